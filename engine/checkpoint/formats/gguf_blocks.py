"""GGUF's blocks of few bits as values, scales and offsets, and as weights.

The layouts are those of ggml-common.h and ggml-quants.c (github.com/ggml-org/ggml).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.checkpoint.formats.gguf_reader import BLOCKS, Tensor

_Array = np.ndarray[Any, Any]
# Values [blocks, weights], scales and offsets [blocks, groups] of as many weights each.
_Block = tuple[_Array, _Array, _Array | None]
# Values [out, in], scales and offsets [out, groups]: w = scale value + offset.
_Affine = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

# The weights that share a scale, and the bits that hold a value as the engine packs it.
GROUP = {
    "Q4_0": (32, 4), "Q4_1": (32, 4), "Q4_K": (32, 4), "Q5_0": (32, 8), "Q5_1": (32, 8),
    "Q5_K": (32, 8), "Q6_K": (16, 8), "Q8_0": (32, 8),
}  # fmt: skip
# Kinds whose values are signed, so that nothing is added.
NO_OFFSET = ("Q5_0", "Q6_K", "Q8_0")


def _half(b: _Array, at: int) -> _Array:
    """An fp16 number of each block, [blocks, 1], in float32."""
    return np.ascontiguousarray(b[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(b: _Array) -> _Array:
    """The lower halves of bytes, then the upper ones."""
    return np.concatenate([b & 15, b >> 4], -1)


def _q8_0(b: _Array) -> _Block:
    return b[:, 2:].view(np.int8), _half(b, 0), None


def _q4_0(b: _Array) -> _Block:
    scale = _half(b, 0)
    return _nibbles(b[:, 2:]), scale, -8 * scale


def _q4_1(b: _Array) -> _Block:
    return _nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)


def _q5(b: _Array, at: int) -> _Array:
    """Four bits of each value, and the fifth of all in the four bytes before them."""
    high = np.unpackbits(b[:, at : at + 4], axis=-1, bitorder="little")
    return (_nibbles(b[:, at + 4 :]) | high << 4).astype(np.int8)


def _q5_0(b: _Array) -> _Block:
    return _q5(b, 2) - np.int8(16), _half(b, 0), None


def _q5_1(b: _Array) -> _Block:
    return _q5(b, 4), _half(b, 0), _half(b, 2)


def _k_scales(b: _Array) -> tuple[_Array, _Array]:
    """Eight groups' scales and offsets: 6 bits each, times fp16 numbers of the block."""
    low, mid, top = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([low & 63, (top & 15) | (low >> 6) << 4], -1)
    minima = np.concatenate([mid & 63, (top >> 4) | (mid >> 6) << 4], -1)
    return _half(b, 0) * scales, -(_half(b, 2) * minima)


def _quarters(b: _Array) -> _Array:
    """256 values of four bits: of each 32 bytes the lower halves, then the upper ones."""
    quarters = b[:, -128:].reshape(len(b), 4, 32)
    return np.stack([quarters & 15, quarters >> 4], 2).reshape(len(b), 256)


def _q4_k(b: _Array) -> _Block:
    return _quarters(b), *_k_scales(b)


def _q5_k(b: _Array) -> _Block:
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high = ((b[:, None, 16:48] >> bits) & 1).reshape(len(b), 256)
    return (_quarters(b) | high << 4).astype(np.int8), *_k_scales(b)


def _q6_k(b: _Array) -> _Block:
    low = b[:, :128].reshape(len(b), 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]
    low = (low & np.uint8(15)).reshape(len(b), 8, 32)
    twos = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (b[:, 128:192].reshape(len(b), 2, 1, 32) >> twos & 3).reshape(low.shape)
    values = ((low | high << 4).astype(np.int8) - np.int8(32)).reshape(len(b), 256)
    return values, _half(b, 208) * b[:, 192:208].view(np.int8), None


READ: dict[str, Callable[[_Array], _Block]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
_BYTES = {kind: size for kind, _, size in BLOCKS.values()}
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def affine(tensor: Tensor, number: int | None = None) -> _Affine:
    """A matrix, or one of a stack, as whole numbers with a scale and an offset of each group.

    Values are uint8 from 0 to 15, or int8; scales and offsets float32, of which those of kinds
    with one level are fp16 numbers.
    """
    data = tensor.data if number is None else tensor.data[number]
    width = data.shape[-1]
    parts = READ[tensor.kind](np.ascontiguousarray(data).reshape(-1, _BYTES[tensor.kind]))
    rows = data.size // width
    values, scale, offset = (
        None if part is None else torch.from_numpy(np.ascontiguousarray(part).reshape(rows, -1))
        for part in parts
    )
    assert values is not None
    assert scale is not None
    return values, scale, offset


def weights_of(tensor: Tensor, number: int | None = None) -> torch.Tensor:
    """A tensor's weights in float32 as ggml has them, bit for bit; or one matrix of a stack."""
    data = tensor.data if number is None else tensor.data[number]
    shape = tensor.shape if number is None else tensor.shape[1:]
    if tensor.kind in _PLAIN:
        plain = np.ascontiguousarray(data).view(_PLAIN[tensor.kind]).astype(np.float32)
        return torch.from_numpy(plain.reshape(shape))
    if tensor.kind == "BF16":
        words = np.ascontiguousarray(data).view(np.int16)
        return torch.from_numpy(words.copy()).view(torch.bfloat16).float().reshape(shape)
    if tensor.kind not in READ:
        from gguf import GGMLQuantizationType, dequantize

        exact = dequantize(data, GGMLQuantizationType[tensor.kind])
        return torch.from_numpy(np.array(exact, np.float32)).reshape(shape)
    values, scale, offset = affine(tensor, number)
    if tensor.kind == "Q4_0":  # for the sign of its zeros
        values, offset = values.to(torch.int8) - 8, None
    blocks = values.float().unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None])
    if offset is not None:
        blocks += offset[..., None]
    return blocks.reshape(shape)
