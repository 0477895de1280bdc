"""A request inside the engine, and its part of the KV cache.

Each layer has one pool of rows, of which a sequence owns a contiguous span.
"""

import asyncio
import random
import time
from bisect import bisect_left
from collections import abc
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engine.detokenizer import Detokenizer
from engine.errors import EngineError
from engine.guide import Guide
from engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]

# Rows that an answer without a stated length reserves at a time.
GROWTH = 1024
# A shorter prefix is computed again rather than kept or copied.
MIN_PREFIX = 16


class Token(NamedTuple):
    """A sampled token; with logprobs, also its log probability and those of the likeliest."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer, and the counts of that answer so far.

    The last one has the finish reason. One without text and counts only tells that the request
    is still being worked on.
    """

    text: str
    index: int = 0  # which of a request's n answers it belongs to
    finish_reason: FinishReason | None = None
    token: Token | None = None  # only with logprobs
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    queue_time: float = 0.0  # seconds it waited for a place in the batch

    @property
    def silent(self) -> bool:
        return not (self.text or self.finish_reason or self.token)


@dataclass(eq=False)
class Span:
    """Tokens and their rows of the pool, from start to start + room.

    The keys and values of the first num_cached tokens are there already.
    """

    tokens: list[int]
    start: int = 0
    room: int = 0
    num_cached: int = 0

    def common_prefix(self, tokens: list[int], beyond: int = 0) -> int:
        """How many of the cached tokens are a prefix of the given ones.

        Never all of the given ones, since the last one's logits are wanted. May return 0 for a
        prefix that is no longer than `beyond`, or shorter than MIN_PREFIX.
        """
        most = min(self.num_cached, len(tokens) - 1)
        if most <= beyond or self.tokens[beyond] != tokens[beyond]:
            return 0
        mine, other = self.tokens[:most], tokens[:most]
        if mine == other or mine[:MIN_PREFIX] != other[:MIN_PREFIX]:
            return most if mine == other else 0
        return bisect_left(range(most), True, key=lambda n: mine[: n + 1] != other[: n + 1])

    @property
    def pending(self) -> int:
        """Tokens not yet computed: the rest of the prompt, then one at a time."""
        return len(self.tokens) - self.num_cached


@dataclass(eq=False, kw_only=True)
class Sequence(Span):
    """One answer in the making: its tokens, its state, and where its text goes."""

    sampling: SamplingParams
    detokenizer: Detokenizer
    loop: asyncio.AbstractEventLoop
    open_ended: bool = False
    outbox: "asyncio.Queue[Delta | EngineError]" = field(default_factory=asyncio.Queue)
    index: int = 0
    label: Any = None  # the caller's own, for Engine.on_end
    guide: Guide | None = None
    done: bool = False
    finish_reason: FinishReason | None = None
    failed: bool = False
    passed: int = 0  # by how many smaller ones, while it waited for room
    follows: "Sequence | None" = None  # whose prefill it waits for, to copy the prefix
    num_reused: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.max_tokens = self.num_prompt + self.sampling.max_new_tokens
        self.random = random.Random(self.sampling.seed)
        # For the next token, however often its step is retried.
        self.draw = self.random.random()

    @property
    def wanted_room(self) -> int:
        """Rows for the longest possible answer, or for the next GROWTH tokens of it."""
        return (
            min(self.max_tokens, len(self.tokens) + GROWTH) if self.open_ended else self.max_tokens
        )

    @property
    def num_completion(self) -> int:
        """Tokens of the answer so far, an end token included."""
        return len(self.tokens) - self.num_prompt

    def append(self, token: Token, end_ids: set[int]) -> None:
        """Append the next token; set the finish reason if it is the last."""
        self.first_token = self.first_token or time.monotonic()
        self.tokens.append(token.id)
        self.draw = self.random.random()
        if self.guide:
            self.guide.matcher.consume_token(token.id)
        if token.id in end_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            self.done = True

    def emit(self, token: Token) -> Delta:
        """The Delta for the token appended last; a stop string in its text ends the answer."""
        ended = self.finish_reason == "stop"
        text = "" if ended else self.detokenizer.push(token.id)
        told = token if token.logprob is not None and not ended else None
        if self.detokenizer.stopped:
            self.done, self.finish_reason = True, "stop"
        if self.finish_reason:
            text += self.detokenizer.flush()
        return Delta(
            text,
            self.index,
            self.finish_reason,
            told,
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_completion,
            cached_tokens=self.num_reused,
            queue_time=self.admitted - self.arrived,
        )


# A step's work: spans, and how many of each one's pending tokens to compute.
Work = abc.Sequence[tuple[Span, int]]
