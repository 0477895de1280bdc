"""An attention layer in few operations, for models whose products are packed for a CPU.

Queries, keys and values are one product already (engine.layers.merged); here the queries and keys
of all heads are also turned together.
"""

from inspect import signature
from typing import Any, TypeGuard

import torch

from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import Scoring
from engine.attention.interface import attend_rows
from engine.layers.merged import PRODUCTS, MergedPart, RMSNorm
from engine.layers.protocols import AttentionModule


class RotaryCache:
    """Rotary embeddings (arXiv 2104.09864) as complex numbers, made once a step for all layers."""

    def __init__(self) -> None:
        self.given: torch.Tensor | None = None
        self.turns = torch.empty(0)

    def of(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """From two [1, tokens, width], the halves of each the same, to [tokens, 1, width / 2]."""
        if cos is not self.given:
            half = cos.shape[-1] // 2
            self.turns = torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])
            self.given = cos
        return self.turns


class OneProductAttention(torch.nn.Module):
    """A layer of attention whose queries, keys and values are one product."""

    def __init__(self, module: AttentionModule, scoring: Scoring, product: Any):
        super().__init__()
        self.layer_idx = module.layer_idx
        self.scoring = scoring
        self.product = product
        self.o_proj = module.o_proj
        self.width = module.head_dim
        # The numbers of heads.
        self.counts = [getattr(module, name).out_features // self.width for name in PRODUCTS]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: ForwardBatch,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """By transformers' interface, [1, tokens, width]."""
        return self.attend(hidden_states[0], position_embeddings, step)[None], None

    def attend(
        self, x: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor], step: ForwardBatch
    ) -> torch.Tensor:
        """The same of [tokens, width], for embeddings of the positions."""
        raise NotImplementedError


class FusedAttention(OneProductAttention):
    """A layer of plain attention with rotary embeddings, norms of each head included.

    Each pair of a head's numbers that is turned together is stored side by side, other than in
    transformers, where it is half a head apart. Keys and queries have the same order.
    """

    def __init__(self, module: AttentionModule, scoring: Scoring, turns: RotaryCache):
        super().__init__(module, scoring, module.q_proj.shared.product)
        self.turns = turns
        self.norm = _head_norm(module, *self.counts[:2])

    def attend(
        self, x: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor], step: ForwardBatch
    ) -> torch.Tensor:
        """The same of [tokens, width], for embeddings of the positions."""
        queries, keys, values = self.counts
        heads = self.product.forward(x).view(-1, queries + keys + values, self.width)
        turning = heads.narrow(1, 0, queries + keys)
        value = heads.narrow(1, queries + keys, values)
        if self.norm is not None:
            turning = self.norm.forward(turning)
        pairs = torch.complex(*turning.chunk(2, -1)).mul_(self.turns.of(*embeddings))
        turned = torch.view_as_real(pairs).flatten(2)
        query, key = turned.narrow(1, 0, queries), turned.narrow(1, queries, keys)
        out = attend_rows(step, self.layer_idx, query, key, value, self.scoring)
        return self.o_proj.forward(out.flatten(1))


def _head_norm(module: Any, queries: int, keys: int) -> RMSNorm | None:
    """One norm for the heads of queries and keys, where a module has one for each."""
    if not hasattr(module, "q_norm"):
        return None
    norms = module.q_norm, module.k_norm
    weights = [n.weight.expand(count, -1) for n, count in zip(norms, (queries, keys), strict=True)]
    return RMSNorm(torch.nn.Parameter(torch.cat(weights)), module.q_norm.eps)


def is_plain_attention(module: Any, norm: type) -> TypeGuard[AttentionModule]:
    """Whether a module looks like attention and no more; `norm` is the type of norms as ours."""
    parts: list[Any] = [getattr(module, name, None) for name in PRODUCTS]
    if None in parts or not hasattr(module, "head_dim"):
        return False
    # Where it is told positions, it does more with them than to turn heads.
    if "position_ids" in signature(type(module).forward).parameters:
        return False
    if module.head_dim % 2 or any(part.out_features % module.head_dim for part in parts):
        return False
    others = {name for name, _ in module.named_children()} - set(PRODUCTS)
    if others == {"o_proj"}:
        return True
    norms: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if others != {"o_proj", "q_norm", "k_norm"} or any(type(n) is not norm for n in norms):
        return False
    # Of each head, and not of all together.
    return {(n.eps, *n.weight.shape) for n in norms} == {(norms[0].eps, module.head_dim)}


def can_be_fused(module: Any) -> TypeGuard[AttentionModule]:
    """Whether a module looks like plain attention, with packed products, and norms as ours."""
    packed = all(isinstance(getattr(module, name, None), MergedPart) for name in PRODUCTS)
    return packed and is_plain_attention(module, RMSNorm)
