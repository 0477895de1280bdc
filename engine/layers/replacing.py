"""Which of a model's modules are replaced by fused ones: those for which both compute the same."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch

from engine.relative_error import relative_error

# By how much a module's result may differ, relatively: in half precision transformers rounds after
# each operation, and 8 bits round activations to 14.
_TOLERANCE = {torch.bfloat16: 0.015, torch.float16: 0.005, torch.float32: 1e-3}


def is_plain(module: Any, parts: dict[str, type]) -> bool:
    """Whether a module looks like such a layer, all of whose parts have been replaced."""
    return {name: type(child) for name, child in module.named_children()} == parts


# From a module and its keyword arguments; None where it sees by these that it cannot be.
Make = Callable[[Any, dict[str, Any]], torch.nn.Module | None]


class _Comparison:
    """Makes fused modules in a forward pass, and keeps those that compute what the model's do.

    Both are given noise: what a model computes of a short text may hardly depend on the order of a
    head's numbers, or on which key is seen.
    """

    def __init__(self, make: Make):
        self.make = make
        self.alike: dict[str, torch.nn.Module] = {}

    def hear(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """What a module was given and gave, as a forward hook is told."""
        fused = self.make(module, kwargs)
        if fused is None:
            return
        if args:
            args = (_noise_like(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": _noise_like(kwargs["hidden_states"])}
        # Not by calling the modules, which would be heard again.
        wanted = module.forward(*args, **_uncounted(kwargs))
        found = fused.forward(*args, **_uncounted(kwargs))
        if type(found) is type(wanted) and is_alike(found, wanted):
            self.alike[name] = fused


def _uncounted(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same, with a step and states of its own, as they count how often a layer is computed."""
    counting = {"step", "cache_params", "past_key_values"} & kwargs.keys()
    return kwargs | {name: copy(kwargs[name]) for name in counting}


def _noise_like(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are about as large, and always the same."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(x) * x.float().square().mean().sqrt().to(x)


def is_alike(found: Any, wanted: Any) -> bool:
    """Whether two modules' outputs are the same but for rounding; attention gives a pair."""
    if isinstance(wanted, tuple):
        found, wanted = found[0], wanted[0]
    return relative_error(found, wanted) < _TOLERANCE[wanted.dtype]


def replace(model: Any, fits: Callable[[Any], bool], make: Make, run: Callable[[], Any]) -> None:
    """Replace the modules that fit, where that computes the same in a forward pass."""
    comparison = _Comparison(make)
    fitting = {name: module for name, module in model.named_modules() if fits(module)}
    if not fitting:
        return
    hooks = [
        module.register_forward_hook(partial(comparison.hear, name), with_kwargs=True)
        for name, module in fitting.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, fused in comparison.alike.items():
        model.set_submodule(name, fused)
