"""Work off the event loop: in order, bounded, given up with its caller, ended with the drain."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import httpx
import pytest
from benchmark import free_port

import api
from engine import ChatModel, EngineStopped
from engine.guided.bounded_compiler import BoundedCompiler
from engine.prompt.tokenizer import ChatTokenizer
from serving import body_limits
from serving.workers import NUM_THREADS, Workers
from tests.api.test_bounds import head
from tests.api.test_security import peer
from tests.conftest import (
    PATIENCE,
    ScriptedRunner,
    byte_tokenizer,
    chat_model,
    ready,
    serve,
    wait_for,
)
from tests.server_process import server_process

# ---- The class


class Gate:
    """Work that waits until the gate is opened, and notes that it was begun."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun: list[str] = []

    def work(self, name: str) -> str:
        self.begun.append(name)
        assert self.opened.wait(PATIENCE)
        return name


async def settled(condition) -> None:
    await asyncio.to_thread(wait_for, condition)


def test_work_is_done_in_order_of_arrival():
    async def crowd() -> list[str]:
        gate, workers = Gate(), Workers(1)
        tasks = [asyncio.create_task(workers.run(partial(gate.work, n))) for n in "abcd"]
        await settled(lambda: gate.begun)
        assert workers.num_pending == 4
        gate.opened.set()
        assert await asyncio.gather(*tasks) == list("abcd")
        assert not workers.num_pending
        return gate.begun

    assert asyncio.run(crowd()) == list("abcd")


def test_cancelled_work_is_never_begun():
    async def leave() -> list[str]:
        gate, workers = Gate(), Workers(1)
        tasks = [asyncio.create_task(workers.run(partial(gate.work, n))) for n in "abc"]
        await settled(lambda: gate.begun)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert workers.num_pending == 2
        gate.opened.set()
        assert [await tasks[0], await tasks[2]] == ["a", "c"]
        return gate.begun

    assert asyncio.run(leave()) == ["a", "c"]


def test_an_error_of_the_work_is_raised():
    async def fail() -> None:
        await Workers(1).run(partial(int, "x"))

    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(fail())


def test_closing_ends_what_waits_and_what_runs():
    async def close() -> list[object]:
        gate, workers = Gate(), Workers(1)
        tasks = [asyncio.create_task(workers.run(partial(gate.work, n))) for n in "ab"]
        await settled(lambda: gate.begun)
        workers.close()
        workers.close()
        ends = await asyncio.gather(*tasks, workers.run(list), return_exceptions=True)
        assert gate.begun == ["a"]
        gate.opened.set()
        return ends

    assert [type(end) for end in asyncio.run(close())] == [EngineStopped] * 3


# ---- In the server


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    """Tokenizing waits at the gate."""
    gate = Gate()
    encode = ChatTokenizer.encode

    def slow(self, messages, *given, **options):
        gate.work(messages[-1]["content"])
        return encode(self, messages, *given, **options)

    monkeypatch.setattr(ChatTokenizer, "encode", slow)
    yield gate
    gate.opened.set()


