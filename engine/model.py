"""Tokenizer and engine together: a chat model."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.errors import ContextTooLong, InvalidInput
from engine.families import Message
from engine.sampling_params import SamplingParams
from engine.sequence import Delta
from engine.truncation import drop_turns, turns_to_drop

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.guide import Guide
    from engine.schema_trial import TrialCompiler
    from engine.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Prompt:
    """A tokenized request, with its sampling settled."""

    ids: list[int]
    params: SamplingParams
    open_ended: bool
    guide: "Guide | None" = None
    dropped_turns: int = 0
    continues: bool = False  # the answer goes on from the prompt's text


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, ready to answer."""

    name: str
    tokenizer: "ChatTokenizer"
    engine: "Engine"
    defaults: SamplingParams
    context_length: int
    prompt_length: int  # most tokens of a prompt, where the model has such a limit
    vocabulary: int  # token ids that the model has an embedding for
    facts: dict[str, str]
    loaded: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.tokenizer.most_tokens = self.prompt_length

    def answer(self, prompt: Prompt, n: int = 1) -> AsyncGenerator[Delta]:
        """Yield an answer piece by piece, or n of them interleaved; closing it cancels.

        Raises QueueFull, EngineStopped, TimedOut, StepFailed, or ContextTooLong.
        """
        return self.engine.stream(
            prompt.ids,
            prompt.params,
            n=n,
            open_ended=prompt.open_ended,
            guide=prompt.guide,
            continues=prompt.continues,
        )

    def check_queue(self) -> None:
        """Raise QueueFull if no more requests may wait, EngineStopped if the engine is dead."""
        self.engine.check_queue()

    @property
    def failure(self) -> BaseException | None:
        """What the engine died of."""
        return self.engine.failure

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has taken so far; 0 while nothing is to be computed."""
        if not self.engine.num_running:
            return 0.0
        return time.monotonic() - self.engine.last_step

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        return self.engine.num_waiting

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.engine.cache.rows

    @property
    def cache_tokens_used(self) -> int:
        return self.engine.cache.num_used

    def close(self) -> None:
        """Stop the engine; those who still generate get EngineStopped."""
        if "_guides" in self.__dict__:
            self._guides.close()
        self.engine.close()

    def guided(self, prompt: Prompt, schema: dict[str, Any]) -> Prompt:
        """The same, to be answered with JSON of a schema. Raises InvalidInput if it is invalid."""
        return replace(prompt, guide=self._guides.compile(schema))

    @cached_property
    def _guides(self) -> "TrialCompiler":
        from engine.schema_trial import TrialCompiler

        special = self.tokenizer.special.values()
        return TrialCompiler(self.tokenizer.backend, special, self.engine.end_ids)

    def prepare(
        self,
        messages: list[Message],
        given: dict[str, Any],
        truncate: bool = False,
        whole_context: bool = False,
    ) -> Prompt:
        """Tokenize and check the lengths; slow, so call it off the event loop.

        `given` are the request's sampling parameters. A length that is not among them is the
        default, or with `whole_context` all that is left, and is cut to fit. Raises ContextTooLong
        if prompt and answer do not fit together.
        """
        # If no length is given, at least half of the context is for the prompt.
        default = min(self.defaults.max_new_tokens, self.context_length // 2)
        answer = given.get("max_new_tokens", default)
        dropped = self._turns_to_drop(messages, answer) if truncate else 0
        ids = self.tokenizer.encode(drop_turns(messages, dropped))
        return replace(self._with_length(ids, given, whole_context), dropped_turns=dropped)

    def prepare_text(self, prompt: str | list[int], given: dict[str, Any]) -> Prompt:
        """The same for a text to continue, or its token ids, without a chat format."""
        ids = self.tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidInput("prompt is empty; send a text or token ids", "prompt")
        return replace(self._with_length(ids, given, whole_context=True), continues=True)

    def _with_length(self, ids: list[int], given: dict[str, Any], whole_context: bool) -> Prompt:
        params = replace(self.defaults, **given)
        asked = "max_new_tokens" in given
        most = params.max_new_tokens if asked or not whole_context else self.context_length
        room = self.context_length - len(ids)
        wanted = most if asked else 1
        if room < wanted or len(ids) > self.prompt_length:
            less = self.prompt_length < self.context_length
            limit = f" ({self.prompt_length} for the prompt)" if less else ""
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens and the answer may have {wanted}, but the"
                f" model's context is {self.context_length} tokens{limit}; shorten the prompt or"
                " the history, or ask for a shorter answer",
                argument="max_new_tokens" if 0 < room < wanted else "prompt",
            )
        if max(ids) >= self.vocabulary:
            last = self.vocabulary - 1
            raise InvalidInput(f"prompt has a token id of {max(ids)}; the last is {last}", "prompt")
        return Prompt(ids, replace(params, max_new_tokens=min(room, most)), not asked)

    def _turns_to_drop(self, messages: list[Message], answer: int) -> int:
        """The fewest of the oldest turns to drop so that the answer fits."""

        def encode(kept: list[Message]) -> list[int] | None:
            try:
                return self.tokenizer.encode(kept)
            except ContextTooLong:
                return None

        room = min(self.prompt_length, self.context_length - answer)
        return turns_to_drop(messages, room, self.tokenizer.num_tokens, encode)
