"""Thoughts as clients hand them back that keep no more of them than a signature.

A thought is deflated, and spelled as base64url behind a prefix. Nothing about it is secret, and
nothing is signed: it is the text itself, on its way through the client's memory.
"""

import base64
import zlib

PREFIX = "t1."
# Bytes of a request's thoughts that are taken back: a deflated one may be a thousand times as long.
MAX_BYTES = 2**20


def encode_thought(text: str) -> str:
    return PREFIX + base64.urlsafe_b64encode(zlib.compress(text.encode(), 6)).decode()


class ThoughtDecoder:
    """Decodes the thoughts of one request, within a bound of all together."""

    def __init__(self, most: int = MAX_BYTES):
        self.room = most

    def decode(self, code: str) -> str | None:
        """The thought of a code; None if it is another server's, or if there are too many."""
        if not code.startswith(PREFIX) or self.room <= 0:
            return None
        try:
            packed = base64.urlsafe_b64decode(code.removeprefix(PREFIX))
            inflate = zlib.decompressobj()
            text = inflate.decompress(packed, self.room).decode()
        except (ValueError, zlib.error):  # not base64, not deflated, no UTF-8
            return None
        self.room -= len(text.encode())
        return text if inflate.eof else None
