"""Tokenizer and engine together: a chat model."""

import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.engine_status import EngineStatus
from engine.errors import ContextTooLong, InvalidInput
from engine.guided.guide import tags_of
from engine.guided.thinking_budget import ThinkingBudget
from engine.offload import remove
from engine.prompt import format_probe
from engine.prompt.bounds import PromptBounds
from engine.prompt.families import Message
from engine.prompt.truncation import drop_turns, turns_to_drop
from engine.sampling_params import SamplingParams
from engine.sequence import Delta, Prompt
from engine.tools.grammar import Thoughts, ToolChoice, ToolGrammar, check_size, explained
from engine.tools.parser import ToolCallParser

if TYPE_CHECKING:
    from engine.guided.bounded_compiler import BoundedCompiler
    from engine.prompt.tokenizer import ChatTokenizer
    from engine.scheduling.engine import Engine

# Characters of a prediction that are used.
_MAX_PREDICTED = 2**17


@dataclass(frozen=True)
class ChatModel(EngineStatus):
    """A loaded model, ready to answer."""

    name: str
    tokenizer: "ChatTokenizer"
    engine: "Engine"
    defaults: SamplingParams
    context_length: int
    prompt_length: int  # most tokens of a prompt, where the model has such a limit
    vocabulary: int  # token ids that the model has an embedding for
    facts: dict[str, str]  # what a developer asks: kernels, rounding, ids
    summary: dict[str, str]  # what an operator asks: size, dtype, devices, context
    states_length: bool = False  # the default length is the checkpoint's own, and not ours
    offloaded: Path | None = None  # the folder of its layers on disk
    loaded: int = field(default_factory=lambda: int(time.time()))
    # Variables of the chat template, where a request does not set them.
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, "ChatTokenizer"] = field(default_factory=dict)  # in the engine's order
    # The ids that end an adapter's answers besides the model's own, where it has such.
    adapter_ends: Mapping[str, frozenset[int]] = field(default_factory=dict)
    own_ends: frozenset[int] = frozenset()  # these of this one
    adapter: int = 0  # with which this one answers, of another's: `base`
    base: "ChatModel | None" = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.tokenizer.most_tokens = self.prompt_length

    @cached_property
    def variants(self) -> dict[str, "ChatModel"]:
        """The model with each of its adapters: models that share its engine."""
        return {
            name: replace(
                self,
                adapters={},
                base=self,
                name=name,
                tokenizer=text,
                adapter=number,
                own_ends=self.adapter_ends.get(name, frozenset()),
            )
            for number, (name, text) in enumerate(self.adapters.items(), 1)
        }

    def answer(self, prompt: Prompt, n: int = 1) -> AsyncGenerator[Delta]:
        """Yield an answer piece by piece, or n of them interleaved; closing it cancels.

        Raises QueueFull, EngineStopped, TimedOut, StepFailed, or ContextTooLong.
        """
        return self.answer_all([prompt], n)

    def answer_all(
        self, prompts: list[Prompt], n: int = 1, *, arrived: float | None = None
    ) -> AsyncGenerator[Delta]:
        """The same for several prompts in one batch; n to the first have the first n indices.

        `arrived` is when the request's time began, by time.monotonic(); absent is now.
        """
        return self.engine.stream_all(prompts, n, arrived=arrived)

    def check_queue(self) -> None:
        """Raise QueueFull if no more requests may wait, EngineStopped if the engine is dead."""
        self.engine.check_queue()

    def close(self) -> None:
        """Stop the engine; those who still generate get EngineStopped."""
        if "_compiler" in self.__dict__:
            self._compiler.close()
        self.engine.close()
        remove(self.offloaded)

    def guided(self, prompt: Prompt, schema: dict[str, Any]) -> Prompt:
        """The same, for JSON behind a thought that has begun, if any. Raises InvalidInput."""
        thoughts = prompt.thoughts or self.thoughts(prompt)
        closing = thoughts.closing if thoughts and thoughts.begun else ""
        guide = self._guides.compile(schema, closing)
        return replace(prompt, guide=guide, thoughts=thoughts if closing else None)

    def with_tools(
        self,
        prompt: Prompt,
        tools: list[Any],
        *,
        required: bool = False,
        parallel: bool = True,
        schema: dict[str, Any] | None = None,
    ) -> Prompt:
        """The same, to be answered with a text or with valid calls of these tools.

        `required` says that it must be calls, `parallel` that there may be several; with a `schema`
        a text is JSON of it. Each tool has the shape of OpenAI's, with parameters. Raises
        InvalidInput if their schemas are invalid.
        """
        thoughts = prompt.thoughts or self.thoughts(prompt)
        choice = ToolChoice(required, parallel, schema)
        grammar = self._tool_grammar.write(tools, choice, thoughts)
        special_ids = self._tool_grammar.special_ids
        try:
            guide = self._guides.compile_grammar(grammar, special_ids)
        except InvalidInput as error:
            raise explained(error, tools) from error
        return replace(
            prompt,
            guide=guide,
            tools=tuple(tools),
            is_json=schema is not None,
            shown_special_ids=frozenset(special_ids),
        )

    def with_budget(self, prompt: Prompt, most: int) -> Prompt:
        """The same, its answer's thought ended after so many tokens.

        Raises InvalidInput if the model's chat template knows no thoughts.
        """
        thoughts = prompt.thoughts or self.thoughts(prompt)
        if thoughts is None:
            raise InvalidInput("this model does not think aloud; leave the budget out", "budget")
        markers = (thoughts.opening, thoughts.closing)
        budget = ThinkingBudget.of(self.tokenizer.backend, most, markers, thoughts.begun)
        return replace(prompt, budget=budget)

    def with_prediction(self, prompt: Prompt, text: str) -> Prompt:
        """The same, and how its answer may go, which changes none and can make it faster.

        Of a long text its beginning is used, and without speculation nothing.
        """
        if self.engine.speculation is None:
            return prompt
        encoded = self.tokenizer.plain.encode(text[:_MAX_PREDICTED], add_special_tokens=False)
        return replace(prompt, prediction=tuple(encoded.ids))

    def tool_parser(self, tools: Iterable[Any] = (), *, is_json: bool = False) -> ToolCallParser:
        """What parts the text of an answer that may call tools, and else is a text or JSON."""
        form, shown = self._tool_grammar.form, self.tokenizer.shown
        return ToolCallParser(form, shown, tools, is_json=is_json)

    def warm_up(self) -> None:
        """Build what tools need and takes seconds, for a model that was trained to call them."""
        if self.tokenizer.tools.form.native:
            self._guides.warm_up()

    def thoughts(self, prompt: Prompt) -> Thoughts | None:
        """What the thoughts of an answer stand between; None for a model that thinks none aloud."""
        markers = self.tokenizer.thinking_markers
        return Thoughts(*markers, self.tokenizer.thinks(prompt.ids)) if markers else None

    @cached_property
    def _tool_grammar(self) -> ToolGrammar:
        special = self.tokenizer.special
        ends = [word for word, i in special.items() if i in self.engine.end_ids]
        form = self.tokenizer.tools.form.ending_with(ends)
        return ToolGrammar(form, special, tags_of(self.tokenizer.plain))

    @property
    def _guides(self) -> "BoundedCompiler":
        with (owner := self.base or self)._lock:
            return owner._compiler

    @cached_property
    def _compiler(self) -> "BoundedCompiler":
        from engine.guided.bounded_compiler import BoundedCompiler

        special = self.tokenizer.special.values()
        return BoundedCompiler(self.tokenizer.plain, special, self.engine.end_ids)

    def prepare(
        self,
        messages: list[Message],
        given: dict[str, Any],
        truncate: bool = False,
        whole_context: bool = False,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
        tools: Sequence[Any] = (),
    ) -> Prompt:
        """Tokenize and check the lengths; slow, so call it off the event loop.

        `given` are the request's sampling parameters. A length that is not among them is the
        default, or with `whole_context` all that is left, and is cut to fit. `template_kwargs` are
        variables of the chat template; with `continue_final` the answer goes on from the last
        message. The prompt tells of `tools`, see `with_tools`. Raises ContextTooLong if prompt and
        answer do not fit together.
        """
        encode = partial(
            self.encode, template_kwargs=template_kwargs, continue_final=continue_final, tools=tools
        )
        # If no length is given, at least half of the context is for the prompt.
        default = min(self.defaults.max_new_tokens, self.context_length // 2)
        answer = given.get("max_new_tokens", default)
        dropped = self._turns_to_drop(messages, answer, encode) if truncate else 0
        kept = drop_turns(messages, dropped)
        prompt = self._with_length(encode(kept), given, whole_context)
        stable = None if continue_final else self._num_stable(prompt.ids, template_kwargs)
        return replace(prompt, dropped_turns=dropped, continues=continue_final, num_stable=stable)

    def _num_stable(self, ids: list[int], given: Mapping[str, Any] | None) -> int | None:
        """How many of a prompt's tokens the next turn begins with, if that is of any use."""
        if self.engine.cache.states.pool is None:
            return None
        variables = {**self.template_kwargs, **(given or {})}
        return self.tokenizer.generation_prompt.num_before(ids, variables)

    def prepare_text(self, prompt: str | list[int], given: dict[str, Any]) -> Prompt:
        """The same for a text to continue, or its token ids, without a chat format."""
        if isinstance(prompt, str):
            self.tokenizer.check_length(prompt)
            prompt = self.tokenizer.encode_text(prompt)
        if not prompt:
            raise InvalidInput("prompt is empty; send a text or token ids", "prompt")
        return replace(self._with_length(prompt, given, whole_context=True), continues=True)

    def prepare_infill(self, prefix: str, suffix: str, given: dict[str, Any]) -> Prompt:
        """The same for what is missing between two texts, which any special token ends.

        Raises InvalidInput if the model cannot fill in.
        """
        ids = self.tokenizer.encode_infill(prefix, suffix)
        ends = set(given.get("stop_token_ids", ()))
        if not given.get("ignore_eos"):
            ends |= set(self.tokenizer.special.values())
        given = given | {"stop_token_ids": tuple(sorted(ends))}
        return replace(self._with_length(ids, given, whole_context=True), continues=True)

    @cached_property
    def can_continue(self) -> bool:
        """Whether an answer can go on from a message: some chat templates leave out the last."""
        return format_probe.can_continue(self.encode)

    @cached_property
    def has_system_turns(self) -> bool:
        """Whether the format takes a system turn in the midst of a conversation, and shows it."""
        return format_probe.has_system_turns(self.encode, self.decode)

    @cached_property
    def can_infill(self) -> bool:
        """Whether the model has tokens for filling in what is missing between two texts."""
        try:
            return bool(self.tokenizer.encode_infill("", ""))
        except InvalidInput:
            return False

    def encode(
        self,
        messages: list[Message],
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
        tools: Sequence[Any] = (),
    ) -> list[int]:
        """The token ids of a conversation. Raises InvalidInput where the format refuses it."""
        check_size(tools)
        variables = {**self.template_kwargs, **(template_kwargs or {})}
        return self.tokenizer.encode(
            messages, variables, continue_final=continue_final, tools=tools
        )

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included. Raises InvalidInput for unknown ids."""
        self._bounds.check_ids(ids, "tokens")
        return self.tokenizer.backend.decode(ids, skip_special_tokens=False)

    def _with_length(self, ids: list[int], given: dict[str, Any], whole_context: bool) -> Prompt:
        fits = self._bounds.fit(ids, self.defaults, given, whole_context)
        return replace(fits, adapter=self.adapter, own_ends=self.own_ends)

    @property
    def _bounds(self) -> PromptBounds:
        return PromptBounds(self.context_length, self.prompt_length, self.vocabulary)

    def _turns_to_drop(
        self, messages: list[Message], answer: int, encode: Callable[[list[Message]], list[int]]
    ) -> int:
        """The fewest of the oldest turns to drop so that the answer fits."""

        def encode_short(kept: list[Message]) -> list[int] | None:
            try:
                return encode(kept)
            except ContextTooLong:
                return None

        room = min(self.prompt_length, self.context_length - answer)
        return turns_to_drop(messages, room, self.tokenizer.num_tokens, encode_short)
