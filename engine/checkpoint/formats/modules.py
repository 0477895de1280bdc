"""Finds the tensors of each quantised matrix by what is stored, whatever its settings say."""

import re
from collections.abc import Callable
from typing import Any

import torch

from engine.checkpoint.formats import bnb, floats, integers
from engine.checkpoint.formats.levels import Levels
from engine.checkpoint.stored import Stored, Weights
from engine.errors import StartError

_Read = Callable[[dict[str, Stored], dict[str, Any]], Any]
# How a matrix is read, and the tensors of its module that belong to it.
KINDS: dict[str, tuple[_Read, tuple[str, ...]]] = {
    "gptq": (integers.gptq, ("qweight", "qzeros", "scales", "g_idx")),
    "awq": (integers.awq, ("qweight", "qzeros", "scales")),
    "pack-quantized": (
        integers.pack_quantized,
        ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
    "fp4": (
        floats.fp4,
        ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    ),
    "scaled": (
        floats.scaled,
        ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "input_scale",
         "activation_scale", "input_scale_ub"),
    ),
    "bnb 4 bits": (
        bnb.four_bits,
        ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
         "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
         "weight.quant_state.bitsandbytes__fp4"),
    ),
    "bnb 8 bits": (bnb.eight_bits, ("weight", "SCB", "weight_format")),
}  # fmt: skip
_WHOLE_NUMBERS = ("gptq", "awq", "pack-quantized")
# What lies beside the weights for what is not done in fewer bits: activations and the cache.
_UNUSED = re.compile(r".+\.(k_scale|v_scale|q_scale|input_zero_point|output_scale|act_scale)")
_PARTS = sorted({name for _, names in KINDS.values() for name in names}, key=len, reverse=True)
_OF_MODULE = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _PARTS))})")

# The tensors of a module that may belong to its matrix, by their last name.
Parts = dict[str, Stored]


def by_module(weights: Weights) -> tuple[dict[str, Parts], dict[str, Stored]]:
    """The tensors that may be parts of a packed matrix, by module, and all others."""
    modules: dict[str, Parts] = {}
    plain: dict[str, Stored] = {}
    for name, tensor in weights.items():
        if match := _OF_MODULE.fullmatch(name):
            modules.setdefault(match[1], {})[match[2]] = tensor
        elif not _UNUSED.fullmatch(name):
            plain[name] = tensor
    return modules, plain


def kind_of(parts: Parts, method: str) -> str | None:
    """How a module's matrix is kept; None if it is an ordinary one."""
    if "qweight" in parts:
        return "awq" if method == "awq" else "gptq"
    if "weight_packed" in parts:
        return "pack-quantized" if parts["weight_packed"].dtype == torch.int32 else "fp4"
    if "SCB" in parts:
        return "bnb 8 bits"
    if any(name.startswith("weight.quant_state.") for name in parts):
        return "bnb 4 bits"
    if {"weight_scale", "weight_scale_inv"} & parts.keys():
        return "scaled"
    return None


def unpacked(weights: Weights, settings: dict[str, Any]) -> dict[str, Stored]:
    """The same weights as ordinary ones in float32, each unpacked when it is asked for.

    Raises StartError for tensors that belong to none.
    """
    method = str(settings["quant_method"])
    modules, plain = by_module(weights)
    for module, parts in modules.items():
        kind = kind_of(parts, method)
        if kind is None:
            plain |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            continue
        read, names = KINDS[kind]
        if odd := sorted(parts.keys() - set(names)):
            raise StartError(f"{module}.{odd[0]} is in the checkpoint, and not understood")
        plain[f"{module}.weight"] = _weight(read, parts, settings)
    return floats.gpt_oss_experts(plain)


def _weight(read: _Read, parts: Parts, settings: dict[str, Any]) -> Stored:
    def weight() -> torch.Tensor:
        matrix = read(parts, settings)
        exact: torch.Tensor = matrix.weight() if isinstance(matrix, Levels) else matrix
        return exact

    return Stored(shape_of(parts), torch.float32, weight)


def shape_of(parts: Parts) -> Any:
    """A matrix's own shape [out, in], without its weights."""
    if "qweight" in parts:
        columns = parts["scales"].shape[1]
        words = parts["qweight"].shape
        if words[1] != columns:  # AWQ packs columns
            return columns, words[0]
        bits = 32 * parts["qzeros"].shape[1] // columns
        return columns, 32 * words[0] // bits
    if "weight_shape" in parts:
        return parts["weight_shape"][...].tolist()
    if "weight_packed" in parts:
        return (*parts["weight_packed"].shape[:-1], 2 * parts["weight_packed"].shape[-1])
    if state := bnb.quant_state(parts):
        return state["shape"]
    return parts["weight"].shape
