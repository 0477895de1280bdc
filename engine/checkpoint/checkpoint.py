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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from engine.checkpoint.attention_probe import check_attention
from engine.checkpoint.llama_like import register_families
from engine.checkpoint.quantizer import (
    QuantizationSettings,
    misshapen,
    quantization_settings,
    quantize_layers,
)
from engine.checkpoint.source import Source
from engine.errors import StartError, TemplateTooCostly
from engine.prompt.families import format_of
from engine.prompt.tokenizer import ChatTokenizer

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
    folder: Path | str,
    *,
    dtype: str = "auto",
    device_map: str = "auto",
    quantize: str = "none",
    base: Path | str | None = None,
) -> tuple[Any, PreTrainedTokenizerFast | None]:
    """A checkpoint's model, a plain transformers one placed by accelerate, and its tokenizer.

    The folder may be a LoRA adapter's, which is merged into the model in the folder `base`, or in
    the one that it names. Nothing in it is executed. The tokenizer is None where there is none.
    Raises StartError, ValueError, or whatever the libraries raise where its files do not make a
    model.
    """
    log.info("loading weights (%s)", folder)
    register_families()
    placement = read_device_map(device_map)
    source = Source(Path(folder), None if base is None else Path(base))
    config = source.config
    check_attention(config)
    if source.weights is not None and "disk" in device_map:
        raise StartError(
            "an adapter's model cannot have layers on disk; take them out of --device-map"
        )
    quantization = quantization_settings(config, quantize, device_map)
    if device_map == "auto":
        placement = best_placement(config, dtype, quantization)
    if not (sys.stderr and sys.stderr.isatty()):
        disable_progress_bar()  # it would raise where standard error is a file on a full disk
    model, report = source.read(
        dtype=dtype,
        quantization_config=quantization,
        device_map=placement,
        offload_folder=tempfile.mkdtemp(prefix="chat-api-") if "disk" in device_map else None,
    )
    check_tensors(model, report)
    return model.eval(), source.tokenizer()


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
