"""Logging that goes on while nobody reads it."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from unittest.mock import patch

import httpx
import pytest
from benchmark import free_port

from serving.log_queue import MAX_LINES, LogQueue, flush_log, start_log, still_logged
from tests.conftest import ROOT, wait_for


class Stuck(logging.Handler):
    """A writer that nobody reads, until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released, self.written = threading.Event(), []

    def emit(self, record: logging.LogRecord) -> None:
        assert self.released.wait(20)
        self.written.append(record.getMessage())


def record(number: int) -> logging.LogRecord:
    return logging.LogRecord("chat", logging.INFO, "", 0, "line %d", (number,), None)


def test_lines_beyond_the_queue_are_dropped_and_counted(monkeypatch):
    monkeypatch.setattr("serving.log_queue.FLUSH_TIMEOUT", 0.1)
    writer = Stuck()
    lines = LogQueue(writer)
    lines.handle(record(0))
    wait_for(lines.lines.empty)  # the writer has it
    for number in range(1, MAX_LINES + 1):
        lines.handle(record(number))
    assert lines.num_dropped == 0
    for number in range(5):
        lines.handle(record(number))
    assert lines.num_dropped == 5
    lines.flush()
    writer.released.set()
    monkeypatch.setattr("serving.log_queue.FLUSH_TIMEOUT", 20)
    lines.flush()
    assert writer.written == [f"line {number}" for number in range(MAX_LINES + 1)]


@contextmanager
def bare_root():
    """The root logger without any handlers, and afterwards as it was."""
    root = logging.getLogger()
    level = root.level
    with patch.object(root, "handlers", []), patch("serving.log_queue.log", logging.Logger("x")):
        yield root
        flush_log()
    root.setLevel(level)


@pytest.mark.parametrize("said", [False, True])
def test_log_is_ours_whatever_a_library_said_before(said, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with bare_root() as root:
        if said:
            # As libraries do that call logging.warning while they are imported.
            logging.basicConfig()
            assert [type(handler) for handler in root.handlers] == [logging.StreamHandler]
        start_log(as_json=True)
        assert [type(handler) for handler in root.handlers] == [LogQueue]
        root.error("of %d", 7)
    assert json.loads(capsys.readouterr().err)["message"] == "of 7"


def test_handlers_of_an_operator_stay_alone(tmp_path):
    """As uvicorn's --log-config sets them."""
    with bare_root() as root, closing(logging.FileHandler(tmp_path / "log")) as handler:
        root.addHandler(handler)
        root.setLevel(logging.ERROR)
        start_log()
        assert root.handlers == [handler]
        assert root.level == logging.ERROR


def test_without_a_terminal_the_log_says_that_something_goes_on(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "chat")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr("serving.log_queue.STILL_EVERY", 0.01)
    with still_logged("loading demo"):
        wait_for(lambda: len(re.findall(r"still loading demo \(\d+ s\)", caplog.text)) >= 2)


def test_beside_progress_bars_the_log_does_not_say_it_too(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with still_logged("loading demo"):
        assert "still" not in [thread.name for thread in threading.enumerate()]


def test_a_traceback_is_written():
    text = io.StringIO()
    lines = LogQueue(logging.StreamHandler(text))
    try:
        raise RuntimeError("a fault")
    except RuntimeError:
        exc_info = sys.exc_info()
    lines.handle(logging.LogRecord("chat", logging.ERROR, "", 0, "it failed", (), exc_info))
    lines.flush()
    assert text.getvalue().startswith("it failed\nTraceback")
    assert text.getvalue().endswith("RuntimeError: a fault\n")


SERVER = """
import sys
sys.path.insert(0, "tests")
import api
from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model
tokenizer = byte_tokenizer()
model = chat_model(ScriptedRunner(tokenizer), tokenizer)
build = api.build_app
api.build_app = lambda settings: build(settings, lambda _: model)
api.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a pipe of one page is Linux's")
def test_answers_go_on_while_nobody_reads_stderr():
    import fcntl

    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ["--port", str(port), "--no-chat-page"]
    process = subprocess.Popen([sys.executable, "-c", SERVER, *flags], cwd=ROOT, stderr=write)
    os.close(write)

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(is_ready)
        with httpx.Client(base_url=url) as client:
            for _ in range(MAX_LINES + 100):
                assert client.get("/nowhere").status_code == 404
            assert client.post("/", json={"prompt": "x"}).json()["response"] == "hello"
            text = client.get("/metrics").text
        assert float(text.partition("\nchat_log_lines_dropped ")[2].partition("\n")[0]) > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(read)
