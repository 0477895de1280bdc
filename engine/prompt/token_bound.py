"""How many tokens a text has at least, known without tokenizing it.

A token that spells so many bytes has no byte whose longest token is shorter. So each byte of a text
stands for at least one part in so many of a token, and the parts add up to fewer tokens than the
text has. Tokenizing megabytes that fit no context would take seconds, and gigabytes.
"""

import json
import unicodedata
from collections.abc import Collection
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# Shorter texts are tokenized, so that an error can say how many tokens they have.
MIN_CHARS = 2**16
# Most characters that are counted at once, during which no other thread runs.
_CHUNK = 2**16
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def _byte_alphabet() -> dict[str, int]:
    """The characters as which byte-level tokenizers write bytes: GPT-2's table."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    own = {chr(byte): byte for byte in shown}
    return own | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def _nodes_of(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers of a tokenizer.json, those of a sequence one by one."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    if part["type"] == "Sequence":
        return [node for item in inner for node in _nodes_of(item)]
    return [part]


def _loses_text(node: dict[str, Any]) -> bool:
    """Whether a normalizer or pre-tokenizer may shorten a text by other than a Unicode form."""
    kind = node["type"]
    if kind == "Replace":
        return bool(node["pattern"].get("String") != " " or node["content"] != "▁")
    if kind in ("Split", "Punctuation"):
        return bool(node["behavior"] == "Removed")
    return kind not in (*_FORMS, "Prepend", "ByteLevel", "Metaspace", "Digits")


class TokenBound:
    """The bound for one tokenizer; none of the words `left_out` may be in the texts."""

    def __init__(self, tokenizer: Tokenizer, left_out: Collection[str] = ()):
        spec = json.loads(tokenizer.to_str())
        normalizers, splitters = _nodes_of(spec["normalizer"]), _nodes_of(spec["pre_tokenizer"])
        self.forms = [node["type"] for node in normalizers if node["type"] in _FORMS]
        by_byte = any(node["type"] == "ByteLevel" for node in (*normalizers, *splitters))
        words = spec["model"]["vocab"]
        if isinstance(words, list):
            words = [word for word, _ in words]
        added = [token for token in spec["added_tokens"] if token["content"] not in left_out]
        # Else what has no token may be one, however long it is.
        complete = by_byte or {f"<0x{byte:02X}>" for byte in range(256)} <= {*words}
        strips = any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])
        lossy = any(map(_loses_text, [*normalizers, *splitters]))
        self.is_known = complete and not strips and not lossy
        texts = {*words, *(token["content"] for token in added)}.difference(left_out)
        self.parts = _parts_of(texts, by_byte)

    def exceeds(self, text: str, most: int) -> bool:
        """Whether a text surely has more than `most` tokens; False where only tokenizing tells."""
        if not self.is_known or len(text) < MIN_CHARS:
            return False
        counts = np.zeros(256, np.int64)
        for start in range(0, len(text), _CHUNK):
            piece = text[start : start + _CHUNK]
            for form in self.forms:
                piece = unicodedata.normalize(form, piece)
            spelled = np.frombuffer(piece.encode(errors="replace"), np.uint8)
            counts += np.bincount(spelled, minlength=256)
            if counts @ self.parts > most + 1:
                return True
        return False


def _parts_of(words: Collection[str], by_byte: bool) -> np.ndarray:
    """The least part in a token that each byte is [256]; 0 of one that no token spells."""
    alphabet = _byte_alphabet()
    longest = np.zeros(256, np.int64)
    for word in words:
        if by_byte and set(word) <= alphabet.keys():
            spelled = bytes(map(alphabet.__getitem__, word))
        else:
            spelled = word.encode() + b" " * ("▁" in word)
        for byte in set(spelled):
            longest[byte] = max(longest[byte], len(spelled))
    if not by_byte:  # each byte has a token of its own
        longest = np.maximum(longest, 1)
    return np.where(longest > 0, 1 / np.maximum(longest, 1), 0.0)
