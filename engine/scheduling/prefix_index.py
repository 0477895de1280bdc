"""Finds spans that begin with the same tokens as a new prompt.

By the chained hashes of their blocks, as in vLLM's automatic prefix caching, in a few look-ups
however many there are.
"""

import secrets
from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice
from typing import Generic, TypeVar

from engine.sequence import KVSpan

# Tokens in a hashed block. A shorter prefix is computed again rather than kept or copied.
BLOCK = 16
# Where the chain of hashes begins: unknown to callers, so that none can make hashes collide.
_SEED = secrets.randbits(62)
# Spans that share a block are compared token by token; of many, so many of the newest.
_MAX_COMPARED = 16


def in_blocks(num_tokens: int) -> int:
    """How many of so many tokens are in whole blocks."""
    return num_tokens // BLOCK * BLOCK


def block_hashes(span: KVSpan, num_tokens: int) -> list[int]:
    """The hashes of the whole blocks in a span's first tokens, each of all up to its end.

    Rows that another adapter computed are others: the chain begins with its number.
    """
    hashes, count = span.block_hashes, num_tokens // BLOCK
    for n in range(len(hashes), count):
        before = hashes[-1] if hashes else hash((_SEED, span.adapter))
        hashes.append(hash((before, *span.tokens[n * BLOCK : (n + 1) * BLOCK])))
    return hashes[:count]


S = TypeVar("S", bound=KVSpan)


class PrefixIndex(Generic[S]):
    """Finds spans that begin with the same blocks as a given one."""

    def __init__(self) -> None:
        self.spans: dict[int, dict[S, None]] = {}  # by a block's hash, in order of arrival
        self.num_blocks: dict[S, int] = {}  # that each span has here

    def add(self, span: S, num_tokens: int) -> None:
        """Let the blocks of a span's first `num_tokens` tokens be found from now on."""
        known = self.num_blocks.get(span, 0)
        count = num_tokens // BLOCK
        if count > known:
            for key in block_hashes(span, num_tokens)[known:]:
                self.spans.setdefault(key, {})[span] = None
            self.num_blocks[span] = count

    def remove(self, span: S) -> None:
        for key in block_hashes(span, self.num_blocks.pop(span, 0) * BLOCK):
            sharing = self.spans.get(key, {})
            sharing.pop(span, None)  # of two blocks with one hash it went with the first
            if not sharing:
                self.spans.pop(key, None)

    def longest(self, span: KVSpan) -> int:
        """How many tokens in whole blocks another one begins with, a span's last one left out."""
        hashes = block_hashes(span, len(span.tokens) - 1)
        # Who has a block has all before it.
        return BLOCK * bisect_left(hashes, True, key=lambda key: key not in self.spans)

    def sharing(self, span: KVSpan, num_tokens: int) -> list[S]:
        """Some of those that share the whole blocks of a span's first tokens, the newest first."""
        hashes = block_hashes(span, num_tokens)
        found = self.spans.get(hashes[-1], {}) if hashes else {}
        return list(islice(reversed(found), _MAX_COMPARED))


class StateIndex:
    """Finds the longest prefix of a text for which a state is kept, and the one unused longest."""

    def __init__(self) -> None:
        self.found: dict[int, dict[tuple[KVSpan, int], None]] = {}  # by the hash of the last block
        self.keys: dict[KVSpan, dict[int, int]] = {}  # that hash, by position
        self.used: dict[tuple[KVSpan, int], int] = {}  # when: a count of uses
        self._clock = 0

    def add(self, span: KVSpan, position: int) -> None:
        """Let the state of a span's first so many tokens be found, if a block of them."""
        hashes = block_hashes(span, position)
        if not hashes or position in self.keys.get(span, {}):
            return
        key = hashes[-1]
        self.found.setdefault(key, {})[span, position] = None
        self.keys.setdefault(span, {})[position] = key
        self.touch(span, position)

    def touch(self, span: KVSpan, position: int) -> None:
        """Note that a state is of use."""
        self._clock += 1
        self.used[span, position] = self._clock

    def remove(self, span: KVSpan, position: int | None = None) -> None:
        """Forget one of a span's states, or all of them."""
        keys = self.keys.get(span, {})
        for each in [*keys] if position is None else [position] if position in keys else []:
            sharing = self.found[keys[each]]
            del sharing[span, each], self.used[span, each]
            if not sharing:
                del self.found[keys[each]]
            del keys[each]
        if not keys:
            self.keys.pop(span, None)

    def rename(self, old: KVSpan, new: KVSpan) -> None:
        """Let another span have a span's states, as long unused as they are."""
        used = {position: self.used[old, position] for position in self.keys.get(old, {})}
        self.remove(old)
        for position, when in used.items():
            self.add(new, position)
            self.used[new, position] = when

    def longest(self, tokens: KVSpan) -> tuple[int, KVSpan | None]:
        """The longest known prefix with a state, and the span that has it; never all tokens."""
        hashes = block_hashes(tokens, len(tokens.tokens) - 1)
        for count in range(len(hashes), 0, -1):
            best: tuple[int, KVSpan | None] = 0, None
            known = self.found.get(hashes[count - 1], {})
            for span, position in islice(reversed(known), _MAX_COMPARED):
                shared = common_prefix(span, tokens, count * BLOCK)
                if best[0] < position <= shared:
                    best = position, span
            if best[1]:
                return best
        return 0, None

    def oldest(self, spans: Iterable[KVSpan]) -> tuple[KVSpan, int] | None:
        """The state of one of these spans that was of no use for longest."""
        each = [(span, position) for span in spans for position in self.keys.get(span, {})]
        return min(each, key=self.used.__getitem__, default=None)


def common_prefix(cached: KVSpan, given: KVSpan, known: int) -> int:
    """How many of the cached tokens are a prefix of the given ones, if at least `known` are.

    Never all of the given ones, since the last one's logits are wanted; none of another adapter's.
    """
    if cached.adapter != given.adapter:  # the hashes collided
        return 0
    return min(cached.num_computed_tokens, equal_tokens(cached.tokens, given.tokens, known))


def equal_tokens(some: list[int], tokens: list[int], known: int) -> int:
    """With how many of the given tokens, but for the last, others begin, if with `known`; or 0."""
    if some[:known] != tokens[:known]:  # the hashes collided
        return 0
    most = min(len(some), len(tokens) - 1)
    count = min(known, most)
    while count < most and some[count] == tokens[count]:
        count += 1
    return count
