"""Decoder layers in few kernels on a GPU, where the time between products goes by their number."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, TypeGuard

import torch

from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import Scoring
from engine.attention.interface import attend_pool
from engine.kernels.cuda import add_and_norm, expert_product, rotate_and_store, silu_and_mul
from engine.layers.experts import has_fused_experts
from engine.layers.fused_attention import OneProductAttention, is_plain_attention
from engine.layers.fused_layer import FusedLayer, scoring_of
from engine.layers.merged import PRODUCTS, looks_gated, norm_parameters
from engine.layers.protocols import AttentionModule, ExpertStack, GatedMLP
from engine.layers.quantized import QuantizedExperts, QuantizedLinear, is_int8
from engine.layers.replacing import is_alike, is_plain, replace


def _merge_linears(layers: list[Any]) -> Any:
    """One linear layer in place of several with the same input, whose weights become parts of its.

    So there is no second copy of them, whoever is used in the end.
    """
    joined = copy(layers[0])
    joined._parameters = {}
    joined.out_features = sum(layer.out_features for layer in layers)
    for name, first in layers[0]._parameters.items():
        if first is None:
            joined._parameters[name] = None
            continue
        parameters = [getattr(layer, name) for layer in layers]
        whole = torch.cat([parameter.data for parameter in parameters])
        joined._parameters[name] = torch.nn.Parameter(whole, requires_grad=False)
        for parameter, part in zip(parameters, whole.split([*map(len, parameters)]), strict=True):
            parameter.data = part
    return joined


def _can_be_joined(layers: list[Any]) -> bool:
    """Whether layers of one input are linear, and of one kind."""
    kinds = {(type(x), x.weight.dtype, x.weight.shape[1:], x.bias is None) for x in layers}
    return len(kinds) == 1 and type(layers[0]) in (torch.nn.Linear, QuantizedLinear)


class _CudaNorm(torch.nn.Module):
    """A model's RMSNorm, over the last dimension, in one kernel."""

    def __init__(self, weight: torch.nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_and_norm(x.contiguous(), None, self.weight, self.eps)

    def after(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """Of x, to which more is added first, in place."""
        return add_and_norm(x, more, self.weight, self.eps)


class CudaMLP(torch.nn.Module):
    """A gated MLP of two products and one kernel between them."""

    def __init__(self, module: GatedMLP):
        super().__init__()
        self.product = _merge_linears([module.gate_proj, module.up_proj])
        self.down_proj = module.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj.forward(silu_and_mul(self.product.forward(x)))


class CudaAttention(OneProductAttention):
    """A layer of plain attention, which turns and stores its heads in one kernel."""

    def __init__(self, module: AttentionModule, scoring: Scoring):
        super().__init__(module, scoring, _merge_linears([getattr(module, n) for n in PRODUCTS]))
        norms = [getattr(module, name) for name in ("q_norm", "k_norm") if hasattr(module, name)]
        self.norms = (norms[0].weight, norms[1].weight) if norms else None
        self.eps = norms[0].eps if norms else 0.0

    def attend(
        self, x: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor], step: ForwardBatch
    ) -> torch.Tensor:
        """The same of [tokens, width], for embeddings of the positions."""
        layer = step.enter(self.layer_idx, self.scoring)
        here = step.on(x.device)
        heads = self.product.forward(x).view(len(x), -1, self.width)
        _, keys, values = heads.split(self.counts, dim=1)
        layer.prepare(keys, values)
        cos, sin = (each[0] for each in embeddings)
        query = rotate_and_store(
            heads, cos, sin, here.write, layer.keys, layer.values, self.norms, self.eps
        )
        out = attend_pool(here, query, layer.keys, layer.values, self.scoring)
        return self.o_proj.forward(out.flatten(1))


class CudaExperts(torch.nn.Module):
    """A mixture's experts, of which a few tokens read the chosen ones where they lie."""

    # With more tokens, a product of all that chose an expert reads its weights less often.
    MAX_TOKENS = 32

    def __init__(self, experts: ExpertStack):
        super().__init__()
        self.experts = experts
        self.scales = [
            getattr(experts, f"{name}_scale", None) for name in ("gate_up_proj", "down_proj")
        ]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum what each token's experts say, [tokens, width], by weights [tokens, top k]."""
        experts = self.experts
        if len(hidden_states) > self.MAX_TOKENS:
            return experts(hidden_states, top_k_index, top_k_weights)
        gate_up_scale, down_scale = self.scales
        x = expert_product(hidden_states, experts.gate_up_proj, gate_up_scale, top_k_index)
        x = silu_and_mul(x).flatten(0, 1)
        x = expert_product(x, experts.down_proj, down_scale, top_k_index.view(-1, 1))
        x = x.view(*top_k_index.shape, -1) * top_k_weights[..., None]
        return x.sum(1).to(hidden_states.dtype)


_PARTS: dict[str, type] = {
    "input_layernorm": _CudaNorm,
    "self_attn": CudaAttention,
    "post_attention_layernorm": _CudaNorm,
    "mlp": CudaMLP,
}


class CudaLayer(FusedLayer):
    """A layer of such parts, which adds and takes the norm in one kernel."""

    post_attention_layernorm: _CudaNorm  # type: ignore[assignment]

    def compute(
        self, x: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor], step: ForwardBatch
    ) -> torch.Tensor:
        """The same of [tokens, width], for embeddings of the positions."""
        # What attention gives is ours to add to; what came in may be another's.
        added = self.self_attn.attend(self.input_layernorm.forward(x), embeddings, step)
        normed = self.post_attention_layernorm.after(added, x)
        return self.mlp.forward(normed).add_(added)


