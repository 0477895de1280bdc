"""Models whose layers keep a state: a batch says what each says alone, from the cache too."""

import asyncio
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.runner.runner import Runner
from engine.sampling_params import SamplingParams
from tests.conftest import byte_tokenizer, chat_model, wait_for
from tests.engine.states import alone, check_slots, engine_for, plain_model, prepared, texts, tokens

KINDS = ["qwen3_5_text", "lfm2", "falcon_h1", "mamba", "zaya"]


def said(kind: str, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    return [alone(kind, tuple(prompt), count) for prompt in prompts]


async def together(engine, prompts, count: int = 12) -> list[list[int]]:
    answers = await asyncio.gather(*(tokens(engine, prompt, count) for prompt in prompts))
    return [each[0][0] for each in answers]


@pytest.fixture
def engine(request):
    made = engine_for(request.param)
    yield made
    wait_for(lambda: not made.num_running)
    check_slots(made)
    made.close()


@pytest.mark.parametrize(("engine", "kind"), [(kind, kind) for kind in KINDS], indirect=["engine"])
def test_batched_equals_single(engine, kind):
    """Together, in chunks, from the cache, n times, and in the turn after."""
    *own, base, tail, turn = texts(3, 50, 1, 17, 90, 33, 16, 70, 4, 20)
    prompts = [*own, [*base, 9, 8, 7], [*base, *tail]]
    expected = said(kind, prompts)
    assert asyncio.run(together(engine, prompts)) == expected
    again = [asyncio.run(tokens(engine, prompt)) for prompt in prompts]
    assert [answers[0] for answers, _ in again] == expected
    assert [cached for _, cached in again] == [48, 0, 16, 80, 32, 0, 64, 64]
    assert asyncio.run(tokens(engine, prompts[0], n=3))[0] == [expected[0]] * 3
    longer = [*prompts[3], *expected[3], *turn]
    assert asyncio.run(tokens(engine, longer)) == (said(kind, [longer]), 101)
    shorter = [*prompts[3][:85], *turn]
    assert asyncio.run(tokens(engine, shorter)) == (said(kind, [shorter]), 80)


@pytest.mark.parametrize("engine", ["lfm2"], indirect=True)
def test_failed_steps_change_no_answer(engine):
    """They were computed, and then lost; states are as they were before."""
    forward, chance = engine.runner.forward, random.Random(0)
    prompts = texts(4, 50, 40, 13, 61)

    def failing(work):
        logits = forward(work)
        if len(work) > 1 and chance.random() < 0.5:
            raise RuntimeError("lost")
        return logits

    engine.runner.forward = failing
    assert asyncio.run(together(engine, prompts)) == said("lfm2", prompts)


@pytest.mark.parametrize("engine", ["qwen3_5_text"], indirect=True)
def test_nan_in_a_state_reaches_nobody(engine):
    """It costs one answer; asked again it is right, as nothing of it was kept."""
    prompts = texts(5, 40, 44, 30)
    pool, forward, spoilt = engine.cache.states.pool, engine.runner.forward, []

    def spoiling(work):
        for span, _ in work:
            if span.tokens[:40] == prompts[0] and span.num_computed_tokens and not spoilt:
                spoilt.append(span.states[span.num_computed_tokens])
                for tensor in pool.tensors.values():
                    tensor[spoilt[0]] = torch.nan
        return forward(work)

    async def ask():
        asked = (tokens(engine, prompt) for prompt in prompts)
        return await asyncio.gather(*asked, return_exceptions=True)

    engine.runner.forward = spoiling
    first, *others = asyncio.run(ask())
    assert spoilt
    assert isinstance(first, EngineError)
    assert [answers[0] for answers, _ in others] == said("qwen3_5_text", prompts[1:])
    assert asyncio.run(together(engine, prompts)) == said("qwen3_5_text", prompts)


@pytest.mark.parametrize("engine", ["lfm2"], indirect=True)
def test_client_that_leaves_loses_no_slot(engine):
    prompts = texts(6, 40, 50, 20)

    async def leave(prompt):
        stream = engine.stream(prompt, SamplingParams(60, temperature=0.0, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()

    async def ask():
        return await asyncio.gather(
            leave(prompts[0]), tokens(engine, prompts[1]), leave(prompts[2])
        )

    assert asyncio.run(ask())[1][0] == said("lfm2", prompts[1:2])


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from([5, 7, 9, 13, 40]),
    rows=st.sampled_from([180, 260, 600]),
    chunk=st.sampled_from([7, 24, 64]),
    batch=st.sampled_from([1, 3, 6]),
    reuse=st.booleans(),
)
def test_random_engines_say_what_generate_does(seed, slots, rows, chunk, batch, reuse):
    """Few slots and rows, steps that fail, several answers, spans that move."""
    chance = random.Random(seed)  # asked in an order that time decides
    engine = engine_for("lfm2", rows, slots, prefill_chunk=chunk, max_batch=batch, reuse=reuse)
    forward = engine.runner.forward

    def failing(work):
        logits = forward(work)
        if len(work) > 1 and chance.random() < 0.15:
            raise RuntimeError("lost")
        return logits

    engine.runner.forward = failing
    base, *tails = texts(chance.randrange(3), 48, 3, 19, 33)
    prompts = [*tails, *([*base, *tail] for tail in tails)]

    async def ask(prompt):
        await asyncio.sleep(chance.random() * 0.02)
        count, n = chance.choice([1, 5, 12]), chance.choice([1, 1, 2])
        answers, _ = await tokens(engine, prompt, count, n, open_ended=chance.random() < 0.5)
        assert answers == said("lfm2", [prompt], count) * n

    async def ask_all():
        await asyncio.gather(*map(ask, prompts))

    try:
        asyncio.run(ask_all())
        wait_for(lambda: not engine.num_running)
        check_slots(engine)
    finally:
        engine.close()


def test_tiny_engine_runs_fewer_at_once():
    engine = engine_for("lfm2", slots=9)
    engine.close()
    assert engine.scheduler.max_batch == 4


def test_mixers_are_found():
    """Zaya's states are inside of attention, Falcon-H1 has both in each layer."""
    found = {kind: len(prepared(kind).state_modules) for kind in KINDS}
    assert found == {"qwen3_5_text": 2, "lfm2": 2, "falcon_h1": 4, "mamba": 4, "zaya": 4}
    attending = {kind: len(prepared(kind).attention_layers) for kind in KINDS}
    assert attending == {"qwen3_5_text": 2, "lfm2": 2, "falcon_h1": 4, "mamba": 0, "zaya": 4}
    assert plain_model("mamba").config.model_type == "mamba"


THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def test_every_second_turn_hits():
    """Whatever the length of the first, though the template leaves out what the answer thought."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    model = chat_model(Runner(prepared("lfm2"), 1200, 77), tokenizer, context_length=256)

    async def ask(messages):
        prompt = model.prepare(messages, {"max_new_tokens": 6, "temperature": 0.0})
        deltas = [delta async for delta in model.answer(prompt)]
        return len(prompt.ids), deltas[-1].cached_tokens

    async def turns(length):
        first = [{"role": "user", "content": "x" * length}]
        tokens, _ = await ask(first)
        answered = {"role": "assistant", "content": "<think>hm</think>so"}
        _, cached = await ask([*first, answered, {"role": "user", "content": "and?"}])
        return cached - tokens

    try:
        # All of the first prompt but its last eight tokens, <|assistant|><think>.
        assert [asyncio.run(turns(n)) for n in range(30, 46)] == [-8] * 16
        assert model.state_slots == 77
        assert 16 < model.state_slots_used < 77
    finally:
        model.close()
