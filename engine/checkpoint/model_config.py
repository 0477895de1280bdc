"""What a checkpoint's config.json says, and whether the engine can run such a model."""

from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from engine.blame import damaged, read_object
from engine.checkpoint.formats import settings_of, why_unreadable
from engine.checkpoint.stated_numbers import MAX_CONTEXT, check_numbers
from engine.errors import StartError


def load_config(folder: Path) -> Any:
    """A checkpoint's configuration, made ready for the engine.

    Raises StartError if the engine cannot run the model, or the file is no configuration.
    """
    _check_model_type(folder)
    with damaged(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    check_numbers(config)
    check_architecture(config)
    _check_quantisation(config, folder)
    if ratio := getattr(config, "rope_ratio", None):  # Index's model for long texts
        config.rope_parameters["rope_theta"] *= ratio
    return config


def _check_model_type(folder: Path) -> None:
    """Raise StartError if transformers itself has no model of the kind."""
    said = read_object(folder / "config.json")
    kind = said.get("model_type")
    if kind is None or kind in CONFIG_MAPPING:
        return
    named = (said.get("architectures") or [kind])[0]
    reason = f"transformers {version('transformers')} has no model of the type {kind}"
    if "auto_map" in said:
        reason += ", and code in a model's folder is never executed"
    raise StartError(f"{named} is not supported: {reason}; take another model")


def not_supported(config: Any, reason: str) -> StartError:
    """The error for a model of a kind that the engine does not do."""
    named = (getattr(config, "architectures", None) or [config.model_type])[0]
    return StartError(f"{named} is not supported: {reason}; take another model")


def check_architecture(config: Any) -> None:
    """Raise StartError if transformers has no causal model of the kind, or a layer has a state."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise not_supported(
            config, "it is no causal language model, which answers by continuing its prompt"
        )
    try:
        layers = layer_types(config)
    except ValueError as error:  # of several texts' configurations it takes none
        raise not_supported(config, "it is made of several models") from error
    needed = {"position_ids", "logits_to_keep", "kwargs"}
    if layers and not layers - _WITHOUT_POSITIONS:
        needed -= {"position_ids"}
    if missing := sorted(needed - signature(kind.forward).parameters.keys()):
        names = " and no ".join(missing)
        raise not_supported(
            config, f"its forward pass takes no {names}, so that requests cannot share a step"
        )
    if other := sorted(layers - _ATTENTION - _STATES - NEITHER):
        raise not_supported(config, f"it has layers of {' and '.join(other)}")


# Kinds of layers, by transformers' names: those that attend, that keep a state, that do neither.
_ATTENTION = {"full_attention", "sliding_attention"}
_STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
NEITHER = {"mlp", "moe"}
_WITHOUT_POSITIONS = {"linear_attention", "conv"} | NEITHER


def layer_types(config: Any) -> set[str]:
    """The kinds of a model's layers, as far as its configuration tells them."""
    return {*(getattr(config.get_text_config(), "layer_types", None) or ())}


def keeps_states(config: Any) -> bool:
    """Whether some layers keep a state in place of rows of keys and values."""
    return bool(layer_types(config) & _STATES)


def cache_argument(model: Any) -> str:
    """By which name a model's forward pass takes its cache."""
    takes = signature(type(model).forward).parameters
    return "past_key_values" if "past_key_values" in takes else "cache_params"


def plain_attention(config: Any) -> str:
    """By which of transformers' attentions a model computes its own forward pass."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Soft caps and sinks are done by the eager one alone.
    return "sdpa" if kind._supports_sdpa else "eager"


def _check_quantisation(config: Any, folder: Path) -> None:
    """Raise StartError if the weights are quantised in a way that cannot be read."""
    settings = settings_of(config, folder)
    if settings and (kind := why_unreadable(settings)):
        raise StartError(
            f"the weights in {folder} are quantised with {kind}, which is not supported; take the"
            " model that it was made from, with --quantize 8bit or 4bit to make it small"
        )


def context_length(config: Any) -> int:
    """Most tokens of prompt and answer together."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    stated = int(getattr(config, "max_position_embeddings", None) or 2048)
    # Layers of several kinds may have one each.
    each = [inner for inner in rope.values() if isinstance(inner, dict)] or [rope]
    return min(MAX_CONTEXT, *(_rope_length(parameters, stated) for parameters in each))


def _rope_length(rope: dict[str, Any], stated: int) -> int:
    """How many positions a rotary embedding is for.

    Dynamic and longrope RoPE depend on the longest sequence in the batch beyond the original
    length; up to it, their frequencies are constant. YaRN's are always, and it multiplies the
    length, which many a config.json leaves as it was.
    """
    original = int(rope.get("original_max_position_embeddings") or stated)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return original
    if rope.get("rope_type") == "yarn":
        return max(stated, int(original * rope.get("factor", 1)))
    return stated
