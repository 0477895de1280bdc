"""A decoder layer in few operations; and which layers are replaced: those that are no more."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch

from engine.fused import FusedMLP, RMSNorm
from engine.fused_attention import FusedAttention, Turns, can_be_fused
from engine.step import Step

# By how much a layer's result may differ, relatively: 8 bits round activations to 14.
TOLERANCE = 1e-3

PARTS = {
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
        for name in PARTS:
            setattr(self, name, getattr(module, name))
        # By which some models choose what they give their layers.
        self.attention_type = getattr(module, "attention_type", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: Step,
        **_: Any,
    ) -> torch.Tensor:
        """By transformers' interface, [1, tokens, width]."""
        x = hidden_states[0]
        normed = self.input_layernorm.forward(x)
        x = self.self_attn.attend(normed, position_embeddings, step).add_(x)
        normed = self.post_attention_layernorm.forward(x)
        return self.mlp.forward(normed).add_(x)[None]


def is_plain(module: Any) -> bool:
    """Whether a module looks like such a layer, all of whose parts have been replaced."""
    return {name: type(child) for name, child in module.named_children()} == PARTS


class Comparison:
    """Makes fused modules in a forward pass, and keeps those that compute what the model's do."""

    def __init__(self, make: Callable[[Any, dict[str, Any]], torch.nn.Module | None]):
        self.make = make
        self.alike: dict[str, torch.nn.Module] = {}

    def hear(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """What a module was given and gave, as a forward hook is told."""
        if not {"position_embeddings", "step"} <= kwargs.keys():
            return
        fused = self.make(module, kwargs)
        if fused is None:
            return
        step = copy(kwargs["step"])  # it counts how often a layer is computed
        found = fused(*args, **kwargs | {"step": step})
        if type(found) is type(output) and differ(found, output) < TOLERANCE:
            self.alike[name] = fused


def differ(found: Any, wanted: Any) -> float:
    """By how much two modules' outputs differ, relatively; attention gives a pair."""
    if isinstance(wanted, tuple):
        found, wanted = found[0], wanted[0]
    return float((found - wanted).norm() / wanted.norm())


def replace(
    model: Any,
    fits: Callable[[Any], bool],
    make: Callable[[Any, dict[str, Any]], torch.nn.Module | None],
    run: Callable[[], Any],
) -> None:
    """Replace the modules that fit, where that computes the same in a forward pass.

    `make` has a module and its keyword arguments; None where it sees by these that it cannot be.
    """
    comparison = Comparison(make)
    hooks = [
        module.register_forward_hook(partial(comparison.hear, name), with_kwargs=True)
        for name, module in model.named_modules()
        if fits(module)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, fused in comparison.alike.items():
        model.set_submodule(name, fused)


def fuse_layers(model: Any, run: Callable[[], Any]) -> None:
    """Replace a model's attention, and then its layers, where it computes the same.

    `run` is a forward pass of several tokens, whose layers are told its step.
    """
    turns = Turns()

    def attention(module: Any, kwargs: dict[str, Any]) -> FusedAttention | None:
        if kwargs["position_embeddings"][0].shape[-1] != module.head_dim:
            return None  # a part of each head is turned
        scoring = kwargs["step"].pool.layers[module.layer_idx].scoring
        return FusedAttention(module, scoring, turns)

    replace(model, can_be_fused, attention, run)
    replace(model, is_plain, lambda module, _: FusedLayer(module), run)
