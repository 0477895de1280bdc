"""Puts adapters beside the products that a model's layers have become."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from engine.errors import StartError
from engine.kernels.cpu import why_missing
from engine.layers import merged
from engine.layers.cpu_layer import CpuLayer
from engine.layers.gated_delta import PackedDelta
from engine.layers.lora import Adapted, Current, Part, Update
from engine.layers.recurrent import InGroups
from engine.layers.weight_format import computes_exactly

# What an adapter adds, by the names of the model's linear layers in transformers.
Updates = dict[str, Update]


class _Place(NamedTuple):
    """Where a linear layer is computed: columns of a module's product, from `first` on."""

    holder: Any
    name: str
    first: int = 0


def _place_of(model: Any, layer: str) -> _Place:
    """Where a model computes a layer that transformers calls so, in whatever form.

    Raises StartError where tokens come in another order than in the step.
    """
    *path, leaf = layer.split(".")
    parent = model
    for name in path:
        parent = getattr(_inside(parent), name)
        if isinstance(parent, PackedDelta) or isinstance(parent.forward, InGroups):
            raise StartError(
                f"--adapter: {layer} is in a layer that keeps a state, which is not computed with"
                " adapters beside the weights; merge the adapter instead, with --model FOLDER"
            )
    parent = _inside(parent)
    for names in merged.SIBLINGS:
        if leaf in names and hasattr(parent, "product"):
            return _Place(parent, "product", sum(_widths_of(parent, names)[: names.index(leaf)]))
    module = getattr(parent, leaf)
    if isinstance(module, merged.MergedPart):
        shared = module.shared
        return _Place(shared, "product", sum(shared.widths[: module.index]))
    return _Place(parent, leaf)


def _inside(module: Any) -> Any:
    """A layer as it was before it became one call."""
    return module.layer if type(module) is CpuLayer else module


def _widths_of(parent: Any, names: tuple[str, ...]) -> list[int]:
    """How many columns of a fused module's product each of its layers has."""
    if names == merged.PRODUCTS:
        return [count * parent.width for count in parent.counts]
    return [parent.product.out_features // len(names)] * len(names)


def _device_of(product: Any) -> torch.device:
    """Where a product is computed."""
    hook = getattr(product, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((parameter.device for parameter in product.parameters()), "cpu")
    return torch.device(device)


def attach(model: Any, adapters: Sequence[Updates]) -> Current:
    """Let a model compute tokens with these adapters, whose numbers count from 1.

    To be done once, when its layers have their final form. The steps that it computes are told to
    what is returned.
    """
    current = Current()
    adapted: list[Adapted] = []
    for number, updates in enumerate(adapters, 1):
        for layer, update in updates.items():
            place = _place_of(model, layer)
            product = getattr(place.holder, place.name)
            if not isinstance(product, Adapted):
                product = Adapted(product, current)
                setattr(place.holder, place.name, product)
                adapted.append(product)
            product.parts.setdefault(number, []).append(Part(place.first, update))
    for product in adapted:
        device = _device_of(product.product)
        by_kernel = device.type == "cpu" and computes_exactly(model) and not why_missing()
        dtype = torch.float32 if computes_exactly(model) else model.dtype
        like = None if by_kernel else torch.empty(0, device=device, dtype=dtype)
        product.seal(len(adapters), like)
    for module in model.modules() if adapted else ():
        if type(module) is CpuLayer:
            module.adapt(len(adapters))
    return current
