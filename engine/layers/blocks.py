"""Layers whose weights are in few bits in blocks (engine.layers.block_packing), kept as they are.

Either a checkpoint had them already, or they are packed while it is loaded. They are read by our
kernels for CPUs; here they are unpacked, for what these are compared with and for an embedding's
rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from engine.layers.block_packing import GROUP, unpack_blocks
from engine.layers.protocols import ExpertStack
from engine.layers.quantized import Bits, QuantizedExperts, QuantizedLinear, shapes_of

# What belongs to a packed matrix beside its numbers, where it has them.
_FACTORS = ("weight_scale", "weight_offset")
_ORDER = "weight_order"


def _set_parts(module: Any, parts: Mapping[str, Any], device: torch.device) -> None:
    """Give a module empty tensors of the shapes and types of a packed matrix's parts.

    All but the numbers are buffers, which no change of a model's dtype touches.
    """
    for name in ("weight", *_FACTORS, _ORDER):
        part = parts.get(name)
        empty = None if part is None else torch.empty(part.shape, dtype=part.dtype, device=device)
        if name == "weight":
            assert empty is not None
            module.weight = torch.nn.Parameter(empty, requires_grad=False)
        else:
            module.register_buffer(name, empty)


class BlockLinear(QuantizedLinear):
    """A linear layer whose matrix a checkpoint has packed already; `weight_order` [in] says which
    number of x belongs to each column, where they are in another order."""

    weight_scale: torch.Tensor  # type: ignore[assignment]
    weight_offset: torch.Tensor | None
    weight_order: torch.Tensor | None

    def __init__(self, linear: torch.nn.Linear, parts: Mapping[str, Any]):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        _set_parts(self, parts, linear.weight.device)
        self.bias = linear.bias
        self.shapes = shapes_of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reference(x)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the unpacked matrix."""
        weight = unpack_blocks(self.weight, self.weight_scale, self.weight_offset)
        if self.weight_order is not None:
            x = x[..., self.weight_order]
        return F.linear(x, weight.to(x.dtype), self.bias)

    def parts(self) -> dict[str, torch.Tensor | None]:
        """What `CpuLinear.of_packed` takes of it beside its numbers and scales."""
        return {"offset": self.weight_offset, "order": self.weight_order}


class PackedLinear(BlockLinear):
    """One whose matrix is packed while it is loaded: 4 bits with scales and offsets."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(linear, empty_parts(linear.weight))


class BlockExperts(QuantizedExperts):
    """A mixture's experts, packed likewise."""

    def __init__(self, experts: ExpertStack):
        super().__init__(experts, 4)

    def _add_stacks(self, experts: ExpertStack, bits: Bits) -> None:
        for name in ("gate_up_proj", "down_proj"):
            parts = empty_parts(getattr(experts, name))
            setattr(self, name, torch.nn.Parameter(parts["weight"], requires_grad=False))
            self.register_buffer(f"{name}_scale", parts["weight_scale"])
            self.register_buffer(f"{name}_offset", parts["weight_offset"])

    def unpacked(self, name: str, dtype: torch.dtype, chosen: Any = slice(None)) -> torch.Tensor:
        parts = (getattr(self, f"{name}{part}")[chosen] for part in ("", "_scale", "_offset"))
        return unpack_blocks(*parts).to(dtype)


def empty_parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Empty tensors of the shapes and types that `pack_blocks` makes of a matrix or a stack."""
    *rows, columns = weight.shape
    factors = weight.new_empty(*rows, columns // GROUP, dtype=torch.float16)
    return {
        "weight": weight.new_empty(*rows, columns // 2, dtype=torch.uint8),
        "weight_scale": factors,
        "weight_offset": torch.empty_like(factors),
    }


class BlockEmbedding(torch.nn.Module):
    """An embedding that is packed likewise; the rows that are asked for are unpacked."""

    weight: torch.nn.Parameter
    weight_scale: torch.Tensor
    weight_offset: torch.Tensor | None

    def __init__(self, embedding: torch.nn.Embedding, parts: Mapping[str, Any]):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.dtype = embedding.weight.dtype
        _set_parts(self, parts, embedding.weight.device)
        self.shapes = shapes_of(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of token ids [...], as [..., width]."""
        offset = None if self.weight_offset is None else self.weight_offset[ids]
        rows = unpack_blocks(self.weight[ids], self.weight_scale[ids], offset)
        return rows.to(self.dtype)


def joined(layers: list[BlockLinear]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Several layers' numbers, scales, and offsets and order, as one matrix, one below the other.

    Where they are packed differently, all become int8 in the finest blocks, which is exact.
    """
    weights: list[torch.Tensor] = [layer.weight for layer in layers]
    scales = [layer.weight_scale for layer in layers]
    offsets = [layer.weight_offset for layer in layers]
    if (
        len(
            {
                (x.dtype, s.shape[1], o is None)
                for x, s, o in zip(weights, scales, offsets, strict=True)
            }
        )
        > 1
    ):
        weights = [_as_int8(weight) for weight in weights]
        blocks = max(scale.shape[1] for scale in scales)
        offsets = [
            torch.zeros_like(scale) if offset is None else offset
            for scale, offset in zip(scales, offsets, strict=True)
        ]
        scales, offsets = (
            [x.repeat_interleave(blocks // x.shape[1], 1) for x in factors]  # type: ignore[union-attr]
            for factors in (scales, offsets)
        )
    offset = None if offsets[0] is None else torch.cat(offsets)  # type: ignore[arg-type]
    more = {"offset": offset, "order": layers[0].weight_order}
    return torch.cat(weights), torch.cat(scales), more


def _as_int8(weight: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits as those of 8 are kept."""
    if weight.dtype != torch.uint8:
        return weight
    return torch.stack([weight >> 4, weight & 15], -1).flatten(-2).to(torch.int8)


def can_be_joined(layers: list[Any]) -> bool:
    """Whether layers of one input can become one matrix."""
    if not all(isinstance(layer, BlockLinear) for layer in layers):
        return False
    first = layers[0].weight_order
    for layer in layers:
        order = layer.weight_order
        if (order is None) != (first is None) or (
            first is not None and not torch.equal(order, first)
        ):
            return False
        if layer.weight.dtype == torch.uint8 and layer.weight_offset is None:
            return all(x.weight.dtype == torch.uint8 and x.weight_offset is None for x in layers)
    counts = [layer.weight_scale.shape[1] for layer in layers]
    return all(max(counts) % count == 0 for count in counts)
