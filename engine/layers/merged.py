"""Fewer and larger operations for a model on a CPU, where each costs as much as the work in it.

So does calling a module: here, and in what is made of these, only `forward` is called.
"""

from typing import Any, TypeGuard

import torch

from engine.kernels.cpu import kernels, why_missing
from engine.layers.blocks import BlockLinear, can_be_joined, joined
from engine.layers.fbgemm import Products
from engine.layers.protocols import GatedMLP
from engine.layers.quantized import QuantizedLinear, bits_of

# Layers of one module that have the same input, by their names in transformers.
PRODUCTS = ("q_proj", "k_proj", "v_proj")
SIBLINGS = (PRODUCTS, ("gate_proj", "up_proj"))


class _MergedLinear:
    """Several linear layers of one input as a single product, computed for the first of them."""

    def __init__(self, layers: list[Any], products: Products):
        self.widths = [layer.out_features for layer in layers]
        self.given: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, ...] = ()
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        self.product: Any
        if isinstance(layers[0], BlockLinear):
            packed, scale, more = joined(layers)
            self.product = products.of_packed(packed, scale, bias, **more)
            return
        weight = torch.cat([layer.weight for layer in layers])
        if isinstance(layers[0], QuantizedLinear):
            scale = torch.cat([layer.weight_scale for layer in layers])
            self.product = products.of_packed(weight, scale, bias)
        else:
            self.product = products.of_half(weight, bias)

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What the layer of that index makes of x; the product is kept until the last asks."""
        if x is not self.given:
            self.given = x
            self.parts = self.product(x).split(self.widths, dim=-1)
        part = self.parts[index]
        if index == len(self.widths) - 1:
            self.given = None
            self.parts = ()
        return part


class MergedPart(torch.nn.Module):
    """One of the layers of a MergedLinear."""

    def __init__(self, shared: _MergedLinear, index: int):
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features = shared.product.in_features
        self.out_features = shared.widths[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(x, self.index)


class RMSNorm(torch.nn.Module):
    """A model's RMSNorm (arXiv 1910.07467), over the last dimension, in float32.

    By our kernel; or in four operations, as the root of the mean square is the vector's norm over
    the root of its width.
    """

    def __init__(self, weight: torch.nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps
        width = weight.shape[-1]
        self.scale = weight.detach().float() * width**0.5
        self.floor = torch.tensor((width * eps) ** 0.5)
        # Norms of each head have a weight for each, of which the kernel knows nothing.
        self.kernel: Any = None if weight.dim() > 1 or why_missing() else kernels().rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None and x.dtype == torch.float32:
            return self._by_kernel(x.contiguous())
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(norm.hypot_(self.floor)).mul_(self.scale)

    def _by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        width = x.shape[-1]
        weight = self.weight.data_ptr()
        self.kernel(weight, self.eps, x.numel() // width, width, x.data_ptr(), out.data_ptr())
        return out


class FusedMLP(torch.nn.Module):
    """A gated MLP (arXiv 2002.05202) of two products, gate and up being one."""

    def __init__(self, module: GatedMLP):
        super().__init__()
        self.product = module.gate_proj.shared.product
        self.act_fn = module.act_fn
        self.down_proj = module.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.product.forward(x).chunk(2, -1)
        return self.down_proj.forward(self.act_fn.forward(gate) * up)


def _can_be_shared(layer: Any, products: Products) -> bool:
    """Whether a layer is linear, and its weights are such as the products take."""
    if isinstance(layer, QuantizedLinear):
        return bits_of(layer) in products.bits
    return type(layer) is torch.nn.Linear and products.fits(layer.weight)


def parents_of_siblings(model: Any) -> list[Any]:
    """A model's modules that have layers of one input; the list itself keeps no layer alive."""
    first = {names[0] for names in SIBLINGS}
    return [x for x in model.modules() if first & {name for name, _ in x.named_children()}]


def share_products(module: Any, products: Products) -> None:
    """Let a module's linear layers of one input be computed together, where all can be."""
    for names in SIBLINGS:
        layers: list[Any] = [getattr(module, name, None) for name in names]
        if not all(_can_be_shared(layer, products) for layer in layers):
            continue
        if isinstance(layers[0], BlockLinear) and not can_be_joined(layers):
            continue
        if len({(type(x), x.in_features, x.bias is None) for x in layers}) == 1:
            shared = _MergedLinear(layers, products)
            for index, name in enumerate(names):
                setattr(module, name, MergedPart(shared, index))


def norm_parameters(module: Any) -> tuple[torch.nn.Parameter, float] | None:
    """The weight and the epsilon of what may be an RMSNorm; None of anything else."""
    if not type(module).__name__.endswith("RMSNorm"):  # whose weights may take long to unpack
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None:
        return None
    return weight, eps


def plain_norm(module: Any) -> RMSNorm | None:
    """Our RMSNorm in place of a module, if it computes the same: some models add 1."""
    parameters = norm_parameters(module)
    if parameters is None:
        return None
    weight = parameters[0]
    norm = RMSNorm(*parameters)
    probe = torch.linspace(-3, 3, 2 * weight.numel()).reshape(1, 2, -1)
    return norm if torch.allclose(norm(probe), module(probe), atol=1e-5, rtol=1e-5) else None


def looks_gated(module: Any) -> TypeGuard[GatedMLP]:
    """Whether a module may be a gated MLP and no more."""
    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _plain_mlp(module: Any) -> FusedMLP | None:
    """A module in few operations, if it computes no more than a gated MLP."""
    if not looks_gated(module) or not isinstance(module.gate_proj, MergedPart):
        return None
    fused = FusedMLP(module)
    probe = torch.linspace(-30, 30, 2 * module.gate_proj.in_features).reshape(1, 2, -1)
    return fused if torch.allclose(fused(probe), module(probe)) else None


def fuse_parts(model: Any) -> None:
    """Replace a model's norms and gated MLPs, where they are no more than that."""
    for name, module in list(model.named_modules()):
        if fused := plain_norm(module) or _plain_mlp(module):
            model.set_submodule(name, fused)
