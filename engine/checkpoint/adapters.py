"""LoRA adapters (arXiv 2106.09685) as peft writes them: what a folder says, read and checked.

Which modules an adapter changes, its tensors say themselves, so target_modules and its like are not
read. What would be wrong to leave out is refused, by name, before a weight is read.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.blame import read_object
from engine.checkpoint.stored import Stored, stored_in
from engine.errors import StartError

# What adapter_config.json may say of the training, which changes nothing once it is done.
_TRAINING_ONLY = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "lora_dropout", "init_lora_weights", "bias", "modules_to_save",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "runtime_config", "peft_version", "qalora_group_size",
    "velora_config", "ensure_weight_tying",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",  # ms-swift's
    "unsloth_fixed",
}  # fmt: skip
_HONOURED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "fan_in_fan_out", "lora_bias", "trainable_token_indices",
}  # fmt: skip
# Ways to begin a training that change the model's own weights, to which the adapter must then be
# added; peft does it again when it loads one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A tensor of an adapter: the module, what of it, and in some files the adapter's name.
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<inner>(base_layer\.)*)(?P<part>lora_A|lora_B|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector)(\.[^.]+?)??(?P<kind>\.weight|\.bias|)"
)
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")

# The tensors of one update, by what they are: lora_A, lora_B, lora_B.bias, ….
Parts = dict[str, Stored]


def refused(folder: Path, reason: str) -> StartError:
    """The error for an adapter that cannot be merged rightly."""
    return StartError(f"the adapter in {folder} cannot be merged: {reason}")


@dataclass
class Adapter:
    """What a folder of peft's says: settings, and tensors by the names of the model's modules."""

    folder: Path
    settings: dict[str, Any]
    pairs: dict[str, Parts] = field(default_factory=dict)  # of each linear layer or embedding
    # Of a mixture's stacked experts: one a parameter, 0 being the outermost that peft wrapped.
    stacks: dict[str, dict[int, Parts]] = field(default_factory=dict)
    whole: dict[str, Stored] = field(default_factory=dict)  # tensors in place of the model's own
    tokens: dict[str, Stored] = field(default_factory=dict)  # rows of embeddings

    def scale_of(self, module: str, rank: int) -> float:
        """By what B A is multiplied (arXiv 2106.09685, and 2312.03732 for rsLoRA)."""
        alpha = pattern_value(self.settings.get("alpha_pattern"), module)
        alpha = self.settings.get("lora_alpha", 8) if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def rank_of(self, module: str) -> int:
        """The rank that the settings say."""
        rank = pattern_value(self.settings.get("rank_pattern"), module)
        return int(self.settings.get("r", 8) if rank is None else rank)


def pattern_value(patterns: dict[str, Any] | None, module: str) -> Any:
    """The value of the first pattern that a module's name, or the end of it, matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not the merged model beside it."""
    whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / "adapter_config.json").is_file() and not whole


def read_adapter(folder: Path) -> Adapter:
    """An adapter, whose tensors are not read yet.

    Raises StartError for what it would not be right to leave out.
    """
    adapter = Adapter(folder, _read_settings(folder))
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise refused(folder, "there is no adapter_model.safetensors and no adapter_model.bin")
    for name, tensor in stored_in(file).items():
        _sort_in(adapter, _module_name(name), tensor)
    if not (adapter.pairs or adapter.stacks or adapter.whole or adapter.tokens):
        raise refused(folder, f"{file.name} has no tensors of a LoRA adapter")
    for module, parts in adapter.pairs.items():
        _check_pair(adapter, module, parts)
    return adapter


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = read_object(folder / "adapter_config.json")
    _check_settings(folder, settings)
    return settings


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise StartError unless all that is set can be honoured."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise refused(folder, f"it is of the type {kind}, and only LORA is known")
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise refused(folder, f"it was trained for {task}, not for CAUSAL_LM")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise refused(
            folder,
            f"it began as {start}, which changed the model's weights; save it from peft with"
            " path_initial_model_for_weight_conversion, or merge it there",
        )
    other = sorted(settings.keys() - _TRAINING_ONLY - _HONOURED)
    if unknown := [name for name in other if settings[name]]:
        raise refused(
            folder,
            f"adapter_config.json sets {unknown[0]}, which is not known; merge it with peft's"
            " merge_and_unload()",
        )


def _module_name(name: str) -> str:
    """A tensor's name without what wrappers of the model put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)*(base_model\.model\.)?", "", name)


def _sort_in(adapter: Adapter, name: str, tensor: Stored) -> None:
    """Put a tensor of an adapter where it belongs."""
    if match := _PART.fullmatch(name):
        part = match["part"] + (".bias" if match["kind"] == ".bias" else "")
        depth = match["inner"].count("base_layer.")
        if depth or match["module"].endswith(".experts"):
            # peft wraps a module again for each of its parameters that is trained.
            adapter.stacks.setdefault(match["module"], {}).setdefault(depth, {})[part] = tensor
        else:
            adapter.pairs.setdefault(match["module"], {})[part] = tensor
    elif match := _TOKENS.fullmatch(name):
        adapter.tokens[match["module"]] = tensor
    else:
        name = re.sub(r"\.(modules_to_save(\.[^.]+)?|base_layer|original_module)\.", ".", name)
        adapter.whole[name] = tensor


def _check_pair(adapter: Adapter, module: str, parts: Parts) -> None:
    """Raise StartError unless a module's update is whole and of the rank that is set."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise refused(adapter.folder, f"{module}.{missing[0]} is not there")
    rank = parts[names[0]].shape[0]
    stated = adapter.rank_of(module)
    if rank != stated or parts[names[1]].shape[1] != rank:
        raise refused(adapter.folder, f"{module} has rank {rank}, and its settings say {stated}")
    if adapter.settings.get("use_dora") and not embedding and "lora_magnitude_vector" not in parts:
        raise refused(adapter.folder, f"{module}.lora_magnitude_vector is not there (use_dora)")


def names_of_base(adapter: Adapter) -> Iterator[str]:
    """Under which the model that an adapter belongs to may be found, the likeliest first."""
    named = str(adapter.settings.get("base_model_name_or_path") or "").rstrip("/\\")
    if named:
        yield named
        yield re.split(r"[/\\]", named)[-1]
