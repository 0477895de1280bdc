"""What each request gets, whoever else is there, and how it ends."""

import asyncio
from dataclasses import replace

import pytest
import torch

from engine.errors import EngineStopped, StepFailed, TimedOut
from engine.sampling_params import SamplingParams
from engine.sequence import Delta, Prompt
from tests.conftest import GREEDY, ScriptedRunner, chat_model, reply, wait_for, whole_of


def test_tokens_computed_after_a_stop_string_are_not_sent(make, runner):
    model = make(runner)
    text, last = asyncio.run(reply(model, [1], replace(GREEDY, stop=("ll",))))
    assert (text, last.finish_reason, last.completion_tokens) == ("he", "stop", 4)
    wait_for(lambda: not model.engine.scheduler.running)
    assert 4 <= len(runner.steps) < 12
    # A stop string at the very end is still the reason.
    text, last = asyncio.run(reply(model, [2], replace(GREEDY, stop=("ll",), max_new_tokens=4)))
    assert (text, last.finish_reason, last.completion_tokens) == ("he", "stop", 4)
    wait_for(lambda: not model.engine.scheduler.running)


def test_end_token_ends_the_answer_and_is_not_text(make, tokenizer):
    text, last = asyncio.run(reply(make(ScriptedRunner(tokenizer, "bye")), [1]))
    assert (text, last.finish_reason) == ("bye", "stop")
    assert (last.prompt_tokens, last.completion_tokens) == (1, 4)


def test_closing_the_stream_cancels_the_request(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x" * 100)
    model = make(runner)
    runner.hold()
    runner.permits.release()

    async def leave():
        stream = model.engine.stream([1], SamplingParams(100))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    runner.free()
    wait_for(lambda: not model.engine.scheduler.running)
    assert len(runner.steps) <= 2


def test_running_request_times_out(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x" * 400)
    runner.pause = 0.01
    model = make(runner, timeout=0.2)
    with pytest.raises(TimedOut):
        asyncio.run(reply(model, [1], SamplingParams(400)))
    wait_for(lambda: not model.engine.scheduler.running)
    assert whole_of(model.engine) == runner.rows


@pytest.mark.parametrize("fault", [RuntimeError("a fault"), torch.OutOfMemoryError("full")])
def test_step_failure_costs_only_the_request_at_fault(make, tokenizer, fault):
    runner = ScriptedRunner(tokenizer)
    runner.failure, runner.poison = fault, [7, 7]
    model = make(runner)

    async def crowd():
        prompts = [[1], [2, 3], [7, 7], [4] * 30, [5]]
        return await asyncio.gather(*(reply(model, p) for p in prompts), return_exceptions=True)

    answers = asyncio.run(crowd())
    assert isinstance(answers.pop(2), StepFailed)
    assert [text for text, _ in answers] == ["hello"] * 4
    wait_for(lambda: not model.engine.scheduler.running)
    assert whole_of(model.engine) == runner.rows


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lost_device_ends_the_engine(make, tokenizer, monkeypatch):
    def gone() -> None:
        raise RuntimeError("CUDA error: device-side assert")

    runner = ScriptedRunner(tokenizer)
    runner.failure = RuntimeError("CUDA error")
    monkeypatch.setattr(runner, "check_device", gone)
    model = make(runner)
    with pytest.raises(EngineStopped, match="has failed, its log says why"):
        asyncio.run(reply(model, [1]))


def test_engine_serves_on_after_a_failed_step(make, tokenizer):
    model = make(ScriptedRunner(tokenizer))
    model.engine.runner.failure = RuntimeError("a fault")
    with pytest.raises(StepFailed):
        asyncio.run(reply(model, [1]))
    model.engine.runner.failure = None
    assert asyncio.run(reply(model, [1]))[0] == "hello"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_engine_fails_everyone_at_once(make, tokenizer):
    model = make(ScriptedRunner(tokenizer))
    model.engine.runner.failure = SystemExit("the end")
    with pytest.raises(EngineStopped, match="has failed, its log says why"):
        asyncio.run(reply(model, [1]))
    with pytest.raises(EngineStopped, match="has failed, its log says why"):
        asyncio.run(reply(model, [1]))
    assert isinstance(model.engine.failure, SystemExit)


def test_closed_engine_refuses_at_once(tokenizer):
    model = chat_model(ScriptedRunner(tokenizer), tokenizer)
    model.engine.close()
    with pytest.raises(EngineStopped, match="stopping"):
        asyncio.run(reply(model, [1]))


def test_idle_stream_gets_heartbeats(make, runner, monkeypatch):
    monkeypatch.setattr("engine.scheduling.output.HEARTBEAT", 0.05)
    model = make(runner)
    runner.hold()

    async def first():
        stream = model.engine.stream([1], GREEDY)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    assert asyncio.run(first()) == Delta("")
    runner.free()


@pytest.mark.parametrize("leaves", [False, True])
def test_no_task_outlives_its_stream(make, runner, leaves):
    model = make(runner)

    async def main() -> None:
        stream = model.engine.stream([1], GREEDY)
        async for _ in stream:
            if leaves:
                break
        await stream.aclose()
        await asyncio.sleep(0)  # in which what is cancelled ends
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_stop_string_ends_the_engines_work_at_once(make, tokenizer):
    """Of two answers one stops: its place is free while the other goes on."""
    runner = ScriptedRunner(tokenizer, "abcdefgh" * 20)
    model = make(runner)

    async def main() -> None:
        prompts = [Prompt([1], SamplingParams(150, stop=stop)) for stop in (("d",), ())]
        stream = model.answer_all(prompts)
        async for delta in stream:
            if delta.index == 0 and delta.finish_reason:
                break
        before = len(runner.steps)
        await asyncio.to_thread(wait_for, lambda: len(runner.steps) > before + 2)
        assert model.num_running == 1
        await stream.aclose()

    asyncio.run(main())


def test_step_is_late_by_what_steps_have_taken(make, tokenizer):
    """A large model's step may take minutes; one without end is late all the same."""
    runner = ScriptedRunner(tokenizer)
    model = make(runner, costs={1: 0.5, 16: 1.0})
    assert model.seconds_late == 0
    runner.hold()

    async def main() -> None:
        stream = model.answer_all([Prompt([1] * 64, SamplingParams(2))])
        asking = asyncio.create_task(anext(stream))
        await asyncio.to_thread(wait_for, lambda: model.num_running)
        await asyncio.to_thread(wait_for, lambda: model.engine.expected_step)
        likely = model.engine.expected_step
        assert 0.5 <= likely < 10
        model.engine.last_step -= 9 * likely
        assert model.seconds_late == 0
        model.engine.last_step -= 9 * likely
        assert 7 * likely < model.seconds_late < 10 * likely
        runner.free()
        await asking
        await stream.aclose()

    asyncio.run(main())
