"""Linear layers with weights in fp16 and sums in float32, by FBGEMM, for CPUs without bfloat16.

They read half of float32's bytes at its full rate. A row's result depends on the batch's size no
more than in float32 itself, so activations are float32 too.
"""

from typing import Any

import torch

# The largest relative error of a layer's weights in fp16, by their norms.
MAX_ERROR = 1e-4


class HalfLinear(torch.nn.Module):
    """A linear layer whose weights are in fp16 and whose sums are in float32, by FBGEMM."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        bias = None if bias is None else bias.detach().float()
        packed = weight.detach().float().contiguous()
        self.packed = torch.ops.quantized.linear_prepack_fp16(packed, bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weights in float32, unpacked for a model that multiplies by them itself."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # By its overload: choosing one takes as long as a small product.
        return torch.ops.quantized.linear_dynamic_fp16.default(x.contiguous(), self.packed)


class HalfExperts(torch.nn.Module):
    """A mixture's experts, each with its matrices as HalfLinear."""

    def __init__(self, experts: Any):
        super().__init__()
        self.act_fn = experts.act_fn
        self.gate_up = torch.nn.ModuleList(map(HalfLinear, experts.gate_up_proj))
        self.down = torch.nn.ModuleList(map(HalfLinear, experts.down_proj))

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


def fits_fp16(weight: torch.Tensor) -> bool:
    """Whether fp16 holds the weights: it has fewer exponents than bfloat16."""
    wide = weight.detach().float()
    error = (wide.half().float() - wide).norm()
    return bool(error <= MAX_ERROR * wide.norm())
