"""A batch says what each says alone: the property that makes continuous batching trustworthy."""

import asyncio
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import StepFailed
from engine.model import ChatModel
from engine.runner.create import create_runner
from engine.sampling_params import SamplingParams
from engine.scheduling.detokenizer import Detokenizer
from engine.scheduling.engine import Engine
from engine.scheduling.sampler import draw_ranked
from engine.sequence import KVSpan, Sequence
from tests.conftest import reply, tiny_llama, wait_for, whole_of
from tests.engine.alone import FAMILIES, alone, needs_kernels
from tests.engine.stand_ins import as_on_a_card


class Told(Detokenizer):
    """Text that is the ids themselves, so that tests compare tokens."""

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


async def tokens(engine: Engine, prompt: list[int], count: int, **options) -> list[int]:
    sampling = SamplingParams(count, temperature=0)
    deltas = [d async for d in engine.stream(prompt, sampling, **options)]
    assert engine.cache.reuse or not deltas[-1].cached_tokens
    return [int(token) for token in "".join(d.text for d in deltas).split()]


asks = st.lists(
    st.tuples(
        st.integers(0, 100),  # which prompt
        st.integers(1, 24),  # how many tokens
        st.integers(0, 3),  # event-loop turns before the next one arrives
        st.booleans(),  # whether its length is open
    ),
    min_size=1,
    max_size=9,
)


batches = given(
    asks=asks,
    chunk=st.integers(1, 40),
    rows=st.integers(160, 600),
    batch=st.integers(1, 6),
    reuse=st.booleans(),
    backend=st.sampled_from(["sliced", "copied", "in place"]),
)
unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
fixtures_once = {"suppress_health_check": unhealthy}


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
@settings(max_examples=16, **fixtures_once)
@batches
def test_a_batch_says_what_each_says_alone(monkeypatch, name, **batch):
    """Staggered arrivals, mixed lengths, chunks, tiny budgets, spans that move and are reused.

    A third of them as a card would do it: in place, and single tokens as CUDA graphs.
    """
    check_batch(monkeypatch, name, **batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"llama", "deepseek_v2"}))
