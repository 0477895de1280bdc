"""Who is computed, and who waits."""

import asyncio
import random
import threading
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer

from engine.errors import ContextTooLong, QueueFull, TimedOut
from engine.sampling_params import SamplingParams
from engine.scheduling.engine import Engine
from engine.scheduling.kv_cache import SpanCache
from engine.scheduling.output import Event, StreamedSequence
from engine.scheduling.scheduler import Scheduler
from tests.conftest import GREEDY, ScriptedRunner, reply, sequence, wait_for, whole_of


class EngineByHand(Engine):
    """Without a thread, so that a test takes its steps, and with an outbox for what it sends."""

    def __init__(self, runner: ScriptedRunner, tokenizer: Tokenizer, **options: object):
        with patch.object(threading.Thread, "start"):
            super().__init__(runner, tokenizer, {256}, **options)
        self.sent: list[tuple[StreamedSequence, object]] = []

    def _send(self, items) -> None:
        self.sent += items

    def ask(
        self, prompt: list[int], params: SamplingParams = GREEDY, **options: float
    ) -> StreamedSequence:
        answer = StreamedSequence(
            prompt, params=params, end_ids=frozenset({256}), outbox=None, **options
        )
        self._inbox.put(answer)
        return answer

    def step(self) -> None:
        self._receive()
        self._advance()


@pytest.mark.slow
def test_no_rows_are_lost_whatever_becomes_of_requests(tokenizer, monkeypatch):
    """Add, step, cancel, finish, move and fail at random, 10,000 operations in all."""
    monkeypatch.setattr("engine.sequence.DECODE_RESERVE", 3)
    chance = random.Random(1)
    runner = ScriptedRunner(tokenizer, "x" * 30, rows=300)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer, max_batch=6, prefill_chunk=16)
    scheduler = engine.scheduler
    live: list[StreamedSequence] = []
    for _ in range(10_000):
        chosen = chance.random()
        if chosen < 0.3 and engine.num_waiting < 10:
            prompt = [1] * chance.randint(0, 40) + chance.choices((1, 2), k=chance.randint(1, 20))
            params = SamplingParams(chance.randint(1, 40))
            live.append(engine.ask(prompt, params, open_ended=chance.random() < 0.5))
        elif chosen < 0.4 and live:
            live.pop(chance.randrange(len(live))).done = True
        else:
            runner.failure = RuntimeError("a fault") if chosen > 0.97 else None
            runner.poison = live[-1].tokens[: live[-1].num_prompt] if live else None
            if engine.num_waiting or scheduler.running:
                engine.step()
        assert sum(seq.room for seq in scheduler.running) + whole_of(engine) == 300
        indexed = {*engine.cache.computed.num_blocks} - {*engine.cache.kept}
        assert indexed <= {*scheduler.running}
        assert {*engine.cache.prefilling.num_blocks} <= {*scheduler.running}
    assert runner.moved > 100
    for seq in live:
        seq.done = True
    live.append(engine.ask([1]))
    live[-1].done = True
    engine.step()
    assert whole_of(engine) == 300
    assert sum(seq.num_reused for seq, _ in engine.sent) > 100


def test_client_that_leaves_during_retire_loses_no_rows(tokenizer):
    """`done` is set by the event loop at any moment, so it may be looked at only once."""
    runner = ScriptedRunner(tokenizer, rows=100)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer, reuse=False)
    seqs = [engine.ask([1]) for _ in range(3)]
    engine._receive()
    engine.scheduler.admit()
    seqs[0].done = True
    release = engine.cache.release
    with patch.object(
        engine.cache, "release", lambda seq: setattr(seqs[2], "done", True) or release(seq)
    ):
        engine.scheduler.remove_finished()
    assert engine.scheduler.running == seqs[1:]
    seqs[1].done = True
    engine.scheduler.remove_finished()
    assert engine.cache.allocator.gaps == [(0, 100)]


