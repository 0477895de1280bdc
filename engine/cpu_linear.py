"""Linear layers by our kernels for CPUs: weights as they are stored, activations in float32."""

import ctypes
from typing import Any, Self

import torch
import torch.nn.functional as F

from engine.cpu_kernels import Linear, kernels

# The kernels' numbers for how weights are stored.
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2}


def pack(weight: torch.Tensor, width: int) -> torch.Tensor:
    """A matrix [out, in] as the kernels read it: [panels, in, width], the last filled up."""
    out_features, in_features = weight.shape
    panels = F.pad(weight, (0, 0, 0, -out_features % width)).view(-1, width, in_features)
    if weight.dtype == torch.bfloat16:  # a row of each half of the panel in turn
        panels = panels.view(-1, 2, width // 2, in_features).transpose(1, 2)
    return panels.reshape(-1, width, in_features).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """The matrix [out, in] that was packed."""
    panels, in_features, width = packed.shape
    rows = packed.transpose(1, 2)
    if packed.dtype == torch.bfloat16:
        rows = rows.reshape(panels, width // 2, 2, in_features).transpose(1, 2)
    return rows.reshape(-1, in_features)[:out_features].contiguous()


class CpuLinear(torch.nn.Module):
    """A linear layer of weights in bfloat16, fp16, or int8 with a scale for each row.

    A row's result does not depend on how many there are, to the last bit.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = pack(weight.detach(), kernels().panel_width())
        # Kept as long as the layer, whose description points to them.
        self.scale, self.bias = (self._column(x) for x in (scale, bias))
        self.described = Linear(
            self.packed.data_ptr(),
            pointer_to(self.scale),
            pointer_to(self.bias),
            self.in_features,
            self.out_features,
            len(self.packed),
            KINDS[weight.dtype],
        )
        self.address = ctypes.addressof(self.described)
        self.product = kernels().linear

    @classmethod
    def of_int8(
        cls, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Self:
        """As Int8Linear is made."""
        return cls(weight, bias, scale)

    @property
    def packed_bytes(self) -> int:
        """The memory that the weights take."""
        return self.packed.nbytes

    @property
    def weight(self) -> torch.Tensor:
        """The weights in float32, unpacked for a model that multiplies by them itself."""
        weight = unpack(self.packed, self.out_features).float()
        return weight if self.scale is None else weight * self.scale[: self.out_features, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.float().contiguous()
        out = torch.empty(*x.shape[:-1], self.out_features)
        self.product(
            self.address,
            rows.numel() // self.in_features,
            rows.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out.to(x.dtype)

    def _column(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """A number for each row, in float32, filled up as the rows are."""
        if values is None:
            return None
        fill = self.packed.shape[0] * self.packed.shape[2] - self.out_features
        return F.pad(values.detach().float().flatten(), (0, fill))


def pointer_to(values: Any) -> int | None:
    """A tensor's first number, or null."""
    return None if values is None else values.data_ptr()


def is_half(weight: torch.Tensor) -> bool:
    """Whether weights are of a half precision, which the kernels read as it is."""
    return weight.dtype in (torch.bfloat16, torch.float16)
