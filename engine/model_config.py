"""What a checkpoint's config.json says, and whether the engine can run such a model."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from engine.errors import StartError

# What the tools for AWQ and GPTQ wrote beside config.json before they wrote into it.
QUANTISERS_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}


def load_config(folder: Path) -> Any:
    """A checkpoint's configuration, made ready for the engine.

    Raises StartError if the engine cannot run the model, or whatever transformers raises where the
    file is no configuration.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    check_architecture(config)
    check_quantisation(config, folder)
    if ratio := getattr(config, "rope_ratio", None):  # Index's model for long texts
        config.rope_parameters["rope_theta"] *= ratio
    widen_window(config)
    return config


def check_architecture(config: Any) -> None:
    """Raise StartError if transformers has no causal model of the kind, or none that uses sdpa."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = (getattr(config, "architectures", None) or [config.model_type])[0]
    if kind is None:
        raise StartError(
            f"{named} is not supported: it is no causal language model, which answers by"
            " continuing its prompt; take another model"
        )
    if not getattr(kind, "_supports_sdpa", False):
        raise StartError(
            f"{named} is not supported: its attention, if it has any, cannot be computed by"
            " PyTorch's scaled_dot_product_attention, as with soft caps, ALiBi or attention sinks;"
            " take another model"
        )


def check_quantisation(config: Any, folder: Path) -> None:
    """Raise StartError if the weights are quantised in a way that cannot be loaded."""
    method = quantisation_of(config, folder)
    if method is None:
        return
    original = "take the model that it was made from, whose weights have 16 bits"
    if method != "bitsandbytes":
        raise StartError(
            f"the weights in {folder} are quantised with {method}, which is not supported;"
            f" {original}"
        )
    # transformers would leave a mixture's experts, nearly all of its weights, as they are.
    if any(hasattr(config, name) for name in ("num_local_experts", "n_routed_experts")):
        raise StartError(
            f"the weights in {folder} are quantised with bitsandbytes, which is not supported for"
            f" mixtures of experts; {original}"
        )
    if find_spec("bitsandbytes") is None:
        raise StartError(
            f"the weights in {folder} are quantised with bitsandbytes, which is not installed; run"
            f" `pip install bitsandbytes`, or {original}"
        )


def quantisation_of(config: Any, folder: Path) -> str | None:
    """By which method a checkpoint's weights are quantised; None if they are not."""
    for name in ("quantization_config", "compression_config"):
        settings = getattr(config, name, None)
        if isinstance(settings, dict):
            named = settings.get("quant_method") or name.removesuffix("_config")
            of_old = any(settings.get(bits) for bits in ("load_in_4bit", "load_in_8bit"))
            method = "bitsandbytes" if of_old else str(named)
            return method.upper() if len(method) <= 4 else method
    found = (m for file, m in QUANTISERS_FILES.items() if (folder / file).is_file())
    method = next(found, "")
    return method.upper() or None


def widen_window(config: Any) -> None:
    """Take a sliding window out of the configuration that is no shorter than the context."""
    window = getattr(config, "sliding_window", None)
    if window is None or window < context_length(config):
        return
    layers = getattr(config, "layer_types", None) or []
    # Gemma 3's layers with a window have a RoPE of their own, so they must stay what they are.
    if any(kind in (getattr(config, "rope_parameters", None) or {}) for kind in layers):
        return
    config.sliding_window = None
    if layers:
        config.layer_types = ["full_attention" if "sliding" in kind else kind for kind in layers]


def context_length(config: Any) -> int:
    """Most tokens of prompt and answer together.

    Dynamic and longrope RoPE depend on the longest sequence in the batch beyond the original
    length; up to it, their frequencies are constant. YaRN's are always, and it multiplies the
    length, which many a config.json leaves as it was.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    stated = int(getattr(config, "max_position_embeddings", None) or 2048)
    original = int(rope.get("original_max_position_embeddings") or stated)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return original
    if rope.get("rope_type") == "yarn":
        return max(stated, int(original * rope.get("factor", 1)))
    return stated
