"""What a model's layers ask of attention, found by a forward pass that computes none.

A short comparison of logits would not notice a window that is longer than its texts. So the masks
are read: transformers makes each from a function of positions, which can be asked about any.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from engine.attention.interface import layer_of
from engine.checkpoint.model_config import (
    NEITHER,
    cache_argument,
    context_length,
    keeps_states,
    layer_types,
    not_supported,
)
from engine.checkpoint.state_probe import StateProbe
from engine.errors import StartError

log = logging.getLogger("chat")

# What a layer may ask for: that which changes nothing in inference, and that which
# `packed_attention` does. A window is read from the mask, as transformers' own sdpa does.
_HARMLESS = {"dropout", "position_ids", "position_embeddings", "cache_position", "use_cache"}
_HARMLESS |= {"is_causal", "logits_to_keep", "output_attentions", "output_hidden_states"}
_HARMLESS |= {"output_router_logits"}
_DONE = {"sliding_window", "softcap", "s_aux"}


class _MaskChanged(StartError, AttributeError):
    """A layer does more with its mask than to pass it on; `hasattr` may still ask."""


class Mask:
    """Stands in for a mask, of which a layer may do no more than pass it on.

    `sees` says whether a query at a position sees a key at another; both may be tensors.
    """

    def __init__(self, sees: Callable[..., torch.Tensor]):
        self.sees = sees

    def __getattr__(self, name: str) -> Any:
        raise _MaskChanged("its layers change their attention's mask")

    def __getitem__(self, index: Any) -> Any:
        raise _MaskChanged("its layers change their attention's mask")

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise _MaskChanged("its layers change their attention's mask")


class _Trial:
    """Stands in for a Step, and keeps what each layer asks for."""

    def __init__(self) -> None:
        self.masks: dict[Any, Mask | None] = {}  # by attention module
        self.calls = 0
        self.layers: list[int] = []  # that attend
        self.states = StateProbe()

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        value: torch.Tensor,
        mask: Mask | torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:
        """Take note of a call, and answer it with zeros [1, tokens, heads, width]."""
        self.calls += 1
        asked = {name for name, given in options.items() if given is not None}
        if unknown := asked - _HARMLESS - _DONE:
            raise StartError(f"its attention uses {', '.join(sorted(unknown))}")
        if isinstance(mask, torch.Tensor):
            raise StartError("its attention has a mask of its own")
        if options.get("is_causal") is False:
            raise StartError("its attention is not causal")
        self.masks[module] = mask
        self.layers.append(layer_of(module, self.states))
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _trial_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    step: _Trial | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """By transformers' interface; a layer that was not given the step is none to be packed."""
    if step is None:
        raise StartError("its layers do not pass on what its forward pass is given")
    return step.attend(module, query, value, attention_mask, kwargs)


def _trial_mask(*_: Any, mask_function: Callable[..., torch.Tensor], **__: Any) -> Mask:
    """By transformers' interface."""
    return Mask(mask_function)


def window_of(mask: Mask, context: int) -> int | None:
    """The most keys that a query sees; None if it sees all up to its own.

    Raises StartError if the mask is neither causal nor a sliding window.
    """
    zero = torch.zeros(1, 1, dtype=torch.long)
    places = torch.arange(context)
    window = context
    for query in sorted({context - 1, context - 2, context // 2, context // 3, 1}, reverse=True):
        seen = mask.sees(zero, zero, zero + query, places[None]).expand(1, context)[0]
        if query == context - 1:
            window = int(seen.sum())
        if not torch.equal(seen, (places <= query) & (places > query - window)):
            raise StartError("its attention's mask is neither causal nor a sliding window")
    return None if window == context else window


@torch.inference_mode()
def _try_attention(model: Any, device: torch.device | str) -> _Trial:
    """What the layers ask for, by a forward pass of two tokens. Leaves its attention changed."""
    AttentionInterface.register("trial", _trial_attention)
    AttentionMaskInterface.register("trial", _trial_mask)
    trial = _Trial()
    kinds = layer_types(model.config)
    if "full_attention" in kinds or "hybrid" in kinds or not keeps_states(model.config):
        model.set_attn_implementation("trial")
        if model.config.get_text_config()._attn_implementation != "trial":
            raise StartError("its attention is code of its own, not transformers' common one")
    places = torch.arange(2, device=device)[None]
    given = {"input_ids": places, "position_ids": places, "logits_to_keep": places[0]}
    if places.is_meta:  # transformers would else look into the positions for packed texts
        given["attention_mask"] = torch.ones_like(places)
    if not keeps_states(model.config):
        model(**given, use_cache=False, step=trial)
        return trial
    with trial.states:
        model(**given, **{cache_argument(model): trial.states}, use_cache=False, step=trial)
    return trial


def attention_windows(
    model: Any, context: int, device: torch.device | str
) -> dict[Any, int | None]:
    """The window of each attention module, None where it sees all.

    Raises StartError for what the engine does not do. Leaves the model's attention changed.
    """
    return probe_layers(model, context, device)[0]


def probe_layers(
    model: Any, context: int, device: torch.device | str
) -> tuple[dict[Any, int | None], _Trial]:
    """The same, and what was found out beside it: which layers attend, and which keep a state."""
    try:
        trial = _try_attention(model, device)
        config = model.config.get_text_config()
        number = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or [""] * number
        neither = [n for n, kind in enumerate(kinds) if kind in NEITHER]
        reached = sorted({*trial.layers, *trial.states.layers, *neither})
        if len(trial.layers) != len({*trial.layers}) or reached != list(range(number)):
            raise StartError(f"its {number} layers do not compute attention once each")
        masks = trial.masks.items()
        windows = {module: window_of(mask, context) if mask else None for module, mask in masks}
        return windows, trial
    except StartError as error:
        raise not_supported(model.config, str(error)) from error


def check_attention(config: Any) -> None:
    """Raise StartError for a model that the engine does not do, before its weights are read.

    On tensors without data; where a model's code needs data, nothing is found out.
    """
    config = deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attention_windows(model, context_length(config), "meta")
    except StartError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries raise almost every kind
        log.debug("%s was not tried without its weights: %s", config.model_type, error)