def test_answer_that_is_through_is_not_late(tokenizer):
    runner = ScriptedRunner(tokenizer, rows=100)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer, reuse=False)
    engine.ask([1], replace(GREEDY, max_new_tokens=1), deadline=0.0)
    engine.step()
    ((_, event),) = engine.sent
    assert event.finish_reason == "length"
    assert engine.cache.allocator.gaps == [(0, 100)]


def test_waiting_request_times_out(tokenizer):
    runner = ScriptedRunner(tokenizer)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer, max_batch=1)
    first, second = engine.ask([1]), engine.ask([2], deadline=0.0)
    engine.step()
    assert [(answer, type(item)) for answer, item in engine.sent] == [
        (first, Event),
        (second, TimedOut),
    ]
    assert (engine.num_running, engine.num_waiting) == (1, 0)


def test_place_of_an_answer_is_free_when_its_end_is_told(tokenizer, monkeypatch):
    """Or as many clients as there are places, each asking again at once, would be refused some."""
    engine = EngineByHand(ScriptedRunner(tokenizer), tokenizer.backend_tokenizer)
    running = []
    monkeypatch.setattr(engine, "_send", lambda items: running.append(engine.num_running))
    engine.ask([1], replace(GREEDY, max_new_tokens=2))
    engine.step()
    engine.step()
    assert running == [1, 0]


def test_rows_that_a_readmitted_answer_finds_are_no_reuse(tokenizer):
    runner = ScriptedRunner(tokenizer, rows=200)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer)
    answer = engine.ask([1] * 40)
    engine.step()
    engine.cache.release(answer)
    engine.scheduler.running.remove(answer)
    engine.scheduler.waiting.append(answer)
    engine.scheduler.admit()
    assert (answer.num_computed_tokens, answer.num_reused) == (40, 0)


def test_prompt_waits_for_a_shared_prefix_in_prefill(make, tokenizer):
    """A class that asks at once with one long system text has it computed once."""
    runner = ScriptedRunner(tokenizer)
    model = make(runner, prefill_chunk=50)
    system = list(range(100, 220))

    async def main() -> None:
        runner.hold()
        jobs = [reply(model, [*system, n]) for n in range(5)]
        everyone = asyncio.gather(*jobs)
        await asyncio.to_thread(wait_for, lambda: model.engine.num_waiting == 4)
        runner.free()
        answers = await everyone
        assert {text for text, _ in answers} == {"hello"}
        assert sorted(last.cached_tokens for _, last in answers) == [0, 120, 120, 120, 120]

    asyncio.run(main())
    computed = sum(n for step in runner.steps for n in step)
    assert computed == 121 + 4 * 1 + 5 * 5


def test_prompt_waiting_for_a_prefix_blocks_nobody(make, tokenizer, monkeypatch):
    """As many as like: it needs no room, and will have what it waits for."""
    monkeypatch.setattr("engine.scheduling.scheduler.MAX_OVERTAKING", 2)
    runner = ScriptedRunner(tokenizer)
    model = make(runner, prefill_chunk=16)
    prompt = list(range(60, 260)) * 2

    async def main() -> None:
        runner.hold()
        asking = [asyncio.create_task(reply(model, [*prompt, n])) for n in range(2)]
        await asyncio.to_thread(wait_for, lambda: model.engine.num_waiting == 1)
        asking += [asyncio.create_task(reply(model, [n])) for n in range(5)]
        await asyncio.sleep(0)  # in which all of them ask
        runner.permits.release(2)
        await asyncio.to_thread(wait_for, lambda: len(model.engine.scheduler.running) == 6)
        assert len(model.engine.scheduler.waiting) == 1
        runner.free()
        await asyncio.gather(*asking)

    asyncio.run(main())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_prompt_waiting_for_a_prefix_goes_on_when_its_leader_leaves(tokenizer, steps):
    runner = ScriptedRunner(tokenizer)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer, prefill_chunk=16)
    prompt = list(range(100, 200))
    leader = engine.ask([*prompt, 1])
    engine.step()
    follower = engine.ask([*prompt, 2])
    for _ in range(steps):
        engine.step()
    assert follower.waiting_for is (leader if steps else None)
    leader.done = True
    for _ in range(20):
        if not follower.done:
            engine.step()
    assert follower.finish_reason == "stop"


