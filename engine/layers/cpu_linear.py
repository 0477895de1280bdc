"""Linear layers by our kernels for CPUs: weights as they are stored, activations in float32."""

import ctypes
from typing import Any, Self

import torch
import torch.nn.functional as F

from engine.kernels.cpu import Linear, kernels

# The kernels' numbers for how weights are stored; of 4 bits, there are two in a byte.
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2, torch.uint8: 3}
WHOLE_NUMBERS, INT8_BLOCKS = 4, 5
_BLOCKS = (WHOLE_NUMBERS, INT8_BLOCKS)


def pack(weight: torch.Tensor, width: int) -> torch.Tensor:
    """A matrix [out, in] as the kernels read it: [panels, in, width], the last filled up.

    In 4 bits there are two in a byte, the first in its upper half: [out, in / 2], and for the
    kernels [panels, in, width / 2].
    """
    if weight.dtype == torch.uint8:
        weight = torch.stack([weight >> 4, weight & 15], dim=2).flatten(1)
        packed = _panels_of(weight, width)
        return packed[..., : width // 2] | packed[..., width // 2 :] << 4
    if weight.dtype == torch.bfloat16:  # a row of each half of the panel in turn
        packed = _panels_of(weight, width)
        return packed.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
    return _panels_of(weight, width)


def _panels_of(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """A matrix [out, in] as [panels, in, width], the last filled up with zeros."""
    filled = F.pad(matrix, (0, 0, 0, -len(matrix) % width))
    return filled.unflatten(0, (-1, width)).transpose(1, 2).contiguous()


class CpuLinear(torch.nn.Module):
    """A linear layer of weights in bfloat16 or fp16, or in 8 or 4 bits with scales.

    With `offset`, weights in 4 bits are whole numbers w = scale value + offset, of which `order`
    says to which number of x each column belongs. A row's result does not depend on how many there
    are, to the last bit.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ):
        super().__init__()
        width = kernels().panel_width()
        self.packed = pack(weight.detach(), width)
        self.out_features, self.in_features = len(weight), self.packed.shape[1]
        kind = _kind_of(weight, scale, offset)
        # Only where all are: they are read as one type.
        half = kind in _BLOCKS and all(
            x is None or x.dtype == torch.float16 for x in (scale, offset)
        )
        dtype = torch.float16 if half else torch.float32
        # Kept as long as the layer, whose description points to them.
        self.scale = None if scale is None else _panels_of(scale.detach().to(dtype), width)
        self.bias = None if bias is None else _panels_of(bias.detach().float()[:, None], width)
        self.offset = None if offset is None else _panels_of(offset.detach().to(dtype), width)
        self.order = None if order is None else order.detach().to(torch.int32).contiguous()
        parts = self.packed, self.scale, self.bias, self.offset, self.order
        self.described = Linear(
            *map(pointer_to, parts),
            self.in_features,
            self.out_features,
            len(self.packed),
            self.in_features // (1 if scale is None else scale.shape[1]),
            kind,
            half,
        )
        self.address = ctypes.addressof(self.described)
        self.product = kernels().linear

    @classmethod
    def of_packed(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        **blocks: torch.Tensor | None,
    ) -> Self:
        """Of a matrix, its scales and what else engine.layers.quantized has of it."""
        return cls(weight, bias, scale, **blocks)

    @property
    def packed_bytes(self) -> int:
        """The memory that the weights take, and their scales."""
        parts = self.packed, self.scale, self.offset, self.order
        return sum(0 if part is None else part.nbytes for part in parts)

    @property
    def weight(self) -> torch.Tensor:
        """The weights in float32, for a model that multiplies by them itself."""
        plain = Linear.from_buffer_copy(self.described)
        plain.bias = None
        return self._multiply(ctypes.addressof(plain), torch.eye(self.in_features)).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(self.address, x.float().contiguous()).to(x.dtype)

    def _multiply(self, address: int, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(*x.shape[:-1], self.out_features)
        tokens = x.numel() // self.in_features
        self.product(address, tokens, x.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out


def _kind_of(weight: torch.Tensor, scale: Any, offset: Any) -> int:
    """The kernels' number for a matrix with such scales and offsets."""
    if weight.dtype == torch.uint8 and offset is not None:
        return WHOLE_NUMBERS
    if weight.dtype == torch.int8 and (offset is not None or scale.shape[1] > 1):
        return INT8_BLOCKS
    return _KINDS[weight.dtype]


def pointer_to(values: Any) -> int | None:
    """A tensor's first number, or null."""
    return None if values is None else values.data_ptr()


def is_half(weight: torch.Tensor) -> bool:
    """Whether weights are of a half precision, which the kernels read as it is."""
    return weight.dtype in (torch.bfloat16, torch.float16)
