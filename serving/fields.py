"""The types of single fields: what a value may be, how large, and what older shapes it has.

Every list and text has a limit, and validation stops at the first error: a body has room for
millions of items.
"""

import json
import re
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from serving.unknown_fields import printable


class StrictModel(BaseModel):
    """Strict: a number is not a string, and True is not 1."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @classmethod
    @cache
    def names(cls) -> dict[str, str]:
        """Each name that a field has in JSON, and the field."""
        found: dict[str, str] = {}
        for field, about in cls.model_fields.items():
            alias = about.validation_alias
            choices = alias.choices if isinstance(alias, AliasChoices) else [alias or field]
            found |= {str(name): field for name in choices}
        return found


class ClosedModel(StrictModel):
    """An object inside a request; what it does not have is refused, as in the request itself."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # What clients add for other servers, or keep of an answer, and changes none whatever it says.
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def check_names(cls, given: Any) -> Any:
        return cls.without_neutral(given) if isinstance(given, dict) else given

    @classmethod
    def without_neutral(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields that it has. Raises ValueError for another that asks for something."""
        names = cls.names()
        for name, value in given.items():
            if name in names or name in cls.ignored or value is None:
                continue
            if value not in cls.neutral.get(name, ()):
                raise ValueError(f"must not have {printable(name)!r}, which is not supported here")
        # Null is absent, wherever something else is meant then.
        return {
            name: value
            for name, value in given.items()
            if name in names and (value is not None or cls.model_fields[names[name]].is_required())
        }


def reject_lone_surrogates(text: str) -> str:
    """Reject half of a surrogate pair: JSON can express it, but no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain an unpaired surrogate") from None
    return text


_IsUnicode = AfterValidator(reject_lone_surrogates)
Text = Annotated[str, _IsUnicode]
MAX_TEXT = 2**20
TextToCount = Annotated[str, Field(max_length=MAX_TEXT), _IsUnicode]


class HistoryMessage(ClosedModel):
    role: Literal["system", "user", "assistant"]
    content: Text


def _check_pair(pair: Any) -> Any:
    # Before its items are looked at, which may be a million.
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError('must be a ["question", "answer"] pair')
    return pair


_Pair = Annotated[
    list[Text],
    Field(min_length=2, max_length=2, fail_fast=True),
    BeforeValidator(_check_pair, json_schema_input_type=list[str]),
]


def history_shape(history: Any) -> str | None:
    """Tell pairs from messages by the items' types; None if the history is neither."""
    if not isinstance(history, list):
        return None
    kinds = {type(turn) for turn in history}
    if kinds <= {list}:
        return "pairs"
    if kinds <= {dict, HistoryMessage}:
        return "turns"
    return None


# A body has room for millions of items; validation stops at the first error.
MAX_TURNS = 4096
_TurnLimit = Field(max_length=MAX_TURNS, fail_fast=True)
_Pairs = Annotated[list[_Pair], _TurnLimit, Tag("pairs")]
Messages = Annotated[list[HistoryMessage], _TurnLimit, Tag("turns")]
History = Annotated[
    _Pairs | Messages,
    Discriminator(
        history_shape,
        custom_error_type="history_shape",
        custom_error_message='must be a list of ["question", "answer"] pairs'
        ' or of {"role": ..., "content": ...} objects',
    ),
]


def _as_stop_strings(stop: Any) -> Any:
    """Accept a single string as a list of one."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return tuple(texts)


StopStrings = Annotated[
    tuple[Annotated[str, Field(max_length=256), _IsUnicode], ...],
    Field(max_length=16, fail_fast=True),
    BeforeValidator(_as_stop_strings, json_schema_input_type=str | list[str]),
]


class TextPart(ClosedModel):
    type: Literal["text"]
    text: str
    cache_control: Any = None  # other servers'; it cannot change the answer


Content = str | list[TextPart]


# More are refused before any is looked at.
MAX_PARTS = 1024


def join_text_parts(content: Any) -> Any:
    """Join text content parts into one string."""
    if content is None:
        raise ValueError("must be a text (a string or a list of text parts), not null")
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise ValueError(f"must have at most {MAX_PARTS} parts, not {len(content)}")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("must be text; images, sound and files are not supported")
        if not isinstance(part.get("text"), str):
            raise ValueError('must hold parts such as {"type": "text", "text": "hello"}')
        TextPart.without_neutral(part)
        texts.append(part["text"])
    return "".join(texts)


# Validates millions of ids in a fraction of a second, unlike a Python loop.
_TOKEN_IDS = TypeAdapter(
    Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(fail_fast=True)]
)
_MAX_PROMPTS = 64


def _parse_prompt(prompt: Any) -> str | list[int]:
    """A text, or a list of token ids."""
    if isinstance(prompt, str):
        return reject_lone_surrogates(prompt)
    try:
        return _TOKEN_IDS.validate_python(prompt)
    except ValidationError:
        raise ValueError("must be a text, or a list of token ids, or a list of these") from None


def parse_prompts(prompt: Any) -> list[str | list[int]]:
    """A list of prompts, of a single one too."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
        return [_parse_prompt(prompt)]
    if len(prompt) > _MAX_PROMPTS:
        raise ValueError(f"must have at most {_MAX_PROMPTS} prompts, not {len(prompt)}")
    return [_parse_prompt(each) for each in prompt]


_MAX_BIASES = 300


def _parse_biases(biases: Any) -> tuple[tuple[int, float], ...]:
    """Token ids and what to add to their logits, from an object whose keys are ids."""
    if not isinstance(biases, dict):
        raise ValueError('must be an object of token ids and biases, such as {"42": -100}')
    if len(biases) > _MAX_BIASES:
        raise ValueError(f"must have at most {_MAX_BIASES} token ids, not {len(biases)}")
    for key, bias in biases.items():
        if not re.fullmatch(r"0|[1-9]\d{0,9}", key, re.ASCII):
            raise ValueError(f"must have token ids as keys, not {printable(key)!r}")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (is_number and -100 <= bias <= 100):
            raise ValueError(f"must have a number from -100 to 100 for token id {key}")
    return tuple((int(key), float(bias)) for key, bias in biases.items())


Biases = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_parse_biases, json_schema_input_type=dict[str, float]),
]
EndIds = Annotated[
    tuple[Annotated[int, Field(ge=0, strict=True)], ...],
    Field(max_length=256, fail_fast=True),
    BeforeValidator(
        lambda ids: tuple(ids) if isinstance(ids, list) else ids, json_schema_input_type=list[int]
    ),
]

MAX_DEPTH = 64  # of a JSON schema, a call's arguments, or a template's variables
_MAX_KWARGS_CHARS = 2**14


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper; asked with as many steps as that at most."""
    layer = [value]
    for _ in range(most):
        inner = [each for each in layer if isinstance(each, dict | list)]
        if not inner:
            return False
        layer = [x for each in inner for x in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in layer)


def _spell_json(value: Any) -> str:
    """JSON as a text, of a bounded depth, so that whoever walks through it needs no long stack."""
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
    return reject_lone_surrogates(json.dumps(value, ensure_ascii=False))


def check_json(value: Any) -> Any:
    """The same value, if it can be spelled."""
    _spell_json(value)
    return value


def _check_kwargs(given: Any) -> Any:
    """Bound what a template is given, at whatever depth."""
    if not isinstance(given, dict):
        raise ValueError('must be an object, such as {"enable_thinking": false}')
    if len(_spell_json(given)) > _MAX_KWARGS_CHARS:
        raise ValueError(f"must be at most {_MAX_KWARGS_CHARS:,} characters of JSON")
    return given


TemplateKwargs = Annotated[dict[str, Any], BeforeValidator(_check_kwargs)]
