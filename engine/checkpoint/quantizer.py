"""Packs a model's weights while they are loaded: what transformers asks of a quantizer.

Packed are the matrices of linear layers and of a mixture's experts. Embeddings, the output head,
norms and routers stay as they are, and so does MLA's up-projection, with which attention computes.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.errors import StartError
from engine.layers.block_packing import GROUP, pack_blocks
from engine.layers.blocks import BlockExperts, PackedLinear
from engine.layers.experts import computes_alike, has_fused_experts
from engine.layers.freed_memory import return_freed_memory
from engine.layers.quantized import (
    BLOCK,
    Bits,
    QuantizedExperts,
    QuantizedLinear,
    fits,
    load_bitsandbytes,
    pack_stack,
    shapes_of,
)

_METHOD = "chat-api"
_EXPERTS = ("gate_up_proj", "down_proj")


class QuantizationSettings(QuantizationConfigMixin):
    """So many bits, as transformers' settings of a quantizer; `blocks` with offsets, which no card
    reads, or else NF4."""

    def __init__(self, bits: Bits, blocks: bool = False):
        self.quant_method = _METHOD
        self.bits, self.blocks = bits, blocks


def quantization_settings(
    quantize: str, device_map: str, on_cpu: bool
) -> QuantizationSettings | None:
    """How to pack a model's weights: none, 8bit or 4bit; None to leave them.

    Raises StartError if it cannot be done.
    """
    if quantize == "none":
        return None
    bits: dict[str, Bits] = {"8bit": 8, "4bit": 4}
    if quantize not in bits:
        raise StartError(f"--quantize {quantize} is not known; it takes none, 8bit or 4bit")
    if "disk" in device_map:
        raise StartError("--quantize does not do layers on disk; take them out of --device-map")
    if quantize == "4bit" and not on_cpu:
        load_bitsandbytes()
    AUTO_QUANTIZER_MAPPING[_METHOD] = _PackingQuantizer
    return QuantizationSettings(bits[quantize], blocks=on_cpu and quantize == "4bit")


def kept(model: Any) -> Iterator[Any]:
    """The linear layers of a model that are not packed."""
    yield model.get_output_embeddings()
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            yield getattr(module, "kv_b_proj", None)
        yield getattr(module, "dt_proj", None)  # Mamba's code takes its weights
        # Beside a mixture's experts stand its routers.
        if any(has_fused_experts(child) for child in module.children()):
            yield from (child for child in module.children() if type(child) is torch.nn.Linear)


def quantize_layers(model: Any, bits: Bits, blocks: bool = False) -> None:
    """Replace a model's layers by packed ones, while it is on the meta device.

    Raises StartError for a mixture whose experts, nearly all of its weights, cannot be packed.
    """
    left = {id(module) for module in kept(model)}
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    tried: set[Any] = set()  # mixtures' experts of this class and size
    block = GROUP if blocks else BLOCK
    for name, module in list(model.named_modules()):
        if id(module) in left or exact & set(name.split(".")):
            continue
        if type(module) is torch.nn.Linear and fits(module.weight, bits, block):
            packed = PackedLinear(module) if blocks else QuantizedLinear(module, bits)
            model.set_submodule(name, packed)
        elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            kind = (type(module), module.gate_up_proj.shape)
            if kind not in tried:
                _check_experts(module)
                tried.add(kind)
            stacks = module.gate_up_proj, module.down_proj
            if all(fits(stack, bits, block) for stack in stacks):
                experts = BlockExperts(module) if blocks else QuantizedExperts(module, bits)
                model.set_submodule(name, experts)


def _check_experts(experts: Any) -> None:
    """Raise StartError if a mixture's experts do other than QuantizedExperts does, tried on two."""
    if has_fused_experts(experts):
        own: Any = deepcopy(experts)
        own.num_experts = 2
        with torch.device("cpu"), torch.inference_mode():
            for name in _EXPERTS:
                drawn = torch.randn(2, *getattr(experts, name).shape[1:]) / 32
                setattr(own, name, torch.nn.Parameter(drawn, requires_grad=False))
            packed = QuantizedExperts(own, 8)
            for name in _EXPERTS:
                weight, scale = pack_stack(getattr(own, name), 8)
                getattr(packed, name).data = weight
                getattr(packed, f"{name}_scale").data = scale
            if computes_alike(packed, own):
                return
    raise StartError(
        f"--quantize cannot pack the experts of {type(experts).__name__}; start without it, or"
        " take another model"
    )


def misshapen(model: Any) -> list[str]:
    """The packed tensors that the checkpoint has in another shape, of which transformers says
    nothing."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            now = shapes_of(module)
            found += [f"{path}.{name}" for name in now if now[name] != module.shapes[name]]
    return found


class Pack(ConversionOps):
    """Packs what one or several tensors of a checkpoint became."""

    def __init__(self, bits: Bits, blocks: bool):
        self.bits, self.blocks = bits, blocks

    @torch.no_grad()
    def convert(self, input_dict: Any, **_: Any) -> dict[str, torch.Tensor]:
        packed: dict[str, torch.Tensor] = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            parts = pack_blocks(weight) if self.blocks else pack_stack(weight, self.bits)
            packed |= zip((name, f"{name}_scale", f"{name}_offset"), parts, strict=False)
        return_freed_memory()
        return packed


class _PackingQuantizer(HfQuantizer):
    """Packs each tensor as soon as it is read, so that the whole is never in memory unpacked."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        quantize_layers(model, self.quantization_config.bits, self.quantization_config.blocks)

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Copy what is not packed: as a part of a mapped file, it would keep all of it mapped."""
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.is_floating_point():
                parameter.data = parameter.data.clone()

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return hasattr(module, f"{name}_scale")

    def get_quantize_ops(self) -> Pack:
        return Pack(self.quantization_config.bits, self.quantization_config.blocks)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
