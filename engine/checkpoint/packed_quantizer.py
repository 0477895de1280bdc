"""Keeps a checkpoint's own few bits: its packed matrices become the engine's, without unpacking."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.checkpoint.llama_like import UngroupQKV
from engine.checkpoint.quantizer import kept
from engine.checkpoint.stored import Stored
from engine.layers.blocks import BlockEmbedding, BlockLinear

_METHOD = "chat-api-packed"


class PackedSettings(QuantizationConfigMixin):
    """Settings of a quantizer that takes what is stored: `packed` has the parts of each matrix,
    which take the place of the matrix in `weights`."""

    def __init__(self, weights: dict[str, Stored], packed: dict[str, dict[str, Stored]]):
        AUTO_QUANTIZER_MAPPING[_METHOD] = _PackedQuantizer
        self.quant_method = _METHOD
        self.weights, self.packed = weights, packed

    def __deepcopy__(self, _: Any) -> "PackedSettings":
        return self  # it holds files

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


class _PackedQuantizer(HfQuantizer):
    """Puts packed layers where the checkpoint's are, and lets their parts be read as they are.

    As it says that it packs while loading, transformers reads one tensor after the other, and
    casts none but to the type that its place has.
    """

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        settings = self.quantization_config
        layers = dict(model.named_modules())
        head = model.get_output_embeddings()
        left = {id(module) for module in kept(model) if module is not head}
        for module, targets in _targets_of(model, settings.packed).items():
            places = [layers.get(target) for target in targets]
            if not all(_can_be_packed(x) and id(x) not in left for x in places):
                continue
            parts = settings.packed[module]
            for target, layer in zip(targets, places, strict=True):
                model.set_submodule(target, _packed(layer, parts))
            del settings.weights[f"{module}.weight"]
            settings.weights |= {f"{module}.{name}": part for name, part in parts.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _can_be_packed(layer: Any) -> bool:
    return type(layer) in (torch.nn.Linear, torch.nn.Embedding)


def _packed(layer: Any, parts: dict[str, Stored]) -> torch.nn.Module:
    """An empty packed layer in place of another; of one that a matrix is split into, its rows."""
    rows = len(layer.weight)
    own = {
        name: part
        if name == "weight_order"
        else Stored((rows, *part.shape[1:]), part.dtype, part.read)
        for name, part in parts.items()
    }
    kind = BlockLinear if isinstance(layer, torch.nn.Linear) else BlockEmbedding
    return kind(layer, own)


def _targets_of(model: Any, modules: Iterable[str]) -> dict[str, list[str]]:
    """What a checkpoint's modules are called in the model: some become several, by rows.

    Those whose weights are changed otherwise are not among them.
    """
    mapping = deepcopy(get_model_conversion_mapping(model, None, None))
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    state = model.state_dict()
    found = {}
    for module in modules:
        name, pattern = rename_source_key(
            f"{module}.weight", renamings, converters, model.base_model_prefix, state
        )
        converter = by_pattern.get(pattern) if pattern else None
        if converter and not all(isinstance(x, UngroupQKV) for x in converter.operations):
            continue
        targets = converter.target_patterns if converter else [""]
        names = [name.replace(targets[0], target) for target in targets]
        found[module] = [x.removesuffix(".weight") for x in names]
    return found
