"""Arguments that are written one by one between tags, as Qwen3-Coder, Qwen 3.5 and GLM do.

A text stands there as it is, anything else as JSON. Which of both a value is, only the tool's
schema tells.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.tools.arguments import Words, spell_json
from engine.tools.json_calls import json_rule

# Where a schema looks up what it names by "$ref".
_DEFINITIONS = ("$defs", "definitions")
# What the name of an argument that no schema names may be.
_NAME_RULE = r"ANY_NAME: /[^\s<>\"'=\/]+/"
# The longest texts whose characters a grammar counts.
_COUNTED = 256
_TYPES: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", dict: "object", list: "array",
    type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class TaggedArguments:
    """Each argument is `head`, its name, `middle`, its value and `tail`."""

    head: str
    middle: str
    tail: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.head, self.middle, self.tail)

    def spell(self, arguments: dict[str, Any]) -> str:
        return "".join(
            f"{self.head}{name}{self.middle}{_spell_value(value)}{self.tail}"
            for name, value in arguments.items()
        )

    def grammar(self, schemas: Sequence[dict[str, Any]], words: Words) -> tuple[list[str], str]:
        """In the order of a schema's properties, each once; what has no names has any.

        Of a text, its choices are held to, and its length where that is short.
        """
        expressions = [self._expression(schema, words) for schema in schemas]
        values = (value for schema in schemas for value in _properties_of(schema).values())
        texts = sorted({"text", *map(_text_rule, values)})
        return expressions, "\n".join([*(self._text(rule, words) for rule in texts), _NAME_RULE])

    def _text(self, rule: str, words: Words) -> str:
        """A text of a length, and the tail: a text ends where a tail begins, so none has one."""
        tail = words(self.tail)
        lazy = "[lazy]" if tail.startswith('"') else ""
        length = rule.removeprefix("text")
        any_text = f"/(.|\\n){{{length.strip('_').replace('_', ',')}}}/" if length else "TEXT"
        return f"{rule}{lazy}: {any_text} {tail}"

    def _expression(self, schema: dict[str, Any], words: Words) -> str:
        required = set(schema.get("required", ()))
        parts = []
        for name, one in _properties_of(schema).items():
            written = f"{words(self.head + name + self.middle)} {self._value(one, words)}"
            parts.append(written if name in required else f"({written})?")
        if not _properties_of(schema) and schema.get("additionalProperties") is not False:
            parts.append(f"({words(self.head)} ANY_NAME {words(self.middle)} text)*")
        return " ".join(parts) or '""'

    def _value(self, schema: dict[str, Any], words: Words) -> str:
        """A value of a schema, and the tail."""
        kinds = _kinds_of(schema)
        if kinds is not None and "string" not in kinds:
            return f"{json_rule(schema)} {words(self.tail)}"
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if not isinstance(choices, list) or not choices:
            return _text_rule(schema) if kinds == {"string"} else "text"
        texts = " | ".join(words(_spell_value(choice)) or '""' for choice in choices)
        return f"({texts}) {words(self.tail)}"

    def parser(self, schema: dict[str, Any], shown: Callable[[str], str]) -> "_TaggedParser":
        tags = (shown(self.head), shown(self.middle), shown(self.tail))
        return _TaggedParser(tags, _properties_of(schema))


def _text_rule(schema: dict[str, Any]) -> str:
    """The rule for a text of the length that a schema has, if that is short enough to count."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not (isinstance(least, int) and isinstance(most, int) and 0 <= least <= most <= _COUNTED):
        return "text"
    return f"text_{least}_{most}"


def _spell_value(value: Any) -> str:
    return value if isinstance(value, str) else spell_json(value)


