"""Attention of packed tokens to the cache: each sequence's reads the rows of its own span alone."""

from itertools import accumulate
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F

from engine.sequence import Work

# The FlashAttention kernel itself: torch's wrapper, varlen_attn, has no seqused_k before 2.13, and
# on some GPUs dispatches to cuDNN, which does not support it.
flash_attention: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)


class Group(Protocol):
    """Part of a step's tokens, whose attention is one call or one loop."""

    tokens: slice  # of the step's packed tokens

    @property
    def is_prefill(self) -> bool:
        """Whether there are several tokens of a sequence."""

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        """The rows that `attend` takes, of a layer's [rows, heads, width]."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of queries [tokens, heads, width] to the selected rows."""


class ChunkAttention(NamedTuple):
    """One chunk of a prompt; a span is contiguous, so its rows need no copy."""

    tokens: slice
    rows: slice
    mask: torch.Tensor  # bool, [new, total], causal and aligned bottom-right
    masks: dict[int, torch.Tensor]  # as sdpa takes it, by how many query heads share a key head
    is_prefill: bool = True

    @classmethod
    def of(cls, work: Work, token: int) -> Self:
        ((span, new),) = work
        total = span.num_cached + new
        places = torch.arange(total)
        rows = slice(span.start, span.start + total)
        return cls(slice(token, token + new), rows, places <= places[-new:, None], {})

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool[self.rows]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        new, num_heads = query.shape[:2]
        num_groups = key.shape[1]
        key, value = (x.transpose(0, 1)[None] for x in (key, value))
        # The query heads of a group become the query's length, [1, kv heads, sharing * new, width],
        # so that no key head is repeated: enable_gqa with a mask is slow on CUDA.
        query = query.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]
        mask = self._mask(num_heads // num_groups, query)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return out[0].unflatten(1, (-1, new)).permute(2, 0, 1, 3).flatten(1, 2)

    def _mask(self, sharing: int, query: torch.Tensor) -> torch.Tensor:
        """The mask for stacked queries, made once a step and not in each layer.

        On a CPU it is to be added, as sdpa would otherwise convert it each time.
        """
        if sharing not in self.masks:
            mask = self.mask.repeat(sharing, 1)
            if query.device.type == "cpu":
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
            self.masks[sharing] = mask
        return self.masks[sharing]


class SlicedAttention(NamedTuple):
    """Decode tokens of several sequences, one after the other, each over its own span."""

    tokens: slice
    spans: tuple[tuple[int, int], ...]  # the first row and the number of rows of each
    is_prefill: bool = False

    @classmethod
    def of(cls, work: Work, token: int) -> Self:
        spans = tuple((span.start, span.num_cached + 1) for span, _ in work)
        return cls(slice(token, token + len(work)), spans)

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        key, value = (x.transpose(0, 1)[None] for x in (key, value))
        # The query heads of a group become the query's length, [tokens, kv heads, sharing, width].
        queries = query.unflatten(1, (key.shape[1], -1)).split(1)
        outs = [
            F.scaled_dot_product_attention(
                one, key.narrow(2, start, count), value.narrow(2, start, count), scale=scale
            )
            for one, (start, count) in zip(queries, self.spans, strict=True)
        ]
        return torch.cat(outs).flatten(1, 2)


class CopiedAttention(NamedTuple):
    """Decode tokens of several sequences, whose rows are copied side by side and padded."""

    tokens: slice
    rows: torch.Tensor  # of the pool, [batch * longest]
    mask: torch.Tensor  # bool, [batch, 1, 1, longest]
    is_prefill: bool = False

    @classmethod
    def of(cls, work: Work, token: int) -> Self:
        totals = torch.tensor([[span.num_cached + 1] for span, _ in work])
        longest = torch.arange(int(totals.max()))
        # A shorter span is padded with its last row, which is masked.
        rows = torch.tensor([[span.start] for span, _ in work]) + longest.minimum(totals - 1)
        mask = (longest < totals)[:, None, None]
        return cls(slice(token, token + len(work)), rows.flatten(), mask)

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool.index_select(0, self.rows)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        key, value = (x.unflatten(0, (len(query), -1)).transpose(1, 2) for x in (key, value))
        query = query.unflatten(1, (key.shape[1], -1))
        out = F.scaled_dot_product_attention(query, key, value, self.mask, scale=scale)
        return out.flatten(1, 2)


class InPlaceAttention(NamedTuple):
    """FlashAttention reads keys and values in place in the pool, on CUDA.

    Either all decode tokens or all prefill chunks; sizes are named as in torch's varlen_attn.
    """

    tokens: slice
    max_q: int
    max_k: int
    cu_seq_q: torch.Tensor  # int32, [sequences + 1]: where each one's packed tokens begin
    cu_seq_k: torch.Tensor  # int32, [sequences + 1]: where each one's span begins, in order
    seqused_k: torch.Tensor  # int32, [sequences]: how many of its rows are read

    @classmethod
    def of(cls, work: Work, token: int) -> Self:
        news = [new for _, new in work]
        starts = [span.start for span, _ in work]
        totals = [span.num_cached + new for span, new in work]
        # The last offset, the end of the last span, is not used: seqused_k gives the lengths.
        numbers = [*accumulate(news, initial=0)], [*starts, starts[-1]], totals
        cu_seq_q, cu_seq_k, seqused_k = (torch.tensor(x, dtype=torch.int32) for x in numbers)
        tokens = slice(token, token + sum(news))
        return cls(tokens, max(news), max(totals), cu_seq_q, cu_seq_k, seqused_k)

    @property
    def is_prefill(self) -> bool:
        return self.max_q > 1

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        # The causal mask is aligned bottom-right. A single token needs none, and without one the
        # kernel can split long sequences over more of the card, if heads share keys.
        out: torch.Tensor = flash_attention(
            query,
            key,
            value,
            self.cu_seq_q,
            self.cu_seq_k,
            self.max_q,
            self.max_k,
            0.0,  # dropout
            self.is_prefill,  # causal
            False,  # return_debug_mask
            scale=scale,
            seqused_k=self.seqused_k,
        )[0]
        return out
