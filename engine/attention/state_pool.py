"""States of layers that keep one instead of rows: linear attention, Mamba, short convolutions.

A state is what such a layer has made of all tokens of a sequence so far. It is never changed: a
step reads it from one slot of a pool and writes the next one into another. So a step that failed
can be computed again, sequences share a state by its number, and one is kept by not being freed.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.sequence import KVSpan, ScheduledBatch

# A layer's tensor in a slot: the layer, what it holds, and which of several such.
Key = tuple[int, str, int]
_Places = slice | torch.Tensor


class _NoSlot(RuntimeError):
    """All slots are in use."""


class StatePool:
    """The slots, each for the states of all layers after some tokens of a sequence.

    Their tensors are created on first use, where the layers live.
    """

    def __init__(self, slots: int):
        self.slots = slots
        self.tensors: dict[Key, torch.Tensor] = {}
        self.users = [0] * slots
        self.free = [*range(slots - 1, -1, -1)]
        self.idle = self.take()  # of what pads a step

    @property
    def most_sequences(self) -> int:
        """How many can run: each reads one slot in a step, and writes another."""
        return (self.slots - 1) // 2

    @property
    def slot_bytes(self) -> int:
        """Of one sequence's states, as far as layers have made any."""
        return sum(x[0].nbytes for x in self.tensors.values())

    def take(self) -> int:
        """A free slot, for one holder. Raises NoSlot."""
        if not self.free:
            raise _NoSlot(f"all {self.slots} slots for states are in use")
        slot = self.free.pop()
        self.users[slot] = 1
        return slot

    def share(self, slot: int) -> int:
        """Another holder of the same state."""
        self.users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Let go of a slot; it is free when its last holder does."""
        self.users[slot] -= 1
        if not self.users[slot]:
            self.free.append(slot)

    def tidy(self, span: KVSpan) -> None:
        """Free what a span no longer needs: what failed steps wrote, and old states not kept."""
        wanted = {span.num_computed_tokens} | {
            p for p in span.kept_states if p <= span.num_computed_tokens
        }
        for position in [p for p in span.states if p not in wanted]:
            self.release(span.states.pop(position))

    def drop(self, span: KVSpan) -> None:
        """Free all states of a span."""
        for slot in span.states.values():
            self.release(slot)
        span.states.clear()
        span.kept_states.clear()

    def read(self, key: Key, slots: torch.Tensor) -> torch.Tensor:
        """Copies of a layer's states in these slots, [slots, ...]."""
        tensor = self.tensors[key]
        return tensor.index_select(0, slots.to(tensor.device, non_blocking=True))

    def prepare(self, key: Key, shape: tuple[int, ...]) -> torch.Tensor:
        """All slots of a layer's states [slots, *shape], float32 on the CPU."""
        if key not in self.tensors:
            self.tensors[key] = zeros((self.slots, *shape), torch.empty(0))
        return self.tensors[key]

    def write(self, key: Key, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Put a layer's states [slots, ...] into these slots."""
        if key not in self.tensors:
            self.tensors[key] = zeros((self.slots, *states.shape[1:]), states)
        tensor = self.tensors[key]
        tensor.index_copy_(0, slots.to(tensor.device, non_blocking=True), states.to(tensor.dtype))


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of a dtype and device; on a CPU by calloc: until a page is written it costs nothing."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return (
        torch.from_numpy(np.zeros(prod(shape) * like.itemsize, np.uint8))
        .view(like.dtype)
        .view(shape)
    )


class StateGroup(NamedTuple):
    """Tokens of a step that a layer computes in one call: as many of each sequence."""

    tokens: _Places  # of the packed row
    size: int  # sequences
    source: torch.Tensor | None  # the slots of their states so far; None if there are none
    target: torch.Tensor  # the slots for those after

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        if isinstance(self.tokens, torch.Tensor):
            return len(self.tokens) // self.size
        return (self.tokens.stop - self.tokens.start) // self.size

    def select(self, x: Any, total: int) -> Any:
        """What belongs to the group, of tensors [1, total, ...]; other things are as they are."""
        if isinstance(x, tuple):
            return tuple(self.select(each, total) for each in x)
        if not isinstance(x, torch.Tensor) or x.shape[:2] != (1, total):
            return x
        return x[0, self.tokens].unflatten(0, (self.size, -1))

    def singles(self) -> "Iterator[StateGroup]":
        """The same, a prompt that goes on in calls of one token each."""
        if self.source is None or isinstance(self.tokens, torch.Tensor) or self.size > 1:
            yield self
            return
        source = self.source
        for token in range(self.tokens.start, self.tokens.stop):
            yield StateGroup(slice(token, token + 1), 1, source, self.target)
            source = self.target


def state_groups(pool: StatePool, work: ScheduledBatch, idle: KVSpan) -> list[StateGroup]:
    """The groups of a step, whose spans take the slots that it writes.

    `work` is in the order of the packed row, `idle` the span that pads it. Raises NoSlot.
    """
    return [*_decode(pool, work, idle), *_pieces(pool, work, idle)]


def _decode(pool: StatePool, work: ScheduledBatch, idle: KVSpan) -> Iterator[StateGroup]:
    """One token of each sequence that has a state."""
    places, sources, targets = [], [], []
    for span, first, new in _with_places(work):
        if span is idle:
            places.append(first)
            sources.append(pool.idle)
            targets.append(pool.idle)
        elif new == 1 and span.num_computed_tokens:
            places.append(first)
            sources.append(span.states[span.num_computed_tokens])
            targets.append(_slot_for(pool, span, span.num_computed_tokens + 1))
    if places:
        begin, end = places[0], places[-1] + 1
        tokens = slice(begin, end) if end - begin == len(places) else torch.tensor(places)
        yield StateGroup(tokens, len(places), torch.tensor(sources), torch.tensor(targets))


def _pieces(pool: StatePool, work: ScheduledBatch, idle: KVSpan) -> Iterator[StateGroup]:
    """Each chunk of a prompt, cut where a state is to be kept."""
    for span, first, new in _with_places(work):
        if span is idle or (new == 1 and span.num_computed_tokens):
            continue
        begin, end = span.num_computed_tokens, span.num_computed_tokens + new
        source = span.states[begin] if begin else None
        at = begin
        for cut in [*sorted(p for p in span.kept_states if begin < p < end), end]:
            target = _slot_for(pool, span, cut)
            tokens = slice(first + at - begin, first + cut - begin)
            read = None if source is None else torch.tensor([source])
            yield StateGroup(tokens, 1, read, torch.tensor([target]))
            at, source = cut, target


def slots_needed(span: KVSpan, new: int) -> int:
    """How many slots a step takes for a span: for its new state, and those to be kept."""
    end = span.num_computed_tokens + new
    return 1 + sum(span.num_computed_tokens < position < end for position in span.kept_states)


def _with_places(work: ScheduledBatch) -> Iterator[tuple[KVSpan, int, int]]:
    """Each span of packed work, its first token's place, and how many it has."""
    first = 0
    for span, new in work:
        yield span, first, new
        first += new


def _slot_for(pool: StatePool, span: KVSpan, position: int) -> int:
    """The slot for a span's state after so many tokens; that of a failed step serves again."""
    if position not in span.states:
        span.states[position] = pool.take()
    return span.states[position]
