"""A decoder layer in few operations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import Scoring
from engine.layers.fused_attention import FusedAttention, RotaryCache, can_be_fused
from engine.layers.merged import FusedMLP, RMSNorm
from engine.layers.replacing import is_plain, replace

# A decoder layer's, by their names in transformers.
_PARTS: dict[str, type] = {
    "input_layernorm": RMSNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": RMSNorm,
    "mlp": FusedMLP,
}


class FusedLayer(torch.nn.Module):
    """A layer of attention and a gated MLP, each behind a norm and added to what came in."""

    input_layernorm: RMSNorm
    self_attn: FusedAttention
    post_attention_layernorm: RMSNorm
    mlp: FusedMLP

    def __init__(self, module: Any):
        super().__init__()
        for name in _PARTS:
            setattr(self, name, getattr(module, name))
        # By which some models choose what they give their layers.
        self.attention_type = getattr(module, "attention_type", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: ForwardBatch,
        **_: Any,
    ) -> torch.Tensor:
        """By transformers' interface, [1, tokens, width]."""
        return self.compute(hidden_states[0], position_embeddings, step)[None]

    def compute(
        self, x: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor], step: ForwardBatch
    ) -> torch.Tensor:
        """The same of [tokens, width], for embeddings of the positions."""
        normed = self.input_layernorm.forward(x)
        x = self.self_attn.attend(normed, embeddings, step).add_(x)
        normed = self.post_attention_layernorm.forward(x)
        return self.mlp.forward(normed).add_(x)


def fuse_layers(model: Any, run: Callable[[], Any]) -> None:
    """Replace a model's attention, and then its layers, where it computes the same.

    `run` is a forward pass of several tokens, whose layers are told its step.
    """
    turns = RotaryCache()

    def attention(module: Any, given: dict[str, Any]) -> FusedAttention | None:
        scoring = scoring_of(module, given)
        return None if scoring is None else FusedAttention(module, scoring, turns)

    replace(model, can_be_fused, attention, run)
    replace(model, partial(is_plain, parts=_PARTS), lambda module, _: FusedLayer(module), run)


def scoring_of(module: Any, given: dict[str, Any]) -> Scoring | None:
    """How attention scored keys in this step, if whole heads are turned by what it is given."""
    if not {"position_embeddings", "step"} <= given.keys() or not given["position_embeddings"]:
        return None
    if given["position_embeddings"][0].shape[-1] != module.head_dim:
        return None
    scoring: Scoring = given["step"].pool.layer(module.layer_idx).scoring
    return scoring