def _attention_of(module: AttentionModule, given: dict[str, Any]) -> CudaAttention | None:
    """Such attention in place of a module, if it stores the same keys.

    What attention gives is not enough: of a few tokens it may hardly depend on how these turn.
    """
    scoring = scoring_of(module, given)
    if scoring is None or "hidden_states" not in given:
        return None
    attention = CudaAttention(module, scoring)
    step = copy(given["step"])
    layer = step.pool.layer(module.layer_idx)
    wanted = layer.keys.clone()
    attention(**given | {"step": step})
    return attention if is_alike(layer.keys, wanted) else None


def _is_norm(module: Any) -> bool:
    return norm_parameters(module) is not None


def _norm_of(module: Any, _: dict[str, Any]) -> _CudaNorm | None:
    parameters = norm_parameters(module)
    return parameters and _CudaNorm(*parameters)


def _is_gated(module: Any) -> TypeGuard[GatedMLP]:
    """Whether a module may be a gated MLP, whose products can be joined."""
    return looks_gated(module) and _can_be_joined([module.gate_proj, module.up_proj])


def _is_experts(module: Any) -> TypeGuard[ExpertStack]:
    """Whether a module may be a mixture's experts, in half precision or in 8 bits."""
    if isinstance(module, QuantizedExperts):
        return is_int8(module)
    return has_fused_experts(module)


def _is_attention(module: Any) -> TypeGuard[AttentionModule]:
    """Whether a module may be plain attention, whose products can be joined."""
    plain = is_plain_attention(module, _CudaNorm)
    return plain and _can_be_joined([getattr(module, name) for name in PRODUCTS])


def fuse_on_gpu(model: Any, run: Callable[[], Any]) -> None:
    """Replace a model's norms, MLPs, experts, attention and layers, where it computes the same.

    `run` is a forward pass of several tokens, whose layers are told its step. Raises whatever
    Triton does where it cannot compile.
    """
    replace(model, _is_norm, _norm_of, run)
    replace(model, _is_gated, lambda module, _: CudaMLP(module), run)
    replace(model, _is_experts, lambda module, _: CudaExperts(module), run)
    replace(model, _is_attention, _attention_of, run)
    replace(model, partial(is_plain, parts=_PARTS), lambda module, _: CudaLayer(module), run)
