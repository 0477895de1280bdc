"""Matrices of few bits as the engine keeps them packed (engine.layers.blocks), by shapes alone.

Nothing is read until a part is asked for; then all parts of a matrix are computed, and kept until
those of another are.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from engine.checkpoint.formats import bnb
from engine.checkpoint.formats.levels import Levels
from engine.checkpoint.formats.modules import KINDS, Parts, by_module, kind_of, shape_of
from engine.checkpoint.stored import Stored, Weights
from engine.layers.block_packing import pairs_of

# NF4's weights that share a scale, as our kernels have them.
_NF4_BLOCK = 64
# The tensors of a matrix, by the names of engine.layers.blocks.
Packed = dict[str, Stored]


def packed_parts(weights: Weights, settings: dict[str, Any]) -> dict[str, Packed]:
    """The matrices of a checkpoint that can stay in its own bits, by module."""
    method = str(settings["quant_method"])
    found = {}
    for module, parts in by_module(weights)[0].items():
        kind = kind_of(parts, method) or ""
        pack = _PACKERS.get(kind)
        if packed := pack(kind, parts, settings) if pack else None:
            found[module] = packed
    return found


def computed(shapes: dict[str, tuple[Any, torch.dtype]], compute: Callable[[], Any]) -> Packed:
    """Parts of such shapes and types, which one call computes, as a dict of tensors."""

    @lru_cache(maxsize=1)
    def last(_: int) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = compute()
        return parts

    left = {*shapes}

    def part(name: str) -> torch.Tensor:
        tensor = last(0)[name].to(shapes[name][1])
        left.discard(name)
        if not left:  # all have been read
            last.cache_clear()
            left.update(shapes)
        return tensor.contiguous()

    return {
        name: Stored(shape, dtype, lambda name=name: part(name))  # type: ignore[misc]
        for name, (shape, dtype) in shapes.items()
    }


def _whole_numbers(kind: str, parts: Parts, settings: dict[str, Any]) -> Packed | None:
    """Of GPTQ, AWQ and packed integers: 4 bits, or int8 where there are more."""
    rows, columns = shape_of(parts)
    scale = parts["weight_scale" if kind == "pack-quantized" else "scales"]
    groups = scale.shape[1] if kind == "pack-quantized" else scale.shape[0]
    bits = _bits_of(kind, parts, columns)
    if columns % groups or columns % 2:
        return None
    group = next((parts[x][...].long() for x in ("g_idx", "weight_g_idx") if x in parts), None)
    order = None if group is None or bool(group.min() < 0) else _order_of(group, groups)
    if order is not None and not _is_even(group, groups):
        return None
    shapes: dict[str, tuple[Any, torch.dtype]] = {
        "weight": ((rows, columns // 2), torch.uint8)
        if bits <= 4
        else ((rows, columns), torch.int8),
        "weight_scale": ((rows, groups), torch.float32),
        "weight_offset": ((rows, groups), torch.float32),
    }
    if order is not None:
        shapes["weight_order"] = ((columns,), torch.int32)
    return computed(shapes, lambda: _parts_of(KINDS[kind][0](parts, settings), order, bits))


def _bits_of(kind: str, parts: Parts, columns: int) -> int:
    """The bits of a value, rounded up where it makes no difference."""
    if kind == "awq":
        return 4
    words = (
        parts["weight_packed"].shape[-1] if kind == "pack-quantized" else parts["qweight"].shape[0]
    )
    return -(-32 * words // columns)


def _order_of(group: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """Which column comes where, so that groups stand in order; None if they do already."""
    if group is None or bool((group[1:] >= group[:-1]).all()):
        return None
    return group.argsort(stable=True)


def _is_even(group: torch.Tensor | None, groups: int) -> bool:
    """Whether all groups have as many columns."""
    assert group is not None
    return bool((group.bincount(minlength=groups) * groups == len(group)).all())


def _parts_of(levels: Levels, order: torch.Tensor | None, bits: int) -> dict[str, torch.Tensor]:
    """Numbers, scales and offsets, w = scale number + offset, and the order of columns."""
    values, rows = levels.values, len(levels.values)
    if order is not None:
        values = values[:, order]
    scale = levels.scale.float().expand(rows, -1)
    zero = torch.zeros(1) if levels.zero is None else levels.zero.float()
    if bits > 4:
        values, zero = (values.int() - 128).to(torch.int8), zero - 128
    else:
        values = pairs_of(values.to(torch.uint8))
    parts = {"weight": values, "weight_scale": scale, "weight_offset": -(zero * scale)}
    return parts if order is None else parts | {"weight_order": order}


def _bytes(kind: str, parts: Parts, settings: dict[str, Any]) -> Packed | None:
    """int8 with a scale of each row or of groups, and no zeros."""
    weight, scale = parts["weight"], parts.get("weight_scale")
    if weight.dtype != torch.int8 or scale is None or "weight_zero_point" in parts:
        return None
    rows, columns = weight.shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if tuple(scale.shape) not in ((rows, groups), (rows,)) or columns % groups:
        return None
    shapes = {"weight": (weight.shape, torch.int8), "weight_scale": ((rows, groups), torch.float32)}
    return computed(
        shapes, lambda: {"weight": weight[...], "weight_scale": scale[...].reshape(rows, groups)}
    )


def _bnb_8_bits(kind: str, parts: Parts, settings: dict[str, Any]) -> Packed | None:
    rows, _ = parts["weight"].shape
    shapes = {
        "weight": (parts["weight"].shape, torch.int8),
        "weight_scale": ((rows, 1), torch.float32),
    }
    return computed(
        shapes,
        lambda: {
            "weight": parts["weight"][...],
            "weight_scale": parts["SCB"][...].float()[:, None] / 127,
        },
    )


def _nf4(kind: str, parts: Parts, settings: dict[str, Any]) -> Packed | None:
    """NF4 in blocks of 64, bitsandbytes' usual ones."""
    state = bnb.quant_state(parts)
    if not state or state["quant_type"] != "nf4" or int(state["blocksize"]) != _NF4_BLOCK:
        return None
    rows, columns = state["shape"]
    if columns % _NF4_BLOCK:
        return None
    shapes: dict[str, tuple[Any, torch.dtype]] = {
        "weight": ((rows, columns // 2), torch.uint8),
        "weight_scale": ((rows, columns // _NF4_BLOCK), torch.float32),
    }
    return computed(
        shapes,
        lambda: {
            "weight": parts["weight"][...].reshape(rows, -1),
            "weight_scale": bnb.block_scales(parts, state).reshape(rows, -1),
        },
    )


_PACKERS = {
    "gptq": _whole_numbers, "awq": _whole_numbers, "pack-quantized": _whole_numbers,
    "scaled": _bytes, "bnb 8 bits": _bnb_8_bits, "bnb 4 bits": _nf4,
}  # fmt: skip
