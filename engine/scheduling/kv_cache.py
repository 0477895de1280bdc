"""Who owns which rows of the KV cache, and which of them a new prompt can take over.

Running sequences own spans of rows; what finished ones have computed is kept until its room is
needed, least recently used first. Where layers keep a state, a prefix is taken over only as far as
one of its states reaches.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

from engine.attention.state_pool import StatePool
from engine.scheduling.kept_states import KeptStates
from engine.scheduling.prefix_index import PrefixIndex, block_hashes, common_prefix, in_blocks
from engine.sequence import KVSpan, ScheduledBatch, Sequence

# Most prefixes of finished requests that are kept.
_MAX_PREFIXES = 256
# Most of them that a new sequence's drafts come from, and most tokens of each.
_MAX_CONTINUATIONS = 2
_MAX_CONTINUED = 2**11


class Allocator:
    """Allocates contiguous spans of the pool's rows; adjacent gaps are merged."""

    def __init__(self, rows: int):
        self.gaps = [(0, rows)]  # (first row, size), in order

    def copy(self) -> "Allocator":
        """One that can be tried without consequences."""
        other = Allocator(0)
        other.gaps = list(self.gaps)
        return other

    @property
    def num_free(self) -> int:
        return sum(size for _, size in list(self.gaps))

    def allocate(self, size: int, at: int | None = None) -> int | None:
        """The first row of a new span, in the tightest gap or the one that begins `at` that row.

        None if none fits.
        """
        gaps = [(gap, start) for start, gap in self.gaps if gap >= size and at in (None, start)]
        if not gaps:
            return None
        gap, start = min(gaps)
        self.gaps.remove((start, gap))
        if gap > size:
            insort(self.gaps, (start + size, gap - size))
        return start

    def release(self, start: int, size: int) -> None:
        """Free a span's rows."""
        at = bisect_left(self.gaps, (start, 0))
        if at < len(self.gaps) and self.gaps[at][0] == start + size:
            size += self.gaps.pop(at)[1]
        if at > 0 and sum(self.gaps[at - 1]) == start:
            at -= 1
            before, room = self.gaps.pop(at)
            start, size = before, room + size
        self.gaps.insert(at, (start, size))


