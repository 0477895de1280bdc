"""Linear layers with weights in fp16 or int8, by FBGEMM, for CPUs where our kernels are not.

They read half or a quarter of float32's bytes at its full rate or more. A row's result depends on
the batch's size hardly more than in float32 itself, so activations are float32 too.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from engine.layers.cpu_linear import CpuLinear, is_half
from engine.layers.protocols import ExpertStack
from engine.layers.quantized import Bits, QuantizedExperts

# FBGEMM stores a row of fp16 weights in blocks of so many; the last is filled up with zeros.
_PACKED_BLOCK = 512

# The largest relative error of a layer's weights in fp16, by their norms.
_MAX_ERROR = 1e-4


def _direct(operator: Any) -> Any:
    """An operator without what torch does in Python before each call with packed weights.

    Twelve microseconds are half a small product's time. Where torch hides it elsewhere, the
    operator itself: one with its overload, since choosing one takes as long again.
    """
    return getattr(operator.default, "_op", operator.default)


class HalfLinear(torch.nn.Module):
    """A linear layer whose weights are in fp16 and whose sums are in float32, by FBGEMM."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        bias = None if bias is None else bias.detach().float()
        packed = weight.detach().float().contiguous()
        self.packed = torch.ops.quantized.linear_prepack_fp16(packed, bias)
        self.product = _direct(torch.ops.quantized.linear_dynamic_fp16)

    @property
    def packed_bytes(self) -> int:
        """The memory that the weights take."""
        blocks = -(-self.in_features // _PACKED_BLOCK)
        return 2 * self.out_features * blocks * _PACKED_BLOCK

    @property
    def weight(self) -> torch.Tensor:
        """The weights in float32, unpacked for a model that multiplies by them itself."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.contiguous(), self.packed)


# FBGEMM's product of float32 activations, which it rounds to whole steps, with packed int8.
_int8_product: Any = getattr(
    torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32", None
)
# An activation is at most so many steps: the AVX2 kernel adds two products of it with an int8 in 16
# bits, which overflow beyond.
_MAX_QUANTIZED = 63
_ZERO_POINT = 64


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are int8, with a scale for each row, by FBGEMM.

    FBGEMM multiplies int8 by 7 bits, which are too few for an activation: 14 are right to 1e-4 of a
    row's largest one. So each row becomes two, its whole steps and 126 times what is left of them,
    and the kernel reads the weights once for both. A step is as large as the row itself asks, so
    that no row depends on its neighbours.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        with warnings.catch_warnings():
            # It is deprecated, but the only way to give the kernel its weights.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            quantized = torch._make_per_channel_quantized_tensor(
                weight.detach().contiguous(),
                scale.detach().flatten().double(),
                torch.zeros(self.out_features, dtype=torch.long),
                0,
            )
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.product = _direct(_int8_product)
        # As tensors, since a number would become one each time.
        self.step = torch.tensor(1 / _MAX_QUANTIZED)
        self.finer = torch.tensor(2.0 * _MAX_QUANTIZED)

    @property
    def packed_bytes(self) -> int:
        """The memory that the weights take; the fill of their last block is never written to."""
        return self.out_features * self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()
        # A row of zeros becomes NaN, then some number, and zero again.
        step = rows.abs().amax(1, keepdim=True).mul_(self.step)
        steps = rows / step
        rest = steps.sub(steps.round()).mul_(self.finer)
        product = self.product(torch.cat([steps, rest]), 1.0, _ZERO_POINT, self.packed)
        out, left = product.chunk(2)
        out = out.addcdiv_(left, self.finer).mul_(step)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)


class ListedExperts(torch.nn.Module):
    """A mixture's experts, each with linear layers of its own."""

    def __init__(
        self,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        gate_up: Iterable[torch.nn.Module],
        down: Iterable[torch.nn.Module],
    ):
        super().__init__()
        self.act_fn = act_fn
        self.gate_up = torch.nn.ModuleList(gate_up)
        self.down = torch.nn.ModuleList(down)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum what each token's experts say, [tokens, width], by weights [tokens, top k]."""
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, place = torch.where(top_k_index == number)
            gate, up = self.gate_up[number](hidden_states[tokens]).chunk(2, dim=-1)
            said = self.down[number](self.act_fn(gate) * up)
            out.index_add_(0, tokens, said * top_k_weights[tokens, place, None].to(said))
        return out


class Products(NamedTuple):
    """How a CPU multiplies by weights that stay in few bits."""

    of_half: Callable[[torch.Tensor, torch.Tensor | None], torch.nn.Module]
    # Of a matrix as engine.layers.quantized packs it, its scales, and a bias.
    of_packed: Callable[..., torch.nn.Module]
    fits: Callable[[torch.Tensor], bool]  # whether it can by weights in 16 bits
    bits: tuple[Bits, ...]  # and packed in how many others

    def half_experts(self, experts: ExpertStack) -> ListedExperts:
        """A mixture's experts, each with its matrices in 16 bits."""
        matrices = experts.gate_up_proj, experts.down_proj
        linears = ([self.of_half(x, None) for x in stack] for stack in matrices)
        return ListedExperts(experts.act_fn, *linears)

    def packed_experts(self, experts: QuantizedExperts) -> ListedExperts:
        """A quantised mixture's experts, each with its matrices as they are."""
        linears: list[list[torch.nn.Module]] = []
        for name in ("gate_up_proj", "down_proj"):
            stack, scale = getattr(experts, name), getattr(experts, f"{name}_scale")
            offset = getattr(experts, f"{name}_offset", None)
            parts = [{}] * len(stack) if offset is None else [{"offset": x} for x in offset]
            each = zip(stack, scale, parts, strict=True)
            linears.append([self.of_packed(x, y, None, **more) for x, y, more in each])
        return ListedExperts(experts.act_fn, *linears)


class WideEmbedding(torch.nn.Module):
    """An embedding that stays as it is in memory and gives float32.

    It is kept whole, as some models have embeddings of their own that scale what they give.
    """

    def __init__(self, embedding: torch.nn.Embedding):
        super().__init__()
        self.embedding = embedding

    @property
    def weight(self) -> torch.Tensor:
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids).float()


