"""Who is computed in the next step, and who waits."""

import time
from collections import deque
from math import inf
from typing import Generic, TypeVar

from engine.scheduling.kv_cache import SpanCache
from engine.sequence import Sequence

# Most smaller requests that may overtake one that waits for room.
MAX_OVERTAKING = 16
# Most tokens in a step of a prompt whose logits are all wanted: each is as wide as the vocabulary.
MAX_SCORED = 128


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """Waiting and running sequences: first come, first served, as the KV cache has room."""

    def __init__(self, cache: SpanCache, max_batch: int = 64, prefill_chunk: int = 512):
        self.cache, self.max_batch, self.prefill_chunk = cache, max_batch, prefill_chunk
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self._ended: deque[float] = deque(maxlen=64)

    def admit(self) -> None:
        """Move waiting sequences into the batch, in order of arrival but for MAX_OVERTAKING."""
        first_blocked: S | None = None
        blocked_size = inf
        for seq in list(self.waiting):
            if len(self.running) == self.max_batch:
                return
            if first_blocked and first_blocked.times_overtaken >= MAX_OVERTAKING:
                return
            # Where one found no room, nobody who wants as much needs to look.
            if seq.wanted_room >= blocked_size or self._lets_another_go_first(seq):
                continue
            if not self.cache.place(seq):
                first_blocked = first_blocked or seq
                blocked_size = seq.wanted_room
                continue
            if first_blocked:
                first_blocked.times_overtaken += 1
            self.waiting.remove(seq)
            self.running.append(seq)
            seq.admitted = seq.admitted or time.monotonic()

    def make_room(self) -> None:
        """Widen the spans that are full; who finds no room waits again, with its tokens."""
        for seq in list(self.running):
            if len(seq.tokens) > seq.room and not seq.done and not self.cache.grow(seq):
                self.running.remove(seq)
                self.waiting.appendleft(seq)

    def plan(self) -> list[tuple[S, int]]:
        """The next step's work: one token of each in decode, and chunks of prompts in order."""
        left = self.prefill_chunk
        work = []
        for seq in self.running:
            count = 1
            if seq.pending > 1:
                count = min(seq.pending, min(left, MAX_SCORED) if seq.all_logits else left)
                left -= count
            if count and not seq.done:
                work.append((seq, count))
        return work

    def advance(self, work: list[tuple[S, int]]) -> None:
        """Note that the work has been computed."""
        for seq, count in work:
            seq.num_cached += count
            self.cache.advance(seq)

    def retire(self) -> None:
        """Remove the sequences that are done, and free their rows."""
        # Read `done` once: the event loop may set it at any moment.
        gone = {seq for seq in (*self.running, *self.waiting) if seq.done}
        if not gone:
            return
        for seq in self.running:
            if seq in gone:
                self.cache.release(seq)
                self._ended.append(time.monotonic())
        self.running = [seq for seq in self.running if seq not in gone]
        self.waiting = deque(seq for seq in self.waiting if seq not in gone)

    def seconds_to_serve(self, count: int) -> int:
        """About how long it takes until so many more requests have ended, at most a minute."""
        now = time.monotonic()
        recent = [ended for ended in list(self._ended) if now - ended < 60]
        rate = len(recent) / (now - recent[0] + 1e-3) if recent else 1.0
        return min(60, 1 + int(count / rate))

    def _lets_another_go_first(self, seq: S) -> bool:
        """Whether a sequence waits for another's prefill, to copy the prefix that they share."""
        leader = seq.waiting_for
        if leader is None or leader.pending <= 1 or leader.done:
            seq.waiting_for = self.cache.prefix_in_prefill(seq)
        return seq.waiting_for is not None
