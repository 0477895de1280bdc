"""What any dialect asks of the model, once its body is read: one request, prepared in one way."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

from engine import ChatModel, InvalidInput, Message, Prompt, Thoughts


class TemplateHint(NamedTuple):
    """What a field wishes of the chat template: the first of these variables that this has."""

    field: str
    variables: Sequence[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class InnerRequest:
    """Messages and how they are to be answered.

    `tools` have the shape of OpenAI's; all of them are told, and `callable` names those that may be
    called if it is not all. With `cuts_length` a stated length is cut to what is left.
    """

    messages: list[Message]
    sampling: dict[str, Any]  # by the names in SamplingParams
    whole_context: bool = True
    cuts_length: bool = False
    truncate: bool = False
    continues: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    hints: Sequence[TemplateHint] = ()
    tools: Sequence[dict[str, Any]] = ()
    callable: frozenset[str] | None = None
    must_call: bool = False
    parallel: bool = True
    schema: dict[str, Any] | None = None
    budget: int | None = None  # most tokens of a thought
    budget_field: str = ""  # where it is only a wish
    prediction: str = ""  # of the answer's text

    def prepare(self, model: ChatModel) -> Prompt:
        """Tokenize it. Raises InvalidInput if it cannot be served, ContextTooLong if too long."""
        sampling = dict(self.sampling)
        if self.tools:
            # A penalty that a model has by default would keep it from quoting the tools' JSON.
            sampling.setdefault("repetition_penalty", 1.0)
        length = sampling.pop("max_new_tokens", None) if self.cuts_length else None
        prompt = model.prepare(
            _placed(model, self.messages),
            sampling,
            self.truncate,
            self.whole_context or length is not None,
            template_kwargs=self.variables(model),
            continue_final=self.continues,
            tools=self.tools,
        )
        if length is not None:
            prompt = _with_most(prompt, length)
        if self.prediction:
            prompt = model.with_prediction(prompt, self.prediction)
        prompt = self._guided(model, replace(prompt, thoughts=self._thoughts(model, prompt)))
        thinks = prompt.calls_tools or prompt.guide is None
        if self.budget is None or not thinks or (self.budget_field and not _can_think(model)):
            return prompt
        return model.with_budget(prompt, self.budget)

    def _thoughts(self, model: ChatModel, prompt: Prompt) -> Thoughts | None:
        """What the answer's thoughts stand between, and whether it begins in one."""
        thoughts = model.thoughts(prompt)
        if thoughts is None or not self.continues:
            return thoughts
        text = self.messages[-1]["content"]
        return replace(thoughts, begun=text.rfind(thoughts.opening) > text.rfind(thoughts.closing))

    def count(self, model: ChatModel) -> int:
        """How many tokens the prompt has."""
        ids = model.encode(
            _placed(model, self.messages),
            self.variables(model),
            continue_final=self.continues,
            tools=self.tools,
        )
        return len(ids)

    def variables(self, model: ChatModel) -> dict[str, Any]:
        """The chat template's variables, with those that it has of what is hinted."""
        hinted = [_has_variable(model, hint) for hint in self.hints]
        return dict(reversed([pair for pair in hinted if pair])) | dict(self.template_kwargs)

    def unmet_hints(self, model: ChatModel) -> list[str]:
        """The fields that wish for what the chat template does not have."""
        wishes = [self.budget_field] if self.budget is not None and not _can_think(model) else []
        return wishes + [
            hint.field
            for hint in self.hints
            if _has_variable(model, hint) is None
            # A model that never thinks need not be told.
            and (_can_think(model) or hint.variables[-1][1] is not False)
        ]

    def _guided(self, model: ChatModel, prompt: Prompt) -> Prompt:
        tools = [tool for tool in self.tools if self._may_call(tool)]
        if tools:
            return model.with_tools(
                prompt, tools, required=self.must_call, parallel=self.parallel, schema=self.schema
            )
        return prompt if self.schema is None else model.guided(prompt, self.schema)

    def _may_call(self, tool: dict[str, Any]) -> bool:
        return self.callable is None or tool["function"]["name"] in self.callable


def _with_joined_head(messages: list[Message]) -> list[Message]:
    """The messages, with all system texts before the first other turn as one."""
    heads = list(takewhile(lambda message: message["role"] == "system", messages))
    if len(heads) < 2:
        return messages
    text = "\n\n".join(message["content"] for message in heads)
    return [{"role": "system", "content": text}, *messages[len(heads) :]]


def _placed(model: ChatModel, messages: list[Message]) -> list[Message]:
    """The messages, with system texts in their midst where the model's format takes them.

    Where it takes none there, each becomes part of the user's turn before or after it, never of the
    first system text: a new one there would void the cache for all that follows.
    """
    messages = _with_joined_head(messages)
    if all(m["role"] != "system" for m in messages[1:]) or model.has_system_turns:
        return messages
    turns = messages[:1]
    was_system = False
    for message in messages[1:]:
        is_system = message["role"] == "system"
        turn = {"role": "user", "content": message["content"]} if is_system else message
        if turns[-1]["role"] == turn["role"] == "user" and (is_system or was_system):
            both = f"{turns[-1]['content']}\n\n{turn['content']}"
            turns[-1] = turns[-1] | {"content": both}
        else:
            turns.append(turn)
        was_system = is_system
    return turns


def _has_variable(model: ChatModel, hint: TemplateHint) -> tuple[str, Any] | None:
    """The first of the variables that the model's chat template reads."""
    template = "\n".join(model.tokenizer.templates)
    known = (pair for pair in hint.variables if re.search(rf"\b{pair[0]}\b", template))
    return next(known, None)


def _can_think(model: ChatModel) -> bool:
    return model.tokenizer.thinking_markers is not None


def _with_most(prompt: Prompt, length: int) -> Prompt:
    """The prompt, its answer so long at most; it reserves room for that bit by bit."""
    params = prompt.params
    params = replace(params, max_new_tokens=min(length, params.max_new_tokens))
    if params.min_tokens > params.max_new_tokens:
        raise InvalidInput(
            f"the answer is to have at least {params.min_tokens} tokens, and at most"
            f" {params.max_new_tokens}; ask for fewer",
            "min_tokens",
        )
    return replace(prompt, params=params)
