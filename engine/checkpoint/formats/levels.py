"""The one form that a matrix of few bits is read into, whatever its file calls the tensors.

A weight is one of a few values, times the scale of its group of columns: w = scale (value - zero).
From that the weights follow in float32 as the tools that wrote the files define them, bit for bit;
and it is from that that they can be packed again as the engine keeps them.
"""

from dataclasses import dataclass

import torch

# E2M1 (OCP Microscaling Formats v1.0), of MXFP4 and NVFP4.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Levels:
    """A matrix as values, scales and zeros, read as the tools of its format define them."""

    values: torch.Tensor  # [..., out, in], whole numbers or a float type of few bits
    scale: torch.Tensor  # that spreads over the values: [..., out or 1, groups or 1]
    zero: torch.Tensor | None = None
    group: torch.Tensor | None = None  # [in], of each column, where they are not in order

    def weight(self) -> torch.Tensor:
        """In float32, [..., out, in]."""
        exact = self.values.float()
        if self.zero is not None:
            exact = exact - self._spread(self.zero.float())
        return exact * self._spread(self.scale.float())

    def _spread(self, factors: torch.Tensor) -> torch.Tensor:
        columns = self.values.shape[-1]
        if factors.dim() < 2 or factors.shape[-1] == 1:
            return factors
        if self.group is not None:
            return factors[..., self.group]
        if factors.shape[-1] == columns:
            return factors
        return factors.repeat_interleave(columns // factors.shape[-1], -1)


def bit_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` whole numbers of so many bits, the lowest first, out of the int32 words of the last
    dimension: uint8 [..., count]."""
    words = words.contiguous()
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        fields = (words[..., None] >> shifts) & (2**bits - 1)
        return fields.flatten(-2)[..., :count].to(torch.uint8)
    # They go on from word to word.
    single = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    stream = single.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (stream << torch.arange(bits, dtype=torch.int32)).sum(-1).to(torch.uint8)


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    """FP4 values, two in a byte, the lower half first: float32 [..., 2 bytes]."""
    table = torch.tensor([*E2M1, *(-x for x in E2M1)])
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return table[halves.int()]


def exponents(scale: torch.Tensor) -> torch.Tensor:
    """Scales in float32; of bytes, E8M0's powers of two."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
