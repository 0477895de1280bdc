"""The engine: what each request gets, whoever else is there."""

import asyncio
import threading

import pytest
import torch
from conftest import ScriptedRunner, chat_model, wait_for

import api


@pytest.fixture
def make(tokenizer):
    """Builds models and closes their engines afterwards."""
    made = []

    def build(runner: object, **options: int) -> api.ChatModel:
        made.append(chat_model(runner, tokenizer, **options))
        return made[-1]

    yield build
    for model in made:
        model.engine.close()


GREEDY = api.Sampling(max_new_tokens=12, temperature=0)


async def reply(model: api.ChatModel, prompt: list[int], sampling: api.Sampling = GREEDY):
    deltas = [delta async for delta in model.engine.stream(prompt, sampling)]
    return "".join(delta.text for delta in deltas), deltas[-1]


def generate(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def test_each_answer_is_what_generate_says(make, tiny_model):
    model = make(api.Runner(tiny_model))
    prompts = [[1, 2, 3], list(range(60)), [9] * 20]

    async def all_at_once():
        return await asyncio.gather(*(reply(model, prompt) for prompt in prompts))

    for prompt, (text, last) in zip(prompts, asyncio.run(all_at_once()), strict=True):
        ids = generate(tiny_model, prompt, 12)
        expected = api.Detokenizer(model.engine.tokenizer)
        assert text == "".join(map(expected.push, ids)) + expected.flush()
        assert last.usage == api.Usage(len(prompt), len(ids))
        assert last.finish_reason == "length"


def test_a_seed_gives_the_same_answer_again(make, tiny_model):
    model = make(api.Runner(tiny_model))
    once, again, other = (
        asyncio.run(reply(model, [1, 2, 3], api.Sampling(20, temperature=2.0, top_p=1, seed=seed)))
        for seed in (5, 5, 6)
    )
    assert once[0] == again[0] != other[0]


def test_an_end_token_ends_and_is_not_text(make, tokenizer):
    text, last = asyncio.run(reply(make(ScriptedRunner(tokenizer, "bye")), [1]))
    assert (text, last.finish_reason) == ("bye", "stop")
    assert last.usage == api.Usage(1, 4)


def test_leaving_early_cancels(make, tokenizer):
    model = make(ScriptedRunner(tokenizer, "x" * 100))

    async def leave():
        stream = model.engine.stream([1], api.Sampling(100))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    wait_for(lambda: not model.engine.running)
    assert model.engine.runner.steps < 100


def test_a_failed_step_costs_only_its_own_request(make, tokenizer):
    model = make(ScriptedRunner(tokenizer))
    model.engine.runner.failure = RuntimeError("a fault")
    with pytest.raises(api.StepFailed):
        asyncio.run(reply(model, [1]))
    model.engine.runner.failure = None
    assert asyncio.run(reply(model, [1]))[0] == "hello"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_fails_everyone_at_once(make, tokenizer):
    model = make(ScriptedRunner(tokenizer))
    model.engine.runner.failure = SystemExit("the end")
    with pytest.raises(api.NotServing, match="died"):
        asyncio.run(reply(model, [1]))
    with pytest.raises(api.NotServing, match="died"):
        asyncio.run(reply(model, [1]))
    assert isinstance(model.engine.failure, SystemExit)


def test_silence_brings_a_sign_of_life(make, runner, monkeypatch):
    monkeypatch.setattr(api, "HEARTBEAT", 0.05)
    model = make(runner)
    runner.hold()

    async def first():
        stream = model.engine.stream([1], GREEDY)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    assert asyncio.run(first()) == api.Delta("")
    runner.free()


def turns(*lengths: int) -> list[api.Message]:
    """A conversation whose turns have so many characters, each a token, in each message."""
    roles = ("user", "assistant")
    return [{"role": role, "content": "x" * n} for n in lengths for role in roles][:-1]


def test_a_default_length_is_cut_to_the_room(make, runner):
    model = make(runner, context_length=100)
    prompt = model.prepare(turns(50), {}, False)
    assert prompt.sampling.max_new_tokens == 100 - len(prompt.ids)


def test_a_length_that_does_not_fit_is_refused_with_both_numbers(make, runner):
    model = make(runner, context_length=100)
    with pytest.raises(api.ContextTooLong, match=r"53 tokens.*48.*100") as refusal:
        model.prepare(turns(50), {"max_new_tokens": 48}, False)
    assert refusal.value.param == "max_length"
    with pytest.raises(api.ContextTooLong) as refusal:
        model.prepare(turns(100), {}, False)
    assert refusal.value.param == "prompt"


def test_truncate_drops_the_oldest_turns_and_as_few_as_it_can(make, runner):
    model = make(runner, context_length=100)
    messages = [{"role": "system", "content": "s"}, *turns(10, 10, 10, 10)]
    for answer, dropped in ((12, 0), (13, 1), (36, 1), (60, 2), (84, 3)):
        prompt = model.prepare(messages, {"max_new_tokens": answer}, True)
        assert prompt.dropped_turns == dropped, answer
        assert model.tokenizer.special["<|system|>"] in prompt.ids
    with pytest.raises(api.ContextTooLong):
        model.prepare(messages, {"max_new_tokens": 90}, True)


def test_many_threads_may_prepare_at_once(make, runner):
    model = make(runner)
    expected = model.prepare(turns(50), {}, False).ids
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.extend(model.prepare(turns(50), {}, False).ids for _ in range(50))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 400
