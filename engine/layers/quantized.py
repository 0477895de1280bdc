"""Weights in 8 or 4 bits: how a matrix is packed, and the layers that compute with it.

In 8 bits, a weight is an int8 and each row of a matrix has a scale, as large as its largest weight
asks. In 4 bits on a card, it is one of the 16 values of NF4 (section 3 of arXiv 2305.14314, QLoRA),
and each block of 64 weights has a scale; those are packed and unpacked by bitsandbytes. On a CPU,
blocks in 4 bits are others (engine.layers.blocks).
"""

import logging
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers.integrations.moe import grouped_mm_experts_forward

from engine.errors import StartError
from engine.layers.protocols import ExpertStack

Bits = Literal[8, 4]

# Weights that share a scale in 4 bits.
BLOCK = 64


def load_bitsandbytes() -> Any:
    """The library that computes in 4 bits. Raises StartError where it is missing."""
    # It warns that a kernel of some hub, which we do not want to run, cannot be downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as missing:
        raise StartError(
            f"--quantize 4bit needs bitsandbytes on a card ({missing}); run"
            " `pip install 'bitsandbytes>=0.50,<1'`, or take --quantize 8bit, which needs nothing"
        ) from missing
    return bitsandbytes


def fits(weight: torch.Tensor, bits: Bits, block: int = BLOCK) -> bool:
    """Whether a matrix, or a stack of them, can be packed: rows are whole blocks in 4 bits."""
    return bits == 8 or weight.shape[-1] % block == 0


def pack(matrix: torch.Tensor, bits: Bits) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [out, in] and its scales: int8 [out, in] and [out, 1]; or in 4 bits, two weights
    in a byte, uint8 [out, in / 2] and float32 [out, in / 64]."""
    if bits == 4:
        packed, state = load_bitsandbytes().functional.quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, quant_type="nf4"
        )
        return packed.view(len(matrix), -1), state.absmax.view(len(matrix), -1)
    exact = matrix.to(torch.float32, copy=True)
    largest = exact.abs().amax(1, keepdim=True)
    # A row of zeros has no scale of its own. The weights are divided by the scale as it is stored,
    # so that its rounding does no harm.
    scale = torch.where(largest == 0, 1.0, largest / 127).to(_scale_dtype(matrix))
    return exact.div_(scale).round_().clamp_(-127, 127).to(torch.int8), scale


def pack_stack(weight: torch.Tensor, bits: Bits) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, or a stack of them one by one, as packing takes a copy in float32; see `pack`."""
    if weight.ndim == 2:
        return pack(weight, bits)
    pairs = [pack(matrix, bits) for matrix in weight]
    return torch.stack([packed for packed, _ in pairs]), torch.stack([scale for _, scale in pairs])


def _scale_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type of scales in 8 bits; fp16 has too few exponents for them."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32


