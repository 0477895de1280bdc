"""The fastest form of a model on this CPU, by measuring its layers."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from math import inf, prod
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32

from engine.blame import first_line
from engine.kernels.cpu import why_missing
from engine.layers.block_packing import GROUP
from engine.layers.blocks import BlockExperts, BlockLinear
from engine.layers.fbgemm import has_int8_products, is_available
from engine.layers.quantized import BLOCK, Bits, bits_of, fits
from engine.layers.weight_format import (
    PACKED,
    WeightFormat,
    convert,
    convert_module,
    convert_packed,
    held_size,
    matrices_of,
    replaceable,
)

# The milliseconds of a step in each form, for each number of _TOKENS.
Timings = dict[WeightFormat, list[float]]

log = logging.getLogger("chat")

# What is measured: the tokens in a step of one request, and of a full batch.
_TOKENS = (1, 16)
# How often each form is tried.
_ROUNDS = 2
# How much faster a form must be than one before it, so that a start under load chooses as an idle
# one does.
_MIN_SPEEDUP = 1.2
# Up to how many times as long is no slower: so much differs from one measurement to the next, and
# is gained by fusing attention, which comes later.
_MAX_SLOWDOWN = 1.2


def _packed_formats() -> list[WeightFormat]:
    """The form in which weights are read in few bits here, if there is one."""
    if why_missing() is None:
        return ["our kernels"]
    return ["fp16 weights"] if is_available() else []


def _products_of(
    form: WeightFormat, weight: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A matrix's product in a form, [tokens, in] to [tokens, out]."""
    if form in PACKED:
        return PACKED[form].of_half(weight, None)
    kept = weight if form == "as it is" else weight.float()
    return lambda x: F.linear(x, kept)


class _AllReached(Exception):
    """Ends a forward pass behind the last layer whose input is wanted."""


def kinds_of(model: Any) -> dict[Any, int]:
    """One layer of each kind, and how many there are: a mixture's first ones often have none.

    None at all if the model does not keep its layers in a list.
    """
    number = model.config.get_text_config().num_hidden_layers
    lists = [x for x in model.get_decoder().modules() if isinstance(x, torch.nn.ModuleList)]
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for layer in next((layers for layers in lists if len(layers) == number), []):
        shapes = tuple((name, parameter.shape) for name, parameter in layer.named_parameters())
        kinds.setdefault(shapes, []).append(layer)
    return {alike[0]: len(alike) for alike in kinds.values()}


def _inputs_of(model: Any, layers: Iterable[Any], tokens: int) -> dict[Any, tuple[Any, Any]]:
    """What layers are called with for so many tokens, positional and named."""
    given: dict[Any, tuple[Any, Any]] = {}
    wanted = set(layers)

    def keep(layer: Any, args: Any, kwargs: Any) -> None:
        given[layer] = args, kwargs
        if given.keys() == wanted:
            raise _AllReached

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in wanted]
    try:
        with suppress(_AllReached):
            model(input_ids=torch.arange(tokens)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _milliseconds_of(call: Callable[[], Any]) -> float:
    """The shortest of a few calls."""
    call()
    shortest = inf
    calls = 0
    began = time.perf_counter()
    while calls < 2 or (calls < 50 and time.perf_counter() - began < 0.02):
        started = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - started)
        calls += 1
    return 1000 * shortest


def _layer_in(form: WeightFormat, layer: Any) -> Any:
    """A layer in a form; another one, unless it is as it is."""
    if form == "as it is":
        return layer
    layer = deepcopy(layer)
    convert_module(layer, form)
    return layer


@torch.inference_mode()
def measure_forms(model: Any) -> Timings:
    """The milliseconds of a forward pass in each form, for each number of TOKENS.

    Measured on one layer of each kind and the head, and multiplied up. Empty if the model's layers
    are not to be found.
    """
    kinds = kinds_of(model)
    if not kinds:
        return {}
    forms: list[WeightFormat] = ["as it is", *_packed_formats(), "float32"]
    taken: Timings = {form: [0.0] * len(_TOKENS) for form in forms}
    inputs = [_inputs_of(model, kinds, tokens) for tokens in _TOKENS]
    for example, count in kinds.items():
        calls = {form: _layer_in(form, example) for form in forms}
        for n, given in enumerate(inputs):
            for form, milliseconds in _measure_in_turns(calls, *given[example]).items():
                taken[form][n] += count * milliseconds
    head = model.get_output_embeddings().weight
    products = {form: _products_of(form, head) for form in forms}
    for n, tokens in enumerate(_TOKENS):
        hidden = torch.ones(tokens, head.shape[1], dtype=model.dtype)
        for form, milliseconds in _measure_in_turns(products, (hidden,), {}).items():
            taken[form][n] += milliseconds
    return taken


