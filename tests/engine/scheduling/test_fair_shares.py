"""What one request of many long prompts leaves to the others."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import QueueFull
from engine.sampling_params import SamplingParams
from engine.scheduling.kv_cache import SpanCache
from engine.scheduling.scheduler import Scheduler, fair_shares
from engine.sequence import Prompt, Sequence
from tests.conftest import ScriptedRunner, reply


def scheduler_of(max_batch: int = 64, chunk: int = 512) -> Scheduler[Sequence]:
    cache = SpanCache(10**6, copy_rows=lambda source, start, count: True, reuse=False)
    return Scheduler(cache, max_batch, chunk)


def add(scheduler: Scheduler[Sequence], request: str, sizes: list[int], answer: int = 8) -> None:
    """Let a request of so many prompts, of these sizes, wait."""
    params = SamplingParams(answer)
    scheduler.waiting += [Sequence([1] * n, params=params, request=request) for n in sizes]


def tokens_of(work: list[tuple[Sequence, int]]) -> dict[str, int]:
    """How many tokens of a step each request has."""
    return {
        request: sum(new for seq, new in work if seq.request == request)
        for request in {seq.request: None for seq, _ in work}
    }


@given(st.integers(1, 600), st.dictionaries(st.integers(0, 99), st.integers(1, 5000), max_size=70))
def test_shares_leave_nothing_and_nobody_out(total, wanted):
    shares = fair_shares(total, wanted)
    assert shares.keys() == wanted.keys()
    assert sum(shares.values()) == min(total, sum(wanted.values()))
    least = total // 2 // max(1, len(wanted))
    assert all(min(least, wanted[who]) <= share <= wanted[who] for who, share in shares.items())


@pytest.mark.parametrize("prompts", [1, 8, 40])
def test_step_is_divided_among_requests_not_prompts(prompts):
    scheduler = scheduler_of()
    add(scheduler, "long", [2000] * prompts)
    add(scheduler, "honest", [300])
    add(scheduler, "second", [300])
    scheduler.admit()
    work = scheduler.plan()
    assert tokens_of(work) == {"long": 85, "honest": 300, "second": 127}
    assert [new for _, new in work] == [85, 300, 127], "of a request its first prompt goes on"
    scheduler.advance(work, {})
    assert tokens_of(scheduler.plan()) == {"long": 339, "honest": 1, "second": 173}


def test_scored_prompts_leave_the_rest_of_a_step_to_others():
    scheduler = scheduler_of()
    params = SamplingParams(1, prompt_logprobs=1)
    scheduler.waiting.append(Sequence([1] * 1000, params=params, request="scored"))
    add(scheduler, "plain", [1000])
    scheduler.admit()
    assert tokens_of(scheduler.plan()) == {"scored": 128, "plain": 384}


def test_one_request_never_holds_all_places():
    scheduler = scheduler_of(max_batch=16)
    add(scheduler, "many", [10] * 100)
    scheduler.admit()
    assert len(scheduler.running) == 14
    add(scheduler, "honest", [10])
    scheduler.admit()
    assert len(scheduler.running) == 15
    assert scheduler.running[-1].request == "honest"


def test_next_place_goes_to_who_has_fewest():
    scheduler = scheduler_of(max_batch=4)
    add(scheduler, "a", [10] * 6)
    scheduler.admit()
    add(scheduler, "b", [10] * 2)
    add(scheduler, "c", [10])
    for ended, follows in ((0, "b"), (0, "c"), (0, "a")):
        scheduler.running[ended].done = True
        scheduler.remove_finished()
        scheduler.admit()
        assert scheduler.running[-1].request == follows
    assert [seq.request for seq in scheduler.running] == ["a", "b", "c", "a"]


def test_answers_count_in_the_queue_not_requests(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    runner.hold()
    model = make(runner, max_batch=1, max_waiting=100)

    async def main() -> None:
        large = [Prompt([1], SamplingParams(1))] * 128
        first = model.answer_all(large)
        served = asyncio.create_task(anext(first))
        await asyncio.sleep(0)  # in which it asks: alone, it is served however large it is
        with pytest.raises(QueueFull):
            await anext(model.answer_all(large[:1]))
        runner.free()
        await served
        await first.aclose()

    asyncio.run(main())


def test_short_request_is_answered_beside_many_long_prompts(make, tokenizer):
    """It takes its own steps and few more, not those of the 64 prompts before it."""
    runner = ScriptedRunner(tokenizer, "x" * 9, rows=200_000)
    model = make(runner, prefill_chunk=64, context_length=2048)

    async def main() -> int:
        long = [Prompt([1] * 2000, SamplingParams(1)) for _ in range(64)]
        stream = model.answer_all(long)
        crowd = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)  # in which it asks
        before = len(runner.steps)
        await reply(model, [2] * 20, SamplingParams(4))
        taken = len(runner.steps) - before
        crowd.cancel()
        await asyncio.gather(crowd, return_exceptions=True)
        await stream.aclose()
        return taken

    assert asyncio.run(main()) < 20
