"""Packs a model's weights while they are loaded: what transformers asks of a quantizer.

Packed are the matrices of linear layers and of a mixture's experts. Embeddings, the output head,
norms and routers stay as they are, and so does MLA's up-projection, with which attention computes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.errors import StartError
from engine.form import has_fused_experts
from engine.quantized import (
    Bits,
    QuantizedExperts,
    QuantizedLinear,
    fits,
    load_bitsandbytes,
    pack,
    shapes_of,
)

METHOD = "chat-api"


class QuantizationSettings(QuantizationConfigMixin):
    """So many bits, as transformers' settings of a quantizer."""

    def __init__(self, bits: Bits):
        self.quant_method = METHOD
        self.bits = bits


def quantization_settings(
    config: Any, quantize: str, device_map: str
) -> QuantizationSettings | None:
    """How to pack a model's weights: none, 8bit or 4bit; None to leave them.

    Raises StartError if it cannot be done.
    """
    if quantize == "none":
        return None
    bits: dict[str, Bits] = {"8bit": 8, "4bit": 4}
    if quantize not in bits:
        raise StartError(f"--quantize {quantize} is not known; it takes none, 8bit or 4bit")
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = stored.get("quant_method") or "with fewer bits"
        raise StartError(
            f"the checkpoint is quantised already ({method}); start without --quantize, or take"
            " the model that it was made from"
        )
    if "disk" in device_map:
        raise StartError("--quantize does not do layers on disk; take them out of --device-map")
    if quantize == "4bit":
        load_bitsandbytes()
    AUTO_QUANTIZER_MAPPING[METHOD] = PackingQuantizer
    return QuantizationSettings(bits[quantize])


def kept(model: Any) -> Iterator[Any]:
    """The linear layers of a model that are not packed."""
    yield model.get_output_embeddings()
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            yield getattr(module, "kv_b_proj", None)
        # Beside a mixture's experts stand its routers.
        if any(has_fused_experts(child) for child in module.children()):
            yield from (child for child in module.children() if type(child) is torch.nn.Linear)


def quantize_layers(model: Any, bits: Bits) -> None:
    """Replace a model's layers by packed ones, while it is on the meta device."""
    left = {id(module) for module in kept(model)}
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in list(model.named_modules()):
        if id(module) in left or exact & set(name.split(".")):
            continue
        if type(module) is torch.nn.Linear and fits(module.weight, bits):
            model.set_submodule(name, QuantizedLinear(module, bits))
        elif has_fused_experts(module) and has_usual_gate(module):
            stacks = (module.gate_up_proj, module.down_proj)
            if all(fits(stack, bits) for stack in stacks):
                model.set_submodule(name, QuantizedExperts(module, bits))


def has_usual_gate(experts: Any) -> bool:
    """Whether the gate is the activation times the other half, which comes second."""
    own = getattr(type(experts), "_apply_gate", None)
    usual = own is None or own.__module__ == "transformers.integrations.moe"
    return usual and getattr(experts, "is_concatenated", True)


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

    def __init__(self, bits: Bits):
        self.bits = bits

    @torch.no_grad()
    def convert(self, input_dict: Any, **_: Any) -> dict[str, torch.Tensor]:
        packed = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            if weight.ndim == 2:
                parts = pack(weight, self.bits)
            else:  # one by one, as packing takes a copy in float32
                pairs = [pack(matrix, self.bits) for matrix in weight]
                parts = (torch.stack([w for w, _ in pairs]), torch.stack([s for _, s in pairs]))
            packed[name], packed[f"{name}_scale"] = parts
        return packed


class PackingQuantizer(HfQuantizer):
    """Packs each tensor as soon as it is read, so that the whole is never in memory unpacked."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        quantize_layers(model, self.quantization_config.bits)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return hasattr(module, f"{name}_scale")

    def get_quantize_ops(self) -> Pack:
        return Pack(self.quantization_config.bits)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
