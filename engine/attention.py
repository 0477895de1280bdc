"""Attention over packed tokens: each sequence's reads the rows of its own span and no others.

The model's own cache is not used: `packed_attention` writes the new rows and reads the old ones.
"""

from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from engine.errors import StartError
from engine.sequence import Work

if TYPE_CHECKING:
    from engine.step import Step

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
    is_prefill: bool = True

    @classmethod
    def of(cls, work: Work, token: int) -> Self:
        ((span, new),) = work
        total = span.num_cached + new
        places = torch.arange(total)
        rows = slice(span.start, span.start + total)
        return cls(slice(token, token + new), rows, places <= places[-new:, None])

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
        mask = self.mask.repeat(num_heads // num_groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return out[0].unflatten(1, (-1, new)).permute(2, 0, 1, 3).flatten(1, 2)


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


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: "Step",
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each group's tokens to their own rows, by transformers' interface.

    Takes [1, heads, tokens, width], returns [1, tokens, heads, width]. Raises StartError for
    options that it does not implement.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise StartError(f"the model's attention uses {name}, which this server does not do")
    step.attended += 1
    here = step.on(query.device)
    layer = step.pool.layers[module.layer_idx]
    query = query[0].transpose(0, 1)
    if keeps_latent(module):
        rows, _ = layer.write(here.write, torch.cat([key, value], dim=-1), None)
        parts = [
            attend_latent(module, group, query[group.tokens], group.select(rows), scaling)
            for group in here.groups
        ]
    else:
        keys, values = layer.write(here.write, key, value)
        parts = [
            group.attend(query[group.tokens], group.select(keys), group.select(values), scaling)
            for group in here.groups
        ]
    return torch.cat(parts)[None], None


def attend_latent(
    module: Any, group: Group, query: torch.Tensor, rows: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Multi-head latent attention over rows [rows, 1, rank + rope width]: latent, rotated key.

    In prefill, keys and values are expanded from the latents, as many queries share them. In
    decode that would dominate the step, so the up-projections are absorbed into the query and
    the output instead: q · (W c) = (Wᵀ q) · c (section 2.1.2 of arXiv 2405.04434, DeepSeek-V2).
    """
    rank = module.kv_lora_rank
    if group.is_prefill:
        given = (x.transpose(0, 1)[None] for x in (rows[..., :rank], rows[..., rank:]))
        key, value = (x[0].transpose(0, 1) for x in type(module).expand_kv(module, *given))
        return group.attend(query, key, value, scale)
    widths = [module.qk_nope_head_dim, module.v_head_dim]
    make_key, make_value = module.kv_b_proj.weight.unflatten(0, (-1, sum(widths))).split(widths, 1)
    plain, turned = query.split([widths[0], rows.shape[-1] - rank], dim=-1)
    query = torch.cat([torch.einsum("thw,hwr->thr", plain, make_key), turned], dim=-1)
    out = group.attend(query, rows, rows[..., :rank], scale)
    return torch.einsum("thr,hwr->thw", out, make_value)


def keep_latent(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces MLA's expand_kv: the cache then holds latents, and attend_latent expands them."""
    return latent, rotated


def keeps_latent(module: Any) -> bool:
    return getattr(module, "expand_kv", None) is keep_latent


def can_absorb(module: Any) -> bool:
    """Whether a module is MLA whose up-projection is a plain matrix, loaded on this device."""
    up = getattr(module, "kv_b_proj", None)
    plain = type(up) is torch.nn.Linear and up.bias is None and not up.weight.is_meta
    return plain and hasattr(module, "expand_kv")


def use_packed_attention(model: Any) -> None:
    """Let a model's layers call `packed_attention`; those of MLA then cache their latents."""
    AttentionInterface.register("packed", packed_attention)
    # cuDNN makes a plan for each new length, and copied keys have a new one at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if can_absorb(module):
            module.expand_kv = keep_latent
    model.set_attn_implementation("packed")
