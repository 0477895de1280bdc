"""How a checkpoint becomes a model. No code from a checkpoint is executed."""

import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from packaging.specifiers import SpecifierSet
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils.logging import disable_progress_bar

from engine.checkpoint.attention_probe import check_attention
from engine.checkpoint.model_config import load_config, plain_attention
from engine.checkpoint.quantizer import (
    QuantizationSettings,
    misshapen,
    quantization_settings,
    quantize_layers,
)
from engine.errors import StartError, TemplateTooCostly
from engine.prompt.families import format_of
from engine.prompt.tokenizer import ChatTokenizer, load_tokenizer

log = logging.getLogger("chat")


SUPPORTED = {"torch": ">=2.6,<2.14", "transformers": ">=5.17,<6"}


def check_versions(installed: Callable[[str], str] = version) -> None:
    """Raise StartError unless torch and transformers are in the supported ranges."""
    for name, wanted in SUPPORTED.items():
        if not SpecifierSet(wanted).contains(installed(name), prereleases=True):
            raise StartError(
                f"{name} {installed(name)} is not one that this server works with ({wanted});"
                f" run `pip install '{name}{wanted}'`, or choose another image"
            )


def check_gpus(device_map: str) -> None:
    """Raise StartError if the machine has an NVIDIA card that torch cannot use.

    A model that falls back to the CPU without a word would seem to hang.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_card = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if device_map == "cpu" or hidden or not has_card:
        return
    try:
        for index in range(max(1, torch.cuda.device_count())):
            torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StartError(
            f"this machine has a card that torch {torch.__version__} cannot use ({reason});"
            " install the torch build that fits the driver (see pytorch.org/get-started),"
            " or start with --device-map cpu"
        ) from error


class UngroupQKV(ConversionOps):
    """Splits InternLM2's fused wqkv.

    Its rows are grouped by key head: its query heads, the key, the value.
    """

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((matrix,),) = input_dict.values()
        queries = config.num_attention_heads // config.num_key_value_heads
        groups = matrix.unflatten(0, (config.num_key_value_heads, queries + 2, config.head_dim))
        parts = groups.split([queries, 1, 1], dim=1)
        named = zip(target_patterns, parts, strict=True)
        return {name: part.flatten(0, 2).contiguous() for name, part in named}


class NormalizeRows(ConversionOps):
    """Index normalises its output head at every forward pass; doing so at load is the same."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((matrix,),) = input_dict.values()
        return {target_patterns[0]: F.normalize(matrix, dim=-1) if config.norm_head else matrix}


# Models that are Llama but for their names: model_type, and how the checkpoint's tensors differ.
LLAMA_LIKE = {
    "xverse": [],
    "index": [WeightConverter("lm_head.weight", "lm_head.weight", [NormalizeRows()])],
    "internlm2": [
        WeightRenaming("tok_embeddings", "embed_tokens"),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming("attention_norm", "input_layernorm"),
        WeightRenaming("ffn_norm", "post_attention_layernorm"),
        WeightRenaming("attention.wo", "self_attn.o_proj"),
        WeightRenaming("feed_forward.w1", "mlp.gate_proj"),
        WeightRenaming("feed_forward.w3", "mlp.up_proj"),
        WeightRenaming("feed_forward.w2", "mlp.down_proj"),
        WeightConverter(
            "attention.wqkv",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [UngroupQKV()],
        ),
    ],
}