def _measure_in_turns(
    calls: dict[WeightFormat, Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[WeightFormat, float]:
    """The milliseconds of each form's call, which are given float32 but as it is.

    In turns, so that what else the machine does meanwhile comes to all alike.
    """
    wide = convert_to_fp32(args), convert_to_fp32(kwargs)
    shortest = dict.fromkeys(calls, inf)
    for form in [*calls] * _ROUNDS:
        given, named = (args, kwargs) if form == "as it is" else wide
        milliseconds = _milliseconds_of(partial(calls[form], *given, **named))
        shortest[form] = min(shortest[form], milliseconds)
    return shortest


def fastest_format(taken: Timings) -> WeightFormat:
    """The first form than which none is clearly faster, and slower for no number of tokens."""
    chosen: WeightFormat = "as it is"
    for form, times in taken.items():
        is_clear = _MIN_SPEEDUP ** len(_TOKENS) * prod(times) < prod(taken[chosen])
        if is_clear and all(
            a <= _MAX_SLOWDOWN * b for a, b in zip(times, taken[chosen], strict=True)
        ):
            chosen = form
    return chosen


def choose_weight_format(
    model: Any, dtype: str = "auto", measure: Callable[[Any], Timings] | None = None
) -> str:
    """Convert a model on the CPU to its fastest form; in words, what its weights are and why.

    A dtype that was asked for is kept, and so is one that is no half precision. `measure` is
    `measure_forms`, or knows what that found before.
    """
    kept = str(model.dtype).removeprefix("torch.")
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    asked = dtype != "auto" or model.dtype not in (torch.bfloat16, torch.float16)
    if any(type(module) is BlockLinear for module in model.modules()):
        how = _settle_quantized(model, asked)
        return f"as they are in the checkpoint, {held_size(model)} ({how})"
    if bits := bits_of(model):
        unfit = _unfit_summary(model, bits)
        how = _settle_quantized(model, asked) if on_cpu else _settle_kernel(bits, model)
        return f"in {bits} bits, {held_size(model)} ({how}{unfit})"
    taken = {} if asked or not on_cpu else (measure or measure_forms)(model)
    if not taken:
        return f"{kept}, {held_size(model)}"
    form = fastest_format(taken)
    convert(model, form)
    figures = [
        f"{kept if other == 'as it is' else other} {' and '.join(f'{ms:.0f}' for ms in times)} ms"
        for other, times in taken.items()
    ]
    tokens = " and ".join(map(str, _TOKENS))
    measured = f"a step of {tokens} tokens here: {', '.join(figures)}{_missing_summary()}"
    named = {"as it is": kept, "our kernels": f"{kept} by our kernels"}.get(form, form)
    return f"{named}, {held_size(model)} ({measured})"


def _missing_summary() -> str:
    """Why our kernels are not among the forms; nothing if they are."""
    reason = why_missing()
    if reason:
        log.warning("tokens take longer than they need to, without our kernels: %s", reason)
    return f"; without our kernels: {reason}" if reason else ""


def _unfit_summary(model: Any, bits: Bits) -> str:
    """How many layers are not packed though others like them are; nothing if all could be."""
    layers = replaceable(model).values()
    blocks = any(isinstance(module, BlockLinear | BlockExperts) for module in model.modules())
    block = GROUP if blocks else BLOCK
    unfit = sum(not all(fits(x, bits, block) for x in matrices_of(layer)) for layer in layers)
    if not unfit:
        return ""
    return f"; {unfit} layers stay as they are, whose rows are not whole blocks of {block} weights"


def _settle_kernel(bits: int, model: Any) -> str:
    """Let a card compute with the packed weights where it can; how it does, in words."""
    if bits == 4:
        return "products by bitsandbytes"
    try:
        from engine.layers.int8 import use_kernel

        use_kernel(model)
    except Exception as error:  # noqa: BLE001 - whatever a compiler for this card may raise
        reason = first_line(error)
        return f"unpacked before each product: {reason}"
    return "products of few tokens by a kernel of ours"


def _settle_quantized(model: Any, asked: bool) -> str:
    """The same for a quantised model; how its products are computed."""
    form: WeightFormat = "our kernels" if why_missing() is None else "fp16 weights"
    if form == "fp16 weights" and not (bits_of(model) == 8 and has_int8_products()):
        return f"unpacked before each product{_missing_summary()}"
    if asked:
        convert_packed(model, PACKED[form])
    else:
        convert(model, form)
    return f"products by FBGEMM{_missing_summary()}" if why_missing() else "products by our kernels"
