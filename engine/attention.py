"""Attention over packed tokens.

Every step is one forward pass over packed tokens: one token of each sequence in decode, and chunks
of the prompts in prefill. Each sequence's attention reads the rows of its own span and no others.
"""

from copy import copy
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from engine.errors import StartError
from engine.sequence import Span, Work

# The FlashAttention kernel itself: torch's wrapper, varlen_attn, has no seqused_k before 2.13, and
# on some GPUs dispatches to cuDNN, which does not support it.
flash_attention: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)


class Gathered(NamedTuple):
    """Part of a step: keys and values are copied side by side for sdpa, on any device.

    Either decode tokens of several sequences, padded to the longest, or one prefill chunk.
    """

    batch: int
    tokens: slice  # of the step's packed tokens
    rows: slice  # of the rows that the step reads
    mask: torch.Tensor | None  # bool, [batch, 1, 1, longest] or [new, total]

    @classmethod
    def of(cls, work: Work, token: int, row: int) -> tuple[Self, torch.Tensor]:
        """The group for this work, and the pool's rows to copy for it."""
        new, totals = work[0][1], torch.tensor([[span.num_cached + new] for span, new in work])
        longest = torch.arange(int(totals.max()))
        # A shorter span is padded with its last row, which is masked.
        rows = torch.tensor([[span.start] for span, _ in work]) + longest.minimum(totals - 1)
        mask = None
        if new > 1:
            mask = longest <= longest[-new:, None]
        elif len(work) > 1:
            mask = (longest < totals)[:, None, None]
        tokens = slice(token, token + len(work) * new)
        return cls(len(work), tokens, slice(row, row + rows.numel()), mask), rows.flatten()

    @property
    def is_prefill(self) -> bool:
        return self.tokens.stop - self.tokens.start > self.batch

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        key, value = (x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in (key, value))
        # The query heads of a group become the query's length, [batch, kv heads, sharing * new,
        # width], so that no key head is repeated: enable_gqa with a mask is slow on CUDA.
        query = query.unflatten(1, (key.shape[1], -1))
        if not self.is_prefill:
            out = F.scaled_dot_product_attention(query, key, value, self.mask, scale=scale)
            return out.flatten(1, 2)
        assert self.mask is not None
        new, sharing = len(query), query.shape[2]
        stacked, mask = query.permute(1, 2, 0, 3).flatten(1, 2)[None], self.mask.repeat(sharing, 1)
        out = F.scaled_dot_product_attention(stacked, key, value, mask, scale=scale)
        return out[0].unflatten(1, (sharing, new)).permute(2, 0, 1, 3).flatten(1, 2)


class InPlace(NamedTuple):
    """Part of a step: FlashAttention reads keys and values in place in the pool, on CUDA.

    Either all decode tokens or all prefill chunks; sizes are named as in torch's varlen_attn.
    """

    tokens: slice
    max_q: int
    max_k: int
    cu_seq_q: torch.Tensor  # int32, [sequences + 1]: where each one's packed tokens begin
    cu_seq_k: torch.Tensor  # int32, [sequences + 1]: where each one's span begins, in order
    seqused_k: torch.Tensor  # int32, [sequences]: how many of its rows are read
    rows: slice = slice(None)  # attend gets all of the pool

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


class Step:
    """The inputs of one forward pass; a plain object, which accelerate's hooks leave alone."""

    def __init__(self, work: Work, in_place: bool = False):
        self.in_place = in_place
        # Work that agrees in the first part of the key shares a call of attention: prefill in
        # place, decode in place, or gathered decode tokens of similar lengths.
        order = sorted(range(len(work)), key=lambda n: self._neighbourhood(*work[n]))
        work = [work[n] for n in order]
        places = [(span.start, span.num_cached + n) for span, new in work for n in range(new)]
        ends = dict(zip(order, accumulate(new for _, new in work), strict=True))
        # Python lists first: a step has too few tokens for tensor operations to be faster.
        self.ids = torch.tensor([i for span, n in work for i in span.tokens[span.num_cached :][:n]])
        self.positions = torch.tensor([position for _, position in places])
        # The pool's row of each packed token, and the index of each sequence's last token.
        self.write = torch.tensor([start + position for start, position in places])
        self.last = torch.tensor([ends[n] - 1 for n in range(len(work))])
        self.groups: list[Gathered | InPlace] = []
        reads = [torch.empty(0, dtype=torch.long)]
        for _, part in groupby(work, lambda item: self._neighbourhood(*item)[0]):
            token = self.groups[-1].tokens.stop if self.groups else 0
            if in_place:
                self.groups.append(InPlace.of(list(part), token))
            else:
                group, rows = Gathered.of(list(part), token, sum(map(len, reads)))
                self.groups.append(group)
                reads.append(rows)
        self.read = torch.cat(reads)  # the pool's rows to copy, for gathered groups
        self.attended = 0
        self._copies: dict[torch.device, Step] = {}

    def _neighbourhood(self, span: Span, new: int) -> tuple[tuple[bool, int], int]:
        if self.in_place:
            return (new > 1, 0), span.start
        # A prefill chunk is always alone; decode lengths agree within a factor of two.
        alike = span.start if new > 1 else (span.num_cached + 1).bit_length()
        return (new > 1, alike), span.num_cached

    def on(self, device: torch.device) -> "Step":
        """The step with its tensors on a device, copied there once for all layers."""
        if device not in self._copies:
            there = self._copies[device] = copy(self)
            there._copies = {}  # a shared dict would be a reference cycle that holds GPU memory
            for name in ("ids", "positions", "write", "read", "last", "groups"):
                here = getattr(self, name)
                setattr(there, name, send_to_device(here, device, non_blocking=True))
        return self._copies[device]


class SpanLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, width] each, wherever the layer lives."""

    def __init__(self, pool: "Pool"):
        super().__init__()
        self.pool = pool

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows = self.pool.rows + 1  # the last one is for padding
        shapes = [(rows, x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        # Not zeroed: no row is read before it is written, and untouched pages cost no memory.
        self.keys, self.values = map(key_states.new_empty, shapes)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's rows; return the rows it reads, or all: [1, heads, rows, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.pool.step.on(key_states.device)
        self.keys.index_copy_(0, step.write, key_states[0].transpose(0, 1))
        self.values.index_copy_(0, step.write, value_states[0].transpose(0, 1))
        keys, values = self.keys, self.values
        if not step.in_place:
            keys, values = keys.index_select(0, step.read), values.index_select(0, step.read)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.pool.rows


class Pool(Cache):
    """The KV cache of every sequence; each layer's rows are created on first use."""

    step: Step

    def __init__(self, num_layers: int, rows: int):
        self.rows = rows
        super().__init__(layers=[SpanLayer(self) for _ in range(num_layers)])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` rows of every layer."""
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                x[target : target + count] = x[source : source + count]


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: Step,
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
    latent = getattr(module, "expand_kv", None) is keep_latent
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    parts = []
    for group in step.on(query.device).groups:
        attend = partial(attend_latent, module, group) if latent else group.attend
        parts.append(attend(query[group.tokens], key[group.rows], value[group.rows], scaling))
    return torch.cat(parts)[None], None


def attend_latent(
    module: Any,
    group: Gathered | InPlace,
    query: torch.Tensor,
    latent: torch.Tensor,
    rotated: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Multi-head latent attention over latents [rows, 1, rank] and rotated keys [rows, 1, width].

    In prefill, keys and values are expanded from the latents, as many queries share them. In
    decode that would dominate the step, so the up-projections are absorbed into the query and
    the output instead: q · (W c) = (Wᵀ q) · c (section 2.1.2 of arXiv 2405.04434, DeepSeek-V2).
    """
    if group.is_prefill:
        given = (x.transpose(0, 1)[None] for x in (latent, rotated))
        key, value = (x[0].transpose(0, 1) for x in type(module).expand_kv(module, *given))
        return group.attend(query, key, value, scale)
    widths = [module.qk_nope_head_dim, module.v_head_dim]
    make_key, make_value = module.kv_b_proj.weight.unflatten(0, (-1, sum(widths))).split(widths, 1)
    plain, turned = query.split([widths[0], rotated.shape[-1]], dim=-1)
    query = torch.cat([torch.einsum("thw,hwr->thr", plain, make_key), turned], dim=-1)
    out = group.attend(query, torch.cat([latent, rotated], dim=-1), latent, scale)
    return torch.einsum("thr,hwr->thw", out, make_value)


def keep_latent(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces MLA's expand_kv: the cache then holds latents, and attend_latent expands them."""
    return latent, rotated


def can_absorb(module: Any) -> bool:
    """Whether a module is MLA whose up-projection is a plain matrix, loaded on this device."""
    up = getattr(module, "kv_b_proj", None)
    plain = type(up) is torch.nn.Linear and up.bias is None and not up.weight.is_meta
    return plain and hasattr(module, "expand_kv")


def register_attention() -> None:
    """Make "packed" known to transformers as an attention implementation."""
    AttentionInterface.register("packed", packed_attention)
    # cuDNN makes a plan for each new length, and gathered keys have a new one at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
