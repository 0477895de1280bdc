"""One thread owns the model and computes step after step.

A request is one or more sequences in it, first waiting, then running.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from math import inf
from typing import Any

from tokenizers import Tokenizer

from engine.cache import Allocator
from engine.detokenizer import Detokenizer
from engine.errors import (
    ContextTooLong,
    EngineError,
    EngineStopped,
    QueueFull,
    StepFailed,
    TimedOut,
)
from engine.guide import Guide
from engine.runner import Runner, to_device
from engine.sampler import pick_tokens
from engine.sampling_params import SamplingParams
from engine.sequence import MIN_PREFIX, Delta, Sequence, Span, Token

log = logging.getLogger("chat")


# Seconds between the empty Deltas that keep an idle stream's connection alive.
HEARTBEAT = 15.0
# Most prefixes of finished requests that are kept.
MAX_PREFIXES = 256
# Most smaller requests that may overtake one that waits for room.
MAX_PASSES = 16


class Engine:
    """Generates for every request; `stream` is how to ask."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        end_ids: set[int],
        *,
        max_batch: int = 64,
        max_waiting: int = 256,
        chunk: int = 512,
        timeout: float = 600.0,
        reuse: bool = True,
    ):
        self.runner, self.tokenizer, self.end_ids = runner, tokenizer, end_ids
        self.max_batch, self.max_waiting, self.reuse = max_batch, max_waiting, reuse
        self.chunk, self.timeout = chunk, timeout
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.failure: BaseException | None = None
        self.allocator = Allocator(runner.rows)
        # The prefix cache: spans of finished requests, least recently used first.
        self.prefixes: list[Span] = []
        self.num_reused = 0
        self.on_end: Callable[[Sequence], None] = lambda seq: None
        self._ended: deque[float] = deque(maxlen=64)
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        # The last step's tokens, until they are sent.
        self._unsent: list[tuple[Sequence, Token | EngineError]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What the routes call, on the event loop.

    async def stream(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        open_ended: bool = False,
        *,
        n: int = 1,
        label: Any = None,
        guide: Guide | None = None,
    ) -> AsyncGenerator[Delta]:
        """Yield an answer piece by piece, or n of them interleaved; leaving the loop cancels.

        Raises ContextTooLong, QueueFull, EngineStopped, TimedOut, or StepFailed.
        """
        self.check_queue()
        outbox: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        shared = {"outbox": outbox, "open_ended": open_ended, "label": label}
        seqs = [self._sequence(prompt, sampling, index, guide, **shared) for index in range(n)]
        self._submit(seqs)
        beating = asyncio.create_task(heartbeat(outbox))
        try:
            while n:
                item = await outbox.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                n -= item.finish_reason is not None
        finally:
            beating.cancel()
            for seq in seqs:
                seq.done = True

    def _sequence(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        index: int,
        guide: Guide | None,
        **shared: Any,
    ) -> Sequence:
        if sampling.seed is not None:  # each of n answers has its own, or all would be the same
            sampling = replace(sampling, seed=sampling.seed + index)
        return Sequence(
            list(prompt),
            sampling=sampling,
            detokenizer=Detokenizer(self.tokenizer, sampling.stop),
            loop=asyncio.get_running_loop(),
            index=index,
            guide=guide.copy() if guide else None,
            **shared,
        )

    def _submit(self, seqs: list[Sequence]) -> None:
        most = seqs[0].max_tokens
        if most > self.runner.rows:
            raise ContextTooLong(
                f"prompt and answer of {most} tokens do not fit in the KV cache of"
                f" {self.runner.rows}; ask for a shorter answer"
            )
        for seq in seqs:
            self._inbox.put(seq)
        if self.failure:
            raise self._dead()

    def check_queue(self) -> None:
        """Raise QueueFull if no more may wait, with the time until the queue is half empty.

        Raises EngineStopped if the engine is dead.
        """
        if self.failure:
            raise self._dead()
        if self.num_waiting >= self.max_waiting:
            now = time.monotonic()
            recent = [ended for ended in list(self._ended) if now - ended < 60]
            rate = len(recent) / (now - recent[0] + 1e-3) if recent else 1.0
            seconds = min(60, 1 + int(self.num_waiting / 2 / rate))
            raise QueueFull(
                f"{self.num_waiting} requests are waiting; try again in {seconds} seconds",
                retry_after=seconds,
            )

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self._inbox.qsize()

    @property
    def num_used(self) -> int:
        """Rows of the KV cache in use; approximate, as other threads read it."""
        return self.runner.rows - sum(gap for _, gap in list(self.allocator.gaps))

    def close(self) -> None:
        """Stop the thread after its current step."""
        self._inbox.put(None)
        self._thread.join()

    # What the thread does.

    def _run(self) -> None:
        try:
            while self._receive():
                self._admit()
                self._step()
                self._retire()
        except BaseException as failure:
            log.exception("the engine died")
            self.failure = failure
        self.failure = self.failure or EngineStopped("the server is stopping")
        while not self._inbox.empty():
            if seq := self._inbox.get():
                self.waiting.append(seq)
        self._emit()
        self._send([(seq, self._dead()) for seq in [*self.running, *self.waiting]])

    def _receive(self) -> bool:
        """Move new sequences from the inbox to the queue, waiting if idle; False to stop."""
        while not (self.running or self.waiting) or not self._inbox.empty():
            seq = self._inbox.get()
            if seq is None:
                return False
            self.waiting.append(seq)
        return True

    def _admit(self) -> None:
        """Move waiting sequences into the batch, in order of arrival but for MAX_PASSES."""
        first_blocked, too_much = None, inf
        for seq in list(self.waiting):
            full = len(self.running) == self.max_batch
            if full or (first_blocked and first_blocked.passed >= MAX_PASSES):
                return
            # Where one found no room, nobody who wants as much needs to look.
            if seq.wanted_room < too_much and self.reuse and self._prefix_is_coming(seq):
                continue
            if seq.wanted_room >= too_much or not self._place(seq):
                first_blocked, too_much = first_blocked or seq, min(too_much, seq.wanted_room)
                continue
            if first_blocked:
                first_blocked.passed += 1
            self.running.append(seq)
            self.waiting.remove(seq)
            seq.admitted = seq.admitted or time.monotonic()

    def _prefix_is_coming(self, seq: Sequence) -> bool:
        """Whether a prompt in prefill will soon share a longer prefix than any cached one.

        Then waiting is faster: of n answers to one prompt, or of requests that arrive together
        with the same system prompt, one computes the prefix and the others copy it.
        """
        if seq.follows and seq.follows.pending > 1 and not seq.follows.done:
            return True  # without comparing long prompts again in every step
        seq.follows = None
        if filling := [other for other in self.running if other.pending > 1]:
            least = self._longest_prefix(seq)[0] + MIN_PREFIX
            leaders = (other for other in filling if other.tokens[:least] == seq.tokens[:least])
            seq.follows = next(leaders, None) if len(seq.tokens) > least else None
        return seq.follows is not None

    def _longest_prefix(self, seq: Sequence) -> tuple[int, Span | None]:
        """The most tokens of a sequence that a span holds already, and that span."""
        shared, source = 0, None
        for span in [*self.prefixes, *self.running]:
            count = span.common_prefix(seq.tokens, beyond=shared)
            if count > shared:
                shared, source = count, span
        return (shared, source) if shared >= MIN_PREFIX else (0, None)

    def _place(self, seq: Sequence) -> bool:
        """Allocate a sequence's span, with the longest cached prefix in it; False if none fits."""
        size = seq.wanted_room
        if size > self._num_free():
            return False
        shared, source = self._longest_prefix(seq) if self.reuse else (0, None)
        whole = source if source in self.prefixes and shared == source.num_cached else None
        if whole and self._extend_prefix(seq, whole):
            return True
        start = self._reserve(size, spare=source)
        if start is None:
            return False
        seq.start, seq.room = start, size
        # The source may have been evicted for the room.
        if source in self.prefixes:
            self.prefixes.append(self.prefixes.pop(self.prefixes.index(source)))
        held = source in [*self.prefixes, *self.running]
        if source and held and self._copied(source, seq, shared):
            self._reuse(seq, shared)
        return True

    def _reuse(self, seq: Sequence, count: int) -> None:
        seq.num_cached = count
        if not seq.admitted:  # a readmitted sequence finds its own rows, which is no reuse
            seq.num_reused = count
            self.num_reused += count

    def _copied(self, source: Span, seq: Sequence, count: int) -> bool:
        """Copy rows to a sequence's span; False if that failed and they must be recomputed."""
        try:
            self.runner.copy(source, seq.start, count)
        except Exception:
            log.exception("%d rows could not be copied", count)
            self.runner.check_device()
            return False
        return True

    def _num_free(self) -> int:
        """Rows that no running sequence owns."""
        free = sum(gap for _, gap in self.allocator.gaps)
        return free + sum(span.room for span in self.prefixes)

    def _extend_prefix(self, seq: Sequence, prefix: Span) -> bool:
        """Continue in a cached prefix's own rows, if those behind it are free."""
        more = seq.wanted_room - prefix.room
        if self.allocator.allocate(more, at=prefix.start + prefix.room) is None:
            return False
        self.prefixes.remove(prefix)
        seq.start, seq.room = prefix.start, seq.wanted_room
        self._reuse(seq, prefix.num_cached)
        return True

    def _reserve(self, size: int, spare: Span | None = None) -> int | None:
        """Allocate rows, evicting cached prefixes as needed, `spare` last.

        None if no gap becomes large enough; then nothing is evicted.
        """
        start = self.allocator.allocate(size)
        if start is not None or self._num_free() < size:
            return start
        gaps, prefixes = list(self.allocator.gaps), list(self.prefixes)
        for span in sorted(prefixes, key=lambda span: span is spare):
            self._evict(span)
            start = self.allocator.allocate(size)
            if start is not None:
                return start
        self.allocator.gaps, self.prefixes = gaps, prefixes
        return None

    def _step(self) -> None:
        """Compute one step; its tokens are sent at once, or while a GPU computes the next."""
        for seq in [seq for seq in self.running if len(seq.tokens) > seq.room and not seq.done]:
            self._grow(seq)
        computed = self._compute(self._plan())
        self._emit()  # unless picking did, while a GPU computed
        for seq, token in computed:
            if isinstance(token, Token):
                if seq.done:  # a stop string or its client has ended it meanwhile
                    continue
                seq.append(token, self.end_ids)
            self._unsent.append((seq, token))
        if not self.runner.asynchronous:
            self._emit()

    def _emit(self) -> None:
        """Detokenize and send the last step's tokens."""
        items: list[tuple[Sequence, Delta | EngineError]] = []
        for seq, token in self._unsent:
            try:
                items.append((seq, seq.emit(token) if isinstance(token, Token) else token))
            except Exception as error:  # of the detokenizer: only this request fails
                items.append((seq, self._failed(seq, error)))
        self._unsent = []
        self._send(items)

    def _grow(self, seq: Sequence) -> None:
        """Widen a sequence's span, or move it; if no room is found, it waits with its tokens."""
        more = seq.wanted_room - seq.room
        if self.allocator.allocate(more, at=seq.start + seq.room) is not None:
            seq.room += more
            return
        start = self._reserve(seq.wanted_room)
        if start is None:
            self._release(seq)
            self.waiting.appendleft(seq)
            self.running.remove(seq)
            return
        old = Span(seq.tokens, seq.start, seq.room, seq.num_cached)
        seq.start, seq.room = start, seq.wanted_room
        if not self._copied(old, seq, old.num_cached):
            seq.num_cached = 0
        self.allocator.release(old.start, old.room)

    def _plan(self) -> list[tuple[Sequence, int]]:
        """The next step's work: one token of each in decode, and chunks of prompts in order."""
        left = self.chunk
        work = []
        for seq in self.running:
            count = min(seq.pending, left) if seq.pending > 1 else 1
            left -= count if seq.pending > 1 else 0
            if count and not seq.done:
                work.append((seq, count))
        return work

    def _compute(
        self, work: list[tuple[Sequence, int]]
    ) -> list[tuple[Sequence, Token | EngineError]]:
        """The next token of each sequence whose prompt is through.

        If a step fails, its halves are retried, so that only the sequences at fault fail.
        """
        if not work:
            return []
        try:
            logits = self.runner.forward(work)
            through = [row for row, (seq, new) in enumerate(work) if seq.pending == new]
            seqs = [work[row][0] for row in through]
            if 0 < len(seqs) < len(work):
                logits = logits.index_select(0, to_device(through, logits.device))
            # The last step's tokens are sent while a GPU computes this one.
            tokens = pick_tokens(seqs, logits, self.runner.ids, self._emit) if seqs else []
        except Exception as error:
            if len(work) == 1:
                self.runner.check_device()
                return [(work[0][0], self._failed(work[0][0], error))]
            log.warning("a step of %d requests failed; retrying its halves", len(work))
        else:
            for seq, new in work:
                seq.num_cached += new
            return list(zip(seqs, tokens, strict=True))
        half = len(work) // 2
        return self._compute(work[:half]) + self._compute(work[half:])

    def _failed(self, seq: Sequence, error: Exception) -> EngineError:
        seq.done = seq.failed = True
        if isinstance(error, EngineError):
            return error
        log.error("a request of %d tokens failed", len(seq.tokens), exc_info=error)
        return StepFailed("the model failed on this request; try again")

    def _retire(self) -> None:
        """Remove sequences that are done, cancelled or too late, and free their rows."""
        everyone = [*self.running, *self.waiting]
        oldest = time.monotonic() - self.timeout
        late = [seq for seq in everyone if seq.arrived < oldest and not seq.done]
        for seq in late:
            seq.done = seq.failed = True
        reason = f"the request took longer than {self.timeout:g} seconds"
        self._send([(seq, TimedOut(reason)) for seq in late])
        # Read `done` once: the event loop may set it at any moment.
        gone = {seq for seq in everyone if seq.done} - {seq for seq, _ in self._unsent}
        for seq in [seq for seq in everyone if seq in gone]:
            if seq.room:
                self._release(seq)
                self._ended.append(time.monotonic())
            self.on_end(seq)
        self.running = [seq for seq in self.running if seq not in gone]
        self.waiting = deque(seq for seq in self.waiting if seq not in gone)

    def _evict(self, span: Span) -> None:
        self.prefixes.remove(span)
        self.allocator.release(span.start, span.room)

    def _release(self, seq: Sequence) -> None:
        """Free a sequence's rows, except for those kept as a cached prefix."""
        count = seq.num_cached if self.reuse and seq.num_cached >= MIN_PREFIX else 0
        if count:
            self.prefixes.append(Span(seq.tokens[:count], seq.start, count, count))
        if len(self.prefixes) > MAX_PREFIXES:
            self._evict(self.prefixes[0])
        if seq.room > count:
            self.allocator.release(seq.start + count, seq.room - count)
        seq.room = seq.num_cached = 0

    def _send(self, items: list[tuple[Sequence, Delta | EngineError]]) -> None:
        """Put items into their requests' outboxes, with one call per event loop for all."""
        for loop, group in groupby(items, key=lambda item: item[0].loop):
            said = [(s, d) for s, d in group if isinstance(d, EngineError) or not d.silent]
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(deliver, said)

    def _dead(self) -> EngineStopped:
        if isinstance(self.failure, EngineStopped):
            return self.failure
        return EngineStopped(f"the engine died ({self.failure!r}); restart the server")


async def heartbeat(outbox: "asyncio.Queue[Delta | EngineError]") -> None:
    """Put an empty Delta into the outbox now and then, until cancelled."""
    while True:
        await asyncio.sleep(HEARTBEAT)
        outbox.put_nowait(Delta(""))


def deliver(items: list[tuple[Sequence, Delta | EngineError]]) -> None:
    for seq, item in items:
        seq.outbox.put_nowait(item)
