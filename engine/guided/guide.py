"""Answers held to a grammar (guided decoding), by llguidance."""

import json
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from engine.errors import InvalidInput
from engine.guided.json_schema import MAX_INTEGER, in_words, place_of_fault, simplified

# A longer JSON schema takes too long to compile.
MAX_SCHEMA_CHARS = 2**16
# What llguidance says of a schema may repeat much of it.
_MAX_REASON = 500
# With the default limits, a pattern such as ^(a{1000}){1000}$ would block every answer for seconds.
_GUIDE_LIMITS = LLParserLimits(initial_lexer_fuel=100_000)


@dataclass(frozen=True)
class Guide:
    """Constrains one answer to a JSON schema, or to calls of tools (guided decoding)."""

    matcher: LLMatcher
    ends: list[int]
    markers: list[int]  # the special tokens that the answer may not have
    argument: str = "schema"  # what asks for it

    def copy(self) -> "Guide":
        return replace(self, matcher=self.matcher.deep_copy())

    def token_mask(self) -> Any:
        """Which tokens may come next, a boolean mask [vocabulary].

        Raises InvalidInput if the matcher has failed, or allows none.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        mask = np.unpackbits(bits, bitorder="little").astype(bool)
        mask[self.markers if self.matcher.is_accepting() else self.markers + self.ends] = False
        if not mask.any():
            raise InvalidInput("the JSON schema allows for no answer", self.argument)
        return mask

    def check(self) -> None:
        """Raise InvalidInput if the matcher has failed, as it never raises by itself."""
        if self.matcher.is_error():
            reason = in_words(self.matcher.get_error()).partition("\n")[0][:_MAX_REASON]
            raise InvalidInput(f"the JSON schema: {reason}", self.argument)


def _with_known_spaces(spec: dict[str, Any]) -> dict[str, Any]:
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


def _is_rounded(schema: Any) -> bool:
    """Whether there is an integer in a schema that llguidance would round to a double."""
    layer = [schema]
    while layer:
        if any(isinstance(each, int) and abs(each) > MAX_INTEGER for each in layer):
            return True
        inner = (
            each.values() if isinstance(each, dict) else each
            for each in layer
            if isinstance(each, dict | list)
        )
        layer = [each for values in inner for each in values]
    return False


def check_numbers(schema: dict[str, Any], argument: str) -> None:
    """Raise InvalidInput for an integer in a schema that would be rounded."""
    if _is_rounded(schema):
        place = place_of_fault(schema, _is_rounded)
        raise InvalidInput(
            f"a JSON schema{place and f', at {place},'} must have no integers beyond"
            f" {MAX_INTEGER:,}, which JSON's numbers do not hold exactly; take a string for them",
            argument,
        )


def spell_schema(schema: dict[str, Any]) -> str:
    """A schema as JSON, without what holds no answer to anything.

    Raises InvalidInput if it is too long, or has too large integers.
    """
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        most = f"{MAX_SCHEMA_CHARS:,} characters"
        raise InvalidInput(f"the JSON schema is longer than {most}", "schema")
    schema = simplified(schema)
    check_numbers(schema, "schema")
    return json.dumps(schema)


# With flexible whitespace, a small model may indent for ever.
_WRITING: Any = {"whitespace_flexible": False}


def _grammar_of(spelled: str) -> str:
    """The grammar of a JSON schema. Raises ValueError if it is invalid."""
    return str(LLMatcher.grammar_from_json_schema(spelled, overrides=_WRITING))


def tags_of(tokenizer: Tokenizer) -> dict[str, int]:
    """The added tokens that are text, but have a form by which llguidance takes them for special.

    So have `</think>` and `<tool_call>` of Qwen's; in a grammar they are to be given by their ids.
    """
    added = tokenizer.get_added_tokens_decoder()
    texts = {token.content: i for i, token in added.items() if not token.special}
    return {text: i for text, i in texts.items() if text.startswith("<") and text.endswith(">")}


def thought_rule(opening: str, closing: str, tags: Mapping[str, int]) -> str:
    """The rule of a thought that ends with the first `closing`; `opening` is what it begins with.

    It takes TEXT to be any text.
    """
    if closing in tags:  # of which there is none in a text
        return f"thought: {opening} TEXT <[{tags[closing]}]>"
    return f"thought[lazy]: {opening} TEXT {json.dumps(closing)}"


def _after_thought(spelled: str, closing: str, tags: Mapping[str, int]) -> str:
    """The grammar of JSON behind a thought that has begun, in llguidance's Lark."""
    schema = json.dumps(json.loads(spelled) | {"x-guidance": _WRITING})
    return "\n".join(
        (
            "%llguidance {}",
            "start: thought /\\n{0,2}/ answer",
            f"answer: %json {schema}",
            "TEXT: /(.|\\n)*/",
            thought_rule("", closing, tags),
        )
    )


def _is_faulty(schema: dict[str, Any]) -> bool:
    """Whether a schema cannot be held, as far as can be seen without an answer."""
    try:
        return bool(LLMatcher.validate_grammar(_grammar_of(json.dumps(schema))))
    except ValueError:
        return True


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

    def compile(self, schema: dict[str, Any], closing: str = "") -> Guide:
        """A guide for answers that match a JSON schema. Raises InvalidInput if it is invalid.

        With `closing`, a thought comes first that the prompt has begun, and this text ends.
        """
        spelled = spell_schema(schema)
        try:
            grammar = _grammar_of(spelled)
            if closing:
                self._guide(grammar, self.markers, "schema")  # its errors are about the schema
                grammar = _after_thought(spelled, closing, tags_of(self.tokenizer))
            return self._guide(grammar, self.markers, "schema")
        except (ValueError, InvalidInput) as error:
            reason = str(error).removeprefix("the JSON schema: ")[:_MAX_REASON]
            place = place_of_fault(json.loads(spelled), _is_faulty)
            where = f", at {place}" if place else ""
            raise InvalidInput(f"the JSON schema{where}: {in_words(reason)}", "schema") from error

    def compile_grammar(self, grammar: str, special_ids: Collection[int]) -> Guide:
        """A guide for answers by a grammar for tools, which may have some of the special tokens.

        Raises InvalidInput if the grammar is invalid.
        """
        markers = sorted(set(self.markers) - set(special_ids))
        return self._guide(grammar, markers, "tools")

    def _guide(self, grammar: str, markers: list[int], argument: str) -> Guide:
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=_GUIDE_LIMITS)
        guide = Guide(matcher, self.ends, markers, argument)
        guide.check()
        # Some errors only show in use; and the first mask takes the longest.
        guide.copy().token_mask()
        return guide

    def _vocabulary(self) -> LLTokenizer:
        """The tokens as a trie, which takes a second or two: it is built on first use."""
        with self._lock:
            if self._trie is None:
                spec = json.dumps(_with_known_spaces(json.loads(self.tokenizer.to_str())))
                self._trie = LLTokenizer(spec, eos_token=self.ends, slices=[])
            return self._trie
