"""bitsandbytes' 4 and 8 bits, read without bitsandbytes."""

import json
from typing import Any

import torch

from engine.checkpoint.stored import Stored


def quant_state(parts: dict[str, Stored]) -> dict[str, Any] | None:
    """What a matrix in 4 bits says of itself; None of another."""
    for name, tensor in parts.items():
        if name.startswith("weight.quant_state."):
            state: dict[str, Any] = json.loads(bytes(tensor[...].tolist()))
            return state
    return None


def block_scales(parts: dict[str, Stored], state: dict[str, Any]) -> torch.Tensor:
    """The largest weight of each block, float32 [blocks]; it may be kept in 8 bits itself."""
    absmax = parts["weight.absmax"][...]
    if absmax.dtype != torch.uint8:
        return absmax
    code, steps = (parts[f"weight.nested_{x}"][...] for x in ("quant_map", "absmax"))
    spread = steps.repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
    exact: torch.Tensor = code[absmax.int()] * spread + state["nested_offset"]
    return exact


def four_bits(parts: dict[str, Stored], settings: dict[str, Any]) -> torch.Tensor:
    """NF4 or FP4, the upper half of a byte first; the scales of blocks may be in 8 bits too."""
    state = quant_state(parts)
    assert state
    absmax = block_scales(parts, state)
    packed = parts["weight"][...].flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()
    table = parts["weight.quant_map"][...]
    blocks = table[codes.int()].unflatten(0, (-1, int(state["blocksize"])))
    return (blocks * absmax[:, None]).reshape(state["shape"])


def eight_bits(parts: dict[str, Stored], settings: dict[str, Any]) -> torch.Tensor:
    """int8 [out, in], and of each row the largest weight, which 127 stands for."""
    return parts["weight"][...].float() * (parts["SCB"][...].float()[:, None] / 127)
