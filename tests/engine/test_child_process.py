"""A process that answers questions: who ended it, and what it is not told."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from engine import ChildEnded, ProcessUnavailable, child_process
from engine.child_process import ChildProcess
from tests.conftest import ROOT, wait_for

MODULE = "tests.engine.answering"


@pytest.fixture
def child():
    made = ChildProcess(MODULE)
    yield made
    made.close()


def kill_at_next_question(child: ChildProcess) -> threading.Thread:
    """From outside, as where the system has no memory left, while it is at a question."""

    def kill() -> None:
        wait_for(lambda: any(x.name == "watcher" for x in threading.enumerate()))
        os.kill(child.process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_child_that_was_killed_is_asked_anew(child):
    child.start()
    killer = kill_at_next_question(child)
    assert child.ask(["sleep", 1.0], 60) == 1.0
    killer.join()


def test_child_that_is_killed_twice_is_unavailable(child):
    child.start()
    first = child.process.pid
    with pytest.raises(ProcessUnavailable, match="log says why"):
        child.ask(["kill", signal.SIGKILL], 60)
    assert child.ask(["sleep", 0], 60) == 0
    assert child.process.pid != first


@pytest.mark.parametrize("question", [["kill", signal.SIGSEGV], ["exit", 1], ["loop", 0]])
def test_child_that_dies_of_a_question_is_not_asked_again(child, question):
    with pytest.raises(ChildEnded) as ended:
        child.ask(question, 0.3)
    assert type(ended.value) is ChildEnded
    assert child.is_able()


def test_child_that_does_not_start_is_tried_again(monkeypatch):
    monkeypatch.setattr(child_process, "RETRY_S", 0.05)
    child = ChildProcess("tests.engine.no_such_module")
    for ask in (child.start, lambda: child.ask(["sleep", 0], 1)):
        with pytest.raises(ProcessUnavailable):
            ask()
    assert not child.is_able()
    child.module = MODULE
    wait_for(child.is_able)
    assert child.ask(["sleep", 0], 60) == 0
    child.close()


def test_child_that_cannot_be_spawned_is_unavailable(child, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    with monkeypatch.context() as broken:
        broken.setattr("subprocess.Popen", refuse)
        with pytest.raises(ProcessUnavailable):
            child.start()
    child.start()
    assert child.is_able()


def test_idle_child_that_dies_is_started_by_who_looks(child):
    child.start()
    first = child.process.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: child.is_able() and child.process and child.process.pid != first)


def test_child_hears_no_secrets(child, monkeypatch):
    secrets = (
        "CHAT_API_KEY",
        "CHAT_MODEL",
        "HF_TOKEN",
        "openai_api_key",
        "DB_PASSWORD",
        "X_SECRET",
    )
    for name in secrets:
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    seen = child.ask(["environment", 0], 60)
    assert not set(secrets) & set(seen)
    assert {"PATH", "TOKENIZERS_PARALLELISM"} <= set(seen)


def test_all_children_end_at_once(child):
    child.start()
    child_process.end_children()
    assert child.process is None


def test_closed_child_answers_nothing(child):
    child.close()
    with pytest.raises(ChildEnded):
        child.ask(["sleep", 0], 1)
    assert child.is_able()


LIMITED = """
import resource, sys
from engine.child_process import limit_memory, limit_time
limit_memory(2**30)
limit_time(1)
limit_time(100)
print(*resource.getrlimit(resource.RLIMIT_AS), *resource.getrlimit(resource.RLIMIT_CPU))
"""


@pytest.mark.parametrize(("space", "seconds"), [("unlimited", "unlimited"), (3_000_000, 50)])
def test_limits_of_the_system_are_lowered_and_never_raised(space, seconds):
    """To raise a batch system's hard limit is an error, of which the process would die."""
    command = [sys.executable, "-c", LIMITED]
    script = f'ulimit -v {space} -t {seconds}; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "", *command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    soft, hard, soft_time, hard_time = map(int, done.stdout.split())
    if space == "unlimited":
        assert (hard, hard_time) == (-1, -1)
        assert 2**30 < soft < 2**34
        assert soft_time > 100
    else:
        assert (hard, hard_time) == (1024 * space, seconds)
        assert soft <= hard
        assert soft_time == seconds