@pytest.mark.parametrize("is_busy", [False, True])
def test_time_without_work_is_no_time_of_a_step(tokenizer, is_busy):
    """Or the first request after an idle night would find the server dead."""
    runner = ScriptedRunner(tokenizer)
    engine = EngineByHand(runner, tokenizer.backend_tokenizer)
    if is_busy:
        engine.ask([1])
        engine.step()
    engine.last_step -= 1000
    engine.ask([2])
    engine._receive()
    assert (time.monotonic() - engine.last_step > 900) is is_busy


def cache_of(rows: int) -> SpanCache:
    return SpanCache(rows, copy_rows=lambda source, start, count: True)


def test_blocked_size_is_not_searched_twice(monkeypatch):
    cache = cache_of(1000)
    cache.allocator.gaps = [(0, 400), (602, 398)]
    scheduler = Scheduler(cache)
    scheduler.running = [sequence([9] * 20)]
    tried = []
    place = cache.place
    monkeypatch.setattr(cache, "place", lambda seq: tried.append(seq.max_tokens) or place(seq))
    wanted = [500, 700, 500, 600, 300]
    for size in wanted:
        scheduler.waiting.append(sequence([1] * 10, max_new_tokens=size - 10))
    scheduler.admit()
    assert tried == [500, 300]
    assert [seq.max_tokens for seq in scheduler.running[1:]] == [300]
    assert [seq.max_tokens for seq in scheduler.waiting] == wanted[:4]


def test_sequences_that_share_a_prefix_are_admitted_when_it_is_computed():
    cache = cache_of(20_000)
    scheduler = Scheduler(cache)
    seqs = [sequence([5] * 2000 + [n], max_new_tokens=12) for n in range(5)]
    scheduler.waiting.extend(seqs)
    for _ in range(4):
        scheduler.admit()
        assert scheduler.running == seqs[:1]
        assert {seq.waiting_for for seq in seqs[1:]} == {seqs[0]}
        scheduler.advance([(seqs[0], 500)], {})
    scheduler.advance([(seqs[0], 1)], {})
    scheduler.admit()
    assert scheduler.running == seqs
    assert [seq.num_reused for seq in seqs] == [0, 2000, 2000, 2000, 2000]


def test_many_waiting_prompts_are_looked_up_by_few_hashes(monkeypatch):
    """Each of 250 waiting requests costs a step a few look-ups, however long the prompts are."""
    cache = cache_of(600_000)
    scheduler = Scheduler(cache, max_batch=300)
    chance = random.Random(0)
    system = [chance.randrange(1000) for _ in range(4000)]
    leader = sequence([1, *system], max_new_tokens=10)
    scheduler.waiting.append(leader)
    scheduler.admit()
    for n in range(250):
        scheduler.waiting.append(sequence([2, n, *system], max_new_tokens=600_000 - 4002))
    scheduler.admit()  # hashes each prompt once
    looked_up = []

    class Counted(dict):
        def __contains__(self, key: object) -> bool:
            looked_up.append(key)
            return super().__contains__(key)

    cache.computed.spans = Counted(cache.computed.spans)
    cache.prefilling.spans = Counted(cache.prefilling.spans)
    monkeypatch.setattr(
        "engine.scheduling.prefix_index.hash",
        lambda tokens: pytest.fail("hashed again"),
        raising=False,
    )
    scheduler.admit()
    assert len(scheduler.waiting) == 250
    assert len(looked_up) <= 250 * 2 * 8


