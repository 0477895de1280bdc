"""Attention of packed tokens to the cache: each sequence's reads the rows of its own span alone."""

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F

from engine.sequence import KVSpan, ScheduledBatch

# The most numbers of a mask, or of scores where torch's kernels do not keep these to themselves. A
# chunk's of a long text would take gigabytes, which nothing has reserved.
_MAX_SCORES = 2**24
# On a CPU, reading so many rows for nothing costs about what a call of sdpa does.
PADDING = 128


class Scoring(NamedTuple):
    """How a layer's queries score keys."""

    scale: float | None = None
    window: int | None = None  # the most keys that a query sees, its own token's the last
    softcap: float | None = None  # scores s become c tanh(s / c), as Gemma 2's (arXiv 2408.00118)
    # A score for each query head beside the keys', whose weight goes to no value, as gpt-oss's.
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's kernels do it."""
        return self.softcap is None and self.sinks is None


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of [batch, kv heads, queries, width], a mask for all that may not be seen.

    A key head's queries are those of the query heads that share it, one head after the other.
    """
    if scoring.is_plain:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scoring.scale)
    most = max(1, _MAX_SCORES // (query[0, ..., 0].numel() * key.shape[2]))
    if most >= len(query):
        return _scored_product(query, key, value, mask, scoring)
    each = zip(query.split(most), key.split(most), value.split(most), strict=True)
    masks = repeat(mask) if mask is None or len(mask) < len(query) else mask.split(most)
    return torch.cat([_scored_product(*x, part, scoring) for x, part in zip(each, masks)])  # noqa: B905


def _scored_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """The same with scores that are held, for what torch's kernels do not do to them."""
    scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = (query @ key.mT).float() * scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().unflatten(0, (key.shape[1], -1))
        each = sinks.repeat_interleave(query.shape[2] // sinks.shape[1], dim=1)
        scores = torch.cat([scores, each[..., None].expand(len(scores), -1, -1, -1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def added(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to be added to scores: -inf for what is hidden."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


class Group(Protocol):
    """Part of a step's tokens, whose attention is one call or one loop."""

    tokens: slice  # of the step's packed tokens

    @property
    def is_prefill(self) -> bool:
        """Whether there are several tokens of a sequence."""

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        """The rows that `attend` takes, of a layer's [rows, heads, width]."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Attention of queries [tokens, heads, width] to the selected rows."""


class ChunkAttention(NamedTuple):
    """One chunk of a prompt; a span is contiguous, so its rows need no copy."""

    tokens: slice
    rows: slice
    mask: torch.Tensor  # bool, [new, total], causal and aligned bottom-right
    # As sdpa takes it, by how many query heads share a key head, and by the window.
    masks: dict[tuple[int, int | None], torch.Tensor]
    is_prefill: bool = True

    @classmethod
    def of(cls, work: ScheduledBatch, token: int) -> Self:
        ((span, new),) = work
        total = span.num_computed_tokens + new
        places = torch.arange(total)
        rows = slice(span.start, span.start + total)
        return cls(slice(token, token + new), rows, places <= places[-new:, None], {})

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool[self.rows]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        new, num_heads = query.shape[:2]
        sharing = num_heads // key.shape[1]
        reach = len(key) if scoring.window is None else min(len(key), new + scoring.window - 1)
        most = max(1, _MAX_SCORES // (reach * (sharing if scoring.is_plain else num_heads)))
        if most >= new:
            return self._attend(query, key, value, scoring)
        before = len(key) - new
        parts = []
        for first in range(0, new, most):
            last = min(new, first + most)
            part = self._replace(mask=self.mask[first:last, : before + last], masks={})
            seen = key[: before + last], value[: before + last]
            parts.append(part._attend(query[first:last], *seen, scoring))
        return torch.cat(parts)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Attention of tokens for which there is room at once, whose mask this one has."""
        new, num_heads = query.shape[:2]
        num_groups = key.shape[1]
        if scoring.window is not None:  # none of the new tokens sees what lies before
            seen = new + scoring.window - 1
            key, value = key[-seen:], value[-seen:]
        key, value = (x.transpose(0, 1)[None] for x in (key, value))
        # The query heads of a group become the query's length, [1, kv heads, sharing * new, width],
        # so that no key head is repeated: enable_gqa with a mask is slow on CUDA.
        query = query.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]
        mask = self._mask(num_heads // num_groups, scoring.window, query)
        out = _scaled_dot_product(query, key, value, mask, scoring)
        return out[0].unflatten(1, (-1, new)).permute(2, 0, 1, 3).flatten(1, 2)

    def _mask(self, sharing: int, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """The mask for stacked queries, made once a step and not in each layer.

        On a CPU it is to be added, as sdpa would otherwise convert it each time.
        """
        if (sharing, window) not in self.masks:
            mask = self.mask
            if window is not None:
                new, total = mask.shape
                mask = mask.triu(total - new - window + 1)[:, -(new + window - 1) :]
            mask = mask.repeat(sharing, 1)
            if query.device.type == "cpu":
                mask = added(~mask, query.dtype)
            self.masks[sharing, window] = mask
        return self.masks[sharing, window]


class SlicedAttention(NamedTuple):
    """Decode tokens of sequences whose spans lie at equal distances: one view, and no copy.

    A shorter span is read on up to the length of the longest, and what is not its own is masked.
    """

    tokens: slice
    start: int  # the first span's first row
    distance: int  # from a span's first row to the next one's
    counts: tuple[int, ...]  # the number of rows of each
    hidden: torch.Tensor | None  # bool, [spans, 1, 1, longest]; none if all are as long
    # As sdpa adds it, by dtype and window, made once a step.
    masks: dict[tuple[torch.dtype, int | None], torch.Tensor]
    is_prefill: bool = False

    @classmethod
    def of(cls, work: ScheduledBatch, token: int) -> Self:
        starts = [span.start for span, _ in work]
        counts = tuple(span.num_computed_tokens + 1 for span, _ in work)
        distance = starts[1] - starts[0] if len(work) > 1 else 0
        hidden = None
        if min(counts) < max(counts):
            hidden = torch.arange(max(counts)) >= torch.tensor(counts)[:, None, None, None]
        return cls(slice(token, token + len(work)), starts[0], distance, counts, hidden, {})

    @staticmethod
    def runs(work: ScheduledBatch) -> Iterator[ScheduledBatch]:
        """Work in the order of its rows, cut where the distance changes or padding would cost."""
        run: list[tuple[KVSpan, int]] = []
        shortest = longest = 0
        for span, new in work:
            count = span.num_computed_tokens + 1
            low, high = min(shortest, count), max(longest, count)
            # A span has no more rows than its room, and behind the last one the pool may end.
            if not (_is_next(span, run) and high - low <= PADDING and high <= span.room):
                if run:
                    yield run
                run, low, high = [], count, count
            run.append((span, new))
            shortest, longest = low, high
        yield run

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        # The query heads of a group become the query's length, [tokens, kv heads, sharing, width].
        query = query.unflatten(1, (key.shape[1], -1))
        # All lie before it that no token of the group sees.
        first = 0 if scoring.window is None else max(0, min(self.counts) - scoring.window)
        mask = self._mask(query.dtype, first, scoring.window)
        key, value = self._view(key, first), self._view(value, first)
        return _scaled_dot_product(query, key, value, mask, scoring).flatten(1, 2)

    def _view(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Rows [rows, heads, width] as [spans, heads, longest, width], each from its `first` on."""
        row, head, one = rows.stride()
        size = (len(self.counts), rows.shape[1], max(self.counts) - first, rows.shape[2])
        offset = rows.storage_offset() + (self.start + first) * row
        return rows.as_strided(size, (self.distance * row, head, row, one), offset)

    def _mask(self, dtype: torch.dtype, first: int, window: int | None) -> torch.Tensor | None:
        if self.hidden is not None and (dtype, window) not in self.masks:
            hidden = self.hidden
            if window is not None:
                counts = torch.tensor(self.counts, device=hidden.device)[:, None, None, None]
                places = torch.arange(hidden.shape[-1], device=hidden.device)
                hidden = (hidden | (places < counts - window))[..., first:]
            self.masks[dtype, window] = added(hidden, dtype)
        return self.masks.get((dtype, window))


def _is_next(span: KVSpan, run: ScheduledBatch) -> bool:
    """Whether a span lies behind the last of a run, as far as that one behind the one before."""
    if len(run) < 2:
        return len(run) == 1
    (before, _), (last, _) = run[-2:]
    return span.start - last.start == last.start - before.start


class CopiedAttention(NamedTuple):
    """Decode tokens of several sequences, whose rows are copied side by side and padded."""

    tokens: slice
    rows: torch.Tensor  # of the pool, [batch * longest]
    mask: torch.Tensor  # bool, [batch, 1, 1, longest]
    is_prefill: bool = False

    @classmethod
    def of(cls, work: ScheduledBatch, token: int) -> Self:
        totals = torch.tensor([[span.num_computed_tokens + 1] for span, _ in work])
        longest = torch.arange(int(totals.max()))
        # A shorter span is padded with its last row, which is masked.
        rows = torch.tensor([[span.start] for span, _ in work]) + longest.minimum(totals - 1)
        mask = (longest < totals)[:, None, None]
        return cls(slice(token, token + len(work)), rows.flatten(), mask)

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool.index_select(0, self.rows)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        key, value = (x.unflatten(0, (len(query), -1)).transpose(1, 2) for x in (key, value))
        query = query.unflatten(1, (key.shape[1], -1))
        mask = self.mask
        if scoring.window is not None:
            # What lies before the window is what the mask shows of a span that much shorter.
            before = mask[..., scoring.window :]
            mask = mask ^ F.pad(before, (0, mask.shape[-1] - before.shape[-1]))
        out = _scaled_dot_product(query, key, value, mask, scoring)
        return out.flatten(1, 2)
