"""The inputs of one forward pass, and the rows of the KV cache that it reads and writes.

Every step is one forward pass over packed tokens: one token of each sequence in decode, and chunks
of the prompts in prefill.
"""

from collections.abc import Iterable
from copy import copy
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device

from engine.attention.groups import ChunkAttention, CopiedAttention, Group, Scoring, SlicedAttention
from engine.attention.in_place import InPlaceAttention, LatentAttention
from engine.attention.kv_pool import KVCache, LayerKVCache
from engine.sequence import KVSpan, ScheduledBatch

# How decode reads the cache: by FlashAttention where the rows lie, by a kernel of ours where these
# are MLA's latents, by sdpa over views of spans at equal distances (best on a CPU), or by sdpa over
# copies of all spans' rows.
AttentionBackend = Literal["in place", "latents", "sliced", "copied"]
_DECODE = {
    "in place": InPlaceAttention,
    "latents": LatentAttention,
    "sliced": SlicedAttention,
    "copied": CopiedAttention,
}


class ForwardBatch:
    """The inputs of one forward pass; a plain object, which accelerate's hooks leave alone."""

    pool: KVCache  # by the runner
    states: Any = None  # by the runner, where layers keep states

    def __init__(self, work: ScheduledBatch, backend: AttentionBackend = "copied"):
        self.backend = backend
        # Work whose keys agree shares a group.
        order = sorted(range(len(work)), key=lambda n: self._group_key(*work[n]))
        ends = dict(zip(order, accumulate(work[n][1] for n in order), strict=True))
        wanted: list[int] = []
        for n, (span, new) in enumerate(work):
            wanted += range(ends[n] - (new if span.all_logits else 1), ends[n])
        work = [work[n] for n in order]
        self.work: ScheduledBatch = work  # in the order of the packed row
        places = [
            (span.start, span.num_computed_tokens + n) for span, new in work for n in range(new)
        ]
        # Python lists first: a step has too few tokens for tensor operations to be faster.
        self.ids = torch.tensor(
            [i for span, n in work for i in span.tokens[span.num_computed_tokens :][:n]]
        )
        self.positions = torch.tensor([position for _, position in places])
        # The pool's row of each packed token, and the indices of the tokens with wanted logits.
        self.write = torch.tensor([start + position for start, position in places])
        self.wanted = torch.tensor(wanted)
        # The adapter of each packed token, where any has one; and of each adapter, which tokens.
        adapters = [span.adapter for span, new in work for _ in range(new)]
        self.adapters = torch.tensor(adapters) if any(adapters) else None
        self.tokens_of = {n: _indices_of(n, adapters) for n in sorted({*adapters} - {0})}
        self.attended = 0
        self.inputs: dict[Any, Any] = {}  # what its layers have made of it for all of them
        self._copies: dict[torch.device, ForwardBatch] = {}

    @cached_property
    def groups(self) -> list[Group]:
        """The work by how its attention is computed; a model that is one call never asks."""
        return list(self._groups(self.work))

    def _group_key(self, span: KVSpan, new: int) -> tuple[bool, int, int]:
        """What work of one group has in common, and behind it its order in the group."""
        if new == 1 and self.backend == "copied":  # lengths within a factor of two
            return False, (span.num_computed_tokens + 1).bit_length(), span.num_computed_tokens
        if new > 1 and self.backend != "in place":  # a prefill chunk is alone
            return True, span.start, 0
        return new > 1, 0, span.start

    def _groups(self, work: ScheduledBatch) -> Iterable[Group]:
        token = 0
        for (is_prefill, _), part in groupby(work, lambda item: self._group_key(*item)[:2]):
            items = list(part)
            kind: Any = _DECODE[self.backend]
            if is_prefill and self.backend != "in place":
                kind = ChunkAttention
            runs = kind.runs(items) if kind is SlicedAttention else [items]
            for run in runs:
                group = kind.of(run, token)
                token = group.tokens.stop
                yield group

    def enter(self, layer_idx: int, scoring: Scoring) -> LayerKVCache:
        """The rows of a layer whose attention is computed now, once in a step."""
        self.attended += 1
        layer = self.pool.layer(layer_idx)
        layer.scoring = scoring
        return layer

    def on(self, device: torch.device) -> "ForwardBatch":
        """The step with its tensors on a device, copied there once for all layers."""
        if device.type == "cpu":  # where they are
            return self
        if device not in self._copies:
            there = self._copies[device] = copy(self)
            there._copies = {}  # a shared dict would be a reference cycle that holds GPU memory
            for name in ("ids", "positions", "write", "wanted", "adapters", "tokens_of", "groups"):
                here = getattr(self, name)
                setattr(there, name, send_to_device(here, device, non_blocking=True))
        return self._copies[device]


def _indices_of(wanted: int, values: list[int]) -> torch.Tensor:
    """Where a value stands among others."""
    return torch.tensor([n for n, value in enumerate(values) if value == wanted])
