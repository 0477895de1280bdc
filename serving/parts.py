"""An answer as it grows, parted, for whichever dialect spells it.

There is one generation path: a full response is built from the same deltas as a stream.
"""

import secrets
import string
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engine import CallPart, ChatModel, Delta, FinishReason, Prompt, Token, ToolCallParser
from serving.reasoning import ParsedMessage, ReasoningParser

# An event is an object, or None for what keeps a connection alive.
Events = AsyncGenerator[dict[str, Any] | None]


@dataclass(eq=False)
class Choice:
    """One of a request's n answers, as it grows."""

    index: int
    shares_prompt: bool = False  # with an earlier one, so that its tokens are counted there
    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # only with logprobs
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    stop_string: str | None = None  # that ended it
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    queue_time: float = 0.0
    first_token: float = 0.0  # by time.monotonic(), as is the next
    last_token: float = 0.0
    started: bool = False
    prompt_logprobs: tuple[Token, ...] = ()  # only with echo

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.token:
            self.tokens.append(delta.token)
        if _is_keepalive(delta):
            return
        if delta.prompt_logprobs:
            self.prompt_logprobs = delta.prompt_logprobs
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.finish_reason = delta.finish_reason
        self.stop_string = delta.stop_string
        self.prompt_tokens = delta.prompt_tokens
        self.completion_tokens = delta.completion_tokens
        self.cached_tokens = delta.cached_tokens
        self.accepted_prediction_tokens = delta.accepted_prediction_tokens
        self.rejected_prediction_tokens = delta.rejected_prediction_tokens
        self.queue_time = delta.queue_time


def _is_keepalive(delta: Delta) -> bool:
    """Whether a delta only keeps a connection alive."""
    return not delta.prompt_tokens


def choices_of(prompts: int, n: int) -> list[Choice]:
    """The choices of n answers to each prompt."""
    return [Choice(index, shares_prompt=index % n > 0) for index in range(prompts * n)]


def usage_of(choices: list[Choice]) -> dict[str, int]:
    """Token counts of a finished request; each prompt is counted once."""
    prompts = sum(choice.prompt_tokens for choice in choices if not choice.shares_prompt)
    completion = sum(choice.completion_tokens for choice in choices)
    counts = {"prompt_tokens": prompts, "completion_tokens": completion}
    return counts | {"total_tokens": sum(counts.values())}


def cached_tokens_of(choices: list[Choice]) -> int:
    """How many of the prompts' tokens were found in the prefix cache."""
    return sum(choice.cached_tokens for choice in choices if not choice.shares_prompt)


