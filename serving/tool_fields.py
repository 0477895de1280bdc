"""Tools, the choice among them, and the calls of earlier turns, in OpenAI's shapes.

https://platform.openai.com/docs/guides/function-calling
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from serving.body_limits import check_items
from serving.fields import ClosedModel, Text, check_json

MAX_TOOLS = 128
_MAX_CALLS = 128  # of one message
MAX_CALLS_IN_ALL = 4096
# Of a function without parameters.
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def check_parameters(schema: Any) -> Any:
    """The JSON schema of a function's arguments, which are always an object."""
    if schema is None:
        return NO_PARAMETERS
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON schema, an object")
    if schema.get("type") in (None, ["object"]):
        schema["type"] = "object"
    if schema["type"] != "object":
        raise ValueError('must have the type "object", as arguments have names')
    return check_json(schema)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse_arguments(text: Any) -> Any:
    """A call's arguments as an object, from the JSON that OpenAI's API has as a text.

    An empty text is that of a call without arguments, as some servers give it. What was cut off by
    a length is none either: its result says what went wrong.
    """
    try:
        arguments = json.loads("{}" if text == "" else text, parse_constant=_refuse_constant)
    except (TypeError, ValueError, RecursionError):
        arguments = {} if isinstance(text, str) and _is_cut_off(text) else None
    if not isinstance(arguments, dict):
        raise ValueError('must be a JSON object as a text, such as "{\\"city\\": \\"Paris\\"}"')
    return check_json(arguments)


_OBJECT = TypeAdapter(dict[str, Any])


def _is_cut_off(text: str) -> bool:
    """Whether a text is the beginning of a JSON object, as our own answers that ended too soon."""
    try:
        json.JSONDecoder().raw_decode(text)
        return False  # it is whole, and something follows
    except RecursionError:
        return False
    except ValueError:
        pass
    try:
        _OBJECT.validate_json(text, experimental_allow_partial=True)
    except ValueError:
        return False
    return True


def _argument_texts(messages: Any) -> Iterator[str]:
    """The calls' arguments in what should be messages."""
    for message in messages if isinstance(messages, list) else ():
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            text = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(text, str):
                yield text


def check_arguments(messages: Any) -> Any:
    """Bound the items of all arguments together: in the body they were texts, and not counted."""
    texts = [text.encode(errors="replace") for text in _argument_texts(messages)]
    if len(texts) > MAX_CALLS_IN_ALL:
        raise ValueError(f"must have at most {MAX_CALLS_IN_ALL} tool_calls, not {len(texts)}")
    name = "what the arguments of tool_calls hold"
    check_items(*texts, name=name, argument="messages")
    return messages


# What clients add for caches and gateways.
_ADDED = frozenset({"cache_control", "provider_specific_fields", "extra_content"})
# A type that is empty is the only one that there is.
_FunctionType = Annotated[
    Literal["function"], BeforeValidator(lambda kind: "function" if kind == "" else kind)
]


class CalledFunction(ClosedModel):
    ignored = _ADDED

    name: Text
    arguments: Annotated[
        dict[str, Any], BeforeValidator(parse_arguments, json_schema_input_type=str)
    ]
    parsed_arguments: Any = Field(
        None, exclude=True, description="not read; OpenAI's clients add it to an answer's calls"
    )


class ToolCall(ClosedModel):
    """A call that an earlier answer made."""

    neutral = {"index": tuple(range(_MAX_CALLS))}  # noqa: RUF012
    ignored = _ADDED

    id: Text | None = None
    type: _FunctionType = "function"
    function: CalledFunction


ToolCalls = Annotated[list[ToolCall], Field(max_length=_MAX_CALLS, fail_fast=True)]


class Function(ClosedModel):
    ignored = _ADDED

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: Annotated[
        dict[str, Any],
        BeforeValidator(check_parameters, json_schema_input_type=dict[str, Any] | None),
    ] = NO_PARAMETERS
    strict: bool | None = None  # whatever it says, arguments keep to their schema


class Tool(ClosedModel):
    # Where the Responses API has it.
    neutral = {"strict": (True, False)}  # noqa: RUF012
    ignored = _ADDED

    type: _FunctionType
    function: Function


def _check_names(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"must have different names; {twice} is there twice")
    return tools


Tools = Annotated[
    list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_check_names)
]


class NamedFunction(ClosedModel):
    name: Text


class NamedTool(ClosedModel):
    type: Literal["function"]
    function: NamedFunction


def _parse_choice(choice: Any) -> Any:
    if choice in ("none", "auto", "required"):
        return choice
    try:
        return NamedTool.model_validate(choice)
    except ValidationError:
        raise ValueError(
            'must be none, auto, required, or {"type": "function", "function": {"name": …}}'
        ) from None


_Choice = Literal["none", "auto", "required"] | NamedTool
ToolChoice = Annotated[_Choice, PlainValidator(_parse_choice, json_schema_input_type=_Choice)]
