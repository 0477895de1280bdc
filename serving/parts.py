"""An answer as it grows, parted, for whichever dialect spells it.

There is one generation path: a full response is built from the same deltas as a stream.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from engine import ChatModel, Delta, FinishReason, Prompt, Token, ToolCallParser
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
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_time: float = 0.0
    first_token: float = 0.0  # by time.monotonic(), as is the next
    last_token: float = 0.0
    started: bool = False
    prompt_logprobs: tuple[Token, ...] = ()  # only with echo

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.token:
            self.tokens.append(delta.token)
        if is_keepalive(delta):
            return
        if delta.prompt_logprobs:
            self.prompt_logprobs = delta.prompt_logprobs
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.finish_reason = delta.finish_reason
        self.prompt_tokens = delta.prompt_tokens
        self.completion_tokens = delta.completion_tokens
        self.cached_tokens = delta.cached_tokens
        self.queue_time = delta.queue_time


def is_keepalive(delta: Delta) -> bool:
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

    @abstractmethod
    def events(self, delta: Delta, choice: Choice) -> list[dict[str, Any]]:
        """What a stream tells of a delta, which has already been added to the choice."""

    @abstractmethod
    def final_events(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """What follows the last delta."""

    @abstractmethod
    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        """The response without streaming."""

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream that fails, from the body that the error has elsewhere."""
        return error


ReplyFactory = Callable[[ChatModel, Any, list[Prompt]], Reply]  # of a checked body


async def collect(deltas: AsyncGenerator[Delta], choices: list[Choice]) -> None:
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.index].add(delta)


async def events_of(deltas: AsyncGenerator[Delta], choices: list[Choice], reply: Reply) -> Events:
    async with aclosing(deltas):
        async for delta in deltas:
            choice = choices[delta.index]
            choice.add(delta)
            if is_keepalive(delta):
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
