"""Who owns which rows of the KV cache."""

from bisect import bisect_left, insort


class Allocator:
    """Allocates contiguous spans of the pool's rows; adjacent gaps are merged."""

    def __init__(self, rows: int):
        self.gaps = [(0, rows)]  # (first row, size), in order

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
            before = self.gaps.pop(at - 1)
            at, start, size = at - 1, before[0], before[1] + size
        self.gaps.insert(at, (start, size))
