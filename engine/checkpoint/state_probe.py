"""Which modules of a model keep a state, found by a forward pass."""

from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from engine.attention.state_pool import StateGroup, StatePool
from engine.layers.recurrent import StateCache


class StateProbe(StateCache):
    """Finds the modules that keep a state, in a forward pass of a single text."""

    is_packed = False

    def __init__(self) -> None:
        fresh = StateGroup(slice(None), 1, None, torch.zeros(1, dtype=torch.long))
        super().__init__(StatePool(2), [fresh], 0)
        self.stack: list[Any] = []  # the modules that are being computed
        self.modules: dict[Any, None] = {}  # those that asked for a state
        self.layers: set[int] = set()  # whose states they are
        self.attended: list[int] = []  # layers that brought keys and values

    def update(self, key: Any, value: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.attended.append(layer_idx)
        return super().update(key, value, layer_idx)

    def update_conv_state(self, conv_states: Any, layer_idx: int, *args: Any, **how: Any) -> Any:
        self._note(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **how)

    def update_recurrent_state(
        self, recurrent_states: Any, layer_idx: int, *args: Any, **how: Any
    ) -> Any:
        self._note(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **how)

    def _note(self, layer_idx: int) -> None:
        self.modules[self.stack[-1]] = None
        self.layers.add(layer_idx)

    def __enter__(self) -> "StateProbe":
        self.hooks = [
            register_module_forward_pre_hook(lambda module, _: self.stack.append(module)),
            register_module_forward_hook(lambda *_: self.stack.pop() and None),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
