"""What a schema may take to compile is bounded, by a process that is ended."""

import json
import os
import signal
import threading
import time
from itertools import pairwise

import pytest

from engine import InvalidInput
from engine.guided.bounded_compiler import BoundedCompiler
from engine.prompt.tokenizer import ChatTokenizer
from tests.conftest import byte_tokenizer, wait_for

EASY = {"type": "integer", "multipleOf": 7}
# It takes a minute and gigabytes where nothing ends it.
HARD = {"type": "integer", "multipleOf": 3_000_017}


@pytest.fixture
def compiler():
    compiler = BoundedCompiler(ChatTokenizer(byte_tokenizer()).plain, (), {256})
    yield compiler
    compiler.close()


@pytest.mark.slow
def test_schema_that_takes_too_much_is_refused_and_the_next_is_compiled(compiler):
    compiler.compile(EASY)
    worker = compiler.trial.process
    with pytest.raises(InvalidInput, match="takes more than 2 seconds or 256 MiB") as refused:
        compiler.compile(HARD)
    assert refused.value.argument == "schema"
    assert worker.poll() is not None
    assert compiler.compile(EASY).token_mask().any()


@pytest.mark.slow
def test_schema_that_takes_too_much_memory_is_refused(compiler, monkeypatch):
    monkeypatch.setattr(
        "engine.guided.bounded_compiler.COMPILE_TIMEOUT", 600
    )  # here, and not over there
    with pytest.raises(InvalidInput, match="256 MiB"):
        compiler.compile(HARD)


@pytest.mark.parametrize("deep", [False, True])
def test_definitions_that_refer_to_each_other_cost_little(compiler, deep):
    """However often: each of them is compiled once, and nothing is put in its place."""
    names = [f"d{n}" for n in range(60)]
    refer = lambda name: {"$ref": f"#/$defs/{name}"}  # noqa: E731
    alternatives = lambda name: {"anyOf": [refer(name), {"type": "array", "items": refer(name)}]}  # noqa: E731
    definitions = {
        name: {
            "type": "object",
            "properties": {f"p{j}": refer(names[(n * 7 + j) % 60]) for j in range(12)},
        }
        for n, name in enumerate(names)
    }
    if deep:
        definitions = {name: alternatives(after) for name, after in pairwise(names)}
        definitions[names[-1]] = {"type": "string"}
    compiler.warm_up()
    began = time.process_time()
    guide = compiler.compile({"$defs": definitions, **refer("d0")})
    assert time.process_time() - began < 1
    assert guide.token_mask().any()


def test_invalid_schema_is_named_and_keeps_the_process(compiler):
    with pytest.raises(InvalidInput, match="bogus"):
        compiler.compile({"type": "bogus"})
    worker = compiler.trial.process
    compiler.compile(EASY)
    assert compiler.trial.process is worker


def test_process_that_died_is_started_again(compiler):
    compiler.compile(EASY)
    os.kill(compiler.trial.process.pid, signal.SIGKILL)
    wait_for(lambda: compiler.trial.process.poll() is not None)
    compiler.compile(EASY)


@pytest.mark.slow
def test_grammar_with_a_schema_that_takes_too_much_is_refused(compiler):
    grammar = '%llguidance {}\nstart: "a" | %json '
    compiler.compile_grammar(grammar + json.dumps(EASY), ())
    worker = compiler.trial.process
    with pytest.raises(InvalidInput, match="takes more than 2 seconds or 256 MiB") as refused:
        compiler.compile_grammar(grammar + json.dumps(HARD), ())
    assert refused.value.argument == "tools"
    assert worker.poll() is not None


def test_warming_up_starts_the_process_and_after_the_end_it_does_nothing(compiler):
    compiler.warm_up()
    worker = compiler.trial.process
    assert worker.poll() is None
    compiler.compile(EASY)
    assert compiler.trial.process is worker
    compiler.close()
    compiler.warm_up()


def test_closing_ends_what_is_compiled(compiler):
    compiler.compile(EASY)
    worker = compiler.trial.process
    refused = []

    def ask() -> None:
        with pytest.raises(InvalidInput):
            compiler.compile(HARD)
        refused.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    compiler.close()
    thread.join(10)
    assert refused
    wait_for(lambda: worker.poll() is not None)


def test_time_in_which_the_process_does_not_compute_does_not_count(compiler, monkeypatch):
    """As on a machine whose cores are busy with other programs."""
    compiler.compile(EASY)
    monkeypatch.setattr("engine.guided.bounded_compiler.COMPILE_TIMEOUT", 0.2)
    monkeypatch.setattr("engine.child_process.MOST_TIMES", 1000)
    worker = compiler.trial.process
    os.kill(worker.pid, signal.SIGSTOP)
    thread = threading.Timer(0.5, os.kill, (worker.pid, signal.SIGCONT))
    thread.start()
    compiler.compile(EASY)
    thread.join()
    assert compiler.trial.process is worker


def test_process_that_does_not_compute_at_all_is_ended(compiler, monkeypatch):
    compiler.compile(EASY)
    monkeypatch.setattr("engine.guided.bounded_compiler.COMPILE_TIMEOUT", 0.05)
    os.kill(compiler.trial.process.pid, signal.SIGSTOP)
    with pytest.raises(InvalidInput, match="takes more than"):
        compiler.compile(EASY)