def ask_in_thread(url: str, prompt: str, got: list[int]) -> threading.Thread:
    def ask() -> None:
        got.append(httpx.post(url, json={"prompt": prompt}, timeout=PATIENCE).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def waiting(url: str) -> int:
    return httpx.get(f"{url}/health").json()["waiting"]


def test_requests_that_are_tokenized_wait_and_the_next_is_refused(runner, tokenizer, gate):
    with serve(lambda _: chat_model(runner, tokenizer), max_batch=1, max_waiting=2) as url:
        ready(url)
        got: list[int] = []
        askers = [ask_in_thread(url, str(n), got) for n in range(3)]
        wait_for(lambda: waiting(url) == 3)
        assert "chat_num_requests_waiting 3.0" in httpx.get(f"{url}/metrics").text
        refused = httpx.post(url, json={"prompt": "x"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        gate.opened.set()
        for asker in askers:
            asker.join(PATIENCE)
        assert got == [200] * 3
        assert httpx.post(url, json={"prompt": "x"}).status_code == 200
        assert waiting(url) == 0


def test_request_whose_refusal_is_not_due_is_taken_when_there_is_room(
    runner, tokenizer, gate, monkeypatch
):
    waits: list[body_limits.BodyBudget] = []
    plain = body_limits.BodyBudget.wait_to_refuse

    async def wait(self: body_limits.BodyBudget) -> None:
        waits.append(self)
        await plain(self)

    monkeypatch.setattr(body_limits, "MAX_REFUSALS_PER_S", 0.3)
    monkeypatch.setattr(body_limits.BodyBudget, "wait_to_refuse", wait)
    with serve(lambda _: chat_model(runner, tokenizer), max_batch=1, max_waiting=1) as url:
        ready(url)
        got: list[int] = []
        askers = [ask_in_thread(url, str(n), got) for n in range(2)]
        wait_for(lambda: waiting(url) == 2)
        assert httpx.post(url, json={"prompt": "x"}).status_code == 429
        askers.append(ask_in_thread(url, "late", got))
        wait_for(lambda: len(waits) == 2)
        gate.opened.set()
        for asker in askers:
            asker.join(PATIENCE)
        assert got == [200] * 3


def test_a_client_that_leaves_before_its_turn_is_not_tokenized(server, gate):
    got: list[int] = []
    ahead = [ask_in_thread(server, "ahead", got) for _ in range(NUM_THREADS)]
    wait_for(lambda: len(gate.begun) == NUM_THREADS)
    body = b'{"prompt": "gone"}'
    with peer(server) as gone:
        gone.sendall(head(len(body)) + body)
        wait_for(lambda: waiting(server) == NUM_THREADS + 1)
    wait_for(lambda: waiting(server) == NUM_THREADS)
    behind = ask_in_thread(server, "behind", got)
    gate.opened.set()
    for asker in (*ahead, behind):
        asker.join(PATIENCE)
    assert got == [200] * (NUM_THREADS + 1)
    assert sorted(gate.begun) == [*["ahead"] * NUM_THREADS, "behind"]


@pytest.mark.slow
def test_nobody_waits_for_a_schema_but_those_with_one(server, monkeypatch):
    gate, check = Gate(), BoundedCompiler._check
    monkeypatch.setattr(
        BoundedCompiler, "_check", lambda *given: gate.work("schema") and check(*given)
    )
    schema = {"type": "json_schema", "json_schema": {"schema": {"multipleOf": 3_000_017}}}
    hard = {"messages": [{"role": "user", "content": "x"}], "response_format": schema}
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{server}/v1/chat/completions", json=hard, timeout=PATIENCE))

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    wait_for(lambda: waiting(server) == 2)
    assert httpx.post(server, json={"prompt": "x"}).json()["response"] == "hello"
    assert waiting(server) == 2
    gate.opened.set()
    for asker in askers:
        asker.join()
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].json()["error"]["param"] == "response_format"
    assert "takes more than 2 seconds" in answers[0].json()["error"]["message"]


def load_slow(settings: api.Settings) -> ChatModel:
    ChatTokenizer.encode = lambda *given, **options: time.sleep(10 * PATIENCE)
    return chat_model(ScriptedRunner(byte_tokenizer()), byte_tokenizer())


@pytest.mark.slow
def test_a_drain_does_not_wait_for_a_thread_that_is_busy():
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ("--port", str(port), "--drain-timeout", "0.2", "--no-chat-page")
    with server_process(load_slow, *flags) as process:
        wait_for(lambda: " ready" in process.said())
        got: list[int] = []
        askers = [ask_in_thread(url, "x", got) for _ in range(NUM_THREADS + 1)]
        wait_for(lambda: waiting(url) == NUM_THREADS + 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        for asker in askers:
            asker.join(PATIENCE)
    assert got == [503] * (NUM_THREADS + 1)
