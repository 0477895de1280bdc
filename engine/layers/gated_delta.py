"""Layers of the gated delta rule (arXiv 2412.06464) on a CPU: Qwen 3.5's and its like.

Their products are computed once for all tokens of a step, and what lies between them by one call of
our kernels, which reads and writes the states where they lie.
"""

import ctypes
from typing import Any

import torch

from engine.attention.state_pool import StateGroup
from engine.kernels.cpu import DeltaLayer, DeltaStep, kernels
from engine.layers.recurrent import StateCache

# Of channels that the kernel reads at once, on any CPU; and inputs of its convolution.
_VECTOR = 16
_TAPS = 4
_PARTS = {"conv1d", "norm", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


def can_be_packed(module: Any) -> bool:
    """Whether a module looks like such a layer, of sizes that the kernel does."""
    if not {name for name, _ in module.named_children()} >= _PARTS:
        return False
    conv = module.conv1d
    return (
        hasattr(module, "A_log")
        and conv.bias is None
        and conv.kernel_size == (_TAPS,)
        and conv.in_channels % _VECTOR == 0
        and conv.weight.device.type == "cpu"
        and conv.weight.dtype == torch.float32
    )


class _Chains:
    """A step's texts for the kernel, each a chain of pieces; keeps alive what it is pointed to."""

    def __init__(self, cache: StateCache, floats: int):
        self.firsts: list[int] = []
        self.sources: list[int] = []
        self.segments = [0]
        self.ends: list[int] = []
        self.targets: list[int] = []
        chain_of = [0] * cache.total
        for group in cache.groups:
            self._add(group, cache.pool.idle, chain_of)
        lists = self.firsts, self.sources, self.segments, self.ends, self.targets, chain_of
        self.tensors = [torch.tensor(x, dtype=torch.long) for x in lists]
        self.tensors.append(torch.empty(cache.total * floats))
        pointers = [x.data_ptr() for x in self.tensors]
        threads = torch.get_num_threads()
        self.described = DeltaStep(cache.total, len(self.firsts), *pointers, threads)
        self.address = ctypes.addressof(self.described)

    def _add(self, group: StateGroup, idle: int, chain_of: list[int]) -> None:
        """The pieces of a group; one that goes on where the last ended is of the same chain."""
        places = group.tokens
        tokens = (
            [*range(places.start, places.stop)] if isinstance(places, slice) else places.tolist()
        )
        sources = [-1] * group.size if group.source is None else group.source.tolist()
        for n, (source, target) in enumerate(zip(sources, group.target.tolist(), strict=True)):
            own = tokens[n * group.length : (n + 1) * group.length]
            if source >= 0 and self.ends and (self.ends[-1], self.targets[-1]) == (own[0], source):
                self.segments.pop()
            else:
                self.firsts.append(own[0])
                # What pads a step needs no state, and all of it would share one.
                self.sources.append(-1 if source == idle else source)
            self.ends.append(own[-1] + 1)
            self.targets.append(target)
            self.segments.append(len(self.ends))
            for token in own:
                chain_of[token] = len(self.firsts) - 1


class PackedDelta(torch.nn.Module):
    """What such a layer computes, for packed steps.

    A token's result does not depend on what else is in the step, to the last bit.
    """

    def __init__(self, module: Any):
        super().__init__()
        self.own: Any = module
        self.layer_idx = module.layer_idx
        conv, norm = module.conv1d, module.norm
        # What the description points to.
        self.parameters_ = [
            conv.weight.detach()[:, 0].T.contiguous(),
            module.A_log.detach().float().exp(),
            module.dt_bias.detach().float(),
            norm.weight.detach().float(),
        ]
        self.described = DeltaLayer(
            *(x.data_ptr() for x in self.parameters_),
            module.num_k_heads,
            module.num_v_heads,
            module.head_k_dim,
            module.head_v_dim,
            norm.variance_epsilon,
        )
        self.address = ctypes.addressof(self.described)
        self.floats = conv.in_channels + 2 * module.num_v_heads
        # One slot's states.
        self.shapes = {
            "conv": (conv.in_channels, _TAPS),
            "recurrent": (module.num_v_heads, module.head_k_dim, module.head_v_dim),
        }
        self.function = kernels().gated_delta

    def forward(
        self, hidden_states: torch.Tensor, cache_params: Any = None, **given: Any
    ) -> torch.Tensor:
        """By transformers' interface, float32 [1, tokens, width]."""
        if not isinstance(cache_params, StateCache) or not cache_params.is_packed:
            return self._alone(hidden_states, cache_params=cache_params, **given)
        cache_params.calls += 1
        own: Any = self.own
        x = hidden_states[0]
        parts = [own.in_proj_qkv, own.in_proj_z, own.in_proj_a, own.in_proj_b]
        inputs = [part.forward(x).contiguous() for part in parts]
        states = [
            cache_params.pool.prepare((self.layer_idx, what, 0), shape).data_ptr()
            for what, shape in self.shapes.items()
        ]
        out = torch.empty_like(inputs[1])
        pointers = [x.data_ptr() for x in inputs]
        self.function(
            self.address, self._chains(cache_params).address, *pointers, *states, out.data_ptr()
        )
        product: torch.Tensor = own.out_proj.forward(out)
        return product[None]

    def _alone(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        own: Any = self.own
        out: torch.Tensor = own.forward(*args, **kwargs)
        return out

    def _chains(self, cache: StateCache) -> _Chains:
        """The step for layers of this size, described once for all of them."""
        if self.floats not in cache.inputs:
            cache.inputs[self.floats] = _Chains(cache, self.floats)
        chains: _Chains = cache.inputs[self.floats]
        return chains