def _properties_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema of each argument that has a name, with the definitions that it may look up."""
    named = schema.get("properties")
    beside = {name: schema[name] for name in _DEFINITIONS if name in schema}
    if not isinstance(named, dict):
        return {}
    return {k: {**beside, **v} if isinstance(v, dict) else beside for k, v in named.items()}


def _kinds_of(schema: Any, depth: int = 0) -> set[str] | None:
    """The types of JSON that a value may have, by what its schema says; None if it says nothing."""
    if not isinstance(schema, dict) or depth > 8:
        return None
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return set(kind)
    for choices in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(choices, list) and choices:
            return {_TYPES.get(type(choice), "string") for choice in choices}
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return _union_of(schema[word], schema, depth)
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
        return _union_of(schema["allOf"], schema, depth)
    if isinstance(schema.get("$ref"), str):
        return _union_of([_looked_up(schema["$ref"], schema)], schema, depth)
    return None


def _union_of(schemas: list[Any], outer: dict[str, Any], depth: int) -> set[str] | None:
    beside = {name: outer[name] for name in _DEFINITIONS if name in outer}
    found: set[str] = set()
    for one in schemas:
        kinds = _kinds_of({**beside, **one} if isinstance(one, dict) else None, depth + 1)
        if kinds is None:
            return None
        found |= kinds
    return found


def _looked_up(reference: str, schema: dict[str, Any]) -> Any:
    """What a reference such as "#/$defs/Colour" names; None if it is nowhere."""
    found: Any = schema if reference.startswith("#/") else None
    for key in reference.removeprefix("#/").split("/"):
        name = key.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


class _TaggedParser:
    """Makes an object of JSON of arguments, piece by piece; a name's first value counts."""

    def __init__(self, tags: tuple[str, str, str], schemas: dict[str, dict[str, Any]]):
        self._head, self._middle, self._tail = tags
        self._schemas = schemas
        self._names: set[str] = set()
        self._value: _Value | None = None

    def take(self, held: str) -> tuple[int, str, bool]:
        at, said = 0, ""
        while True:
            rest = held[at:]
            if self._value is not None:
                taken, whole = self._length_of_value(rest)
                said += self._value.push(rest[:taken], whole)
                at += taken
                if not whole:
                    return at, said, False
                at += len(self._tail)
                self._value = None
            elif not rest.startswith(self._head):
                if not rest or self._head.startswith(rest):
                    return at, said, False  # what comes may be either
                return at, said + ("}" if self._names else "{}"), True
            elif (end := rest.find(self._middle, len(self._head))) < 0:
                return at, said, False
            else:
                said += self._begin(rest[len(self._head) : end])
                at += end + len(self._middle)

    def _begin(self, name: str) -> str:
        kinds = _kinds_of(self._schemas.get(name))
        is_new = name not in self._names
        self._value = _Value(kinds, is_told=is_new)
        begun = ", " if self._names else "{"
        self._names.add(name)
        return f"{begun}{spell_json(name)}: " if is_new else ""

    def _length_of_value(self, text: str) -> tuple[int, bool]:
        """How many characters of a text are the value's, and whether it ends there."""
        end = text.find(self._tail)
        if end >= 0:
            return end, True
        sizes = range(min(len(text), len(self._tail) - 1), 0, -1)
        begun = next((size for size in sizes if text.endswith(self._tail[:size])), 0)
        return len(text) - begun, False


class _Value:
    """One argument's value on its way to JSON.

    A text is told as it comes, and so is JSON. What may be either is told at its end: as what it
    spells, if the schema has that beside a text.
    """

    def __init__(self, kinds: set[str] | None, is_told: bool):
        self._kinds = kinds
        self._is_told = is_told
        self._held = ""
        self._begun = False

    def push(self, text: str, whole: bool) -> str:
        if not self._is_told:
            return ""
        if self._kinds == {"string"}:
            quote = "" if self._begun else '"'
            self._begun = True
            return quote + spell_json(text)[1:-1] + ('"' if whole else "")
        if self._kinds is not None and "string" not in self._kinds:
            return text
        self._held += text
        return self._either() if whole else ""

    def _either(self) -> str:
        try:
            value = json.loads(self._held)
        except ValueError:
            return spell_json(self._held)
        kind = _TYPES.get(type(value))
        kinds = self._kinds or {*_TYPES.values()}  # a text's quotes are its own
        fits = kind in kinds or (kind == "integer" and "number" in kinds)
        return self._held if fits else spell_json(self._held)
