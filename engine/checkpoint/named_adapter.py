"""Adapters that stay beside the model's weights, of which each request chooses one by its name.

Such an adapter changes linear layers of the model, and those alone. What else may be trained is
refused, by name: merging does it.
"""

from collections.abc import Mapping
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from engine.attention.interface import can_absorb
from engine.checkpoint.adapters import Adapter, Parts, is_adapter, read_adapter
from engine.checkpoint.checkpoint import as_start_error
from engine.checkpoint.llama_like import UngroupQKV
from engine.errors import StartError
from engine.layers.lora import Update
from engine.layers.named_adapters import Updates
from engine.layers.quantized import QuantizedLinear
from engine.prompt.families import format_of
from engine.prompt.generation_defaults import known_ends
from engine.prompt.tokenizer import ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer

# The tensors of an update that is computed beside the weights.
_PAIR = {"lora_A", "lora_B"}


def _not_beside(folder: Path, what: str) -> StartError:
    """The error for an adapter that must be merged."""
    return StartError(
        f"--adapter: the adapter in {folder} changes {what}, which is not computed beside the"
        f" model's weights; merge it instead, with --model {folder}"
    )


def read_named_adapter(folder: Path) -> Adapter:
    """An adapter that can be one of several, as far as its own files say.

    Raises StartError for one that is no adapter, or must be merged.
    """
    if not is_adapter(folder):
        raise StartError(f"--adapter: {folder} is no folder of a LoRA adapter")
    adapter = read_adapter(folder)
    if adapter.stacks:
        raise _not_beside(folder, f"the parameters of {min(adapter.stacks)}")
    for tensors in (adapter.whole, adapter.tokens):
        if tensors:
            raise _not_beside(folder, f"{min(tensors)} itself")
    for module, parts in adapter.pairs.items():
        if other := sorted(parts.keys() - _PAIR):
            raise _not_beside(folder, f"{module}.{other[0]}")
        if adapter.settings.get("fan_in_fan_out"):
            raise _not_beside(folder, f"the transposed matrix of {module}")
    return adapter


def updates_of(adapter: Adapter, model: Any) -> Updates:
    """What an adapter adds to a model's linear layers, before these change their form.

    Raises StartError if it is another model's, or changes what is no linear layer of this one's.
    """
    found: Updates = {}
    mapping = deepcopy(get_model_conversion_mapping(model, None, None))
    names = model.state_dict()  # which takes longer than a module's matrices
    for module, parts in adapter.pairs.items():
        for layer, update in _layers_of(adapter, model, mapping, names, module, parts).items():
            _check_layer(adapter, model, module, layer, update)
            found[layer] = update
    return found


def _layers_of(
    adapter: Adapter,
    model: Any,
    mapping: list[Any],
    names: Mapping[str, torch.Tensor],
    module: str,
    parts: Parts,
) -> dict[str, Update]:
    """An update by the names of the model's layers, as several of which a module may be loaded.

    `mapping` is how transformers loads a checkpoint of this model, `names` are its tensors.
    """
    down, up = (parts[name][...].to(torch.float32) for name in ("lora_A", "lora_B"))
    up = up * adapter.scale_of(module, len(down))
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    name, pattern = rename_source_key(
        f"{module}.weight", renamings, converters, model.base_model_prefix, names
    )
    converter = next((x for x in converters if pattern in x.source_patterns), None)
    if converter is None:
        return {name.removesuffix(".weight"): Update(down, up)}
    targets = converter.target_patterns
    layers = [name.replace(targets[0], target).removesuffix(".weight") for target in targets]
    if not all(isinstance(x, UngroupQKV) for x in converter.operations):
        raise _not_beside(adapter.folder, module)
    # Its rows go where the matrix's do.
    (operation,) = converter.operations
    split = operation.convert({pattern: [up]}, [pattern], targets, config=model.config)
    return {name: Update(down, split[part]) for name, part in zip(layers, targets, strict=True)}


def _check_layer(adapter: Adapter, model: Any, module: str, name: str, update: Update) -> None:
    """Raise StartError unless a layer is there, linear, of this shape, and computed by itself."""
    try:
        layer = model.get_submodule(name)
        parent = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        layer = parent = None
    if layer is None and not any(part == "experts" for part in module.split(".")):
        raise StartError(
            f"--adapter: the model has no {module}, which the adapter in {adapter.folder} changes;"
            " is it another model's?"
        )
    absorbed = can_absorb(parent) and name.endswith("kv_b_proj")
    linear = type(layer) is torch.nn.Linear or isinstance(layer, QuantizedLinear)
    if not linear or absorbed or layer is model.get_output_embeddings():
        raise _not_beside(adapter.folder, module)
    own = [layer.out_features, layer.in_features]
    found = [len(update.up), update.down.shape[1]]
    if own != found:
        raise StartError(
            f"--adapter: {module} is {found} in the adapter in {adapter.folder}, and {own} in the"
            " model; is it another model's?"
        )


def _text_of(folder: Path, own: Any, text: ChatTokenizer, model_type: str) -> ChatTokenizer:
    """What an adapter is prompted by: its model's own, unless `own` has another template.

    Raises StartError if this is another tokenizer than the model's.
    """
    if own is None:
        return text
    if own.get_vocab() != text.tokenizer.get_vocab():
        raise _not_beside(folder, "the tokenizer")
    if own.chat_template in (None, text.tokenizer.chat_template):
        return text
    prompted = copy(text.tokenizer)
    prompted.chat_template = own.chat_template
    return ChatTokenizer(prompted, format_of(model_type, prompted))


def _ends_of(folder: Path, own: Any, text: ChatTokenizer, vocabulary: int) -> frozenset[int]:
    """The ids that end an answer by an adapter's own tokenizer, template and generation config.

    A tutorial often trains a chat's end of turn into a model that had only the end of a text.
    """
    config = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    ends = text.end_ids(config) | ({own.eos_token_id} if own else set())
    return frozenset(known_ends((i for i in ends if i is not None), vocabulary))


class NamedAdapters:
    """Adapters by their names: read and checked, and then fitted to their model.

    Raises StartError for one that is damaged, must be merged, or has the model's own name.
    """

    def __init__(self, folders: Mapping[str, Path], model_name: str):
        self.name = model_name
        if model_name in folders:
            raise StartError(
                f"--adapter: the model itself is called {model_name}; choose another name"
            )
        self.adapters: dict[str, Adapter] = {}
        self.updates: list[Updates] = []  # of each, in order
        self.texts: dict[str, ChatTokenizer] = {}  # what each is prompted by
        self.ends: dict[str, frozenset[int]] = {}  # of each one's answers
        for name, folder in folders.items():
            with as_start_error(folder):
                self.adapters[name] = read_named_adapter(folder)

    @property
    def told(self) -> str:
        """Behind the model's name, in words."""
        return f" with {', '.join(self.adapters)}" if self.adapters else ""

    def fit(self, model: Any, text: ChatTokenizer, own_templates: bool) -> None:
        """Find their layers in a loaded model. Raises StartError if one is another model's."""
        kind, vocabulary = model.config.model_type, len(model.get_input_embeddings().weight)
        for name, adapter in self.adapters.items():
            folder = adapter.folder
            with as_start_error(folder):
                self.updates.append(updates_of(adapter, model))
                own = load_tokenizer(folder)
                prompted = _text_of(folder, own, text, kind) if own_templates else text
                self.texts[name] = prompted
                self.ends[name] = _ends_of(folder, own, prompted, vocabulary)