class Reply(ABC):
    """Formats the answer of one endpoint."""

    def take(self, delta: Delta, choice: Choice) -> None:  # noqa: B027 - most need no more
        """A delta of an answer that is not streamed, which has been added to the choice."""

    @abstractmethod
    def events(self, delta: Delta, choice: Choice) -> list[dict[str, Any]]:
        """What a stream tells of a delta, which has already been added to the choice."""

    @abstractmethod
    def final_events(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """What follows the last delta."""

    @abstractmethod
    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        """The response without streaming."""

    def failure(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """How a stream ends that fails, from the body that the error has elsewhere."""
        return [error]


ReplyFactory = Callable[[ChatModel, Any, list[Prompt]], Reply]  # of a checked body


async def collect(deltas: AsyncGenerator[Delta], choices: list[Choice], reply: Reply) -> None:
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.index].add(delta)
            if not _is_keepalive(delta):
                reply.take(delta, choices[delta.index])


async def events_of(deltas: AsyncGenerator[Delta], choices: list[Choice], reply: Reply) -> Events:
    async with aclosing(deltas):
        async for delta in deltas:
            choice = choices[delta.index]
            choice.add(delta)
            if _is_keepalive(delta):
                yield None
                continue
            for event in reply.events(delta, choice):
                yield event
    for event in reply.final_events(choices):
        yield event


class OutputParser:
    """Parts an answer into thoughts, content and calls of tools, piece by piece."""

    def __init__(self, thoughts: ReasoningParser | None, calls: ToolCallParser | None):
        self.thoughts = thoughts
        self.calls = calls

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next belongs to a thought, or to the marker behind it."""
        return self.thoughts is not None and self.thoughts.state == "thought"

    @property
    def is_within_call(self) -> bool:
        """Whether what came last is a call whose arguments go on."""
        return self.calls is not None and self.calls.num_calls > 0 and not self.calls.has_calls

    def push(self, text: str, choice: Choice) -> ParsedMessage:
        """The next text of a choice, to which it has been added; the last if that has ended.

        Notes in the choice that it ends with calls.
        """
        last = choice.finish_reason is not None
        reasoning = ""
        if self.thoughts:
            reasoning, text, _ = self.thoughts.push(text)
            if last:
                rest = self.thoughts.flush()
                reasoning += rest.reasoning
                text += rest.content
        if not self.calls:
            return ParsedMessage(reasoning, text)
        content, parts = self.calls.push(text, last)
        if choice.finish_reason == "stop" and self.calls.has_calls:
            choice.finish_reason = "tool_calls"
        return ParsedMessage(reasoning, content, parts)


def output_parser(model: ChatModel, prompt: Prompt) -> OutputParser:
    """What parts an answer."""
    calls = None
    if prompt.calls_tools:
        calls = model.tool_parser(prompt.tools, is_json=prompt.is_json)
    thoughts = prompt.thoughts
    if thoughts is None:
        return OutputParser(None, calls)  # nobody thinks, as in JSON
    markers = (thoughts.opening, thoughts.closing)
    return OutputParser(ReasoningParser(markers, thoughts.begun), calls)


# Of letters and digits, and so many: the templates of some models demand it.
_CALL_ID_LENGTH = 9


def new_call_id() -> str:
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(_CALL_ID_LENGTH))


# ---- A stream of parts: a thought, a text, and calls, in this order, each of which may be absent

_PartKind = Literal["thought", "text", "call"]


@dataclass(eq=False)
class Part:
    """A part of an answer, as it grows."""

    kind: _PartKind
    index: int  # among the answer's parts
    name: str = ""  # of the tool that is called
    call_id: str = ""
    text: str = ""  # of a call, its arguments as JSON
    is_whole: bool = False  # it has ended, and was not cut off
    tokens: list[Token] = field(default_factory=list)  # only with logprobs


class PartEvent(NamedTuple):
    """A part begins, has more text, or ends."""

    kind: Literal["begin", "more", "end"]
    part: Part
    text: str = ""
    tokens: Sequence[Token] = ()


class PartStream:
    """Tells of the parts of an answer; each is open until the next begins."""

    def __init__(self, parser: OutputParser):
        self.parser = parser
        self.parts: list[Part] = []
        self.thought_tokens = 0  # until the thought ended

    def push(self, delta: Delta, choice: Choice) -> list[PartEvent]:
        """What a delta brings, which has been added to the choice."""
        was_thinking = self.parser.is_thinking
        said = self.parser.push(delta.text, choice)
        tokens = [delta.token] if delta.token else []
        events: list[PartEvent] = []
        if said.reasoning:
            events += self._more("thought", said.reasoning)
        if was_thinking or said.reasoning or self.parser.is_thinking:
            self.thought_tokens = choice.completion_tokens
        if said.content:
            events += self._more("text", said.content, tokens)
        for call in said.calls:
            events += self._call(call)
        if choice.finish_reason is not None:
            events += self._end(not self.parser.is_within_call)
        return events

    @property
    def _open(self) -> Part | None:
        return self.parts[-1] if self.parts and not self.parts[-1].is_whole else None

    def _more(self, kind: _PartKind, text: str, tokens: Sequence[Token] = ()) -> list[PartEvent]:
        events = []
        part = self._open
        if part is None or part.kind != kind:
            events = self._begin(kind)
        part = self.parts[-1]
        part.text += text
        part.tokens += tokens
        return [*events, PartEvent("more", part, text, tokens)]

    def _call(self, call: CallPart) -> list[PartEvent]:
        events = []
        if call.name is not None:
            events = self._begin("call", call.name)
        return events + (self._more("call", call.arguments) if call.arguments else [])

    def _begin(self, kind: _PartKind, name: str = "") -> list[PartEvent]:
        events = self._end(True)
        part = Part(kind, len(self.parts), name, new_call_id() if kind == "call" else "")
        self.parts.append(part)
        return [*events, PartEvent("begin", part)]

    def _end(self, is_whole: bool) -> list[PartEvent]:
        part = self._open
        if part is None:
            return []
        part.is_whole = is_whole or part.kind != "call"
        return [PartEvent("end", part)]
