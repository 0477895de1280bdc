"""Whole numbers packed into int32 words: GPTQ, AWQ, and compressed-tensors' pack-quantized."""

from typing import Any

import torch

from engine.checkpoint.formats.levels import Levels, bit_fields
from engine.checkpoint.stored import Stored
from engine.errors import StartError

# AWQ packs eight columns in a word in this order.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def gptq(parts: dict[str, Stored], settings: dict[str, Any]) -> Levels:
    """qweight int32 [in bits / 32, out], qzeros [groups, out bits / 32], scales [groups, out]."""
    words, scales = parts["qweight"][...], parts["scales"][...]
    groups, columns = scales.shape[0], scales.shape[1]
    zeros = parts["qzeros"][...]
    bits = 32 * zeros.shape[1] // columns
    inner = 32 * words.shape[0] // bits
    less = settings.get("checkpoint_format", "gptq") != "gptq_v2"
    values = bit_fields(words.T, bits, inner)
    zero = bit_fields(_one_more(zeros, bits) if less and 32 % bits == 0 else zeros, bits, columns)
    if less and 32 % bits:
        zero = (zero + 1) & (2**bits - 1)
    group = parts["g_idx"][...].long() if "g_idx" in parts else None
    if group is None or torch.equal(group, torch.arange(inner) // -(-inner // groups)):
        group = None
    return Levels(values, scales.T, zero.T, group)


def _one_more(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The first GPTQ format has zero points less one: taken off whole words, so put back on them.

    Of a zero point of 0, what was taken off went over into the next; added field by field, that
    would be wrong.
    """
    ones = sum(1 << at for at in range(0, 32, bits))
    added = (zeros.long() + ones) & 0xFFFFFFFF
    return torch.where(added >= 1 << 31, added - (1 << 32), added).to(torch.int32)


def awq(parts: dict[str, Stored], settings: dict[str, Any]) -> Levels:
    """qweight int32 [in, out / 8], qzeros [groups, out / 8], scales [groups, out]: version gemm."""
    scales = parts["scales"][...]
    columns = scales.shape[1]
    values, zeros = (
        bit_fields(parts[name][...], 4, columns).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1)
        for name in ("qweight", "qzeros")
    )
    return Levels(values.T, scales.T, zeros.T)


def pack_quantized(parts: dict[str, Stored], settings: dict[str, Any]) -> Levels:
    """compressed-tensors': values with half their range added, int32 [out, in bits / 32]."""
    words, scale = parts["weight_packed"][...], parts["weight_scale"][...]
    rows, columns = parts["weight_shape"][...].tolist()
    bits = _bits_of(words.shape[-1], columns)
    values = bit_fields(words, bits, columns)
    zero = torch.full((1, 1), 2.0 ** (bits - 1))
    if "weight_zero_point" in parts:
        packed = parts["weight_zero_point"][...]
        if packed.dtype == torch.int32:
            zero = bit_fields(packed.T, bits, rows).T.float()
        else:
            zero = zero + packed.float()
    group = parts["weight_g_idx"][...].long() if "weight_g_idx" in parts else None
    if group is not None and group.min() < 0:  # as its tools write where there is no order
        group = None
    return Levels(values, scale, zero, group)


def _bits_of(words: int, columns: int) -> int:
    """Of how many bits so many numbers are, that take so many words."""
    for bits in range(1, 9):
        if -(-columns * bits // 32) == words:
            return bits
    raise StartError(f"{columns} columns are in {words} words")
