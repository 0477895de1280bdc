"""Answers held to a grammar (guided decoding), by llguidance."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from engine.errors import InvalidInput

# A longer JSON schema takes too long to compile.
MAX_SCHEMA_CHARS = 2**16
# With the default limits, a pattern such as ^(a{1000}){1000}$ would block every answer for seconds.
GUIDE_LIMITS = LLParserLimits(initial_lexer_fuel=100_000)


@dataclass(frozen=True)
class Guide:
    """Constrains one answer to a JSON schema (guided decoding)."""

    matcher: LLMatcher
    ends: list[int]
    markers: list[int]  # the other special tokens

    def copy(self) -> "Guide":
        return replace(self, matcher=self.matcher.deep_copy())

    def allowed(self) -> Any:
        """Which tokens may come next, a boolean mask [vocabulary].

        Raises InvalidInput if the matcher has failed, or if the schema requires a text that
        spells a special token: the matcher then allows only that token.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        allowed = np.unpackbits(bits, bitorder="little").astype(bool)
        allowed[self.markers if self.matcher.is_accepting() else self.markers + self.ends] = False
        if not allowed.any():
            raise InvalidInput("the JSON schema asks for a special token", "schema")
        return allowed

    def check(self) -> None:
        """Raise InvalidInput if the matcher has failed, as it never raises by itself."""
        if self.matcher.is_error():
            reason = self.matcher.get_error().partition("\n")[0]
            raise InvalidInput(f"the JSON schema: {reason}", "schema")
