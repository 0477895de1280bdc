"""Values of one byte or less with scales beside them: int8, FP8, NVFP4, MXFP4."""

from functools import partial
from typing import Any

import torch

from engine.checkpoint.formats.levels import Levels, e2m1, exponents
from engine.checkpoint.stored import Stored
from engine.errors import StartError


def scaled(parts: dict[str, Stored], settings: dict[str, Any]) -> Levels:
    """Values of one byte each, int8 or FP8, with scales of a tensor, rows, groups or blocks.

    `weight_scale_inv` multiplies too, whatever its name.
    """
    values = parts["weight"][...]
    scale = parts["weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"][...]
    scale = exponents(scale)
    zero = parts["weight_zero_point"][...] if "weight_zero_point" in parts else None
    rows = values.shape[-2]
    if scale.dim() == 1 and scale.numel() == rows > 1:
        scale = scale[:, None]
    blocks = _block_of(values.shape, scale.shape, settings) if scale.dim() >= 2 else None
    if blocks:
        high, wide = blocks
        scale = scale.repeat_interleave(high, -2)[..., :rows, :]
        scale = scale.repeat_interleave(wide, -1)[..., : values.shape[-1]]
    return Levels(values, scale, zero)


def _block_of(shape: Any, scales: Any, settings: dict[str, Any]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, the last block cut off; None if it is not blocks."""
    stated = [settings.get("weight_block_size")]
    groups = (settings.get("config_groups") or {}).values()
    stated += [(group.get("weights") or {}).get("block_structure") for group in groups]
    for high, wide in filter(None, stated):
        if scales[-2] == -(-shape[-2] // high) and scales[-1] == -(-shape[-1] // wide):
            return int(high), int(wide)
    if scales[-2] in (1, shape[-2]):
        return None
    if shape[-2] % scales[-2] or shape[-1] % scales[-1]:
        raise StartError(f"scales {list(scales)} do not divide weights {list(shape)}")
    return shape[-2] // scales[-2], shape[-1] // scales[-1]


def fp4(parts: dict[str, Stored], settings: dict[str, Any]) -> Levels:
    """compressed-tensors' NVFP4 and MXFP4: E2M1 values, two in a byte; the global scale divides."""
    scale = exponents(parts["weight_scale"][...])
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"][...].float()
    return Levels(e2m1(parts["weight_packed"][...]), scale)


def gpt_oss_experts(weights: dict[str, Stored]) -> dict[str, Stored]:
    """The same weights, with gpt-oss's MXFP4 blocks and exponents as matrices."""
    for name in [name for name in weights if name.endswith("_proj_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = weights.pop(name), weights.pop(f"{base}_scales")
        experts, rows, groups, _ = blocks.shape
        weights[base] = Stored(
            (experts, 32 * groups, rows), torch.float32, partial(_mxfp4, blocks, scales)
        )
    return weights


def _mxfp4(blocks: Stored, scales: Stored) -> torch.Tensor:
    """gpt-oss's experts, [experts, out, in / 32, 16] and exponents, as [experts, in, out]."""
    values = e2m1(blocks[...])  # [experts, out, in / 32, 32]
    exact = torch.ldexp(values, scales[...].int()[..., None] - 127)
    return exact.flatten(-2).transpose(1, 2).contiguous()
