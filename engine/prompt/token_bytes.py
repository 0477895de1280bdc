"""The bytes of a token that is part of a character, which no text spells.

Byte-level tokenizers write each byte as a printable character, by the table of GPT-2
(https://github.com/openai/gpt-2/blob/master/src/encoder.py); others have a token `<0xF0>` for it.
"""

import re
from functools import cache

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_of_char() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    """What a token adds to the text, from its own name; None if that does not say it."""
    piece = tokenizer.id_to_token(token) or ""
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    table = _byte_of_char()
    return bytes(table[c] for c in piece) if piece and table.keys() >= set(piece) else None
