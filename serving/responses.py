"""POST /v1/responses and its input_tokens.

https://platform.openai.com/docs/api-reference/responses
"""

from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, Field, PrivateAttr

from engine import ChatModel, InvalidInput
from serving.fields import MAX_TURNS
from serving.inner_request import InnerRequest, TemplateHint
from serving.kept import OwnAnswers
from serving.lenient import LenientRequest, ObjectReader
from serving.messages import effort_hint
from serving.request_model import LENGTH_NAMES, InstantRequest
from serving.responses_items import ItemReader
from serving.responses_tools import Toolbox, read_toolbox

_WHOLE_CHOICES = ("none", "auto", "required")
_MEMORY = "conversations are not kept here; send all items in input"


class ResponseNotFound(InvalidInput):
    """There is no response of this id."""


class ItemNotFound(InvalidInput):
    """There is no item of this id."""


class ResponsesRequest(LenientRequest):
    field_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_output_tokens",
        "messages": "input",
        "prompt": "input",
        "schema": "text",
        "template_kwargs": "chat_template_kwargs",
    }
    inert: ClassVar[frozenset[str]] = frozenset({
        "service_tier", "prompt_cache_retention", "client_metadata", "access_programs", "image",
        "max_tool_calls", "user",
    })  # fmt: skip
    refused: ClassVar[dict[str, str]] = {
        "background": "wait for the answer, or stream it",
        "moderation": "nothing is moderated here",
        "conversation": _MEMORY,
        "prompt": "send input and instructions",
    }
    reported: ClassVar[frozenset[str]] = frozenset({"context_management"})

    input: str | list[Any] = Field(description="a text, or items")
    instructions: str | None = Field(None, description="a system text before all else")
    max_new_tokens: int | None = Field(
        None,
        ge=-1,
        validation_alias=AliasChoices("max_output_tokens", *LENGTH_NAMES),
        description="most new tokens; cut to what the context has left",
    )
    tools: list[Any] = Field(default_factory=list, description="what may be called")
    tool_choice: Any = Field(None, description="none, auto, required, a tool, or allowed_tools")
    parallel_tool_calls: bool | None = None
    text: Any = Field(None, description="format: text, json_object or json_schema")
    reasoning: Any = Field(None, description="effort, where the chat template knows it")
    include: list[str] = Field(default_factory=list, max_length=16)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_options: Any = None
    stream_options: Any = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    _items: ItemReader = PrivateAttr()
    _toolbox: Toolbox = PrivateAttr()
    _choice: dict[str, Any] = PrivateAttr(default_factory=dict)
    _schema: dict[str, Any] | None = PrivateAttr(None)
    _format: dict[str, Any] = PrivateAttr(default_factory=lambda: {"type": "text"})
    _hints: list[TemplateHint] = PrivateAttr(default_factory=list)
    _effort: str = PrivateAttr("")
    _whole_items: list[Any] = PrivateAttr(default_factory=list)

    def check(self) -> None:
        self._toolbox = read_toolbox(self.tools, self._ignored)
        self._items = ItemReader(self._ignored, self._toolbox)
        self._read_input()
        self._read_text()
        self._read_reasoning()
        self._read_choice()
        self._read_options()
        super().check()

    @property
    def is_probe(self) -> bool:
        """Whether it is an older Codex that asks whether anybody is there."""
        return self.input == [] and self.max_new_tokens == 1

    @property
    def effort(self) -> str:
        return self._effort

    @property
    def text_format(self) -> dict[str, Any]:
        """What text.format asked for, as an answer says it."""
        return self._format

    @property
    def toolbox(self) -> Toolbox:
        return self._toolbox

    @property
    def shows_logprobs(self) -> bool:
        return self.top_logprobs is not None or "message.output_text.logprobs" in self.include

    def _read_input(self) -> None:
        earlier = self._earlier_items()
        if len(earlier) + len(self.items) > MAX_TURNS:
            raise InvalidInput(f"input must have at most {MAX_TURNS} items", "input")
        for item in earlier:
            self._items.add(item, "previous_response_id")
        for at, item in enumerate(self.items):
            path = f"input[{at}]"
            is_reference = isinstance(item, dict) and item.get("type") == "item_reference"
            self._whole_items.append(self._referred(item, path) if is_reference else item)
            self._items.add(self._whole_items[-1], path)
        if not any(turn["role"] != "system" for turn in self._items.turns):
            raise InvalidInput("input must have an item of the user", "input")
        if self.instructions:
            self._items.turns.insert(0, {"role": "system", "content": self.instructions})

    @property
    def items(self) -> list[Any]:
        """The input as items."""
        if isinstance(self.input, str) or self.is_probe:
            return [{"role": "user", "content": self.input or ""}]
        return self.input

    @property
    def whole_items(self) -> list[Any]:
        """The input as items, of which none refers to another."""
        return self._whole_items

    @property
    def keeper(self) -> OwnAnswers | None:
        """Where the answer is to be kept, if it is."""
        return None if self.store is False else self._answers

    def _earlier_items(self) -> list[Any]:
        """Those of the answer from which this one goes on."""
        name, own = self.previous_response_id, self._answers
        if name is None:
            return []
        found = own.answers.conversation(own.owner, name) if own else None
        if found is None:
            raise ResponseNotFound(
                f"previous_response_id: there is no response {name[:64]!r} here; it may have been"
                " long ago, or before a restart. Send all items in input",
                "previous_response_id",
            )
        return found

    def _referred(self, item: dict[str, Any], path: str) -> Any:
        """The item to which one refers."""
        name, own = ObjectReader(item, path, self._ignored).text("id"), self._answers
        found = own.answers.item(own.owner, name) if own else None
        if found is not None:
            return found
        raise ItemNotFound(
            f"Item with id '{name[:64]}' not found. It may have been long ago, or before a restart;"
            " send items whole"
            " (AI SDK: providerOptions.openai.store = false)",
            "input",
        )

    def _read_text(self) -> None:
        if self.text is None:
            return
        text = ObjectReader(self.text, "text", self._ignored)
        if text.text("verbosity", "medium") != "medium":
            text.report("verbosity")
        spec = text.child("format")
        text.done()
        if spec is None:
            return
        kind = spec.text("type")
        self._format = {"type": kind}
        if kind == "json_object":
            self._schema = {"type": "object"}
        elif kind == "json_schema":
            self._schema = spec.json_object("schema")
            description = spec.text("description", "") or None
            self._format |= {"name": spec.text("name", ""), "description": description}
            self._format |= {"schema": self._schema, "strict": spec.flag("strict")}
        elif kind != "text":
            raise spec.error("must be text, json_object or json_schema", "type")
        spec.done("name", "description", "strict")

    def _read_reasoning(self) -> None:
        effort = self._items.effort
        if self.reasoning is not None:
            reasoning = ObjectReader(self.reasoning, "reasoning", self._ignored)
            effort = effort or reasoning.text("effort", "")
            reasoning.done()
        self._effort = effort
        if effort:
            self._hints.append(effort_hint("reasoning.effort", effort))

    def _read_choice(self) -> None:
        choice = self.tool_choice
        self._choice["parallel"] = self.parallel_tool_calls is not False
        names = {tool.flat_name for tool in self._toolbox.usable}
        if choice is None or choice in _WHOLE_CHOICES:
            if choice == "required" and not names:
                raise InvalidInput("tool_choice is required, but there are no tools", "tool_choice")
            self._choice["must_call"] = choice == "required"
            return
        if not isinstance(choice, dict):
            raise InvalidInput(
                f"tool_choice must be {', '.join(_WHOLE_CHOICES)}, or an object", "tool_choice"
            )
        reader = ObjectReader(choice, "tool_choice", self._ignored)
        if choice.get("type") != "allowed_tools":
            self._choice |= {"callable": frozenset({self._toolbox.find(reader)})}
            self._choice |= {"must_call": True, "parallel": False}
            return
        reader.text("type")
        mode = reader.text("mode", "auto")
        if mode not in ("auto", "required"):
            raise reader.error("must be auto or required", "mode")
        allowed = [
            self._toolbox.find(ObjectReader(each, f"tool_choice.tools[{at}]", self._ignored))
            for at, each in enumerate(reader.items("tools", len(names)))
        ]
        reader.done()
        self._choice |= {"callable": frozenset(allowed), "must_call": mode == "required"}

    def _read_options(self) -> None:
        for name in self.include:
            if name not in ("reasoning.encrypted_content", "message.output_text.logprobs"):
                self._ignored.add(f"include.{name}")
        if self.store and self._answers is None:
            self._ignored.add("store")
        options = {"prompt_cache_options": (), "stream_options": ("include_obfuscation",)}
        for name, inert in options.items():
            value = getattr(self, name)
            if value is None:
                continue
            reader = ObjectReader(value, name, self._ignored)
            if name == "stream_options":
                reader.done(*inert)
            elif reader.take("prewarm"):
                raise reader.error("is not supported; leave it out", "prewarm")

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        if self.tool_choice == "none":
            return []
        functions = (tool.function for tool in self._toolbox.usable)
        return [{"type": "function", "function": function} for function in functions]

    @property
    def has_schema(self) -> bool:
        return bool(self.usable_tools) or self._schema is not None

    def overrides(self) -> dict[str, Any]:
        given = {name: value for name, value in super().overrides().items() if name != "logprobs"}
        if self.shows_logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def inner(self) -> InnerRequest:
        if self.has_schema:
            self.check_ends_by_itself()
        return InnerRequest(
            messages=self._items.turns,
            sampling=self.overrides(),
            cuts_length=True,
            truncate=self.truncation == "auto",
            template_kwargs=self.chat_template_kwargs or {},
            hints=self._hints,
            tools=self.usable_tools,
            schema=self._schema,
            budget=self.thinking_budget(),
            budget_field="reasoning_budget",
            **self._choice,
        )


class InputTokensRequest(ResponsesRequest, InstantRequest):
    """The same body, to be counted."""

    def result(self, model: ChatModel) -> dict[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": self.inner().count(model)}


class InputTokensResponse(BaseModel):
    object: str
    input_tokens: int


class ResponsesResponse(BaseModel):
    """The response, as far as the docs show it."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    error: dict[str, Any] | None
