"""Rows of the KV cache: none is lost or owned twice, and prefixes are found."""

import asyncio
import random
from itertools import pairwise, takewhile

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.scheduling.kv_cache import Allocator, SpanCache
from engine.sequence import KVSpan
from tests.conftest import ScriptedRunner, reply, sequence, wait_for, whole_of


def test_allocator_loses_no_rows():
    """Take, give and move at random; the free list is always whole, joined and in order."""
    chance, allocator, held = random.Random(0), Allocator(1000), []
    for _ in range(10_000):
        if held and chance.random() < 0.5:
            allocator.release(*held.pop(chance.randrange(len(held))))
        else:
            size = chance.randint(1, 120)
            start = allocator.allocate(size)
            if start is None:
                assert all(gap < size for _, gap in allocator.gaps)
            else:
                held.append((start, size))
        pieces = sorted(held + allocator.gaps)
        assert sum(size for _, size in pieces) == 1000
        assert all(a + n <= b for (a, n), (b, _) in pairwise(pieces))
        assert all(a + n < b for (a, n), (b, _) in pairwise(allocator.gaps))
    for span in held:
        allocator.release(*span)
    assert allocator.gaps == [(0, 1000)]


def cache_with(rows: int, *kept: KVSpan) -> SpanCache:
    """A cache whose free rows are none, and that keeps these prefixes."""
    cache = SpanCache(rows, copy_rows=lambda source, start, count: True)
    cache.allocator.gaps = []
    for span in kept:
        cache.kept[span] = None
        cache.computed.add(span, span.num_computed_tokens)
    return cache


def test_prefixes_are_evicted_only_where_their_rows_join():
    kept = [KVSpan([1] * 400, 0, 400, 400), KVSpan([2] * 398, 602, 398, 398)]
    cache = cache_with(1000, *kept)
    assert not cache.place(sequence([3] * 10, max_new_tokens=690))
    assert list(cache.kept) == kept
    assert not cache.allocator.gaps
    assert cache.place(sequence([3] * 10, max_new_tokens=388))
    assert list(cache.kept) == kept[1:]


def test_prefixes_that_give_no_room_are_not_evicted():
    """Only those whose rows are taken go, not all that were used longer ago."""
    kept = [
        KVSpan([1] * 100, 0, 100, 100),
        KVSpan([2] * 300, 200, 300, 300),
        KVSpan([3] * 90, 600, 90, 90),
    ]
    cache = cache_with(1000, *kept)
    assert cache.place(sequence([4] * 10, max_new_tokens=240))
    assert list(cache.kept) == [kept[0], kept[2]]


def test_longest_prefix_is_found_among_many():
    chance = random.Random(0)
    system = [chance.randrange(9) for _ in range(100)]
    spans = []
    for n in range(50):
        tokens = [*system[: 16 + 2 * n], *(chance.randrange(9, 99) for _ in range(40))]
        spans.append(KVSpan(tokens, 200 * n, 200, len(tokens)))
    cache = cache_with(20_000, *spans)
    cache.allocator.gaps = [(10_000, 10_000)]
    seq = sequence([*system, 100], max_new_tokens=10)
    assert cache.place(seq)
    assert seq.num_computed_tokens == 100
    other = sequence([*system[:50], 100, 101], max_new_tokens=10)
    assert cache.place(other)
    assert other.num_computed_tokens == 50


def test_colliding_hashes_reuse_nothing(monkeypatch):
    """Rows are another's unless the tokens themselves are the same."""
    monkeypatch.setattr("engine.scheduling.prefix_index.hash", lambda tokens: 1, raising=False)
    cache = cache_with(1000, KVSpan([1] * 64, 0, 64, 64))
    cache.allocator.gaps = [(100, 900)]
    seq = sequence([2] * 64, max_new_tokens=10)
    assert cache.place(seq)
    assert seq.num_computed_tokens == 0
    seq.num_computed_tokens = 64
    cache.advance(seq)
    cache.release(seq)
    assert len(cache.kept) == 2


