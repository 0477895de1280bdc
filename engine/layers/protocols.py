"""The kinds of a model's modules that are replaced, by what all families' share in transformers."""

from typing import Any, Protocol

import torch


class AttentionModule(Protocol):
    """A layer of attention: hidden states [1, tokens, width] to the same, and None."""

    layer_idx: int
    head_dim: int
    # Linear layers, or what stands in for them.
    q_proj: Any  # [tokens, width] to [tokens, query heads * head_dim]
    k_proj: Any  # [tokens, width] to [tokens, kv heads * head_dim], as v_proj
    v_proj: Any
    o_proj: Any  # [tokens, query heads * head_dim] to [tokens, width]


class GatedMLP(Protocol):
    """A gated MLP (arXiv 2002.05202): down(act(gate(x)) * up(x)), of [..., width]."""

    gate_proj: Any  # to [..., inner], as up_proj
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """[..., width] to the same."""


class ExpertStack(Protocol):
    """A mixture's experts, gated MLPs, in one tensor a product."""

    gate_up_proj: torch.Tensor  # [experts, 2 * inner, width]
    down_proj: torch.Tensor  # [experts, width, inner]
    act_fn: Any

    def __call__(
        self, x: torch.Tensor, choices: torch.Tensor, weights: torch.Tensor, /
    ) -> torch.Tensor:
        """[tokens, width] to the same, by each token's experts [tokens, chosen] and weights."""
