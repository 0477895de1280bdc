"""Weights in 4 bits as whole numbers in blocks: how a matrix is packed, and unpacked.

A weight is a whole number times the scale of its block of columns, plus the block's offset where it
has one: int8, or from 0 to 15, two in a byte, the first in its upper half. In 4 bits and without
offsets it is one of NF4's values.
"""

import sys

import torch

# Appendix E of arXiv 2305.14314, QLoRA.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Weights that share a scale and an offset where we pack them, as in GGUF's Q4_1 and Q4_K.
GROUP = 32
_LARGEST = 15
# How often numbers are rounded and factors fitted to them: the error is 7 % less than from the
# range alone, of 9 % that a hundred rounds from many starts give.
_ROUNDS = 3
# Rows at a time, as fitting takes some copies of them in float32.
_ROWS = 1024


def pairs_of(values: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits, uint8 [..., columns], two in a byte, the first in its upper half."""
    if sys.byteorder == "big":
        return values[..., ::2] << 4 | values[..., 1::2]
    # The first of two is a word's lower byte: as words they are moved a hundred at a time.
    words = values.contiguous().view(torch.int16)
    return (words << 4 | words >> 8).to(torch.uint8)


def pack_blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix [..., in], or a stack, as uint8 [..., in / 2], and fp16 scales and offsets [..., in
    / 32].

    The factors are those with the least squares of errors that rounding and fitting in turn find.
    """
    rows = matrix.detach().flatten(0, -2)
    parts = zip(*map(_pack_rows, rows.split(_ROWS)), strict=True)
    packed, scale, offset = (torch.cat(part).unflatten(0, matrix.shape[:-1]) for part in parts)
    return packed, scale, offset


def _pack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exact = rows.float().unflatten(-1, (-1, GROUP))
    least, most = exact.aminmax(dim=-1, keepdim=True)
    scale, offset = (most - least) / _LARGEST, least
    mean = exact.mean(-1, keepdim=True)
    for _ in range(_ROUNDS):
        numbers = _rounded(exact, scale, offset)
        middle = numbers.mean(-1, keepdim=True)
        numbers -= middle
        spread = numbers.square().sum(-1, keepdim=True)
        # Where all weights are alike, the offset is all there is.
        scale = (numbers * exact).sum(-1, keepdim=True) / spread.clamp_min_(1e-9)
        offset = mean - scale * middle
    scale, offset = scale.half(), offset.half()
    numbers = _rounded(exact, scale.float(), offset.float())
    return pairs_of(numbers.to(torch.uint8).flatten(-2)), scale[..., 0], offset[..., 0]


def _rounded(exact: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The nearest numbers to weights; 0 where nothing is between them and the offset."""
    numbers = (exact - offset).div_(torch.where(scale == 0, torch.inf, scale))
    return numbers.round_().clamp_(0, _LARGEST)


def unpack_blocks(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights in float32, [..., columns], of numbers [..., columns or half as many], and scales
    and offsets [..., blocks]."""
    values = weight
    if weight.dtype == torch.uint8:
        values = torch.stack([weight >> 4, weight & 15], -1).flatten(-2)
    exact = values.float()
    if weight.dtype == torch.uint8 and offset is None:
        exact = torch.tensor(NF4)[values.int()]
    blocks = exact.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.float()[..., None])
    if offset is not None:
        blocks += offset.float()[..., None]
    return blocks.flatten(-2)
