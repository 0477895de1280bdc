"""The numbers that a config.json states, checked before they cost memory or time."""

import logging
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from engine.blame import REMEDY, damaged
from engine.checkpoint.files import weight_files
from engine.checkpoint.formats.settings import settings_of
from engine.errors import StartError

log = logging.getLogger("chat")

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_ROPE_NUMBERS = ("rope_theta", "factor")
# Far more than any model has; each layer takes its time to be made, even without weights.
_MAX_LAYERS = 10_000
# Most tokens of a context, whatever a config.json states; the longest known are of 10 million.
MAX_CONTEXT = 2**24


def check_numbers(config: Any) -> None:
    """Raise StartError for a size that is none, by its name."""
    config = config.get_text_config()
    for name in _SIZES:
        value = getattr(config, name, None)
        if isinstance(value, str) or (isinstance(value, int | float) and not value > 0):
            raise _wrong(name, value)
    if not 0 < (layers := getattr(config, "num_hidden_layers", 1)) <= _MAX_LAYERS:
        raise _wrong("num_hidden_layers", layers)
    rope = getattr(config, "rope_parameters", None) or {}
    for rotary in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        for name in _ROPE_NUMBERS:
            value = rotary.get(name, 1)
            if not isinstance(value, int | float) or not (value > 0 and isfinite(value)):
                raise _wrong(name, value)
    stated = getattr(config, "max_position_embeddings", None) or 0
    if stated > MAX_CONTEXT:
        log.warning(
            "config.json states a context of %s tokens; %s are served",
            f"{stated:,}",
            f"{MAX_CONTEXT:,}",
        )


def _wrong(name: str, value: Any) -> StartError:
    return StartError(f"config.json says {name} {value!r}, which cannot be; {REMEDY}")


def check_size(config: Any, folder: Path) -> None:
    """Raise StartError for a configuration of a model that is larger than its weights.

    What they lack would be made up, in memory, before it is found to be missing. Quantised weights
    are not compared, nor are those that do not state their shapes.
    """
    files = weight_files(folder)
    if settings_of(config, folder) or not files:
        return
    if any(file.suffix != ".safetensors" for file in files):
        return
    stored = sum(map(_num_elements, files))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stated = sum(parameter.numel() for parameter in model.parameters())
    if stated > 1.5 * stored:
        raise StartError(
            f"config.json describes a model of {stated:,} parameters, and the weights in {folder}"
            f" have {stored:,}; one of them belongs to another model, or was changed: run the"
            " download again, as with `python model_download.py NAME`"
        )


def _num_elements(file: Path) -> int:
    with damaged(file), safe_open(file, "pt") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    return sum(torch.Size(shape).numel() for shape in shapes)
