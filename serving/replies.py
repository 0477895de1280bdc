"""How each endpoint formats what the engine generates.

There is one generation path: a full response is built from the same deltas as a stream.
"""

import hashlib
import secrets
import string
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from engine import CallPart, ChatModel, Delta, FinishReason, Prompt, Token, ToolCallParser
from serving import __version__
from serving.reasoning import ParsedMessage, ReasoningParser
from serving.schemas import ChatCompletionRequest, ChatRequest, CompletionRequest, OpenAIRequest

# An event is an object, or None for a keep-alive comment.
Events = AsyncGenerator[dict[str, Any] | None]


def local_time() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


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


class Reply(Protocol):
    """Formats the answer of one endpoint."""

    def chunk(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        """The event for a delta, which has already been added to the choice; None: nothing yet."""

    def final_event(self, choices: list[Choice]) -> dict[str, Any] | None:
        """The event that follows the last delta, if any."""

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        """The response without streaming."""


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
            elif event := reply.chunk(delta, choice):
                yield event
    if event := reply.final_event(choices):
        yield event


@dataclass
class ClassicReply:
    """POST /: the deltas as they come, then the full response."""

    model: ChatModel
    body: ChatRequest
    prompts: list[Prompt]

    def chunk(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        return {"delta": delta.text} if delta.text else None

    def final_event(self, choices: list[Choice]) -> dict[str, Any]:
        return self.full_response(choices)

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        response = {
            "response": choices[0].text,
            "history": self.body.with_answer(choices[0].text),
            "status": 200,
            "time": local_time(),
            "finish_reason": choices[0].finish_reason,
            "usage": usage_of(choices),
        }
        if self.body.truncate:
            response["dropped_turns"] = self.prompts[0].dropped_turns
        return response


def fingerprint(model: ChatModel) -> str:
    """What an answer depends on beside the request: the model, how it computes, this version.

    What a start measures stands in brackets: it is another each time, and changes no answer.
    """
    names = ("model", "weights", "devices", "attention")
    facts = [model.facts.get(name, "").partition(" (")[0] for name in names]
    told = "|".join((__version__, model.name, *facts))
    return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


class OpenAIReply:
    """What OpenAI's two endpoints share: the object around the choices."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: ChatModel, body: OpenAIRequest, prompts: list[Prompt]):
        self.model = model
        self.include_usage = body.include_usage
        self.frame = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": fingerprint(model),
        }

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        content = [self.whole(c) | {"finish_reason": c.finish_reason} for c in choices]
        return self.frame | {"choices": content, "usage": self.usage(choices)}

    def chunk(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        part = self.part(delta, choice)
        if part is None:
            return None
        content = part | {"finish_reason": choice.finish_reason}
        event = self.frame | {"object": self.chunk_kind, "choices": [content]}
        if self.include_usage:
            event["usage"] = None
        return event

    def final_event(self, choices: list[Choice]) -> dict[str, Any] | None:
        if not self.include_usage:
            return None
        usage = self.usage(choices)
        return self.frame | {"object": self.chunk_kind, "choices": [], "usage": usage}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        details = {"prompt_tokens_details": {"cached_tokens": cached_tokens_of(choices)}}
        return usage_of(choices) | details

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished choice, without its finish_reason."""
        raise NotImplementedError

    def part(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        """The same of a delta; None if it brings nothing."""
        raise NotImplementedError


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


# Of letters and digits, and so many: the templates of some models demand it.
CALL_ID_LENGTH = 9


def chunk_of(part: CallPart) -> dict[str, Any]:
    """A part of a call as OpenAI's API streams it: its id and name first, then the arguments."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    letters = string.ascii_letters + string.digits
    number = "".join(secrets.choice(letters) for _ in range(CALL_ID_LENGTH))
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": number, "type": "function", "function": function}


def whole_calls(parts: list[CallPart]) -> list[dict[str, Any]]:
    """The calls of a whole answer, from their parts."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        chunk = chunk_of(part)
        if part.name is not None:
            calls.append({name: chunk[name] for name in ("id", "type", "function")})
        else:
            calls[-1]["function"]["arguments"] += part.arguments
    return calls


class ChatCompletionReply(OpenAIReply):
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, model: ChatModel, body: ChatCompletionRequest, prompts: list[Prompt]):
        super().__init__(model, body, prompts)
        self.prompt = prompts[0]
        self.said = body.messages[-1].content if self.prompt.continues else None
        self.parsers = [self._parser() for _ in range(body.num_answers)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        said = self._parser().push(choice.text, choice)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = whole_calls(said.calls)
            message["content"] = said.content or None
        logprobs = self._logprobs(choice.tokens)
        return {"index": choice.index, "message": message, "logprobs": logprobs}

    def part(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        said = self.parsers[choice.index].push(delta.text, choice)
        message: dict[str, Any] = {}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [chunk_of(part) for part in said.calls]
        if said.content or not (message or self.prompt.calls_tools):
            message["content"] = said.content
        if not choice.started:
            nothing = {"content": None if self.prompt.calls_tools else ""}
            message = {"role": "assistant"} | (message or nothing)
        choice.started = True
        tokens = [delta.token] if delta.token else []
        if not (message or tokens or choice.finish_reason):
            return None  # it belongs to the beginning of a call
        return {"index": choice.index, "delta": message, "logprobs": self._logprobs(tokens)}

    def _parser(self) -> "OutputParser":
        calls = self.model.tool_parser() if self.prompt.calls_tools else None
        return OutputParser(self._thought_parser(), calls)

    def _thought_parser(self) -> ReasoningParser | None:
        """Parts an answer; None where nobody thinks, as in JSON."""
        markers = self.model.tokenizer.thinking_markers
        if markers is None or (self.prompt.guide and not self.prompt.calls_tools):
            return None
        if self.said is None:
            inside = self.model.tokenizer.thinks(self.prompt.ids)
        else:
            inside = self.said.rfind(markers[0]) > self.said.rfind(markers[1])
        return ReasoningParser(markers, inside)

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        return {"content": [self._logprob(token) for token in tokens], "refusal": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        top_logprobs = [self._scored(*pair) for pair in token.top_logprobs]
        return self._scored(token.id, token.logprob or 0.0) | {"top_logprobs": top_logprobs}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.model.tokenizer.spell(token)
        # Part of a multi-byte character: its bytes are not known from its text.
        known = None
        if "\ufffd" not in text:
            known = list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


# More tokens than this never spell one character.
MAX_PIECES = 4


class TokenTexts:
    """Where each token of a text begins in it, by characters."""

    def __init__(self, model: ChatModel):
        self.tokenizer = model.tokenizer
        self.at = 0
        self.pieces: list[int] = []  # of a character that is not complete yet

    def add_prompt(self, tokens: list[int], text: str) -> list[int]:
        """The tokens of a prompt; returns where each begins in its text.

        The text may lack what its tokens have: a BOS, or a space in front.
        """
        begins = []
        for token in tokens:
            begins.append(self.at)
            spelled = self._spelled(token)
            if not text.startswith(spelled, self.at):
                spelled = spelled.lstrip(" ")
            if text.startswith(spelled, self.at):
                self.at += len(spelled)
        self.at = len(text)
        self.pieces = []
        return begins

    def add(self, token: int) -> int:
        """The next token of the answer; returns where it begins."""
        begin = self.at
        self.at += len(self._spelled(token))
        return begin

    def _spelled(self, token: int) -> str:
        """The text that is complete with a token."""
        self.pieces.append(token)
        text = self.tokenizer.spell(token)
        if len(self.pieces) > 1:
            text = self.tokenizer.backend.decode(self.pieces, skip_special_tokens=False)
        if "\ufffd" in text and len(self.pieces) < MAX_PIECES:
            return ""
        self.pieces = []
        return text


class CompletionReply(OpenAIReply):
    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, model: ChatModel, body: CompletionRequest, prompts: list[Prompt]):
        super().__init__(model, body, prompts)
        self.body, self.prompts, self.n = body, prompts, body.num_answers
        self.places = [TokenTexts(model) for _ in range(len(prompts) * self.n)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        return self._choice(choice, choice.text, choice.tokens)

    def part(self, delta: Delta, choice: Choice) -> dict[str, Any]:
        return self._choice(choice, delta.text, [delta.token] if delta.token else [])

    def _choice(self, choice: Choice, text: str, tokens: list[Token]) -> dict[str, Any]:
        """A choice with a text and its tokens; with echo, the prompt before those of the first."""
        echoed = ""
        offsets: list[int] = []
        places = self.places[choice.index]
        added = tokens
        if self.body.echo and not choice.started:
            echoed = self._echoed(choice)
            scored = self._scored_prompt(choice)
            offsets = places.add_prompt([token.id for token in scored], echoed)
            tokens = [*scored, *tokens]
        choice.started = True
        offsets += [places.add(token.id) for token in added]
        logprobs = self._logprobs(tokens, offsets) if tokens else None
        return {"index": choice.index, "text": echoed + text, "logprobs": logprobs}

    def _echoed(self, choice: Choice) -> str:
        given = self.body.prompt[choice.index // self.n]
        return given if isinstance(given, str) else self.model.decode(given)

    def _scored_prompt(self, choice: Choice) -> list[Token]:
        """The prompt's tokens; the first has no logprob, as nothing stands before it."""
        if self.body.logprobs is None:
            return []
        return [Token(self.prompts[choice.index // self.n].ids[0]), *choice.prompt_logprobs]

    def _logprobs(self, tokens: list[Token], offsets: list[int]) -> dict[str, Any]:
        spell = self.model.tokenizer.spell
        return {
            "tokens": [spell(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        told: dict[str, float] = {}
        for i, logprob in token.top_logprobs:
            # Parts of characters are spelled alike; the likeliest is told.
            told.setdefault(self.model.tokenizer.spell(i), logprob)
        return told