@settings(max_examples=3, **fixtures_once)
@batches
def test_a_batch_of_renamed_llama_says_what_each_says_alone(monkeypatch, name, **batch):
    check_batch(monkeypatch, name, **batch)


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param("our kernels", marks=needs_kernels), "fp16 weights"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
@settings(max_examples=8, **fixtures_once)
@batches
def test_a_batch_says_what_each_says_alone_in_few_bits(monkeypatch, name, form, **batch):
    """Where the CPU's products are our kernels' or FBGEMM's, whose sums are float32."""
    check_batch(monkeypatch, name, form=form, **batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
@settings(max_examples=4, **fixtures_once)
@batches
def test_a_batch_says_what_each_says_alone_in_8_bits(monkeypatch, name, **batch):
    """Where weights are unpacked for sums in float32."""
    check_batch(monkeypatch, name, quantize="8bit", **batch)


def check_batch(
    monkeypatch, name, asks, chunk, rows, batch, reuse, backend, form="as it is", quantize="none"
) -> None:
    family = alone(name, form, quantize)
    assert family.on_cards.backend == "in place"
    as_on_a_card(monkeypatch)
    monkeypatch.setattr("engine.scheduling.output.Detokenizer", Told)
    monkeypatch.setattr("engine.sequence.DECODE_RESERVE", 5)
    monkeypatch.setattr("engine.scheduling.prefix_index.BLOCK", 2)
    runner = family.on_cards if backend == "in place" else family.runner
    runner.backend = backend
    if backend == "in place" and not runner.graphs:
        runner.capture_graphs(6, 200)
        assert [r.size for r in runner.graphs] == [1, 2, 4, 6]
    runner.pool.rows, whole = rows, runner.pool.rows
    engine = Engine(runner, None, set(), max_batch=batch, prefill_chunk=chunk, reuse=reuse)
    runner.pool.rows = whole

    async def ask_all():
        tasks, expected = [], []
        for which, count, pause, open_ended in asks:
            prompt = family.prompts[which % len(family.prompts)]
            answer = family.answers[which % len(family.prompts)][:count]
            expected.append(answer)
            ask = tokens(engine, prompt, len(answer), open_ended=open_ended)
            tasks.append(asyncio.create_task(ask))
            for _ in range(pause):
                await asyncio.sleep(0.002)
        return await asyncio.gather(*tasks), expected

    try:
        answers, expected = asyncio.run(ask_all())
        assert answers == expected
        wait_for(lambda: not engine.scheduler.running)
        assert whole_of(engine) == rows
    finally:
        engine.close()


def test_reading_a_neighbours_rows_changes_the_logits():
    """The property above would fail if a sequence read its neighbour's rows."""
    family = alone("llama")
    one, other = KVSpan(family.prompts[4], start=0), KVSpan(family.prompts[5], start=100)
    right = family.runner.forward([(one, 17), (other, 31)])
    one.num_computed_tokens = other.num_computed_tokens = 10
    one.start = 100
    assert not torch.allclose(family.runner.forward([(one, 7)])[0], right[0], atol=1e-2)


def test_seeded_answer_does_not_depend_on_the_batch(make):
    family = alone("llama")
    model = make(family.runner)
    how = SamplingParams(20, temperature=1.5, top_k=0, top_p=0.95, seed=5)

    async def crowd(others: int):
        jobs = [reply(model, p, SamplingParams(24, 2.0)) for p in family.prompts[:others]]
        return (await asyncio.gather(reply(model, [9, 8, 7], how), *jobs))[0][0]

    once, again = asyncio.run(crowd(0)), asyncio.run(crowd(6))
    assert once == again
    assert asyncio.run(reply(model, [9, 8, 7], SamplingParams(20, 1.5, 0, 0.95, seed=6)))[0] != once


def test_seeded_answer_does_not_depend_on_a_neighbours_failure(make):
    family = alone("llama")
    how = SamplingParams(20, temperature=1.5, top_k=0, top_p=0.95, seed=5)

    async def crowd(fault: bool) -> str:
        model = make(family.runner)
        asked = asyncio.create_task(reply(model, [9, 8, 7], how))
        await asyncio.sleep(0)
        other = asyncio.create_task(reply(model, [1, 2, 3], replace(how, seed=6)))
        with pytest.MonkeyPatch.context() as patch:
            if fault:  # in the middle of the answer, where both are sampled together
                patch.setattr(
                    "engine.scheduling.sampler.draw_ranked", failing_beside(5, draw_ranked)
                )
                with pytest.raises(StepFailed):
                    await other
            return (await asked)[0]

    assert asyncio.run(crowd(True)) == asyncio.run(crowd(False))


def failing_beside(seed: int, draw):
    """Fails, once the seeded answer has begun, for whoever else is sampled."""

    def drawn(seqs: list[Sequence], *given: object, **named: object) -> object:
        if any(seq.params.seed != seed and seq.num_completion > 2 for seq in seqs):
            raise RuntimeError("a fault of the sampler")
        return draw(seqs, *given, **named)

    return drawn


def talk(model: ChatModel, turns: int) -> list[str]:
    """The answers of a conversation, each turn's history holding those before."""
    answers, messages = [], []

    async def turn() -> str:
        prompt = model.prepare(messages, {"max_new_tokens": 8, "temperature": 0.0}, False)
        return "".join([delta.text async for delta in model.answer(prompt)])

    for number in range(turns):
        messages.append({"role": "user", "content": f"{number} more words" * 9})
        answers.append(asyncio.run(turn()))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_tenth_turn_reuses_the_first_nine(make):
    """The same answers, for a small part of the prompts' tokens."""
    computed: dict[bool, int] = {True: 0, False: 0}
    answers = {}
    llama = tiny_llama(max_position_embeddings=4096)
    for reuse in (True, False):
        runner = create_runner(llama, "64MiB", 4096)
        right = runner.forward

        def counted(work, right=right, reuse=reuse):
            computed[reuse] += sum(new for _, new in work)
            return right(work)

        runner.forward = counted
        answers[reuse] = talk(make(runner, context_length=4096, reuse=reuse), 10)
    assert answers[True] == answers[False]
    assert computed[False] > 4 * computed[True]
