"""How the arguments of a call are written: what each way of writing them has to offer."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

# A text as the grammar of an answer has it, in which special tokens stand apart.
Words = Callable[[str], str]


class ArgumentsParser(Protocol):
    """Reads the arguments of one call, as their text comes."""

    def take(self, held: str) -> tuple[int, str, bool]:
        """How many characters of the text are sure, the JSON that they say, whether it is whole."""


class Arguments(Protocol):
    """One way of writing arguments; a module each."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What stands around names and values, in which there may be special tokens."""

    def spell(self, arguments: dict[str, Any]) -> str:
        """An object's text."""

    def grammar(self, schemas: Sequence[dict[str, Any]], words: Words) -> tuple[list[str], str]:
        """An expression of llguidance's Lark for each JSON schema, and rules that they share.

        `words` spells a text; `TEXT` is a terminal that matches any.
        """

    def parser(self, schema: dict[str, Any], shown: Callable[[str], str]) -> ArgumentsParser:
        """Of a call's arguments, given their JSON schema; `shown` spells texts as answers do."""


def spell_json(value: Any) -> str:
    """JSON as models are trained to write it: in one line, with a space after , and :."""
    return json.dumps(value, ensure_ascii=False)
