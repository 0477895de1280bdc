"""What benchmarks/soak.py promises, in short; and that it would notice if a promise were broken."""

import asyncio
import gc
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import soak
import torch
from benchmark import Server

import api
from engine.errors import QueueFull
from engine.scheduling.engine import Engine
from engine.scheduling.kv_cache import SpanCache
from engine.scheduling.output import Event, OutputProcessor, deliver
from engine.sequence import Delta, KVSpan, Sequence
from tests.conftest import ROOT, ScriptedRunner, chat_model, ready, serve, wait_for


@pytest.fixture
def report(monkeypatch) -> soak.Report:
    # However busy the machine is; the answers that are left here would take longer still.
    monkeypatch.setattr(soak, "SOON", 20.0)
    return soak.Report()


class Parrot(ScriptedRunner):
    """Says what it was told, as it reads it in the rows of its cache: its own, or another's."""

    def __init__(self, tokenizer, rows: int = 20_000):
        super().__init__(tokenizer, rows=rows)
        self.cells = torch.full((rows,), 256)

    def forward(self, work):
        logits = super().forward(work)
        for row, (seq, new) in zip(logits, work, strict=True):
            first = seq.start + seq.num_computed_tokens
            fresh = seq.tokens[seq.num_computed_tokens : seq.num_computed_tokens + new]
            self.cells[first : first + new] = torch.tensor(fresh)
            # All but the last message's end and the assistant's beginning.
            said = len(seq.tokens) - seq.num_prompt
            told = self.cells[seq.start + max(0, seq.num_prompt - 42) + said]
            row[:] = -50.0
            row[told if told < 256 else 32] = 50.0
        return logits

    def copy(self, span, start, count):
        super().copy(span, start, count)
        self.cells[start : start + count] = self.cells[span.start : span.start + count].clone()


def served(runner, tokenizer, **options):
    options = {"context_length": 4096} | options
    return serve(lambda settings: chat_model(runner, tokenizer, **options))


# ---- A rush


@pytest.mark.slow
def test_a_rush_is_answered_or_told_to_come_back(report, runner, tokenizer):
    runner.pause = 0.005
    with served(runner, tokenizer, max_waiting=60) as url:
        soak.rush(report, Server("scripted", ready(url)), 200)
    # Here the callers share the server's process, so that its speed is not for this test.
    assert not [words for words in report.broken if "/health" not in words]


def test_a_refusal_that_does_not_say_when_is_noticed(report, runner, tokenizer, monkeypatch):
    def refuse(engine: Engine, _: int = 1) -> None:
        if engine.num_waiting > 10:
            raise QueueFull("later")

    monkeypatch.setattr(Engine, "check_queue", refuse)
    runner.pause = 0.02
    with served(runner, tokenizer, max_batch=4) as url:
        soak.rush(report, Server("scripted", ready(url)), 60)
    assert any("told when to come back" in words for words in report.broken)


# ---- A soak


