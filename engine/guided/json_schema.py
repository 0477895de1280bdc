"""JSON schemas as they come: without what asks for nothing, and what is wrong in words.

https://json-schema.org/draft/2020-12/json-schema-validation
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

_Schema = dict[str, Any]

# Where a schema has schemas: by name, in a list, or one.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else",
    "propertyNames", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
# What holds no answer to anything, whatever it says.
_ANNOTATIONS = {
    "$schema", "$comment", "title", "description", "default", "example", "examples", "deprecated",
    "readOnly", "writeOnly",
}  # fmt: skip
# Others are annotations too (section 7.2.1).
_FORMATS = {
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname",
    "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template",
    "json-pointer", "relative-json-pointer", "regex",
}  # fmt: skip
# Larger integers are not exact in the doubles that JSON's numbers commonly are (RFC 8259, section
# 6), and no model means to write them: as a bound they bound nothing.
MAX_INTEGER = 2**53
_MAX_LENGTH = 2**31
# What llguidance's patterns do not have: look-around, back references, word boundaries.
_UNHELD = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9bBk])")
# Parts of a schema that are tried by themselves, for what is wrong with the whole.
_MAX_TRIES = 200


def simplified(schema: _Schema) -> _Schema:
    """The same schema, without what holds no answer to anything."""
    schema = _mapped(schema, simplified)
    return {name: value for name, value in schema.items() if _counts(name, value)}


def _counts(name: str, value: Any) -> bool:
    """Whether a keyword may hold an answer to something."""
    if name in _ANNOTATIONS:
        return False
    if name == "format":
        return value in _FORMATS if isinstance(value, str) else True
    if not isinstance(value, int | float):
        return True
    if name in ("minimum", "exclusiveMinimum"):
        return value > -MAX_INTEGER
    if name in ("maximum", "exclusiveMaximum"):
        return value < MAX_INTEGER
    return not (name in ("maxLength", "maxItems", "maxProperties") and value > _MAX_LENGTH)


def relaxed(schema: _Schema) -> _Schema:
    """The same schema, without what no grammar can hold, as somebody else wrote it."""
    schema = {name: value for name, value in simplified(schema).items() if _can_hold(name, value)}
    if isinstance(schema.get("oneOf"), list) and "anyOf" not in schema:
        schema["anyOf"] = schema.pop("oneOf")  # that no other one matches, too
    if isinstance(patterns := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {
            pattern: value for pattern, value in patterns.items() if _can_hold("pattern", pattern)
        }
    return _mapped(schema, relaxed)


def _can_hold(name: str, value: Any) -> bool:
    if name == "pattern":
        return isinstance(value, str) and not _UNHELD.search(value)
    if name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        return not isinstance(value, int | float) or abs(value) < MAX_INTEGER
    if name in ("const", "enum"):
        values = value if name == "enum" and isinstance(value, list) else [value]
        return not any(isinstance(x, int) and abs(x) > MAX_INTEGER for x in values)
    return True


def _mapped(schema: _Schema, change: Callable[[_Schema], _Schema]) -> _Schema:
    """A schema whose own schemas are changed."""

    def changed(inner: Any) -> Any:
        return change(inner) if isinstance(inner, dict) else inner

    result = dict(schema)
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            result[name] = {key: changed(inner) for key, inner in value.items()}
        elif name in _LISTED and isinstance(value, list):
            result[name] = [changed(inner) for inner in value]
        elif name in _SINGLE:
            result[name] = changed(value)
    return result


def parts(schema: _Schema) -> Iterator[tuple[str, _Schema]]:
    """The schemas that a schema has, each with the path that leads to it."""
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            pairs = [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif name in _LISTED and isinstance(value, list):
            pairs = [(f"{name}[{index}]", inner) for index, inner in enumerate(value)]
        else:
            pairs = [(name, value)] if name in _SINGLE else []
        yield from ((path, inner) for path, inner in pairs if isinstance(inner, dict))


def place_of_fault(schema: _Schema, is_faulty: Callable[[_Schema], bool]) -> str:
    """The path to the innermost part that is faulty by itself; empty if it is the whole."""
    shared: _Schema = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    path, left = "", _MAX_TRIES
    while True:
        tried = [pair for pair in parts(schema) if not path or pair[0] not in shared][:left]
        left -= len(tried)
        faulty = next(((p, inner) for p, inner in tried if is_faulty({**shared, **inner})), None)
        if faulty is None:
            return path
        path, schema = f"{path}.{faulty[0]}".lstrip("."), faulty[1]


_WORDS = (
    ("coerce_one_of", "the alternatives of its oneOf overlap, which is not supported; send anyOf"),
    ("NoExtensionBias", "it refers to itself without an end"),
    (r"look-?around", "its pattern has look-around, which is not supported"),
    ("backreference", "its pattern has back references, which are not supported"),
    ("not present in a registry", "its $ref is not within the schema, and nothing is fetched"),
)


def in_words(reason: str) -> str:
    """What llguidance says is wrong, in the words of JSON schemas."""
    found = (words for pattern, words in _WORDS if re.search(pattern, reason))
    return next(found, reason)
