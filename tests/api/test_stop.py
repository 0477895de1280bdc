"""A server that is told to stop loses nothing that it has begun."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from benchmark import free_port

import api
from engine import ChatModel
from engine.prompt.tokenizer import ChatTokenizer
from serving.log_queue import LogQueue
from tests.conftest import PATIENCE, ROOT, ScriptedRunner, byte_tokenizer, chat_model, wait_for
from tests.server_process import ServerProcess, forking, server_process

# What uvicorn waits for connections that stay open after the requests are drained; it is told to
# wait less here than api.py tells it to, so that tests outlast it sooner.
GRACE = 0.5


def wait_less() -> None:
    config = uvicorn.Config

    def impatient(*args: Any, **options: Any) -> uvicorn.Config:
        assert "timeout_graceful_shutdown" in options
        return config(*args, **options | {"timeout_graceful_shutdown": GRACE})

    uvicorn.Config = impatient


def wait_less_for_steps() -> None:
    wait_less()
    api.STEP_TIMEOUT = 0.5


class Leash:
    """Holds the model in the server's process: it takes a step, or encodes, when it is let."""

    def __init__(self) -> None:
        self.steps, self.encoding = forking().Semaphore(0), forking().Event()

    def let_steps(self, count: int) -> None:
        for _ in range(count):
            self.steps.release()


def load_scripted(
    settings: api.Settings, say: str, pause: float, load: float, context: int, leash: Leash | None
) -> ChatModel:
    """A model that says one character each so many seconds, or as it is let."""
    time.sleep(load)
    runner = ScriptedRunner(byte_tokenizer(), say, context)
    runner.pause = pause
    if leash:
        encode = ChatTokenizer.encode
        ChatTokenizer.encode = lambda *given, **options: (
            leash.encoding.wait(PATIENCE) and encode(*given, **options)
        )
        runner.permits = leash.steps
    return chat_model(runner, byte_tokenizer(), context, max_batch=settings.max_batch)


@contextmanager
def started(
    *flags: str,
    say: str = "x" * 20,
    load: float = 0,
    leash: Leash | None = None,
    pause: float = 0.1,
    context: int = 512,
    before: Callable[[], object] = wait_less,
) -> Iterator[tuple[ServerProcess, str]]:
    port = str(free_port())
    options = {"say": say, "load": load, "leash": leash}
    loader = partial(load_scripted, pause=pause, context=context, **options)
    with server_process(loader, "--port", port, "--no-chat-page", *flags, before=before) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: status(url) in ("ready", "loading"))
        if not load:
            wait_for(lambda: status(url) == "ready")
        yield process, url


def status(url: str) -> str | None:
    try:
        return httpx.get(f"{url}/health").json()["status"]
    except httpx.TransportError:
        return None


class Client(threading.Thread):
    """Asks for a stream, and keeps what it gets."""

    def __init__(self, url: str):
        super().__init__()
        self.url, self.begun, self.events, self.cut_off = url, threading.Event(), [], False
        self.start()
        assert self.begun.wait(PATIENCE)

    def run(self) -> None:
        try:
            self._read({"prompt": "x", "stream": True})
        except httpx.TransportError:
            self.cut_off = True

    def _read(self, body: dict[str, object]) -> None:
        with httpx.stream("POST", self.url, json=body, timeout=PATIENCE) as response:
            for line in filter(None, response.iter_lines()):
                self.events.append(line.removeprefix("data: "))
                self.begun.set()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_answers_under_way_are_finished_and_new_ones_refused(sent):
    with started(leash=(leash := Leash())) as (process, url):
        leash.encoding.set()
        leash.let_steps(1)
        client = Client(url)
        process.send_signal(sent)
        wait_for(lambda: status(url) == "draining")
        refused = httpx.post(url, json={"prompt": "x"})
        leash.let_steps(20)
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 31
        assert "stopping" in refused.json()["error"]["message"]
        assert process.wait(PATIENCE) == 0
        client.join(PATIENCE)
    assert client.events[-1] == "[DONE]"
    assert json.loads(client.events[-2])["response"] == "x" * 20