def soaked(report, runner, tokenizer) -> int:
    """A short soak; returns by how many tasks the event loop has more at its end."""
    runner.pause = 0.001
    loops = set()
    put = Engine._submit
    options = {"context_length": 2048, "max_batch": 4}
    runner.rows, runner.ids = 2048, torch.zeros(2048, dtype=torch.long)

    def noted(engine, seqs):
        loops.add(seqs[0].outbox.loop)
        put(engine, seqs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_submit", noted)
        with served(runner, tokenizer, **options) as url:
            asyncio.run(soak.emptied(ready(url)))
            (loop,) = loops
            before = len(asyncio.all_tasks(loop))
            asyncio.run(soak.soak(report, url, minutes=2, minute=1, clients=12))
            wait_for(lambda: len(asyncio.all_tasks(loop)) <= before, seconds=5)
            return len(asyncio.all_tasks(loop)) - before


@pytest.mark.slow
def test_a_soak_leaves_nothing_behind(report, runner, tokenizer):
    assert soaked(report, runner, tokenizer) <= 0
    # Two minutes of a second say nothing of memory.
    assert not [words for words in report.broken if "memory" not in words]


@pytest.mark.slow
def test_rows_that_are_not_given_back_are_noticed(report, runner, tokenizer, monkeypatch):
    release = SpanCache.release

    def forgetful(cache: SpanCache, seq: Sequence) -> None:
        # Of some requests only: what comes before the crowd has none.
        seq.room -= seq.params.seed is not None
        release(cache, seq)

    monkeypatch.setattr(SpanCache, "release", forgetful)
    monkeypatch.setattr(soak, "EMPTYING", 2)
    soaked(report, runner, tokenizer)
    assert any("whole cache" in words for words in report.broken)


# ---- Secrets


def leaked(report, tokenizer, count: int = 8) -> soak.Heard:
    parrot = Parrot(tokenizer)
    with (
        served(Parrot(tokenizer), tokenizer, reuse=False) as alone,
        served(parrot, tokenizer, max_batch=6) as url,
    ):
        servers = Server("alone", ready(alone)), Server("parrot", ready(url))
        return soak.leaks(report, *servers, seconds=1, count=count, own=0.4)


def test_nobody_hears_anothers_secret(report, tokenizer):
    heard = leaked(report, tokenizer)
    assert not report.broken
    assert heard.left


def test_a_span_that_is_reused_unread_is_noticed(report, tokenizer, monkeypatch):
    def unread(span: KVSpan, other: KVSpan, known: int) -> int:
        return min(span.num_computed_tokens, len(other.tokens) - 1)

    # As if all prompts were alike, whatever their tokens are.
    monkeypatch.setattr(
        "engine.scheduling.prefix_index.hash", lambda tokens: len(tokens), raising=False
    )
    monkeypatch.setattr("engine.scheduling.kv_cache.common_prefix", unread)
    heard = leaked(report, tokenizer)
    assert heard.others
    assert heard.different


def test_a_delta_in_the_wrong_outbox_is_noticed(report, tokenizer, monkeypatch):
    right = deliver
    count = 0

    def astray(items) -> None:
        nonlocal count
        count += 1
        # Not the last ones, for whose lack a stream would never end.
        texts = [
            n for n, (_, e) in enumerate(items) if isinstance(e, Event) and not e.finish_reason
        ]
        if count % 3 == 0 and len(texts) > 1:
            one, other = texts[:2]
            (a, x), (b, y) = items[one], items[other]
            items = [*items]
            items[one] = a, y._replace(answer=a)
            items[other] = b, x._replace(answer=b)
        right(items)

    monkeypatch.setattr("engine.scheduling.engine.deliver", astray)
    heard = leaked(report, tokenizer)
    assert heard.different
    assert report.broken


@pytest.mark.slow
def test_a_crowd_hears_what_each_would_alone_from_a_model_that_heeds_every_token(
    report, tokenizer, tmp_path
):
    soak.save_tiny(str(tmp_path))
    exact = {"model": str(tmp_path), "dtype": "float32", "cache_memory": "16MiB"}
    with (
        serve(api.load_served, **exact, reuse=False) as alone,
        serve(api.load_served, **exact) as url,
    ):
        soak.leaks(report, Server("alone", ready(alone)), Server("tiny", ready(url)), 1, count=16)
    assert not report.broken


# ---- Faults


@pytest.fixture
def slow(tokenizer):
    """A model with two places that takes its time."""
    runner = ScriptedRunner(tokenizer, "x" * 1000)
    runner.pause = 0.1  # so that nothing ends by itself before it is seen
    with served(runner, tokenizer, max_batch=2, prefill_chunk=16) as url:
        yield ready(url)


@pytest.mark.slow
def test_who_hangs_up_is_forgotten_at_every_stage(report, slow):
    asyncio.run(soak.hang_ups(report, slow, batch=2))
    assert not report.broken


@pytest.mark.release
def test_a_server_that_serves_on_who_hung_up_is_noticed(report, slow, monkeypatch):
    async def deaf(request, work):
        return await work

    monkeypatch.setattr(api, "while_connected", deaf)
    monkeypatch.setattr(soak, "STAGES", [soak.whole])
    # The stage after it is not reached, as the two that serve on are in the way.
    with suppress(SystemExit):
        asyncio.run(soak.hang_ups(report, slow, batch=2))
    assert any("whole" in words for words in report.broken)


@pytest.mark.slow
def test_a_slow_reader_holds_nobody_up_and_leaves_nothing(report, tokenizer):
    # Of a letter that no other test's answers have: their pieces may still be about.
    with served(ScriptedRunner(tokenizer, "Q" * 4000), tokenizer) as url:
        asyncio.run(soak.slow_readers(report, ready(url), length=1000, peers=1, rounds=1))
        gc.collect()
        left = [o for o in gc.get_objects() if type(o) is Delta and "Q" in o.text]
    # That others are served at all is seen; how fast depends on what else the machine does.
    assert not [words for words in report.broken if "others" not in words]
    assert not left


def test_slow_senders_do_not_keep_others_waiting(report, server):
    asyncio.run(soak.slow_senders(report, server, count=40, seconds=2))
    assert not [words for words in report.broken if "others" not in words]


# ---- A siege


def besieged(report, runner, tokenizer) -> None:
    runner.say, runner.pause = "one two three four", 0.002
    with served(runner, tokenizer) as url:
        soak.lay_siege(report, ready(url), seconds=2, callers=2)


@pytest.mark.slow
def test_a_siege_costs_no_honest_answer(report, runner, tokenizer):
    besieged(report, runner, tokenizer)
    # The callers share the server's process, and so its memory and its speed.
    assert not [words for words in report.broken if not re.search("/health|memory", words)]


@pytest.mark.slow
def test_an_answer_that_is_altered_in_a_siege_is_noticed(report, runner, tokenizer, monkeypatch):
    right, count = OutputProcessor.take, 0

    def astray(text: OutputProcessor, event: Event) -> Delta | None:
        nonlocal count
        delta = right(text, event)
        count += 1
        return replace(delta, text="?") if delta and count % 50 == 0 else delta

    monkeypatch.setattr(OutputProcessor, "take", astray)
    besieged(report, runner, tokenizer)
    assert any("altered" in words for words in report.broken)


# ---- The long forms


@pytest.mark.release
@pytest.mark.parametrize(
    "arguments", ["rush", "soak --minutes 3", "leaks --minutes 1", "faults", "siege"]
)
def test_every_promise_is_kept_for_long(arguments):
    command = [sys.executable, "benchmarks/soak.py", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
