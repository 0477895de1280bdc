"""Tools, the choice among them, and the calls of earlier turns, in OpenAI's shapes.

https://platform.openai.com/docs/guides/function-calling
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationError

from serving.field_types import ClosedModel, Text, reject_lone_surrogates

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
MAX_DEPTH = 64  # of a JSON schema, or of a call's arguments
# Of a function without parameters.
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper; asked with as many steps as that at most."""
    layer = [value]
    for _ in range(most):
        inner = [each for each in layer if isinstance(each, dict | list)]
        if not inner:
            return False
        layer = [x for each in inner for x in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in layer)


def check_json(value: Any) -> Any:
    """Bound how deep JSON is, so that whoever walks through it needs no long stack."""
    if is_deeper(value, MAX_DEPTH):
        raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
    reject_lone_surrogates(json.dumps(value, ensure_ascii=False))
    return value


def check_parameters(schema: Any) -> Any:
    """The JSON schema of a function's arguments, which are always an object."""
    if schema is None:
        return NO_PARAMETERS
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON schema, an object")
    if schema.setdefault("type", "object") != "object":
        raise ValueError('must have the type "object", as arguments have names')
    return check_json(schema)


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse_arguments(text: Any) -> Any:
    """A call's arguments as an object, from the JSON that OpenAI's API has as a text.

    An empty text is that of a call without arguments, as some servers give it.
    """
    try:
        arguments = json.loads("{}" if text == "" else text, parse_constant=refuse_constant)
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError('must be a JSON object as a text, such as "{\\"city\\": \\"Paris\\"}"')
    return check_json(arguments)


class CalledFunction(ClosedModel):
    name: Text
    arguments: Annotated[
        dict[str, Any], BeforeValidator(parse_arguments, json_schema_input_type=str)
    ]
    parsed_arguments: Any = Field(
        None, exclude=True, description="not read; OpenAI's clients add it to an answer's calls"
    )


class ToolCall(ClosedModel):
    """A call that an earlier answer made."""

    neutral = {"index": tuple(range(MAX_CALLS))}  # noqa: RUF012

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]


class Function(ClosedModel):
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

    type: Literal["function"]
    function: Function


def check_names(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"must have different names; {twice} is there twice")
    return tools


Tools = Annotated[
    list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(check_names)
]


class NamedFunction(ClosedModel):
    name: Text


class NamedTool(ClosedModel):
    type: Literal["function"]
    function: NamedFunction


def parse_choice(choice: Any) -> Any:
    if choice in ("none", "auto", "required"):
        return choice
    try:
        return NamedTool.model_validate(choice)
    except ValidationError:
        raise ValueError(
            'must be none, auto, required, or {"type": "function", "function": {"name": …}}'
        ) from None


Choice = Literal["none", "auto", "required"] | NamedTool
ToolChoice = Annotated[Choice, PlainValidator(parse_choice, json_schema_input_type=Choice)]
