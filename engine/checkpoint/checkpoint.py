"""How a checkpoint becomes a model. No code from a checkpoint is executed."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from engine.blame import damaged, first_line, is_out_of_memory, not_loaded
from engine.checkpoint.attention_probe import check_attention
from engine.checkpoint.files import check_folder, check_pointer, plain_folder
from engine.checkpoint.llama_like import register_families
from engine.checkpoint.quantizer import (
    QuantizationSettings,
    misshapen,
    quantization_settings,
    quantize_layers,
)
from engine.checkpoint.source import Source
from engine.errors import EngineError, ProcessUnavailable, StartError
from engine.kernels.cpu import why_missing
from engine.offload import offload_folder, remove
from engine.prompt.families import format_of
from engine.prompt.template_renderer import renderer
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
def as_start_error(folder: Path | str) -> Iterator[None]:
    """Turn what a folder's chat template refuses, and a lack of memory, into a StartError.

    Of its files each call that reads one does so, see `damaged`. What else is raised is our fault.
    """
    try:
        yield
    except ProcessUnavailable as error:
        raise StartError(
            "the process that renders chat templates does not start, the log says why; it needs"
            " memory and a further process, where a system limits these"
        ) from error
    except EngineError as error:
        raise StartError(
            f"{error}; pass another one with --chat-template FILE, or take another model"
        ) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StartError(
            f"there is too little memory to load {folder} ({first_line(error)}); start with"
            " --quantize 8bit or 4bit, with a smaller --cache-memory, or take a smaller model"
        ) from error


def _read_device_map(device_map: str) -> str | dict[str, Any]:
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
            quantize_layers(model, quantization.bits, quantization.blocks)
        size = model.get_memory_footprint()
        for card in cards:
            if size <= 0.7 * torch.cuda.mem_get_info(card)[0]:
                return f"cuda:{card}"
    return "auto"


def _reads_packed(placement: Any) -> bool:
    """Whether a model is to be where packed weights are multiplied: on a CPU, by our kernels."""
    return is_on_cpu(placement) and why_missing() is None


def is_on_cpu(placement: Any) -> bool:
    """Whether all of a model is to be on the CPU."""
    return placement == "cpu" or (placement == "auto" and not torch.cuda.is_available())


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
    the one that it names. Nothing in it is executed. The tokenizer is None where there is none. The
    model's `offloaded` is the folder of its layers on disk, or None. Raises StartError where the
    files do not make a model.
    """
    log.info("loading weights (%s)", folder)
    register_families()
    on_disk = "disk" in device_map
    offloaded = offload_folder() if on_disk else None

    def plain(folder: Path) -> Path:
        if folder.is_file():  # a model in one
            check_pointer(folder)
            return folder
        check_folder(folder)
        return plain_folders.enter_context(plain_folder(folder, by_links=not on_disk))

    try:
        with ExitStack() as plain_folders:
            source = Source(Path(folder), None if base is None else Path(base), plain)
            tokenizer = source.tokenizer()
            if tokenizer and tokenizer.chat_template:
                renderer().start_behind()  # which takes as long as a small model's weights do
            model = _read_model(source, dtype, device_map, quantize, offloaded)
            model.offloaded = offloaded
            return model.eval(), tokenizer
    except BaseException:
        remove(offloaded)
        raise


def _read_model(
    source: Source, dtype: str, device_map: str, quantize: str, offloaded: Path | None
) -> Any:
    """The model of a source, in the form and on the devices that are wanted. Raises StartError."""
    placement = _read_device_map(device_map)
    check_attention(source.config)
    if source.weights is not None and offloaded:
        raise StartError(
            "an adapter's model cannot have layers on disk; take them out of --device-map"
        )
    quantization = quantization_settings(quantize, device_map, is_on_cpu(placement))
    if source.packed and quantize == "none" and dtype == "auto" and _reads_packed(placement):
        quantization, placement = source.keep_packed(), "cpu"
    elif device_map == "auto":
        placement = best_placement(source.config, dtype, quantization)
    if not (sys.stderr and sys.stderr.isatty()):
        disable_progress_bar()  # it would raise where standard error is a file on a full disk
    with damaged(source.folder):
        model, report = source.read(
            dtype=dtype,
            quantization_config=quantization,
            device_map=placement,
            offload_folder=offloaded,
        )
    check_tensors(model, report, source.folder)
    return model


def check_tensors(model: Any, report: dict[str, Any], folder: Path) -> None:
    """Raise StartError if a checkpoint lacked tensors, or had some of another shape."""
    other_shapes = report["mismatched_keys"] or misshapen(model)
    wrong = {"not there": report["missing_keys"], "of another shape": other_shapes}
    for how, names in wrong.items():
        if names:
            # Of a mismatch the shapes are told too.
            first = min(name if isinstance(name, str) else name[0] for name in names)
            reason = f"{len(names)} of its tensors are {how}, for example {first}"
            raise not_loaded(folder, reason)


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
