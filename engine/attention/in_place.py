"""Attention that reads keys and values where they lie in the pool, by kernels for CUDA."""

from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch

from engine.attention.groups import Scoring
from engine.sequence import ScheduledBatch

# The FlashAttention kernel itself: torch's wrapper, varlen_attn, has no seqused_k before 2.13, and
# on some GPUs dispatches to cuDNN, which does not support it.
flash_attention: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)


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
    def of(cls, work: ScheduledBatch, token: int) -> Self:
        news = [new for _, new in work]
        starts = [span.start for span, _ in work]
        totals = [span.num_computed_tokens + new for span, new in work]
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
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        # The causal mask is aligned bottom-right. A single token needs none, and without one the
        # kernel can split long sequences over more of the card, if heads share keys.
        window = scoring.window
        if window is not None and window >= self.max_k:
            window = None
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
            scale=scoring.scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=self.seqused_k,
        )[0]
        return out

    def bounded(self, longest: int) -> Self:
        """The same for sequences of up to `longest` tokens, by which the kernel divides work."""
        return self._replace(max_k=longest)

    def overwrite(self, given: Any) -> None:
        """Take over another group's spans, in the same tensors."""
        for mine, other in ((self.cu_seq_k, given.cu_seq_k), (self.seqused_k, given.seqused_k)):
            mine.copy_(other, non_blocking=True)


class LatentAttention(NamedTuple):
    """Decode tokens of MLA, whose latents a kernel of ours reads in place in the pool, on CUDA."""

    tokens: slice
    starts: torch.Tensor  # int32, [sequences]: where each one's span begins
    counts: torch.Tensor  # int32, [sequences]: how many of its rows are read
    is_prefill: bool = False

    @classmethod
    def of(cls, work: ScheduledBatch, token: int) -> Self:
        numbers = (
            [span.start for span, _ in work],
            [span.num_computed_tokens + 1 for span, _ in work],
        )
        starts, counts = (torch.tensor(x, dtype=torch.int32) for x in numbers)
        return cls(slice(token, token + len(work)), starts, counts)

    def select(self, pool: torch.Tensor) -> torch.Tensor:
        return pool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        from engine.kernels.cuda import latent_attention  # Triton is not everywhere

        scale = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        return latent_attention(query, key, self.starts, self.counts, value.shape[-1], scale)

    def bounded(self, longest: int) -> Self:
        """The same for sequences of up to `longest` tokens."""
        return self

    def overwrite(self, given: Any) -> None:
        """Take over another group's numbers, in the same tensors."""
        for mine, other in ((self.starts, given.starts), (self.counts, given.counts)):
            mine.copy_(other, non_blocking=True)
