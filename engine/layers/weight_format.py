"""The form of a model's weights on a CPU.

Most CPUs have no instructions for half precision: there torch's products of it are slower than
those of float32, and take longer in proportion to the batch. The weights may then be read as they
are with sums in float32, by our kernels (cpu_linear) or, where these cannot be compiled, by
FBGEMM's (fbgemm), and operations be larger (merged). That can be faster on other CPUs too, as in
half precision the small operations between products are slow. Weights in 8 or 4 bits are read by
such products where there are any, as unpacking them would take longer than 16 bits do.
"""

from typing import Any, Literal

import torch

from engine.attention.interface import can_absorb
from engine.layers.blocks import BlockEmbedding, BlockLinear
from engine.layers.cpu_linear import CpuLinear
from engine.layers.experts import computes_alike, has_fused_experts
from engine.layers.fbgemm import (
    BY_FBGEMM,
    BY_KERNELS,
    HalfLinear,
    Int8Linear,
    Products,
    WideEmbedding,
)
from engine.layers.freed_memory import return_freed_memory
from engine.layers.lora import Adapted
from engine.layers.merged import MergedPart, fuse_parts, parents_of_siblings, share_products
from engine.layers.quantized import QuantizedExperts, QuantizedLinear, bits_of

WeightFormat = Literal["as it is", "our kernels", "fp16 weights", "float32"]
PACKED: dict[WeightFormat, Products] = {"our kernels": BY_KERNELS, "fp16 weights": BY_FBGEMM}


def replaceable(model: Any) -> dict[str, Any]:
    """The linear layers and stacks of experts that may change their form, by their names.

    MLA's up-projection is not among them: attention reads its matrix. Nor is Mamba's for steps of
    time, of which its code takes the weights.
    """
    absorbed = {f"{name}.kv_b_proj" for name, module in model.named_modules() if can_absorb(module)}
    absorbed |= {name for name, _ in model.named_modules() if name.endswith(".dt_proj")}
    return {
        name: module
        for name, module in model.named_modules()
        if name not in absorbed and (type(module) is torch.nn.Linear or has_fused_experts(module))
    }


def matrices_of(module: Any) -> list[torch.Tensor]:
    """The weights of a linear layer, or of all experts of a stack, [out, in] each."""
    if isinstance(module, torch.nn.Linear):
        return [module.weight]
    return [*module.gate_up_proj, *module.down_proj]


@torch.inference_mode()
def convert(model: Any, form: WeightFormat) -> None:
    """Give a model's linear layers a form, one after the other, and the rest float32.

    A layer whose weights do not fit it has them in float32.
    """
    if form == "as it is":
        return
    if form in PACKED:
        embedding = model.get_input_embeddings()
        if isinstance(embedding, BlockEmbedding):
            embedding.dtype = torch.float32  # its rows need not be rounded on the way
        model.set_input_embeddings(WideEmbedding(embedding))
    convert_module(model, form)


def convert_module(model: Any, form: WeightFormat) -> None:
    """The same for a model or for a part of it; its embedding stays."""
    if products := PACKED.get(form):
        for module in parents_of_siblings(model):
            share_products(module, products)
            return_freed_memory()
        convert_packed(model, products)
        layers = replaceable(model)
        while layers:  # each is freed before the next is made
            _convert_half(model, *layers.popitem(), products)
            return_freed_memory()
    wide = [module for module in model.modules() if isinstance(module, WideEmbedding)]
    kept = {parameter for embedding in wide for parameter in embedding.parameters()}
    for parameter in model.parameters():
        if parameter not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "get_slope_rate"):
            _widen_decays(module)
    fuse_parts(model)


def _widen_decays(module: Any) -> None:
    """Make MiniMax's decays again in float32: they are computed, and were rounded when loaded."""
    slope = module.get_slope_rate(device=module.slope_rate.device)
    module.slope_rate = slope
    module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(slope)


def _convert_half(model: Any, name: str, layer: Any, products: Products) -> None:
    """Let a layer's or a mixture's weights be read in 16 bits, if all can be."""
    if not all(map(products.fits, matrices_of(layer))):
        return
    if isinstance(layer, torch.nn.Linear):
        model.set_submodule(name, products.of_half(layer.weight, layer.bias))
    elif computes_alike(half := products.half_experts(layer), layer):
        model.set_submodule(name, half)


@torch.inference_mode()
def convert_packed(model: Any, products: Products) -> None:
    """Let a model's weights in 8 or 4 bits be read as they are, one layer after the other."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedExperts)
        and bits_of(module) in products.bits
    }
    while layers:
        name, layer = layers.popitem()
        if isinstance(layer, QuantizedLinear):
            more = layer.parts() if isinstance(layer, BlockLinear) else {}
            linear = products.of_packed(layer.weight, layer.weight_scale, layer.bias, **more)
            model.set_submodule(name, linear)
        else:
            model.set_submodule(name, products.packed_experts(layer))
        del layer
        return_freed_memory()


def computes_exactly(model: Any) -> bool:
    """Whether activations and sums are float32."""
    return isinstance(model.get_input_embeddings(), WideEmbedding) or model.dtype == torch.float32


def tolerance_of(model: Any) -> float:
    """By how much two right ways to compute a model's logits may differ, relatively.

    In half precision it is a few percent. Of Int8Linear's activations, which it rounds to 14 bits,
    those between two steps may be rounded to either.
    """
    if not computes_exactly(model):
        return 0.1
    by_int8 = any(isinstance(_product_of(module), Int8Linear) for module in model.modules())
    return 0.01 if by_int8 else 1e-3


def _product_of(module: Any) -> Any:
    """A module itself, or the product that the first of several layers computes for all."""
    if isinstance(module, MergedPart):
        product = module.shared.product if module.index == 0 else None
        return product.product if isinstance(product, Adapted) else product
    return module


def held_bytes(model: Any) -> int:
    """The memory that a model's weights take in whatever form; those on disk take none."""
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    for product in map(_product_of, model.modules()):
        if isinstance(product, CpuLinear | HalfLinear | Int8Linear):
            total += product.packed_bytes
    return total


def held_size(model: Any) -> str:
    """The same in words."""
    size = held_bytes(model)
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
