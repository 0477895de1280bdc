"""POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat/create."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from engine import CallPart, ChatModel, Delta, InvalidInput, Prompt, Token
from serving.conversation import Conversation, Turns
from serving.fields import ClosedModel, Content, Text, check_json, join_text_parts
from serving.inner_request import InnerRequest
from serving.openai_shared import OpenAIReply, OpenAIRequest, spell_logprobs
from serving.parts import Choice, OutputParser, new_call_id, output_parser
from serving.tool_fields import NamedTool, Tool, ToolChoice
from serving.unknown_fields import printable

_Schema = Annotated[dict[str, Any], AfterValidator(check_json)]


class JSONSchema(ClosedModel):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # whatever it says, an answer keeps to its schema
    wanted: _Schema = Field(validation_alias="schema")


class ResponseFormat(ClosedModel):
    """https://platform.openai.com/docs/guides/structured-outputs"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None
    # Beside json_object, as in llama.cpp.
    wanted: _Schema | None = Field(None, validation_alias="schema")

    def to_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None if any text is allowed."""
        given = self.json_schema.wanted if self.json_schema else self.wanted
        if self.type == "json_object" and self.json_schema is None:
            return {"type": "object"} if given is None else given
        if self.type == "json_schema" and given is not None:
            return given
        if self.type == "json_schema":
            problem = 'response_format needs "json_schema": {"schema": …}'
        elif given is not None:
            problem = f'response_format has a schema; its type is "json_schema", not "{self.type}"'
        else:
            return None
        raise InvalidInput(problem, "response_format")


class Prediction(ClosedModel):
    """https://platform.openai.com/docs/guides/predicted-outputs"""

    type: Literal["content"]
    content: Annotated[
        Text, BeforeValidator(join_text_parts, json_schema_input_type=Content | None)
    ]


class ChatCompletionRequest(Conversation, OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    field_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_tokens",
        "prompt": "messages",
        "schema": "response_format",
        "budget": "reasoning_budget",
        "template_kwargs": "chat_template_kwargs",
    }

    messages: Turns
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: ToolChoice | None = Field(
        None, description="none, auto, required, or the function that must be called"
    )
    reasoning_budget: int | None = Field(
        None, ge=-1, description="most tokens of a thought, -1 is no limit"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    prediction: Prediction | None = Field(
        None, description="how the answer may go; it changes none, and can make it faster"
    )

    def check(self) -> None:
        super().check()
        self.check_tools()
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs to be true", "top_logprobs")

    def check_tools(self) -> None:
        """What tools cannot go with, and what cannot go without. Raises InvalidInput."""
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in names:
                raise InvalidInput(
                    f"tool_choice is {printable(name)!r}, which is not in tools", "tool_choice"
                )
        elif self.tool_choice == "required" and not names:
            raise InvalidInput("tool_choice is required, but there are no tools", "tool_choice")
        if not self.usable_tools:
            return
        if self.response_format and self.response_format.type != "text":
            raise InvalidInput("response_format cannot go with tools; send one of them", "tools")
        if self.continues(self.messages):
            raise InvalidInput("an answer with tools cannot go on from the last message", "tools")

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def has_schema(self) -> bool:
        return self.response_format is not None or bool(self.usable_tools)

    def overrides(self) -> dict[str, Any]:
        given = {name: value for name, value in super().overrides().items() if name != "logprobs"}
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        schema = self.response_format.to_schema() if self.response_format else None
        tools = [tool.model_dump(exclude_none=True) for tool in self.usable_tools]
        if tools or schema is not None:
            self.check_ends_by_itself()
        named = self.tool_choice if isinstance(self.tool_choice, NamedTool) else None
        inner = InnerRequest(
            messages=[message.as_turn() for message in self.messages],
            sampling=self.overrides(),
            whole_context=self.has_no_limit or not model.states_length,
            continues=self.continues(self.messages),
            template_kwargs=self.chat_template_kwargs or {},
            tools=tools,
            callable=frozenset({named.function.name}) if named else None,
            must_call=named is not None or self.tool_choice == "required",
            parallel=self.parallel_tool_calls is not False and named is None,
            schema=schema,
            budget=None if self.reasoning_budget == -1 else self.reasoning_budget,
            prediction=self.prediction.content if self.prediction else "",
        )
        return [inner.prepare(model)]


def _chunk_of(part: CallPart) -> dict[str, Any]:
    """A part of a call as OpenAI's API streams it: its id and name first, then the arguments."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": new_call_id(), "type": "function", "function": function}


def _whole_calls(parts: list[CallPart]) -> list[dict[str, Any]]:
    """The calls of a whole answer, from their parts."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.name is None:
            calls[-1]["function"]["arguments"] += part.arguments
        else:
            chunk = _chunk_of(part)
            calls.append({name: chunk[name] for name in ("id", "type", "function")})
    return calls


class ChatCompletionReply(OpenAIReply):
    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, model: ChatModel, body: ChatCompletionRequest, prompts: list[Prompt]):
        super().__init__(model, body, prompts)
        self.prompt = prompts[0]
        self.parsers = [self._parser() for _ in range(body.num_answers)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        said = self._parser().push(choice.text, choice)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = _whole_calls(said.calls)
            message["content"] = said.content or None
        logprobs = self._logprobs(choice.tokens)
        return {"index": choice.index, "message": message, "logprobs": logprobs}

    def part(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        said = self.parsers[choice.index].push(delta.text, choice)
        message: dict[str, Any] = {}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_chunk_of(part) for part in said.calls]
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

    def _parser(self) -> OutputParser:
        return output_parser(self.model, self.prompt)

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        return {"content": spell_logprobs(self.model, tokens), "refusal": None}
