"""A mixture's experts, as transformers stacks them."""

from typing import Any, TypeGuard

import torch

from engine.layers.protocols import ExpertStack
from engine.relative_error import relative_error


def has_fused_experts(module: Any) -> TypeGuard[ExpertStack]:
    """Whether a module is a mixture's experts, as transformers stacks them: [experts, out, in]."""
    matrices = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    stacked = all(isinstance(x, torch.nn.Parameter) and x.dim() == 3 for x in matrices)
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    plain = plain and all(name == "act_fn" for name, _ in module.named_children())
    return stacked and plain and hasattr(module, "act_fn") and len(list(module.parameters())) == 2


def computes_alike(half: Any, experts: ExpertStack) -> bool:
    """Whether a mixture's experts do no more than ours in their place: some clamp, or shift."""
    weight = experts.gate_up_proj
    choices = torch.tensor([[0, 1], [len(weight) - 1, 0]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    for scale in (1.0, 100.0):
        x = scale * torch.linspace(-1, 1, 2 * weight.shape[2]).reshape(2, -1)
        wanted = experts(x.to(weight.dtype), choices, weights.to(weight.dtype))
        if not relative_error(half(x, choices, weights), wanted) < 0.05:
            return False
    return True