def is_available() -> bool:
    """Whether this torch has FBGEMM's products with fp16 weights, on this CPU."""
    try:
        torch.ops.quantized.linear_dynamic_fp16(
            torch.ones(1, 8), torch.ops.quantized.linear_prepack_fp16(torch.ones(8, 8), None)
        )
    except (AttributeError, RuntimeError):
        return False
    return True


def has_int8_products() -> bool:
    """Whether this torch has FBGEMM's products with int8 weights, on this CPU, and they are right.

    The probe is what would overflow in a kernel of fewer bits.
    """
    weight = torch.full((8, 64), 127, dtype=torch.int8)
    try:
        product = Int8Linear(weight, torch.ones(8, 1))(torch.ones(1, 64))
    except (AttributeError, RuntimeError):
        return False
    return bool((product - 127 * 64).abs().max() < 1)


def fits_fp16(weight: torch.Tensor) -> bool:
    """Whether fp16 holds the weights: it has fewer exponents than bfloat16.

    Some rows at a time, as it takes three copies of them in float32.
    """
    sizes, errors = [], []
    for rows in weight.detach().split(4096):
        wide = rows.float()
        sizes.append(wide.norm())
        errors.append((wide.half().float() - wide).norm())
    return bool(torch.stack(errors).norm() <= _MAX_ERROR * torch.stack(sizes).norm())


BY_KERNELS = Products(CpuLinear, CpuLinear.of_packed, is_half, (8, 4))
BY_FBGEMM = Products(HalfLinear, Int8Linear, fits_fp16, (8,))
