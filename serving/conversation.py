"""Messages in OpenAI's shape, and how the model's chat template is to render them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from engine import InvalidInput, Message
from serving.fields import MAX_TURNS, ClosedModel, Content, TemplateKwargs, Text, join_text_parts
from serving.request_model import RequestModel
from serving.tool_fields import ToolCalls, Tools, check_arguments


def _check_role(role: Any) -> Any:
    if role == "function":
        raise ValueError('must be "tool" for the result of a tool; "function" is its old name')
    # OpenAI's newer name for the system role.
    return "system" if role == "developer" else role


class OpenAIMessage(ClosedModel):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "function_call": ({},),
        "refusal": ("",),
        "images": ([],),
        "videos": ([],),
        "audio": ({},),
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "id", "provider_specific_fields", "reasoning_details", "thinking_blocks"}
    )

    role: Annotated[
        Literal["system", "user", "assistant", "tool"],
        BeforeValidator(
            _check_role,
            json_schema_input_type=Literal["system", "developer", "user", "assistant", "tool"],
        ),
    ]
    content: Annotated[
        Text, BeforeValidator(join_text_parts, json_schema_input_type=Content | None)
    ]
    tool_calls: ToolCalls | None = Field(None, description="of the assistant; content may be null")
    tool_call_id: Text | None = Field(None, description="whose result a tool's message is")
    name: Text | None = Field(None, description="who speaks, for templates that say it")
    reasoning_content: Text | None = Field(
        None,
        validation_alias=AliasChoices("reasoning_content", "reasoning"),
        description="what the assistant thought, for templates that repeat it",
    )
    prefix: bool | None = Field(None, description="of the last one: the answer goes on from it")
    parsed: Any = Field(
        None, exclude=True, description="not read; OpenAI's clients add it to an answer's message"
    )

    @model_validator(mode="before")
    @classmethod
    def check_calls(cls, given: Any) -> Any:
        """Calls are the assistant's, and stand for a content; the results of them name them."""
        if not isinstance(given, dict):
            return given
        if given.get("tool_calls") and given.get("role") != "assistant":
            raise ValueError("has tool_calls, which only the assistant makes")
        if given.get("tool_call_id") is not None and given.get("role") != "tool":
            raise ValueError('has a tool_call_id, so its role must be "tool"')
        if given.get("tool_calls") and given.get("content") is None:
            return given | {"content": ""}
        return given

    def as_turn(self) -> Message:
        """The message for the engine."""
        turn = self.model_dump(exclude={"prefix"}, exclude_none=True)
        if not self.tool_calls:
            turn.pop("tool_calls", None)
        return turn


Turns = Annotated[
    list[OpenAIMessage],
    Field(min_length=1, max_length=MAX_TURNS, fail_fast=True),
    BeforeValidator(check_arguments, json_schema_input_type=list[OpenAIMessage]),
]


class Conversation(RequestModel):
    """Messages, and how the model's chat template is to render them."""

    tools: Tools | None = Field(None, description="functions that the answer may call")
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="variables of the model's chat template"
    )
    continue_final_message: bool | None = Field(
        None, description="the answer goes on from the last message, the assistant's"
    )
    add_generation_prompt: bool | None = Field(
        None, description="false only with continue_final_message"
    )

    def continues(self, messages: list[OpenAIMessage]) -> bool:
        """Whether the answer goes on from the last message. Raises InvalidInput."""
        if any(message.prefix for message in messages[:-1]):
            raise InvalidInput("only the last message can have prefix", "messages")
        continued = bool(self.continue_final_message or messages[-1].prefix)
        if continued and messages[-1].role != "assistant":
            raise InvalidInput("only a last message of the assistant can be continued", "messages")
        if self.add_generation_prompt is not None and self.add_generation_prompt is continued:
            name = "add_generation_prompt"
            raise InvalidInput(f"{name} is the contrary of continue_final_message", name)
        return continued
