"""A decoder layer as one call of our kernels for CPUs, which is given where its tensors lie."""

import ctypes
from typing import Any

import torch
from transformers.activations import SiLUActivation

from engine.attention.forward_batch import ForwardBatch
from engine.kernels.cpu import Layer, StepInputs, Updates, kernels
from engine.layers.cpu_linear import CpuLinear, pointer_to
from engine.layers.fused_layer import FusedLayer
from engine.layers.lora import Table

# Of numbers that the kernels read at once, on any CPU.
_VECTOR = 16


def can_be_one_call(module: Any) -> bool:
    """Whether a module is a FusedLayer that computes no more than our kernel does."""
    if type(module) is not FusedLayer:
        return False
    attention, mlp = module.self_attn, module.mlp
    queries, kv_heads, _ = attention.counts
    return (
        all(isinstance(x, CpuLinear) for x in _products_of(module))
        and isinstance(mlp.act_fn, SiLUActivation | torch.nn.SiLU)
        and attention.scoring.is_plain
        and attention.width % _VECTOR == mlp.down_proj.in_features % _VECTOR == 0
        and queries % kv_heads == 0
        and queries // kv_heads <= kernels().most_sharing()
    )


def _products_of(layer: FusedLayer) -> list[Any]:
    """A layer's products, in the order of the kernel's."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.product, attention.o_proj, mlp.product, mlp.down_proj]


class Inputs:
    """What a step's layers are told of it; keeps alive what the kernel is pointed to."""

    def __init__(
        self, step: ForwardBatch, embeddings: tuple[torch.Tensor, torch.Tensor], floats: int
    ):
        scratch = torch.empty(len(step.ids) * floats)
        tensors = step.write, step.positions, *(x[0].contiguous() for x in embeddings), scratch
        self.tensors = tensors, step.adapters
        pointers = [x.data_ptr() for x in tensors]
        threads, adapters = torch.get_num_threads(), pointer_to(step.adapters)
        self.described = StepInputs(len(step.ids), *pointers, threads, adapters)
        self.address = ctypes.addressof(self.described)


class CpuLayer(torch.nn.Module):
    """What a FusedLayer computes, by one call.

    A token's result does not depend on what else is in the step, to the last bit.
    """

    def __init__(self, layer: FusedLayer):
        super().__init__()
        self.layer = layer
        # What the description points to besides the products, which keep their own.
        norms = layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.norm
        self.norms = [None if norm is None else norm.weight.detach() for norm in norms]
        self.attention_type = layer.attention_type
        attention = layer.self_attn
        self.described = self._describe()
        self.address = ctypes.addressof(self.described)
        self.floats = kernels().scratch_floats(self.address)
        self.function = kernels().decoder_layer
        # What shows the cache how large a row is.
        self.row = torch.empty(1, attention.counts[1], attention.width)

    def _describe(self) -> Layer:
        """The layer for the kernel."""
        layer, attention = self.layer, self.layer.self_attn
        scale = attention.scoring.scale
        pointers = [pointer_to(weight) for weight in self.norms]
        products = [product.described for product in _products_of(layer)]
        return Layer(
            **dict(zip(("input_norm", "post_norm", "head_norm"), pointers, strict=True)),
            **dict(zip(("qkv", "o", "gate_up", "down"), products, strict=True)),
            width=layer.input_layernorm.weight.numel(),
            inner=layer.mlp.down_proj.in_features,
            queries=attention.counts[0],
            kv_heads=attention.counts[1],
            head_width=attention.width,
            window=attention.scoring.window or 0,
            input_eps=layer.input_layernorm.eps,
            post_eps=layer.post_attention_layernorm.eps,
            head_eps=0.0 if attention.norm is None else attention.norm.eps,
            scale=attention.width**-0.5 if scale is None else scale,
        )

    def adapt(self, count: int) -> None:
        """Let the kernel add what the `count` adapters of the products do."""
        products = _products_of(self.layer)
        updates = [getattr(product, "updates", None) for product in products]
        self.tables = [
            table if isinstance(table, Table) else Table(product.in_features, {}, count)
            for table, product in zip(updates, products, strict=True)
        ]
        self.updates = (Updates * len(products))(*(table.described for table in self.tables))
        self.described.updates = ctypes.addressof(self.updates)
        self.floats = kernels().scratch_floats(self.address)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: ForwardBatch,
        **_: Any,
    ) -> torch.Tensor:
        """By transformers' interface, float32 [1, tokens, width]."""
        attention = self.layer.self_attn
        cache = step.enter(attention.layer_idx, attention.scoring)
        cache.prepare(self.row, self.row)
        made_of = position_embeddings[0], self.floats
        if made_of not in step.inputs:
            step.inputs[made_of] = Inputs(step, position_embeddings, self.floats)
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        self.function(
            self.address,
            step.inputs[made_of].address,
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            cache.rows,
            x.data_ptr(),
            out.data_ptr(),
        )
        return out
