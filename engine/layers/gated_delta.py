"""Layers of the gated delta rule (arXiv 2412.06464) on a CPU: Qwen 3.5's and its like.

Their products are computed once for all tokens of a step, and what lies between them by one call of
our kernels, which reads and writes the states where they lie; so is a whole decoder layer, where it
is no more than such a layer and a gated MLP.
"""

import ctypes
from typing import Any

import torch
from transformers.activations import SiLUActivation

from engine.attention.state_pool import StateGroup
from engine.kernels.cpu import DeltaBlock as DescribedBlock
from engine.kernels.cpu import DeltaLayer, DeltaStep, kernels
from engine.layers.cpu_linear import CpuLinear
from engine.layers.merged import FusedMLP, MergedPart, RMSNorm
from engine.layers.recurrent import StateCache
from engine.layers.replacing import is_plain

# Of channels that the kernel reads at once, on any CPU; and inputs of its convolution.
_VECTOR = 16
_TAPS = 4
# Its layers of one input: each pair is one matrix of what the kernel is given.
INPUTS = (("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))
_PARTS = {"conv1d", "norm", "out_proj", *INPUTS[0], *INPUTS[1]}


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


def product_of(module: Any, *names: str) -> Any:
    """The one product that computes a module's layers of these names; None if there is none."""
    parts = [getattr(module, name) for name in names]
    shared = {part.shared for part in parts if isinstance(part, MergedPart)}
    is_one = len(shared) == 1 and all(isinstance(part, MergedPart) for part in parts)
    return shared.pop().product if is_one else None


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
        self.products = [product_of(module, *names) for names in INPUTS]
        self.function = kernels().gated_delta

    def forward(
        self, hidden_states: torch.Tensor, cache_params: Any = None, **given: Any
    ) -> torch.Tensor:
        """By transformers' interface, float32 [1, tokens, width]."""
        if not isinstance(cache_params, StateCache) or not cache_params.is_packed:
            return self._alone(hidden_states, cache_params=cache_params, **given)
        cache_params.calls += 1
        own: Any = self.own
        inputs = [self._inputs(n, hidden_states[0]) for n in range(len(INPUTS))]
        states = self.states(cache_params)
        out = torch.empty(len(inputs[0]), own.num_v_heads * own.head_v_dim)
        pointers = [x.data_ptr() for x in inputs]
        address = self.chains(cache_params, self.floats).address
        self.function(self.address, address, *pointers, *states, out.data_ptr())
        product: torch.Tensor = own.out_proj.forward(out)
        return product[None]

    def states(self, cache: StateCache) -> list[int]:
        """Where the pool has the states of all slots."""
        return [
            cache.pool.prepare((self.layer_idx, what, 0), shape).data_ptr()
            for what, shape in self.shapes.items()
        ]

    def chains(self, cache: StateCache, floats: int) -> _Chains:
        """The step for layers of this size, described once for all of them."""
        if floats not in cache.inputs:
            cache.inputs[floats] = _Chains(cache, floats)
        chains: _Chains = cache.inputs[floats]
        return chains

    def _inputs(self, n: int, x: torch.Tensor) -> torch.Tensor:
        """What some of its layers make of x [tokens, width], side by side."""
        if self.products[n] is not None:
            joined: torch.Tensor = self.products[n].forward(x)
            return joined
        return torch.cat([getattr(self.own, name).forward(x) for name in INPUTS[n]], dim=-1)

    def _alone(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        own: Any = self.own
        out: torch.Tensor = own.forward(*args, **kwargs)
        return out


# A decoder layer's parts, by their names in transformers.
_BLOCK: dict[str, type] = {
    "linear_attn": PackedDelta,
    "mlp": FusedMLP,
    "input_layernorm": RMSNorm,
    "post_attention_layernorm": RMSNorm,
}


def can_be_one_call(module: Any) -> bool:
    """Whether a module is a decoder layer of such parts, all of whose products are our kernels'."""
    if not is_plain(module, _BLOCK):
        return False
    return (
        all(isinstance(x, CpuLinear) for x in _products_of(module))
        and isinstance(module.mlp.act_fn, SiLUActivation | torch.nn.SiLU)
        and module.mlp.down_proj.in_features % _VECTOR == 0
    )


def _products_of(block: Any) -> list[Any]:
    """A decoder layer's products, in the order of the kernel's."""
    mixer, mlp = block.linear_attn, block.mlp
    return [*mixer.products, mixer.own.out_proj, mlp.product, mlp.down_proj]


class DeltaBlock(torch.nn.Module):
    """What a decoder layer of such a mixer computes, by one call.

    A token's result does not depend on what else is in the step, to the last bit.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer
        self.adapted = False
        self.block_type = getattr(layer, "block_type", None)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.norms = [norm.weight.detach() for norm in norms]
        self.described = DescribedBlock(
            *(weight.data_ptr() for weight in self.norms),
            *(product.described for product in _products_of(layer)),
            norms[0].weight.numel(),
            layer.mlp.down_proj.in_features,
            *(norm.eps for norm in norms),
        )
        self.address = ctypes.addressof(self.described)
        self.floats = kernels().delta_floats(layer.linear_attn.address, self.address)
        self.function = kernels().delta_layer

    def adapt(self, _: int) -> None:
        """Compute with adapters of the products, by the layer itself."""
        self.adapted = True

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Any = None, **given: Any
    ) -> torch.Tensor:
        """By transformers' interface, float32 [1, tokens, width]."""
        is_packed = isinstance(past_key_values, StateCache) and past_key_values.is_packed
        if self.adapted or not is_packed:
            whole: Any = self.layer
            alone: torch.Tensor = whole.forward(
                hidden_states, past_key_values=past_key_values, **given
            )
            return alone
        past_key_values.calls += 1
        mixer: Any = self.layer.linear_attn
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        step = mixer.chains(past_key_values, self.floats).address
        states = mixer.states(past_key_values)
        self.function(mixer.address, self.address, step, *states, x.data_ptr(), out.data_ptr())
        return out
