"""A step of a whole model as one call of our kernels for CPUs: from embeddings to logits."""

import ctypes
from inspect import signature
from typing import Any

import torch

from engine.attention.forward_batch import ForwardBatch
from engine.attention.kv_pool import KVCache
from engine.kernels.cpu import Cache, Model, kernels
from engine.layers.cpu_layer import CpuLayer, Inputs
from engine.layers.cpu_linear import CpuLinear
from engine.layers.merged import RMSNorm


class CpuModel:
    """What a model computes, where its layers are one call each and it does no more around them.

    A token's logits are those of the model's own forward pass, to the last bit.
    """

    def __init__(self, model: Any):
        decoder = model.get_decoder()
        self.embedding = model.get_input_embeddings()
        self.turns = decoder.rotary_emb
        self.layers: list[CpuLayer] = [*decoder.layers]
        self.norm: RMSNorm = decoder.norm
        self.head: CpuLinear = model.get_output_embeddings()
        self.addresses = (ctypes.c_void_p * len(self.layers))(*(x.address for x in self.layers))
        self.described = Model(
            ctypes.addressof(self.addresses),
            len(self.layers),
            self.norm.weight.numel(),
            self.norm.weight.data_ptr(),
            self.norm.eps,
            self.head.described,
        )
        self.address = ctypes.addressof(self.described)
        self.function = kernels().decoder_step
        self.pool: KVCache | None = None

    def logits(self, step: ForwardBatch, wanted: torch.Tensor) -> torch.Tensor:
        """A step's logits of the wanted tokens, float32 [wanted, vocabulary]."""
        if step.pool is not self.pool:
            self._point_to(step.pool)
        hidden = self.embedding.forward(step.ids[None])
        cos, sin = self.turns.forward(hidden, step.positions[None])
        inputs = Inputs(step, (cos, sin), self.floats)
        normed = torch.empty(len(wanted), hidden.shape[-1])
        out = torch.empty(len(wanted), self.head.out_features)
        self.function(
            self.address,
            inputs.address,
            ctypes.addressof(self.caches),
            hidden.data_ptr(),
            wanted.data_ptr(),
            len(wanted),
            normed.data_ptr(),
            out.data_ptr(),
        )
        return out

    def _point_to(self, pool: KVCache) -> None:
        """Let the kernel read and write the rows of this pool."""
        self.caches = (Cache * len(self.layers))()
        for layer, cache in zip(self.layers, self.caches, strict=True):
            attention = layer.layer.self_attn
            rows = pool.layer(attention.layer_idx)
            rows.scoring = attention.scoring
            rows.prepare(layer.row, layer.row)
            cache.keys, cache.values = rows.keys.data_ptr(), rows.values.data_ptr()
            cache.rows = rows.rows
        self.pool = pool
        self.floats = max(layer.floats for layer in self.layers)  # with adapters, if there are any


def looks_whole(model: Any) -> bool:
    """Whether a model seems to be an embedding, layers of one call each, a norm and a head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    layers = getattr(decoder, "layers", [])
    turns = getattr(decoder, "rotary_emb", None)
    norm = getattr(decoder, "norm", None)
    return (
        len(layers) == model.config.get_text_config().num_hidden_layers
        and all(type(layer) is CpuLayer for layer in layers)
        and isinstance(norm, RMSNorm)
        and norm.kernel is not None
        and norm.weight.dtype == torch.float32
        and isinstance(head, CpuLinear)
        and turns is not None
        and [*signature(turns.forward).parameters] == ["x", "position_ids"]
        and not any(hasattr(module, "_hf_hook") for module in (model, decoder, head, norm, turns))
    )
