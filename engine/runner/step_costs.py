"""What a step costs on this machine, by how many tokens it computes."""

import time
from collections.abc import Mapping

import torch

from engine.runner.runner import Runner
from engine.sequence import KVSpan

# Up to how many times as much a token may cost as in the best of steps.
_EFFICIENT = 1.1
# Seconds of a step behind which no larger one is tried, and from which on one is measured once.
_LONGEST = 1.0
_LONG = 0.2
# Tokens of the steps that are measured for drafts.
_ROWS = (1, 2, 4, 8, 16)


def step_costs(runner: Runner, most: int) -> dict[int, float]:
    """Seconds of a step, by its tokens: 1, and 16 times powers of two up to `most`.

    Measured until larger steps bring no more; a step that fails, as for want of memory, is not
    in it.
    """
    costs = {1: _seconds_of(runner, 1)}
    size = 16
    while size <= min(most, runner.rows):
        try:
            costs[size] = _seconds_of(runner, size)
        except RuntimeError:  # torch's for memory, too
            runner.check_device()
            break
        before = costs.get(size // 2, torch.inf) / (size // 2)
        if costs[size] > _LONGEST or before <= _EFFICIENT * costs[size] / size:
            break
        size *= 2
    return costs


def row_costs(runner: Runner) -> dict[int, float]:
    """Seconds of a step by its tokens, few of them, the logits of all of which are wanted."""
    costs: dict[int, float] = {}
    for size in _ROWS:
        costs[size] = _seconds_of(runner, size, all_logits=True)
        if costs[size] > _LONGEST:
            break
    return costs


def _seconds_of(runner: Runner, tokens: int, *, all_logits: bool = False) -> float:
    """How long a step of so many tokens of one prompt takes: the shorter of two, or of one."""
    vocabulary = len(runner.model.get_input_embeddings().weight)
    span = KVSpan([7 * n % vocabulary for n in range(tokens)], 0, all_logits=all_logits)
    shortest = torch.inf
    try:
        for _ in range(2):
            began = time.perf_counter()
            runner.forward([(span, tokens)])[0, 0].item()  # which waits for a card
            shortest = min(shortest, time.perf_counter() - began)
            if shortest > _LONG:
                break
    finally:
        runner.forget([span])
    return shortest


def efficient_size(costs: Mapping[int, float]) -> int:
    """The fewest tokens of a step of which one costs about as little as any does."""
    of_one = {size: seconds / size for size, seconds in costs.items()}
    best = min(of_one.values())
    return min(size for size, cost in of_one.items() if cost <= _EFFICIENT * best)