def test_decode_goes_on_beside_a_long_prefill(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x" * 50)
    model = make(runner, prefill_chunk=16)

    async def both():
        runner.hold()
        runner.permits.release(4)
        first = asyncio.create_task(reply(model, [1], SamplingParams(50)))
        await asyncio.to_thread(wait_for, lambda: len(runner.steps) == 4)
        second = asyncio.create_task(reply(model, [2] * 160, SamplingParams(3)))
        await asyncio.sleep(0)  # in which it asks
        runner.free()
        await asyncio.gather(first, second)

    asyncio.run(both())
    chunked = [step for step in runner.steps if max(step) > 1]
    assert len(chunked) >= 10
    assert all(max(step) <= 16 and 1 in step for step in chunked)


def test_prompts_share_a_step_up_to_the_prefill_chunk(tokenizer):
    runner = ScriptedRunner(tokenizer, "x")
    engine = EngineByHand(runner, tokenizer.backend_tokenizer, prefill_chunk=12)
    answers = [engine.ask([i] * 8) for i in (1, 2, 3)]
    while not all(answer.done for answer in answers):
        engine.step()
    chunks = [[new for new in step if new > 1] for step in runner.steps]
    assert sum(map(sum, chunks)) == 24
    assert max(map(sum, chunks)) == 12
    assert chunks[0] == [8, 2, 2], (
        "half of it is divided evenly, the first is through with the rest"
    )


def test_small_requests_overtake_a_large_one_only_so_often(make, tokenizer, monkeypatch):
    """While one request holds most of the room, a large one waits; small ones pass, a few."""
    monkeypatch.setattr("engine.scheduling.scheduler.MAX_OVERTAKING", 3)
    runner = ScriptedRunner(tokenizer, "x" * 500, rows=200)
    model = make(runner, max_batch=8, context_length=200)
    order = []

    async def ask(name: str, prompt: int, most: int):
        await reply(model, [1] * prompt, SamplingParams(most))
        order.append(name)

    async def crowd():
        runner.hold()
        jobs = [asyncio.create_task(ask("holder", 50, 100))]
        await asyncio.to_thread(wait_for, lambda: model.engine.scheduler.running)
        jobs.append(asyncio.create_task(ask("large", 100, 20)))
        jobs += [asyncio.create_task(ask(f"small{i}", 5, 5)) for i in range(8)]
        await asyncio.sleep(0)  # in which all of them ask
        runner.free()
        await asyncio.gather(*jobs)

    asyncio.run(crowd())
    assert order[: order.index("holder")] == ["small0", "small1", "small2"]


def test_open_ended_answer_without_room_waits_and_goes_on(make, tokenizer, monkeypatch):
    monkeypatch.setattr("engine.sequence.DECODE_RESERVE", 10)
    runner = ScriptedRunner(tokenizer, "x" * 60, rows=120)
    model = make(runner)

    async def two():
        jobs = [reply(model, [i] * 20, SamplingParams(70), open_ended=True) for i in (1, 2)]
        return await asyncio.gather(*jobs)

    answers = asyncio.run(two())
    assert [text for text, _ in answers] == ["x" * 60] * 2
    assert any(step.count(1) < len(step) and max(step) > 20 for step in runner.steps), "it waited"


def test_request_larger_than_the_cache_is_refused(make, tokenizer):
    model = make(ScriptedRunner(tokenizer, rows=50))
    with pytest.raises(ContextTooLong, match="50"):
        asyncio.run(reply(model, [1] * 30, SamplingParams(21)))


def test_full_queue_is_refused_with_a_time_to_retry(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    runner.hold()
    model = make(runner, max_batch=1, max_waiting=2)

    async def crowd():
        jobs = [asyncio.create_task(reply(model, [1])) for _ in range(8)]
        await asyncio.sleep(0)  # in which all of them ask
        runner.free()
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(crowd())
    refused = [answer for answer in answers if isinstance(answer, QueueFull)]
    assert 5 <= len(refused) <= 6
    assert all(1 <= refusal.retry_after <= 60 for refusal in refused)
    assert sum(isinstance(answer, tuple) for answer in answers) == 8 - len(refused)
