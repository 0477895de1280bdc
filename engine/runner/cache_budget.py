"""How the memory for the cache is divided into rows of keys and values, and slots for states."""

import logging
from collections import Counter

import psutil
import torch
from accelerate.utils import convert_file_size_to_int

from engine.container import free_memory
from engine.layers.quantized import largest_unpacked
from engine.runner.runner import Runner

log = logging.getLogger("chat")

# What the processes that render templates and try grammars take, some time after the start.
CHILDREN = 2**28


def affordable_rows(trial: Runner, cache_memory: str, slots: int = 0) -> int:
    """Rows that the memory budget holds beside the states, where it holds the fewest."""
    costs: Counter[torch.device] = Counter()
    for layer in trial.pool.layers:
        costs[layer.keys.device] += layer.row_bytes
    taken = _state_costs(trial)
    return min(
        (
            (
                cache_budget(cache_memory, device, largest_unpacked(trial.model, device))
                - slots * taken[device]
            )
            // cost
            for device, cost in costs.items()
        ),
        default=2**24,
    )


def _state_costs(trial: Runner) -> Counter[torch.device]:
    """Bytes of one sequence's states, by device."""
    costs: Counter[torch.device] = Counter()
    if trial.states:
        for tensor in trial.states.tensors.values():
            costs[tensor.device] += tensor[0].nbytes
    return costs


def affordable_slots(trial: Runner, cache_memory: str, most: int) -> int:
    """Slots for states that half of the budget holds, at most so many."""
    costs = _state_costs(trial)
    each = [
        cache_budget(cache_memory, device, largest_unpacked(trial.model, device)) // 2 // cost
        for device, cost in costs.items()
    ]
    return min([most, *each])


def cache_budget(setting: str, device: torch.device, needed: int = 0) -> int:
    """Bytes for the KV cache on a device: auto, a fraction of the free memory, or a size.

    `needed` bytes are not free, as a step unpacks weights into them.
    """
    on_card = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_card else _available_memory()
    free = max(0, free - needed)
    if setting == "auto" and on_card:
        # The rest is for activations and CUDA graphs.
        return int(min(0.85 * free, max(free / 2, free - 2**30)))
    if setting == "auto":
        return min(2**31, max(0, free - CHILDREN) // 2)
    try:
        return int(free * float(setting))
    except ValueError:
        wanted = int(convert_file_size_to_int(setting))
    if wanted > free:
        log.warning(
            "--cache-memory %s is more than the %.1f GiB that are free", setting, free / 2**30
        )
    return wanted


def _available_memory() -> int:
    """Bytes of main memory that may still be used, by the machine's count and a container's."""
    return int(min(psutil.virtual_memory().available, free_memory()))
