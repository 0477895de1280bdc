"""Answers held to a grammar (guided decoding), by llguidance."""

import json
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from engine.errors import InvalidInput

# A longer JSON schema takes too long to compile.
MAX_SCHEMA_CHARS = 2**16
# Larger ones are not exact in the doubles that JSON's numbers commonly are (RFC 8259, section 6).
MAX_INTEGER = 2**53
# What llguidance says of a schema may repeat much of it.
MAX_REASON = 500
# With the default limits, a pattern such as ^(a{1000}){1000}$ would block every answer for seconds.
GUIDE_LIMITS = LLParserLimits(initial_lexer_fuel=100_000)


@dataclass(frozen=True)
class Guide:
    """Constrains one answer to a JSON schema, or to calls of tools (guided decoding)."""

    matcher: LLMatcher
    ends: list[int]
    markers: list[int]  # the special tokens that the answer may not have
    argument: str = "schema"  # what asks for it

    def copy(self) -> "Guide":
        return replace(self, matcher=self.matcher.deep_copy())

    def allowed(self) -> Any:
        """Which tokens may come next, a boolean mask [vocabulary].

        Raises InvalidInput if the matcher has failed, or allows none.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        allowed = np.unpackbits(bits, bitorder="little").astype(bool)
        allowed[self.markers if self.matcher.is_accepting() else self.markers + self.ends] = False
        if not allowed.any():
            raise InvalidInput("the JSON schema allows for no answer", self.argument)
        return allowed

    def check(self) -> None:
        """Raise InvalidInput if the matcher has failed, as it never raises by itself."""
        if self.matcher.is_error():
            reason = self.matcher.get_error().partition("\n")[0][:MAX_REASON]
            raise InvalidInput(f"the JSON schema: {reason}", self.argument)


def with_known_spaces(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json in which llguidance finds how spaces are written.

    It knows them by a decoder that replaces a character, as Llama's, and not by Metaspace, as
    XVERSE's, which does the same.
    """
    decoder = spec["decoder"]
    if decoder and decoder["type"] == "Sequence":
        for node in decoder["decoders"]:
            if node["type"] == "Metaspace":
                pattern = {"String": node["replacement"]}
                node.clear()
                node |= {"type": "Replace", "pattern": pattern, "content": " "}
    return spec


def check_numbers(spelled: str, argument: str) -> None:
    """Raise InvalidInput for an integer in a JSON text that llguidance would round to a double."""

    def check(digits: str) -> None:
        if abs(int(digits)) > MAX_INTEGER:
            raise InvalidInput(
                f"a JSON schema must have no integers beyond {MAX_INTEGER:,}, which JSON's numbers"
                " do not hold exactly; take a string for them",
                argument,
            )

    json.loads(spelled, parse_int=check)


def spell_schema(schema: dict[str, Any]) -> str:
    """A schema as JSON. Raises InvalidInput if it is too long, or has too large integers."""
    spelled = json.dumps(schema)
    if len(spelled) > MAX_SCHEMA_CHARS:
        most = f"{MAX_SCHEMA_CHARS:,} characters"
        raise InvalidInput(f"the JSON schema is longer than {most}", "schema")
    check_numbers(spelled, "schema")
    return spelled


class GuideCompiler:
    """Compiles JSON schemas and grammars into guides for one model's tokens; thread-safe.

    The tokenizer is one in which no text is encoded as a special token: what a schema requires is
    written as the tokenizer would.
    """

    def __init__(
        self, tokenizer: Tokenizer, special_ids: Collection[int], end_ids: Collection[int]
    ):
        self.tokenizer = tokenizer
        self.ends = sorted(end_ids)
        self.markers = sorted(set(special_ids) - set(end_ids))
        self._trie: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, schema: dict[str, Any]) -> Guide:
        """A guide for answers that match a JSON schema. Raises InvalidInput if it is invalid."""
        spelled = spell_schema(schema)
        try:
            # With flexible whitespace, a small model may indent for ever.
            grammar = LLMatcher.grammar_from_json_schema(
                spelled, overrides={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise InvalidInput(f"the JSON schema: {str(error)[:MAX_REASON]}", "schema") from error
        return self._guide(grammar, self.markers, "schema")

    def compile_grammar(self, grammar: str, marks: Collection[int]) -> Guide:
        """A guide for answers by a grammar for tools, which may have some of the special tokens.

        Raises InvalidInput if the grammar is invalid.
        """
        markers = sorted(set(self.markers) - set(marks))
        return self._guide(grammar, markers, "tools")

    def _guide(self, grammar: str, markers: list[int], argument: str) -> Guide:
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=GUIDE_LIMITS)
        guide = Guide(matcher, self.ends, markers, argument)
        guide.check()
        # Some errors only show in use; and the first mask takes the longest.
        guide.copy().allowed()
        return guide

    def _vocabulary(self) -> LLTokenizer:
        """The tokens as a trie, which takes a second or two: it is built on first use."""
        with self._lock:
            if self._trie is None:
                spec = json.dumps(with_known_spaces(json.loads(self.tokenizer.to_str())))
                self._trie = LLTokenizer(spec, eos_token=self.ends, slices=[])
            return self._trie