def unpack(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix, or the stack of them, that was packed, but for what the fewer bits cost."""
    if packed.dtype == torch.int8:
        return (packed * scale.to(torch.promote_types(scale.dtype, dtype))).to(dtype)
    state = _state_of(packed, scale, dtype)
    weight = load_bitsandbytes().functional.dequantize_4bit(packed.reshape(-1, 1), state)
    return weight.view(state.shape)


def _state_of(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Any:
    """What bitsandbytes must be told of a packed matrix."""
    shape = torch.Size((*packed.shape[:-1], 2 * packed.shape[-1]))
    return load_bitsandbytes().functional.QuantState(
        scale.flatten(), shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype
    )


def _empty_pair(weight: torch.Tensor, bits: Bits) -> list[torch.nn.Parameter]:
    """Parameters for what a matrix, or a stack of them, will be packed into, and its scales."""
    *rows, columns = weight.shape
    kinds: list[tuple[int, torch.dtype]] = [(columns, torch.int8), (1, _scale_dtype(weight))]
    if bits == 4:
        kinds = [(columns // 2, torch.uint8), (columns // BLOCK, torch.float32)]
    return [
        torch.nn.Parameter(
            torch.empty(*rows, width, dtype=dtype, device=weight.device), requires_grad=False
        )
        for width, dtype in kinds
    ]


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    """The shapes of a module's own tensors."""
    own = *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
    return {name: x.shape for name, x in own}


class QuantizedLinear(torch.nn.Module):
    """A linear layer whose matrix is packed; what it holds is loaded afterwards."""

    # A product of few tokens by a kernel that reads the packed weights, where there is one.
    kernel: Any = None

    def __init__(self, linear: torch.nn.Linear, bits: Bits):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight, self.weight_scale = _empty_pair(linear.weight, bits)
        self.bias = linear.bias
        self.shapes = shapes_of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == torch.uint8:
            state = _state_of(self.weight, self.weight_scale, x.dtype)
            bnb = load_bitsandbytes()
            return bnb.matmul_4bit(x, self.weight.view(-1, 1), state, bias=self.bias)
        if self.kernel is not None and self.kernel.takes(x):
            return self.kernel.product(x, self.weight, self.weight_scale, self.bias)
        return self.reference(x)

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """How much memory the matrix takes while it is unpacked."""
        return self.out_features * self.in_features * dtype.itemsize

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the unpacked matrix."""
        return F.linear(x, unpack(self.weight, self.weight_scale, x.dtype), self.bias)


class QuantizedExperts(torch.nn.Module):
    """A mixture's experts, unpacked when they are needed; nothing waits for the card."""

    def __init__(self, experts: ExpertStack, bits: Bits):
        super().__init__()
        self.num_experts = len(experts.gate_up_proj)
        self.act_fn = experts.act_fn
        self._add_stacks(experts, bits)
        self.shapes = shapes_of(self)

    def _add_stacks(self, experts: ExpertStack, bits: Bits) -> None:
        self.gate_up_proj, self.gate_up_proj_scale = _empty_pair(experts.gate_up_proj, bits)
        self.down_proj, self.down_proj_scale = _empty_pair(experts.down_proj, bits)

    def unpacked(self, name: str, dtype: torch.dtype, chosen: Any = slice(None)) -> torch.Tensor:
        """A stack, [experts, out, in], or the chosen ones of it."""
        scale = getattr(self, f"{name}_scale")
        return unpack(getattr(self, name)[chosen], scale[chosen], dtype)

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """How much memory both stacks take while they are unpacked."""
        per_byte = 1 if self.gate_up_proj.dtype == torch.int8 else 2
        return (self.gate_up_proj.numel() + self.down_proj.numel()) * per_byte * dtype.itemsize

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum what each token's experts say, [tokens, width], by weights [tokens, top k]."""
        if top_k_index.numel() >= self.num_experts:
            return self._all(hidden_states, top_k_index, top_k_weights)
        dtype, chosen = hidden_states.dtype, top_k_index.flatten()
        x = hidden_states.repeat_interleave(top_k_index.shape[1], 0)[..., None]
        x = torch.bmm(self.unpacked("gate_up_proj", dtype, chosen), x)[..., 0]
        x = torch.bmm(self.unpacked("down_proj", dtype, chosen), self.gate(x)[..., None])[..., 0]
        return (x.unflatten(0, top_k_index.shape) * top_k_weights[..., None]).sum(1).to(dtype)

    def _all(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The same with all experts unpacked, for one grouped product of all tokens."""
        experts = SimpleNamespace(
            gate_up_proj=self.unpacked("gate_up_proj", hidden_states.dtype),
            down_proj=self.unpacked("down_proj", hidden_states.dtype),
            num_experts=self.num_experts,
            has_gate=True,
            has_bias=False,
            has_post_expert_norm=False,
            is_transposed=False,
            is_concatenated=True,
            _is_expert_parallel=False,
            _apply_gate=self.gate,
        )
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def is_int8(module: Any) -> bool:
    """Whether a layer is packed in 8 bits."""
    if isinstance(module, QuantizedLinear):
        return module.weight.dtype == torch.int8
    return isinstance(module, QuantizedExperts) and module.down_proj.dtype == torch.int8


def bits_of(model: Any) -> Bits | None:
    """In how many bits a model's layers are packed; None if they are not."""
    layers = [x for x in model.modules() if isinstance(x, QuantizedLinear | QuantizedExperts)]
    if not layers:
        return None
    return 8 if any(map(is_int8, layers)) else 4


def num_parameters(model: Any) -> int:
    """A model's weights, of which two may share a byte; scales are none.

    A matrix that is both an embedding and a head counts once, also where it is packed twice.
    """
    both = model.get_input_embeddings(), model.get_output_embeddings()
    tied = [layer.weight for layer in both if hasattr(layer, "weight_scale")]
    twice = len(tied) == 2 and tied[0].dtype == tied[1].dtype and torch.equal(*tied)
    return sum(
        parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        for name, parameter in model.named_parameters()
        if not name.endswith(("weight_scale", "proj_scale"))
        and not (twice and parameter is tied[0])
    )


def largest_unpacked(model: Any, device: torch.device) -> int:
    """The bytes that a device needs for what a step unpacks at most at a time."""
    layers = (x for x in model.modules() if isinstance(x, QuantizedLinear | QuantizedExperts))
    here = (x for x in layers if next(x.parameters()).device == device)
    return max((layer.unpacked_bytes(model.dtype) for layer in here), default=0)
