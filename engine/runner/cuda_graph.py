"""Decode steps as CUDA graphs: one launch instead of hundreds."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.attention.forward_batch import ForwardBatch


def capture(
    compute: Callable[[], torch.Tensor], device: torch.device, memory: Any
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Capture a computation as a CUDA graph; its output, and the function that replays it.

    Raises RuntimeError if it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # A failed capture leaves its own stream current; this restores ours.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        compute()  # what is created on first use must not be captured
        # A synchronisation during capture fails and leaves torch's allocator broken, so look for
        # one before. torch warns that this mode is a prototype.
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.set_sync_debug_mode("error")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            return compute(), graph.replay


class DecodeGraph:
    """A decode step of a fixed batch size as a CUDA graph, whose inputs are overwritten.

    `longest` bounds the sequences' lengths: by it, the kernel divides its work at capture. Adapters
    are computed by a graph whose step has room for their numbers.
    """

    size: int  # sequences
    longest: int
    adapted: bool  # whether sequences may have adapters

    def __init__(
        self,
        step: ForwardBatch,
        longest: int,
        compute: Callable[[ForwardBatch], torch.Tensor],
        device: torch.device,
        memory: Any,
    ):
        (group,) = step.groups
        self.step = step
        self.longest = longest
        self.size = len(step.ids)
        self.adapted = step.adapters is not None
        self.group: Any = group.bounded(longest)  # type: ignore[attr-defined]
        step.groups = [self.group]
        self.logits, self.replay = capture(partial(compute, step), device, memory)

    def __call__(self, step: ForwardBatch) -> torch.Tensor:
        """Replay with a step's inputs; the returned logits are overwritten by the next call."""
        (given,) = step.groups
        for name in ("ids", "positions", "write", "wanted", "adapters"):
            if (kept := getattr(self.step, name)) is not None:
                kept.copy_(getattr(step, name), non_blocking=True)
        self.group.overwrite(given)
        self.replay()
        return self.logits