@pytest.mark.slow
def test_those_who_wait_are_answered_too():
    with started("--max-batch", "1", leash=(leash := Leash())) as (process, url):
        leash.encoding.set()
        leash.let_steps(1)
        clients = [Client(url)]
        later = threading.Thread(target=lambda: clients.append(Client(url)))
        later.start()
        wait_for(lambda: httpx.get(f"{url}/health").json()["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: status(url) == "draining")
        leash.let_steps(41)
        assert process.wait(PATIENCE) == 0
        later.join(PATIENCE)
        for client in clients:
            client.join(PATIENCE)
    assert [client.events[-1] for client in clients] == ["[DONE]", "[DONE]"]


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_ended_with_an_error():
    with started("--drain-timeout", "0.5", say="x" * 300, pause=1) as (process, url):
        client = Client(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        client.join(PATIENCE)
    error = json.loads(client.events[-1])["error"]
    assert (error["code"], error["message"]) == ("not_serving", "the server is stopping")


@pytest.mark.slow
def test_a_request_that_is_still_tokenized_is_answered_too():
    """The engine does not know of it yet."""
    with started(leash=(leash := Leash())) as (process, url):
        answers = []
        asker = threading.Thread(
            target=lambda: answers.append(httpx.post(url, json={"prompt": "x"}, timeout=PATIENCE))
        )
        asker.start()
        wait_for(lambda: httpx.get(f"{url}/health").json()["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: status(url) == "draining")
        time.sleep(3 * GRACE)
        leash.encoding.set()
        leash.let_steps(21)
        assert process.wait(PATIENCE) == 0
        asker.join(PATIENCE)
    assert answers[0].json()["response"] == "x" * 20


@pytest.mark.slow
def test_an_answer_that_is_still_being_read_is_not_cut():
    """It is all computed, and its reader takes longer than uvicorn would wait."""
    with started(say="x" * 3000, pause=0, context=8192) as (process, url):
        question = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        body = json.dumps(question | {"logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            answer = client.recv(1000)
            wait_for(lambda: httpx.get(f"{url}/health").json()["running"] == 0)
            process.send_signal(signal.SIGTERM)
            time.sleep(3 * GRACE)
            answer += b"".join(iter(lambda: client.recv(2**20), b""))
        assert process.wait(PATIENCE) == 0
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert len(answer) > 2**22, "less would lie in the sockets' buffers"


@pytest.mark.slow
def test_a_server_that_was_paused_goes_on_and_answers_who_came_meanwhile():
    """As with Ctrl-Z, a laptop's lid, or a virtual machine that is moved."""
    body = b'{"prompt": "x"}'
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with started() as (process, url):
        client = Client(url)
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: psutil.Process(process.process.pid).status() == psutil.STATUS_STOPPED)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as late:
            late.sendall(head % len(body) + body)
            process.send_signal(signal.SIGCONT)
            answer = b"".join(iter(lambda: late.recv(65536), b""))
        client.join(PATIENCE)
        assert status(url) == "ready"
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert client.events[-1] == "[DONE]"
    assert json.loads(client.events[-2])["response"] == "x" * 20


def leave_for_where_nothing_can_be_written() -> None:
    os.chdir("/proc")


@pytest.mark.skipif(not Path("/proc").exists(), reason="the system has no such folder")
def test_a_server_needs_no_folder_to_write_in():
    with started(before=leave_for_where_nothing_can_be_written, pause=0) as (process, url):
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 1}}},
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
        assert answer.json()["choices"][0]["message"]["content"] == "1", answer.text
        assert httpx.post(url, json={"prompt": "x"}).json()["response"] == "x" * 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


@pytest.mark.slow
def test_a_step_that_never_ends_is_left_at_the_deadline():
    """It is told as dead, also while the server stops."""
    leash = Leash()
    leash.encoding.set()
    with started("--drain-timeout", "1", leash=leash, before=wait_less_for_steps) as (process, url):
        leash.let_steps(2)
        client = Client(url)
        wait_for(lambda: status(url) == "dead")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert status(url) == "dead"
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - begun < PATIENCE / 4
        assert "has not ended; stopping without it" in process.said()
        client.join(PATIENCE)
    assert client.cut_off


def test_handler_of_signals_takes_no_lock():
    """A signal may come while its thread holds the log's, which nobody may take twice."""
    service = api.ChatService(api.Settings(), lambda _: None)
    server = api.Server(uvicorn.Config(lambda *_: None), service)
    handler = LogQueue(logging.NullHandler())
    logging.getLogger().addHandler(handler)
    try:
        with handler.lines.mutex:
            server.handle_exit(signal.SIGTERM, None)
    finally:
        logging.getLogger().removeHandler(handler)
    assert service.draining


def test_a_second_signal_ends_at_once():
    with started(say="x" * 300, pause=1) as (process, url):
        client = Client(url)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: status(url) == "draining")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 128 + signal.SIGINT
        client.join(PATIENCE)
    assert client.cut_off


@pytest.mark.slow
@pytest.mark.parametrize("load", [0, 10 * PATIENCE])
def test_an_idle_or_a_loading_server_stops_soon_and_without_noise(load):
    with started(load=load) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        noise = process.said()
    assert "Traceback" not in noise
    assert "terminate called" not in noise


def test_a_real_model_that_is_loading_can_be_stopped(demo_folder):
    port = str(free_port())
    process = subprocess.Popen(
        [sys.executable, "api.py", "--port", port], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    wait_for(lambda: status(f"http://127.0.0.1:{port}") is not None)
    process.send_signal(signal.SIGTERM)
    _, noise = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, noise
    assert "terminate called" not in noise
    assert Path(demo_folder).is_dir()
