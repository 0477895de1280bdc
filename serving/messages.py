"""POST /v1/messages and its count_tokens: https://platform.claude.com/docs/en/api/messages."""

from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, BaseModel, Field, PrivateAttr

from engine import ChatModel, ContextTooLong, InvalidInput, Prompt
from serving.fields import MAX_TURNS, StopStrings
from serving.inner_request import InnerRequest, TemplateHint
from serving.lenient import LenientRequest, ObjectReader
from serving.message_blocks import (
    ConversationReader,
    DeclaredTools,
    ReadConversation,
    read_system,
    read_tools,
)
from serving.request_model import LENGTH_NAMES, InstantRequest

# A prompt that leaves less of the context than this share, or than was asked for, is too long: a
# client then makes room for a whole answer instead of being cut off again and again.
_MIN_ROOM = 1 / 16


class ThreadUnsupported(InvalidInput):
    """Conversations are not kept here; SDKs send them whole upon this."""

    details: ClassVar = {"error_code": "thread_unsupported_request"}


class MessagesRequest(LenientRequest):
    field_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_tokens",
        "prompt": "messages",
        "schema": "output_config",
        "template_kwargs": "chat_template_kwargs",
    }
    inert: ClassVar[frozenset[str]] = frozenset({
        "metadata", "service_tier", "cache_control", "inference_geo", "diagnostics", "betas",
        "billing_policy", "user_profile_id", "workspace_id",
    })  # fmt: skip
    refused: ClassVar[dict[str, str]] = {
        "mcp_servers": "declare their functions as tools",
        "container": "nothing is run here",
        "fallbacks": "there is one model here",
        "compaction": "send the messages that are to be read",
    }

    messages: list[Any] = Field(min_length=1, max_length=MAX_TURNS)
    max_new_tokens: int | None = Field(
        None,
        ge=-1,
        validation_alias=AliasChoices("max_tokens", *LENGTH_NAMES),
        description="most new tokens; cut to what the context has left",
    )
    stop: StopStrings | None = Field(
        None,
        validation_alias=AliasChoices("stop_sequences", "stop", "stop_strings"),
        description="texts that end the answer",
    )
    system: Any = Field(None, description="a text, or text blocks")
    tools: list[Any] = Field(default_factory=list, description="functions that may be called")
    tool_choice: Any = Field(None, description="auto, any, none, or the tool that must be called")
    thinking: Any = Field(None, description="enabled or disabled, where the chat template can")
    output_config: Any = Field(None, description="format: a JSON schema; effort")
    output_format: Any = Field(None, description="the same format, by its older name")
    context_management: Any = None
    thread: Any = None
    speed: Annotated[str | None, Field(description="fast is not supported")] = None

    _read: ReadConversation = PrivateAttr()
    _declared: DeclaredTools = PrivateAttr()
    _choice: dict[str, Any] = PrivateAttr(default_factory=dict)
    _schema: dict[str, Any] | None = PrivateAttr(None)
    _hints: list[TemplateHint] = PrivateAttr(default_factory=list)
    _budget: int = PrivateAttr(-1)
    _hides_thoughts: bool = PrivateAttr(False)

    def check(self) -> None:
        self.check_length()
        if self.thread is not None:
            raise ThreadUnsupported("thread: conversations are not kept here", "thread")
        reader = ConversationReader(self._ignored)
        for at, message in enumerate(self.messages):
            reader.add(message, f"messages[{at}]")
        system = read_system(self.system, self._ignored)
        reader.read.turns[:0] = system
        self._read = reader.read
        if not any(turn["role"] != "system" for turn in self._read.turns):
            raise InvalidInput("messages must have one of the user", "messages")
        self._declared = read_tools(self.tools, self._read, self._ignored)
        self._read_thinking()
        self._read_output()
        self._read_choice()
        self._read_context_management()
        if self.speed not in (None, "standard"):
            self._ignored.add("speed")
        super().check()

    def check_length(self) -> None:
        if self.max_new_tokens is None:
            raise InvalidInput("max_tokens is missing", "max_tokens")

    def _read_choice(self) -> None:
        if self.tool_choice is None:
            return
        choice = ObjectReader(self.tool_choice, "tool_choice", self._ignored)
        kind = choice.text("type")
        names = [tool["function"]["name"] for tool in self._declared.usable]
        if kind not in ("auto", "any", "tool", "none"):
            raise choice.error("must be auto, any, tool or none", "type")
        if kind == "any" and not names:
            raise choice.error("is any, but there are no tools", "type")
        if kind == "tool":
            name = choice.text("name")
            if name not in names:
                raise choice.error(f"is {name[:64]!r}, which is not in tools", "name")
            self._choice["callable"] = frozenset({name})
        self._choice["must_call"] = kind in ("any", "tool")
        serial = choice.flag("disable_parallel_tool_use")
        self._choice["parallel"] = not serial and kind != "tool"
        choice.done()
        if kind == "none":
            self._declared = DeclaredTools([], self._declared.left_out)

    def _read_thinking(self) -> None:
        if self.thinking is None:
            return
        thinking = ObjectReader(self.thinking, "thinking", self._ignored)
        kind = thinking.text("type")
        if kind in ("enabled", "disabled"):
            variables = [("enable_thinking", kind == "enabled")]
            self._hints.append(TemplateHint("thinking", variables))
        elif kind == "between_tools":
            self._ignored.add("thinking.type")
        elif kind != "adaptive":
            raise thinking.error("must be enabled, disabled or adaptive", "type")
        self._budget = thinking.number("budget_tokens", -1)
        self._hides_thoughts = thinking.text("display", "") == "omitted"
        thinking.done()

    def _read_output(self) -> None:
        output = None
        if self.output_config is not None:
            output = ObjectReader(self.output_config, "output_config", self._ignored)
        spec = output.child("format") if output else None
        if self.output_format is not None:
            spec = ObjectReader(self.output_format, "output_format", self._ignored)
        if spec:
            if spec.text("type") != "json_schema":
                raise spec.error("must be json_schema", "type")
            self._schema = spec.json_object("schema")
            spec.done("name", "description", "strict")
        if output:
            if effort := output.text("effort", ""):
                self._hints.append(effort_hint("output_config.effort", effort))
            if output.take("task_budget"):
                output.report("task_budget")
            output.done()

    def _read_context_management(self) -> None:
        if self.context_management is None:
            return
        management = ObjectReader(self.context_management, "context_management", self._ignored)
        for at, value in enumerate(management.items("edits", 16)):
            edit = ObjectReader(value, f"context_management.edits[{at}]", self._ignored)
            kept = edit.take("keep")
            if not (edit.text("type").startswith("clear_thinking") and kept == "all"):
                edit.report()
                continue
            edit.done()
        management.done()

    @property
    def has_schema(self) -> bool:
        return bool(self._declared.usable) or self._schema is not None

    @property
    def hides_thoughts(self) -> bool:
        """Whether a thought is told by its signature alone."""
        return self._hides_thoughts

    @property
    def continues(self) -> bool:
        """Whether the answer goes on from the last message."""
        return bool(self._read.turns[-1]["role"] == "assistant") and not self._declared.usable

    def inner(self) -> InnerRequest:
        if self.has_schema:
            self.check_ends_by_itself()
        return InnerRequest(
            messages=self._read.turns,
            sampling=self.overrides(),
            cuts_length=True,
            continues=self.continues,
            template_kwargs=self.chat_template_kwargs or {},
            hints=self._hints,
            tools=self._declared.usable,
            schema=self._schema,
            budget=self.thinking_budget(self._budget),
            budget_field="thinking.budget_tokens",
            **self._choice,
        )

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        try:
            (prompt,) = super().tokenize(model)
        except ContextTooLong as error:
            if error.most is None:  # the cache is too small, and not the context
                raise
            raise _too_long(error.num_tokens, error.most) from error
        room = model.context_length - len(prompt.ids)
        wanted = model.context_length * _MIN_ROOM
        if self.max_new_tokens not in (None, -1):
            wanted = min(wanted, self.max_new_tokens)
        if room < wanted:
            raise _too_long(len(prompt.ids), model.context_length)
        return [prompt]


def effort_hint(field: str, effort: str) -> TemplateHint:
    thinks = ("enable_thinking", effort != "none")
    return TemplateHint(field, [("reasoning_effort", effort), thinks])


def _too_long(num_tokens: int | None, most: int) -> ContextTooLong:
    """In the words by which clients know that they are to compact, with both numbers."""
    told = f"more than {most}" if num_tokens is None else str(num_tokens)
    return ContextTooLong(f"prompt is too long: {told} tokens > {most} maximum", "prompt")


class CountTokensRequest(MessagesRequest, InstantRequest):
    """The same body without a length."""

    def check_length(self) -> None:
        """None is needed."""

    def result(self, model: ChatModel) -> dict[str, Any]:
        return {"input_tokens": self.inner().count(model)}


class CountTokensResponse(BaseModel):
    input_tokens: int


class MessagesResponse(BaseModel):
    """The response, as far as the docs show it."""

    id: str
    type: str
    role: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str
    stop_sequence: str | None
    usage: dict[str, Any]
