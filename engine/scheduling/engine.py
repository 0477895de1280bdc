"""One thread owns the model and computes step after step; it knows token ids only.

A request is one or more answers in it, first waiting, then running. Their tokens go once a step to
the event loop of who asked, where `stream` makes text of them: on a card, while it computes on.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

from engine.errors import ContextTooLong, EngineError, EngineStopped, QueueFull, TimedOut
from engine.runner.runner import Runner
from engine.sampling_params import SamplingParams
from engine.scheduling.draft_source import DraftSource
from engine.scheduling.kv_cache import SpanCache
from engine.scheduling.output import (
    Item,
    Outbox,
    OutputProcessor,
    StreamedSequence,
    deliver,
    heartbeat,
)
from engine.scheduling.scheduler import Scheduler, sizes_of
from engine.scheduling.speculation import Drafts, Speculation
from engine.scheduling.stepper import Stepper
from engine.sequence import Delta, KVSpan, Prompt

log = logging.getLogger("chat")

# The last tokens of a text to continue, by which its continuation is decoded.
_CONTEXT = 8


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
        prefill_chunk: int = 512,
        costs: Mapping[int, float] | None = None,
        speculation: Speculation | None = None,
        timeout: float = 600.0,
        reuse: bool = True,
    ):
        self.runner, self.tokenizer, self.end_ids = runner, tokenizer, frozenset(end_ids)
        self.max_waiting, self.timeout = max_waiting, timeout
        self.cache = SpanCache(runner.rows, self._copy_rows, reuse, runner.states)
        if runner.states:
            max_batch = min(max_batch, runner.states.most_sequences)
        self.speculation = speculation
        self.scheduler: Scheduler[StreamedSequence] = Scheduler(
            self.cache, max_batch, prefill_chunk, costs, speculation
        )
        self.stepper = Stepper(runner, self.scheduler)
        self.failure: BaseException | None = None
        self.expected_step = 0.0  # seconds that the current step is likely to take
        self.last_step = time.monotonic()  # when the last step ended, or work came after idleness
        self._inbox: queue.SimpleQueue[StreamedSequence | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What is called on the event loop.

    def stream(
        self, ids: list[int], params: SamplingParams, n: int = 1, **options: Any
    ) -> AsyncGenerator[Delta]:
        """The answers to a single prompt, see `stream_all`; `options` are fields of Prompt."""
        return self.stream_all([Prompt(ids, params, **options)], n)

    async def stream_all(
        self, prompts: list[Prompt], n: int = 1, *, arrived: float | None = None
    ) -> AsyncGenerator[Delta]:
        """Yield n answers to each prompt, interleaved piece by piece; leaving the loop cancels.

        Those to the first prompt have the first n indices, and so on. `arrived`, by
        time.monotonic(), is when the request's time began, if not now. Raises ContextTooLong,
        QueueFull, EngineStopped, TimedOut, or StepFailed.
        """
        self.check_queue(len(prompts) * n)
        outbox = Outbox()
        deadline = self.timeout + (time.monotonic() if arrived is None else arrived)
        each = [(prompt, number) for prompt in prompts for number in range(n)]
        answers = [self._answer(*pair, index, outbox, deadline) for index, pair in enumerate(each)]
        contexts = [prompt.ids[-_CONTEXT:] if prompt.continues else [] for prompt, _ in each]
        texts = [
            OutputProcessor(
                answer, self.tokenizer, context, prompt.shown_special_ids, prompt.thoughts
            )
            for answer, context, (prompt, _) in zip(answers, contexts, each, strict=True)
        ]
        self._submit(answers)
        beating = asyncio.create_task(heartbeat(outbox))
        try:
            while not all(text.ended for text in texts):
                item = await outbox.queue.get()
                if isinstance(item, EngineError):
                    raise item
                delta = texts[item.answer.index].take(item) if item else Delta("")
                if delta:
                    yield delta
        finally:
            beating.cancel()
            for answer in answers:
                answer.done = True

    def check_queue(self, more: int = 1) -> None:
        """Raise QueueFull if no more answers may wait, with the time until the queue is half empty.

        Where nobody else waits, they may however many they are. Raises EngineStopped if the engine
        is dead.
        """
        if self.failure:
            raise self._stopped()
        waiting = self.num_waiting
        if waiting and waiting + more > self.max_waiting:
            seconds = self.scheduler.seconds_to_serve(waiting // 2)
            message = f"{waiting} requests are waiting; try again in {seconds} seconds"
            raise QueueFull(message, seconds)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + self._inbox.qsize()

    def close(self) -> None:
        """Stop the thread after its current step; those who still generate get EngineStopped."""
        self._inbox.put(None)
        self._thread.join()

    def _answer(
        self, prompt: Prompt, number: int, index: int, outbox: Outbox, deadline: float
    ) -> StreamedSequence:
        """The answer of this number to a prompt, and of this index in its request."""
        params = prompt.params
        if params.seed is not None:  # each of n answers has its own, or all would be the same
            params = replace(params, seed=params.seed + number)
        ends = frozenset() if params.ignore_eos else self.end_ids | prompt.own_ends
        tokens = list(prompt.ids)
        source = DraftSource(tokens, prompt.prediction) if self.speculation else None
        return StreamedSequence(
            tokens,
            params=params,
            request=outbox,
            end_ids=ends.union(params.stop_token_ids),
            guide=prompt.guide.copy() if prompt.guide else None,
            budget=prompt.budget.copy() if prompt.budget else None,
            adapter=prompt.adapter,
            open_ended=prompt.open_ended,
            num_stable=prompt.num_stable,
            drafts=Drafts(source) if source else None,
            outbox=outbox,
            index=index,
            deadline=deadline,
        )

    def _submit(self, answers: list[StreamedSequence]) -> None:
        most = max(answer.max_tokens for answer in answers)
        if most > self.cache.rows:
            raise ContextTooLong(
                f"prompt and answer of {most} tokens do not fit in the KV cache of"
                f" {self.cache.rows}; ask for a shorter answer"
            )
        for answer in answers:
            self._inbox.put(answer)
        if self.failure:
            raise self._stopped()

    # What the thread does.

    def _run(self) -> None:
        try:
            while self._receive():
                self._advance()
        except BaseException as failure:
            log.exception("the engine died")
            self.failure = failure
        self.failure = self.failure or EngineStopped("the server is stopping")
        while not self._inbox.empty():
            if answer := self._inbox.get():
                self.scheduler.waiting.append(answer)
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        self._send([(answer, self._stopped()) for answer in everyone])

    def _receive(self) -> bool:
        """Move new answers from the inbox to the queue, waiting if idle; False to stop."""
        scheduler = self.scheduler
        while not (scheduler.running or scheduler.waiting) or not self._inbox.empty():
            answer = self._inbox.get()
            if answer is None:
                return False
            if not (scheduler.running or scheduler.waiting):
                self.last_step = time.monotonic()
            scheduler.waiting.append(answer)
        return True

    def _advance(self) -> None:
        """Compute a step with those for whom there is room, and send what it brought."""
        self.scheduler.admit()
        items = self._step()
        self.last_step = time.monotonic()
        items += self._end_late_ones()
        self.scheduler.remove_finished()
        # Last, so that whoever is told of an answer's end finds its place free.
        self._send(items)

    def _step(self) -> list[Item]:
        """Compute the next step; returns what it brought."""
        self.scheduler.grow_or_preempt()
        work = self.scheduler.plan()
        sizes = sizes_of(work)
        began = time.monotonic()
        self.expected_step = self.scheduler.expected(sizes)
        items = self.stepper.compute(work)
        self.scheduler.note(sizes, time.monotonic() - began)
        return items

    def _end_late_ones(self) -> list[Item]:
        """Give up the sequences that have taken longer than the timeout; returns their errors."""
        now = time.monotonic()
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        late = [seq for seq in everyone if seq.deadline < now and not seq.done]
        for seq in late:
            seq.done = True
        why = f"the request took longer than {self.timeout:g} seconds"
        # One each: whoever raises an exception adds to its traceback.
        return [(seq, TimedOut(why)) for seq in late]

    def _copy_rows(self, source: KVSpan, start: int, count: int) -> bool:
        """Copy a span's first rows; False if that failed and they must be recomputed."""
        try:
            self.runner.copy(source, start, count)
        except Exception:
            log.exception("%d rows could not be copied", count)
            self.runner.check_device()
            return False
        return True

    def _send(self, items: Iterable[Item]) -> None:
        """Put items into their requests' outboxes, with one call per event loop for all."""
        for loop, group in groupby(items, key=lambda item: item[0].outbox.loop):
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(deliver, list(group))

    def _stopped(self) -> EngineStopped:
        if isinstance(self.failure, EngineStopped):
            return EngineStopped(*self.failure.args)
        return EngineStopped("the engine has failed, its log says why; restart the server")
