"""Layers that keep a state, in packed steps: by the models' own modules.

Each is called once for all sequences in decode, and once for each piece of a prompt, and is given a
cache that holds the states of these sequences alone.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from engine.attention.state_pool import Key, StateGroup, StatePool
from engine.layers import selective_scan
from engine.relative_error import relative_error

# transformers tells of packages that would be faster on a card, once for each function that it has
# written in torch too.
logging.getLogger("transformers.integrations.hub_kernels").addFilter(
    lambda record: "falling back to its reference" not in record.getMessage()
)


class StateCache:
    """Stands in for transformers' cache in one forward pass.

    Attention layers get back the keys and values that they bring, as ours are written elsewhere.
    The other layers find the states of the group that is being computed.
    """

    is_compileable = False
    _is_quantized = False
    is_packed = True  # not the probe's, which goes to a module as it is

    def __init__(self, pool: StatePool, groups: list[StateGroup], total: int):
        self.pool, self.groups, self.total = pool, groups, total
        self.group = groups[0]  # that is being computed
        self.changed: dict[Key, torch.Tensor] = {}
        self.calls = 0
        self.recurrent: torch.Tensor | None = None  # the state that was last asked for
        self.inputs: dict[int, Any] = {}  # what layers have made of the groups for all of them
        self.layer_idx = -1  # of the attention layer that came last

    # What the model and its attention layers ask.

    def update(self, key: Any, value: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.layer_idx = layer_idx
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    # What layers with a state ask.

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def has_previous_state(self, *_: int | None, **__: int | None) -> bool:
        return self.group.source is not None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get((layer_idx, "conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        self.recurrent = self._get((layer_idx, "recurrent", state_idx))
        return self.recurrent

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The new inputs of a convolution behind those before; the last ones are kept."""
        key = (layer_idx, "conv", state_idx)
        before = self._get(key)
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        if before is None:
            full = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            full = torch.cat([before, conv_states], dim=-1)
            size = before.shape[-1]
        self.changed[key] = full[..., -size:]
        return full

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.changed[layer_idx, "recurrent", state_idx] = recurrent_states
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """MiniMax's name for it."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, states: torch.Tensor) -> None:
        self.update_recurrent_state(states, layer_idx)

    def _get(self, key: Key) -> torch.Tensor | None:
        if self.group.source is None or (key not in self.pool.tensors and key not in self.changed):
            return None  # nothing has been computed, or only what pads the first step of all
        if key not in self.changed:  # a copy, which some layers change in place
            self.changed[key] = self.pool.read(key, self.group.source)
        return self.changed[key]

    # What the wrapped layers do.

    def compute(self, layer: "InGroups", args: Any, kwargs: dict[str, Any]) -> Any:
        """A layer's result for all tokens of the step, from one call for each group."""
        self.calls += 1
        groups = self.groups
        if layer.one_by_one:
            groups = [single for group in groups for single in group.singles()]
        parts = []
        for self.group in groups:
            self.changed, self.recurrent = {}, None
            given = [self.group.select(x, self.total) for x in args]
            named = {name: self.group.select(x, self.total) for name, x in kwargs.items()}
            with selective_scan.going_on(self):
                parts.append(layer.forward(*given, **named))
            for key, states in self.changed.items():
                self.pool.write(key, self.group.target, states)
        self.changed = {}
        return self._joined(groups, parts)

    def _joined(self, groups: list[StateGroup], parts: list[Any]) -> Any:
        if isinstance(parts[0], tuple):
            return tuple(self._joined(groups, [*each]) for each in zip(*parts, strict=True))
        if not isinstance(parts[0], torch.Tensor):
            return parts[0]
        sizes = [(group.size, group.length) for group in groups]
        if [tuple(part.shape[:2]) for part in parts] != sizes:
            return None  # nothing of each token
        if len(parts) == 1 and isinstance(groups[0].tokens, slice):
            return parts[0].flatten(0, 1)[None]
        out = parts[0].new_empty(1, self.total, *parts[0].shape[2:])
        for group, part in zip(groups, parts, strict=True):
            out[0, group.tokens] = part.flatten(0, 1)
        return out


def use_state_groups(modules: Sequence[Any]) -> None:
    """Let modules that keep a state compute group after group in a packed step."""
    for module in modules:
        selective_scan.carry_states(module)
        module.forward = InGroups(module.forward)


class InGroups:
    """Stands in for the forward pass of a module that keeps a state.

    Some modules forget the state that is there where they are given several tokens. So the first
    text that comes is also computed in two pieces, and where that is not the same, prompts go on
    token by token.
    """

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward
        self.one_by_one: bool | None = None  # not known yet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if isinstance(given, StateCache) and given.is_packed:
                if self.one_by_one is None and given.total > 4 and len(given.groups) == 1:
                    self._try(given.total, args, kwargs)
                return given.compute(self, args, kwargs)
        return self.forward(*args, **kwargs)  # the model's own forward pass

    def _try(self, total: int, args: Any, kwargs: dict[str, Any]) -> None:
        whole = self._in_pieces([total], args, kwargs)
        self.one_by_one = False
        pieces = self._in_pieces([3, total - 3], args, kwargs)
        self.one_by_one = relative_error(pieces, whole) > 0.01

    def _in_pieces(self, sizes: list[int], args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """The result for a text computed in pieces of these sizes, [1, tokens, width]."""
        pool, groups, first = StatePool(2), [], 0
        slot = torch.tensor([1])
        for size in sizes:
            tokens = slice(first, first + size)
            groups.append(StateGroup(tokens, 1, slot if first else None, slot))
            first += size
        cache = StateCache(pool, groups, first)
        given = [cache if isinstance(x, StateCache) else x for x in args]
        named = {k: cache if isinstance(x, StateCache) else x for k, x in kwargs.items()}
        out = cache.compute(self, given, named)
        return out[0] if isinstance(out, tuple) else out
