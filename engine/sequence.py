"""An answer in the making, and its part of the KV cache.

Each layer has one pool of rows, of which a sequence owns a contiguous span.
"""

import random
import time
from collections import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.guided.guide import Guide
    from engine.guided.thinking_budget import ThinkingBudget
    from engine.tools.grammar import Thoughts

FinishReason = Literal["stop", "length"]

# Rows that an answer without a stated length reserves at a time.
DECODE_RESERVE = 1024


class Token(NamedTuple):
    """A sampled token; with logprobs, also its log probability and those of the likeliest."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer, and the counts of its answer so far; the last has a finish reason.

    A Delta without text whose counts are all 0 only keeps an idle connection alive.
    """

    text: str
    index: int = 0  # which of a request's n answers it belongs to
    finish_reason: FinishReason | None = None
    token: Token | None = None  # only with logprobs
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    queue_time: float = 0.0  # seconds until it had a place in the batch
    stop_string: str | None = None  # that ended the answer
    prompt_logprobs: tuple[Token, ...] = ()  # of the prompt's tokens from the second on, if asked
    accepted_prediction_tokens: int = 0  # of a prediction, tried and said
    rejected_prediction_tokens: int = 0  # and tried in vain


@dataclass(frozen=True)
class Prompt:
    """A tokenized request, with its sampling settled."""

    ids: list[int]
    params: SamplingParams
    open_ended: bool = False  # no length was stated
    guide: "Guide | None" = None
    dropped_turns: int = 0
    own_ends: frozenset[int] = frozenset()  # ids of its adapter that end the answer, too
    continues: bool = False  # the answer goes on from the prompt's text
    tools: tuple[Any, ...] = ()  # that the answer may call, in OpenAI's shape
    is_json: bool = False  # what is no call in the answer
    num_stable: int | None = None  # tokens with which the next turn begins, too; None if unknown
    shown_special_ids: frozenset[int] = frozenset()  # special tokens that are text in the answer
    thoughts: "Thoughts | None" = None  # which are told apart, and in which nothing stops
    budget: "ThinkingBudget | None" = None
    adapter: int = 0  # by its number among the model's, from 1 on; 0 is none
    prediction: tuple[int, ...] = ()  # how the answer may go, which can make it faster

    @property
    def calls_tools(self) -> bool:
        """Whether the answer is for a parser of calls."""
        return bool(self.tools)


@dataclass(eq=False)
class KVSpan:
    """Tokens and their rows of the pool, from start to start + room.

    The keys and values of the first num_computed_tokens tokens are there already.
    """

    tokens: list[int]
    start: int = 0
    room: int = 0
    num_computed_tokens: int = 0
    all_logits: bool = False  # the logits of all its tokens are wanted, not only of the last
    adapter: int = 0  # with which it is computed; 0 is none
    # The chained hashes of the tokens' whole blocks, as far as anybody has asked for them.
    block_hashes: list[int] = field(default_factory=list, repr=False)
    # The slots of the states of its layers that keep one, by how many tokens they are of, and after
    # how many one is to be kept for others.
    states: dict[int, int] = field(default_factory=dict, repr=False)
    kept_states: set[int] = field(default_factory=set, repr=False)

    @property
    def pending(self) -> int:
        """Tokens not yet computed: the rest of the prompt, then one at a time."""
        return len(self.tokens) - self.num_computed_tokens


@dataclass(eq=False, kw_only=True)
class Sequence(KVSpan):
    """One answer in the making: its tokens, how to pick the next, and how far it has come."""

    params: SamplingParams
    request: abc.Hashable = field(default_factory=object, repr=False)  # with whose it shares
    end_ids: frozenset[int] = frozenset()
    open_ended: bool = False  # no length was stated: rows are reserved bit by bit
    guide: "Guide | None" = None
    budget: "ThinkingBudget | None" = None
    done: bool = False  # ended, or its client has left; may be set from another thread
    spoilt: bool = False  # it failed: nothing that it computed is for others
    finish_reason: FinishReason | None = None
    prompt_scores: list[Token] = field(default_factory=list)  # with params.prompt_logprobs
    num_stable: int | None = None  # of the prompt's tokens, as Prompt has it
    num_reused: int = 0  # of the prompt's tokens, found in the prefix cache
    times_overtaken: int = 0  # by smaller ones, while it waited for room
    waiting_for: "Sequence | None" = None  # whose prefill it lets go first, to copy the prefix
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    drafts: Any = field(default=None, repr=False)  # where its drafts come from, for speculation
    draft: list[int] = field(default_factory=list)  # tokens that the step tries behind the last
    accepted_prediction_tokens: int = 0  # as in Delta
    rejected_prediction_tokens: int = 0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.max_tokens = self.num_prompt + self.params.max_new_tokens
        self.all_logits = self.params.prompt_logprobs is not None
        self.random = random.Random(self.params.seed)
        # For the next token, however often its step is retried.
        self.draw = self.random.random()

    @property
    def rows_needed(self) -> int:
        """Rows for the longest possible answer, or for the next DECODE_RESERVE tokens of it."""
        if self.open_ended:
            return min(self.max_tokens, len(self.tokens) + DECODE_RESERVE)
        return self.max_tokens

    @property
    def num_completion(self) -> int:
        """Tokens of the answer so far, an end token included."""
        return len(self.tokens) - self.num_prompt

    @property
    def may_end(self) -> bool:
        """Whether the next token may end the answer."""
        return self.num_completion >= self.params.min_tokens

    @property
    def banned(self) -> set[int]:
        """The ids that may not be the next token, whatever their logits are."""
        found = set(self.params.suppress_tokens)
        if not self.num_completion:
            found.update(self.params.begin_suppress_tokens)
        if not self.may_end:
            found |= self.end_ids
        return found

    def append(self, token: int) -> None:
        """Append the next token; set the finish reason if it is the last."""
        self.tokens.append(token)
        self.draw = self.random.random()
        if self.guide:
            self.guide.matcher.consume_token(token)
        if self.budget:
            self.budget.note(token)
        if token in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            self.done = True


# A step's work: spans, and how many of each one's pending tokens to compute.
ScheduledBatch = abc.Sequence[tuple[KVSpan, int]]
