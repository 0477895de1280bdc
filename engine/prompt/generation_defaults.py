"""What a checkpoint's generation_config.json wishes: sampling defaults, ends, tokens never said.

What the engine has not, the start log says; it would else be missing without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from engine.errors import StartError
from engine.prompt.families import Family
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import GenerationConfig

log = logging.getLogger("chat")

# What transformers' generate does and the engine does not, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


def states_length(config: GenerationConfig, family: Family | None = None) -> bool:
    """Whether a checkpoint's own generation_config.json, where it counts, bounds its answers."""
    if family and family.ignores_generation_config:
        return False
    return config.max_new_tokens is not None


def checkpoint_defaults(
    config: GenerationConfig, family: Family | None = None, vocabulary: int = 2**31
) -> SamplingParams:
    """The sampling of a checkpoint's generation_config.json, and the family's for the rest.

    Token ids that are not in the vocabulary are left out. Raises StartError for a value that is of
    another kind.
    """
    base = family.defaults if family else SamplingParams()
    if family and family.ignores_generation_config:
        return base
    names = [parameter.name for parameter in fields(SamplingParams)]
    found = {name: getattr(config, name, None) for name in names}
    found |= {
        "min_tokens": config.min_new_tokens,
        "stop": texts(config.stop_strings),
        "suppress_tokens": ids(
            "suppress_tokens", [*(config.suppress_tokens or ()), *_banned_words(config)], vocabulary
        ),
        "begin_suppress_tokens": ids(
            "begin_suppress_tokens", config.begin_suppress_tokens, vocabulary
        ),
    }
    for name, value in found.items():
        if isinstance(getattr(base, name), int | float) and value is not None:
            _check_number(name, value)
    if config.do_sample is False:
        found["temperature"] = 0.0
    found["top_k"] = found["top_k"] and max(0, found["top_k"])  # some write -1 for off
    return replace(base, **{name: x for name, x in found.items() if x is not None})


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float):
        raise StartError(
            f"generation_config.json says {name} {value!r}, which is no number; correct the file,"
            " or run the download again"
        )


def ids(name: str, listed: Any, vocabulary: int) -> tuple[int, ...] | None:
    """Token ids that a setting lists; None where it lists none."""
    if not listed:
        return None
    if not isinstance(listed, list | tuple) or not all(isinstance(i, int) for i in listed):
        raise StartError(
            f"generation_config.json says {name} {listed!r}, which is no list of token ids; correct"
            " the file, or run the download again"
        )
    return tuple(sorted({i for i in listed if 0 <= i < vocabulary})) or None


def texts(listed: Any) -> tuple[str, ...] | None:
    """Stop strings that a setting lists, or the one that it is; None where there are none."""
    stop = (listed,) if isinstance(listed, str) else tuple(listed or ())
    return tuple(text for text in stop if text) or None


def _banned_words(config: GenerationConfig) -> list[int]:
    """The words never to be said that are one token; longer ones are none of what we do."""
    return [word[0] for word in config.bad_words_ids or () if len(word) == 1]


def known_ends(ends: Iterable[int], vocabulary: int) -> set[int]:
    """The ids that end an answer, of those that the model can say.

    Raises StartError where it can say none of them: its answers would never end.
    """
    listed = set(ends)
    known = {i for i in listed if 0 <= i < vocabulary}
    if unknown := sorted(listed - known):
        said = f"{unknown[0]} ends an answer, and the last token of the model is {vocabulary - 1}"
        if not known:
            raise StartError(
                f"{said}; correct eos_token_id in generation_config.json and config.json, or run"
                " the download again"
            )
        log.warning("an end is left out: %s", said)
    return known


def log_wishes(config: GenerationConfig, family: Family | None = None) -> None:
    """Log what a checkpoint wishes that is not done."""
    if family and family.ignores_generation_config:
        return
    wishes = {name: getattr(config, name, None) for name in _NOT_DONE}
    wishes = {name: x for name, x in wishes.items() if x and x not in _NOT_DONE[name]}
    if longer := [word for word in config.bad_words_ids or () if len(word) > 1]:
        wishes["bad_words_ids"] = longer
    if wishes:
        told = ", ".join(f"{name} {value}" for name, value in wishes.items())
        log.warning("generation_config.json asks for what is not done here: %s", told[:500])