@cache
def register_families() -> None:
    """Make the families known to transformers.

    Once registered, transformers' own code is used and a checkpoint's `auto_map` is not.
    """
    for name, mapping in LLAMA_LIKE.items():
        config_class = type(f"{name}Config", (LlamaConfig,), {"model_type": name})
        model_class = type(
            f"{name}ForCausalLM", (LlamaForCausalLM,), {"config_class": config_class}
        )
        AutoConfig.register(name, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


@contextmanager
def explained(folder: Path | str) -> Iterator[None]:
    """Turn any error about a folder's files into a StartError of one sentence."""
    try:
        yield
    except (StartError, torch.OutOfMemoryError):
        raise
    except TemplateTooCostly as error:
        raise StartError(f"{error}; pass another one with --chat-template FILE") from error
    except Exception as error:  # the libraries raise almost every kind
        broken = first_damaged(Path(folder)) if isinstance(error, SafetensorError) else folder
        # Without ANSI colours and other control characters.
        said = re.sub(r"\x1b\[\d*m|[\x00-\x09\x0b-\x1f]", "", str(error)).strip()
        reason = said.partition("\n")[0].rstrip(". :") or type(error).__name__
        raise StartError(
            f"the model could not be loaded from {broken} ({reason}); if a file is damaged, delete"
            " it and run the download again, as with `python model_download.py NAME`"
        ) from error


def first_damaged(folder: Path) -> Path:
    """The first safetensors file that cannot be opened; the error itself does not name it."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return folder


def read_device_map(device_map: str) -> str | dict[str, Any]:
    """A device map as accelerate takes it.

    Raises StartError if it is none, or if it names a card that is not there.
    """
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_map
    takes = "--device-map takes auto, cpu, cuda:0 and the like, or a JSON map of module to device"
    try:
        parsed = json.loads(device_map) if device_map.startswith("{") else device_map
        places = parsed.values() if isinstance(parsed, dict) else [parsed]
        devices = [torch.device(place) for place in places if place != "disk"]
    except (ValueError, TypeError, RuntimeError) as error:
        raise StartError(f"{device_map!r} is no device map; {takes}") from error
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count() or "no"
            raise StartError(
                f"--device-map names {device}, but torch sees {count} CUDA card here; {takes}"
            )
    return parsed


def best_placement(
    config: Any, dtype: str, quantization: QuantizationSettings | None = None
) -> str:
    """A device map: the first of several cards that has room for the whole model and a KV cache.

    On one card decode steps run as CUDA graphs, and no card waits for another; `auto`, accelerate's
    balanced map, would use all cards even for a small model.
    """
    if torch.backends.mps.is_available():
        return "cpu"  # sampling needs float64, which Apple's GPUs lack
    cards = range(torch.cuda.device_count())
    if len(cards) > 1:
        known = config.dtype if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=known)
        if quantization:
            quantize_layers(model, quantization.bits)
        size = model.get_memory_footprint()
        for card in cards:
            if size <= 0.7 * torch.cuda.mem_get_info(card)[0]:
                return f"cuda:{card}"
    return "auto"


def load_model(
    folder: Path | str, *, dtype: str = "auto", device_map: str = "auto", quantize: str = "none"
) -> tuple[Any, PreTrainedTokenizerFast | None]:
    """A checkpoint's model, a plain transformers one placed by accelerate, and its tokenizer.

    Nothing in the folder is executed. The tokenizer is None where the folder has none. Raises
    StartError, ValueError, or whatever the libraries raise where its files do not make a model.
    """
    log.info("loading weights (%s)", folder)
    register_families()
    placement = read_device_map(device_map)
    config = load_config(Path(folder))
    check_attention(config)
    quantization = quantization_settings(config, quantize, device_map)
    if device_map == "auto":
        placement = best_placement(config, dtype, quantization)
    if not (sys.stderr and sys.stderr.isatty()):
        disable_progress_bar()  # it would raise where standard error is a file on a full disk
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        quantization_config=quantization,
        device_map=placement,
        offload_folder=tempfile.mkdtemp(prefix="chat-api-") if "disk" in device_map else None,
        # InternLM2's config asks for eager attention, which is slow.
        attn_implementation=plain_attention(config),
        trust_remote_code=False,
        local_files_only=True,
        # Missing or mismatched tensors would otherwise be random, with only a line in the log.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_tensors(model, report)
    return model.eval(), load_tokenizer(Path(folder))


def check_tensors(model: Any, report: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint lacked tensors, or had some of another shape."""
    other_shapes = report["mismatched_keys"] or misshapen(model)
    wrong = {"not there": report["missing_keys"], "of another shape": other_shapes}
    for how, names in wrong.items():
        if names:
            # Of a mismatch the shapes are told too.
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise ValueError(f"{len(names)} of its tensors are {how}, for example {first}")


def device_summary(model: Any) -> str:
    """The devices that hold the model: how many of its parts each, and its free memory."""
    parts = Counter(map(str, getattr(model, "hf_device_map", {"": model.device}).values()))
    said = []
    for name, count in parts.items():
        device = f"cuda:{name}" if name.isdigit() else name
        told = []
        if len(parts) > 1:
            told.append(f"{count} {'part' if count == 1 else 'parts'}")
        if "cuda" in device:
            told.append(f"{torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GiB left")
        said.append(f"{device} ({', '.join(told)})" if told else device)
    return ", ".join(said)


def chat_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerFast | None, chat_template: str | None = None
) -> ChatTokenizer:
    """The tokenizer with the family's format, or else a chat template: a given one, its own."""
    if tokenizer is None:
        raise StartError(
            "the model's folder has no tokenizer.json and no tokenizer.model;"
            " run the download again"
        )
    if chat_template is None:
        return ChatTokenizer(tokenizer, format_of(model.config.model_type, tokenizer))
    tokenizer.chat_template = chat_template
    return ChatTokenizer(tokenizer)