def test_rows_of_another_adapter_are_not_shared(monkeypatch):
    """Neither where hashes tell them apart, nor where these collide."""
    tokens = [1] * 64
    cache = cache_with(1000, KVSpan(tokens, 0, 64, 64, adapter=1))
    cache.allocator.gaps = [(100, 900)]
    for adapter, shared in ((0, 0), (2, 0), (1, 63)):
        seq = sequence(tokens, max_new_tokens=10)
        seq.adapter = adapter
        assert cache.place(seq)
        assert seq.num_computed_tokens == shared
        seq.num_computed_tokens = 64
        cache.release(seq)
    assert {span.adapter for span in cache.kept} == {0, 1, 2}
    monkeypatch.setattr("engine.scheduling.prefix_index.hash", lambda tokens: 1, raising=False)
    cache = cache_with(1000, KVSpan(tokens, 0, 64, 64, adapter=1))
    cache.allocator.gaps = [(100, 900)]
    other = sequence(tokens, max_new_tokens=10)
    assert cache.place(other)
    assert other.num_computed_tokens == 0


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=80), min_size=1, max_size=12),
    left=st.lists(st.integers(0, 40), min_size=12, max_size=12),
)
def test_prefix_found_is_the_longest_of_at_least_a_block(prompts, left):
    """Of spans that are computed but for what is left of them, what is computed counts."""
    *texts, prompt = prompts
    cached = [tokens[: max(0, len(tokens) - n)] for tokens, n in zip(texts, left, strict=False)]
    spans = [
        KVSpan(tokens, 100 * n, 100, len(computed))
        for n, (tokens, computed) in enumerate(zip(texts, cached, strict=True))
    ]
    cache = cache_with(5000, *spans)
    cache.allocator.gaps = [(2000, 3000)]

    def common(tokens: list[int]) -> int:
        pairs = zip(tokens, prompt[:-1], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    seq = sequence(prompt, max_new_tokens=10)
    assert cache.place(seq)
    longest = max(map(common, cached), default=0)
    assert seq.num_computed_tokens == (longest if longest >= 16 else 0)


def test_span_grows_in_place_where_the_rows_behind_are_free(make, tokenizer, monkeypatch):
    monkeypatch.setattr("engine.sequence.DECODE_RESERVE", 10)
    runner = ScriptedRunner(tokenizer, "x" * 30)
    model = make(runner)
    assert asyncio.run(reply(model, [1], SamplingParams(40), open_ended=True))[0] == "x" * 30
    assert runner.moved == 0


def test_rows_that_cannot_be_copied_are_recomputed(make, tokenizer, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("engine.sequence.DECODE_RESERVE", 10)
    runner = ScriptedRunner(tokenizer, "x" * 30)
    monkeypatch.setattr(runner, "copy", full)
    model = make(runner)
    whole = model.engine.cache.allocator.allocate
    # Nothing grows where it is, so all that grows is moved.
    monkeypatch.setattr(
        model.engine.cache.allocator, "allocate", lambda size, at=None: None if at else whole(size)
    )
    text, _ = asyncio.run(reply(model, [1] * 20, SamplingParams(40), open_ended=True))
    assert text == "x" * 30
    assert max(max(step) for step in runner.steps[1:]) > 20
    assert asyncio.run(reply(model, [1] * 20 + [2] * 5))[0] == "x" * 12


def test_conversation_continues_in_its_own_kept_span(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    model = make(runner)
    asyncio.run(reply(model, [1] * 40))
    wait_for(lambda: not model.engine.scheduler.running)
    (kept,) = model.engine.cache.kept
    _, last = asyncio.run(reply(model, [*kept.tokens, 9, 9]))
    assert runner.moved == 0
    assert last.cached_tokens == len(kept.tokens)


def test_kept_prefixes_are_evicted_for_new_requests(make, tokenizer):
    runner = ScriptedRunner(tokenizer, rows=100)
    model = make(runner)
    for number in range(1, 8):
        assert asyncio.run(reply(model, [number] * 40))[0] == "hello"
    wait_for(lambda: not model.engine.scheduler.running)
    assert [span.tokens[0] for span in model.engine.cache.kept][-1] == 7
    assert whole_of(model.engine) == 100


def test_only_the_common_prefix_is_reused(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    model = make(runner)
    asyncio.run(reply(model, [1] * 40))
    wait_for(lambda: not model.engine.scheduler.running)
    _, last = asyncio.run(reply(model, [1] * 30 + [2] * 10))
    assert last.cached_tokens == 30
    assert sum(map(sum, runner.steps)) == 40 + 5 + 10 + 5
