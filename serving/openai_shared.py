"""What OpenAI's chat and text completions share: options, logprobs, the object around choices."""

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from engine import ChatModel, Delta, InvalidInput, Prompt, Token, token_bytes
from serving import __version__
from serving.fields import ClosedModel
from serving.parts import Choice, Reply, cached_tokens_of, usage_of
from serving.request_model import SamplingFields


class StreamOptions(ClosedModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # which changes no answer
    continuous_usage_stats: bool | None = None  # as in vLLM: each chunk has its choice's counts


# Of all tokens of a request's answers, and of its prompts with echo: each takes some 100 bytes.
MAX_LOGPROBS = 2**20


def with_few_logprobs(prompts: list[Prompt], num_answers: int) -> list[Prompt]:
    """The prompts, their answers shortened to what has room if no length was stated.

    Raises InvalidInput if one was stated that would make more than MAX_LOGPROBS.
    """
    params = prompts[0].params
    each = 0 if params.logprobs is None else max(1, params.logprobs)
    each_of_prompt = 0 if params.prompt_logprobs is None else max(1, params.prompt_logprobs)
    most = MAX_LOGPROBS // num_answers - each_of_prompt * sum(len(p.ids) for p in prompts)
    if each * sum(p.params.max_new_tokens for p in prompts) <= most:
        return prompts
    room = most // (max(1, each) * len(prompts))
    if room < 1 or not prompts[0].open_ended:
        raise InvalidInput(
            f"there would be more than {MAX_LOGPROBS:,} logprobs; ask for fewer of them, or for"
            " fewer or shorter answers",
            "logprobs",
        )
    return [
        replace(p, params=replace(p.params, max_new_tokens=min(room, p.params.max_new_tokens)))
        for p in prompts
    ]


class OpenAIRequest(SamplingFields):
    """Fields shared by OpenAI's two endpoints."""

    field_names: ClassVar[dict[str, str]] = {"max_new_tokens": "max_tokens"}

    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="answers to give, computed together")

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options needs stream to be true", "stream_options")

    def prepare(self, model: ChatModel) -> list[Prompt]:
        return with_few_logprobs(super().prepare(model), self.num_answers)

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class Completion(BaseModel):
    """The response of OpenAI's two endpoints, as far as the docs show it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    system_fingerprint: str


def fingerprint(model: ChatModel) -> str:
    """What an answer depends on beside the request: the model, how it computes, this version.

    What a start measures stands in brackets: it is another each time, and changes no answer.
    """
    names = ("model", "weights", "devices", "attention")
    facts = [model.facts.get(name, "").partition(" (")[0] for name in names]
    told = "|".join((__version__, model.name, *facts))
    return f"fp_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def bytes_of(model: ChatModel, token: int) -> bytes | None:
    """A token's bytes, of part of a character too; None where they are not known."""
    text = model.tokenizer.spell(token)
    return token_bytes(model.tokenizer.backend, token) if "\ufffd" in text else text.encode()


def spell_logprobs(model: ChatModel, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Each token with its logprob, and those of the likeliest in its place."""

    def scored(token: int, logprob: float) -> dict[str, Any]:
        text = model.tokenizer.spell(token)
        known = bytes_of(model, token)
        return {"token": text, "logprob": logprob, "bytes": None if known is None else list(known)}

    return [
        scored(token.id, token.logprob or 0.0)
        | {"top_logprobs": [scored(*pair) for pair in token.top_logprobs]}
        for token in tokens
    ]


class OpenAIReply(Reply):
    """What OpenAI's two endpoints share: the object around the choices."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: ChatModel, body: OpenAIRequest, prompts: list[Prompt]):
        self.model = model
        self.include_usage = body.include_usage
        self.has_continuous_usage = body.has_continuous_usage
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

    def events(self, delta: Delta, choice: Choice) -> list[dict[str, Any]]:
        part = self.part(delta, choice)
        if part is None:
            return []
        content = part | {"finish_reason": choice.finish_reason}
        event = self.frame | {"object": self.chunk_kind, "choices": [content]}
        if self.has_continuous_usage:
            event["usage"] = self.usage([replace(choice, shares_prompt=False)])
        elif self.include_usage:
            event["usage"] = None
        return [event]

    def final_events(self, choices: list[Choice]) -> list[dict[str, Any]]:
        if not self.include_usage:
            return []
        usage = self.usage(choices)
        return [self.frame | {"object": self.chunk_kind, "choices": [], "usage": usage}]

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        predicted = ("accepted_prediction_tokens", "rejected_prediction_tokens")
        return usage_of(choices) | {
            "prompt_tokens_details": {"cached_tokens": cached_tokens_of(choices)},
            "completion_tokens_details": {
                name: sum(getattr(choice, name) for choice in choices) for name in predicted
            },
        }

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished choice, without its finish_reason."""
        raise NotImplementedError

    def part(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        """The same of a delta; None if it brings nothing."""
        raise NotImplementedError