class SpanCache:
    """The rows of the KV cache: places sequences in it, and keeps what finished ones computed.

    `copy_rows(source, start, count)` copies a span's first rows to those from `start` on, and says
    whether it succeeded; if not, they are computed again.
    """

    def __init__(
        self,
        rows: int,
        copy_rows: Callable[[KVSpan, int, int], bool],
        reuse: bool = True,
        states: StatePool | None = None,
    ):
        self.rows, self.reuse = rows, reuse
        self.states = KeptStates(states, reuse)
        self.copy_rows = copy_rows
        self.allocator = Allocator(rows)
        self.kept: dict[KVSpan, None] = {}  # of finished requests, least recently used first
        # Kept spans, and running ones as far as they are computed.
        self.computed = PrefixIndex[KVSpan]()
        # The prompts of running ones that are being computed.
        self.prefilling = PrefixIndex[Sequence]()

    @property
    def num_used(self) -> int:
        """Rows in use; approximate, as other threads read it."""
        return self.rows - self.allocator.num_free

    def place(self, seq: Sequence) -> bool:
        """Give a sequence a span, with the longest cached prefix in it; False if none fits."""
        shared, source = self._longest_prefix(seq)
        if not self._continue_in(source, shared, seq):
            start = self._reserve(seq.rows_needed, spare=source)
            if start is None:
                return False
            seq.start, seq.room = start, seq.rows_needed
            # The source may have been evicted for the room.
            if source and source in self.computed.num_blocks:
                if source in self.kept:
                    self.kept[source] = self.kept.pop(source)
                if self.copy_rows(source, start, shared):
                    seq.num_computed_tokens = shared
                    self.states.share(source, shared, seq)
        if not seq.admitted:  # a readmitted sequence finds its own rows, which is no reuse
            seq.num_reused = seq.num_computed_tokens
        self.states.plan(seq, self.computed.longest(seq))
        self.advance(seq)
        return True

    def advance(self, seq: Sequence) -> None:
        """Let what a sequence has computed by now be found by others."""
        self.states.advance(seq)
        if not self.reuse:
            return
        self.computed.add(seq, seq.num_computed_tokens)
        if seq.pending > 1:
            self.prefilling.add(seq, len(seq.tokens))
        elif seq in self.prefilling.num_blocks:
            self.prefilling.remove(seq)

    def prefix_in_prefill(self, seq: Sequence) -> Sequence | None:
        """A sequence in prefill that will soon share a longer prefix than any cached one.

        Then waiting is faster: of n answers to one prompt, or of requests that arrive together
        with the same system prompt, one computes the prefix and the others copy it.
        """
        if not self.prefilling.num_blocks or seq.all_logits:
            return None
        coming = self.prefilling.longest(seq)
        if self.states.pool:
            return self.states.coming(seq, self.prefilling, coming)
        if coming <= self.computed.longest(seq):
            return None
        return self.prefilling.sharing(seq, coming)[0]

    def grow(self, seq: Sequence) -> bool:
        """Widen a sequence's span, or move it; if no room is found, it is released."""
        more = seq.rows_needed - seq.room
        if self.allocator.allocate(more, at=seq.start + seq.room) is not None:
            seq.room += more
            return True
        start = self._reserve(seq.rows_needed)
        if start is None:
            self.release(seq)
            return False
        old = KVSpan(seq.tokens, seq.start, seq.room, seq.num_computed_tokens)
        seq.start, seq.room = start, seq.rows_needed
        if not self.copy_rows(old, seq.start, old.num_computed_tokens):
            self.computed.remove(seq)
            self.prefilling.remove(seq)
            self.states.drop(seq)
            seq.num_computed_tokens = 0
        self.allocator.release(old.start, old.room)
        return True

    def release(self, seq: Sequence) -> None:
        """Free a sequence's rows, except for those kept as a prefix."""
        self.computed.remove(seq)
        self.prefilling.remove(seq)
        keeps = self.reuse and not seq.spoilt and in_blocks(seq.num_computed_tokens)
        count = seq.num_computed_tokens if keeps else 0
        if count:
            hashes = block_hashes(seq, count)
            prefix = KVSpan(
                seq.tokens[:count],
                seq.start,
                count,
                count,
                adapter=seq.adapter,
                block_hashes=hashes,
            )
            self.kept[prefix] = None
            self.computed.add(prefix, count)
            self.states.hand_over(seq, prefix)
        self.states.drop(seq)
        if len(self.kept) > _MAX_PREFIXES:
            self._evict(next(iter(self.kept)))
        if seq.room > count:
            self.allocator.release(seq.start + count, seq.room - count)
        seq.room = seq.num_computed_tokens = 0

    def continuations(self, seq: Sequence) -> list[list[int]]:
        """How some of the kept texts go on that begin with most of a sequence's tokens."""
        known = self.computed.longest(seq) if self.reuse else 0
        if 2 * known < len(seq.tokens):
            return []
        alike = [span for span in self.computed.sharing(seq, known) if span in self.kept]
        return [span.tokens[known:][:_MAX_CONTINUED] for span in alike[:_MAX_CONTINUATIONS]]

    def free_slots(self, work: ScheduledBatch) -> None:
        """Free as many slots for states as a step takes, giving up kept prefixes for them."""
        for prefix in self.states.free(work, self.kept):
            self._evict(prefix)

    def _longest_prefix(self, seq: Sequence) -> tuple[int, KVSpan | None]:
        """The most tokens of a sequence that a span holds already, and that span."""
        if not self.reuse or seq.all_logits:
            return 0, None
        if self.states.pool:
            return self.states.index.longest(seq)
        known = self.computed.longest(seq)
        longest, source = 0, None
        for span in self.computed.sharing(seq, known):
            count = common_prefix(span, seq, known)
            if count > longest:
                longest, source = count, span
        return longest, source

    def _continue_in(self, prefix: KVSpan | None, shared: int, seq: Sequence) -> bool:
        """Take over the rows of a kept prefix that is shared whole, if those behind are free."""
        if prefix is None or prefix not in self.kept or shared < prefix.num_computed_tokens:
            return False
        more = seq.rows_needed - prefix.room
        if self.allocator.allocate(more, at=prefix.start + prefix.room) is None:
            return False
        seq.start, seq.room, seq.num_computed_tokens = prefix.start, seq.rows_needed, shared
        del self.kept[prefix]
        self.computed.remove(prefix)
        self.states.hand_over(prefix, seq)
        return True

    def _reserve(self, size: int, spare: KVSpan | None = None) -> int | None:
        """Allocate rows, evicting kept prefixes as needed, `spare` last; None if they are few."""
        start = self.allocator.allocate(size)
        if start is not None:
            return start
        if self.allocator.num_free + sum(span.room for span in self.kept) < size:
            return None
        trial = self.allocator.copy()
        for span in sorted(self.kept, key=lambda span: span is spare):
            trial.release(span.start, span.room)
            start = trial.allocate(size)
            if start is not None:
                break
        if start is None:
            return None
        for span in [span for span in self.kept if start <= span.start < start + size]:
            self._evict(span)
        return self.allocator.allocate(size, at=start)

    def _evict(self, span: KVSpan) -> None:
        del self.kept[span]
        self.computed.remove(span)
        self.states.drop(span)
        self.allocator.release(span.start, span.room)
