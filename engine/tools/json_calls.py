"""Arguments that are written as JSON, as most models do."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from engine.tools.arguments import Words, spell_json

# As models are trained to write them. Keywords that cannot be checked as JSON is written, such as
# uniqueItems, are let pass; else a schema with one would be refused.
_WRITING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}


def json_rule(schema: dict[str, Any]) -> str:
    """The JSON of a schema, as an expression of llguidance's Lark."""
    return f"%json {json.dumps(schema | {'x-guidance': _WRITING})}"


class _JSONArguments:
    """An object of JSON."""

    texts: tuple[str, ...] = ()

    def spell(self, arguments: dict[str, Any]) -> str:
        return spell_json(arguments)

    def grammar(self, schemas: Sequence[dict[str, Any]], words: Words) -> tuple[list[str], str]:
        return [json_rule(schema) for schema in schemas], ""

    def parser(self, schema: dict[str, Any], shown: Callable[[str], str]) -> "_JSONParser":
        return _JSONParser()


class _JSONParser:
    """Finds where an object ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def take(self, held: str) -> tuple[int, str, bool]:
        for at, char in enumerate(held):
            if self._quoted:
                self._quoted = char != '"' or self._escaped
                self._escaped = char == "\\" and not self._escaped
                continue
            self._quoted = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if not self._depth:
                return at + 1, held[: at + 1], True
        return len(held), held, False


JSON_ARGUMENTS = _JSONArguments()
