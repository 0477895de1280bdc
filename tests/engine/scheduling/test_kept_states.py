"""Slots for states: none is lost or changed while somebody holds it, and prefixes are found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.state_pool import StatePool, state_groups
from engine.scheduling.kv_cache import SpanCache
from engine.sequence import KVSpan
from tests.conftest import sequence

IDLE = KVSpan([0], 1000, 1)


def cache_of(slots: int, rows: int = 1000) -> SpanCache:
    return SpanCache(rows, lambda source, start, count: True, True, StatePool(slots))


def compute(cache: SpanCache, seq, count: int) -> None:
    """What a step does to a sequence's states, without a model."""
    cache.free_slots([(seq, count)])
    state_groups(cache.states.pool, [(seq, count)], IDLE)
    seq.num_computed_tokens += count
    cache.advance(seq)


def computed(cache: SpanCache, tokens: list[int], **fields):
    seq = sequence(tokens, max_new_tokens=4)
    for name, value in fields.items():
        setattr(seq, name, value)
    assert cache.place(seq)
    compute(cache, seq, seq.pending)
    return seq


def reused(cache: SpanCache, tokens: list[int]) -> int:
    seq = sequence(tokens, max_new_tokens=4)
    assert cache.place(seq)
    cache.release(seq)
    return seq.num_reused


def counts(cache: SpanCache, *running) -> list[int]:
    held = [0] * cache.states.pool.slots
    held[cache.states.pool.idle] += 1
    for span in [*cache.kept, *running]:
        for slot in span.states.values():
            held[slot] += 1
    return held


def test_state_is_there_exactly_if_tokens_are():
    cache = cache_of(9)
    seq = sequence([*range(40)], max_new_tokens=4)
    assert cache.place(seq)
    assert not seq.states
    for count in (7, 20, 13):
        compute(cache, seq, count)
        assert seq.num_computed_tokens in seq.states
        assert seq.states.keys() <= {32, seq.num_computed_tokens}


def test_failed_step_leaves_rubbish_that_is_freed():
    """Its slots serve the next try; positions above what is computed are never read."""
    cache = cache_of(9)
    seq = computed(cache, [*range(30)])
    before = dict(seq.states)
    state_groups(cache.states.pool, [(seq, 1)], IDLE)  # and then it fails
    assert before.items() < seq.states.items()
    cache.states.pool.tidy(seq)
    assert seq.states == before
    assert counts(cache, seq) == cache.states.pool.users


def test_step_writes_no_slot_that_is_held():
    cache = cache_of(20)
    first = computed(cache, [*range(40)])
    cache.release(first)
    second = computed(cache, [*range(33), 7, 7])
    assert second.num_reused == 32
    held = {slot for span in cache.kept for slot in span.states.values()}
    [group] = state_groups(cache.states.pool, [(second, 1)], IDLE)
    assert group.source.tolist() == [second.states[second.num_computed_tokens]]
    assert not held & {*group.target.tolist()}
    assert not {*group.source.tolist()} & {*group.target.tolist()}


def test_prefix_is_reused_only_where_a_state_is():
    cache = cache_of(20)
    cache.release(computed(cache, [*range(45)]))
    assert reused(cache, [*range(45), 1, 2]) == 45  # of the whole text
    assert reused(cache, [*range(44), 1, 2]) == 32  # near its end
    assert reused(cache, [*range(31), 1, 2]) == 0
    assert reused(cache, [*range(32)]) == 0  # never all of a prompt


def test_state_stands_where_the_next_turn_begins():
    cache = cache_of(20)
    cache.release(computed(cache, [*range(45)], num_stable=39))
    assert reused(cache, [*range(39), 1, 2]) == 39
    assert reused(cache, [*range(38), 1, 2]) == 0


def test_third_prompt_hits_where_two_parted():
    """So system prompts are found without knowing what they are."""
    cache = cache_of(30)
    hits = []
    for n in range(3):
        seq = computed(cache, [*range(80), *[100 + n] * 30])
        hits.append(seq.num_reused)
        cache.release(seq)
    assert hits == [0, 0, 80]


def test_follower_waits_for_a_state_only_if_it_comes():
    cache = cache_of(30)
    leader = sequence([*range(60)], max_new_tokens=4)
    assert cache.place(leader)
    compute(cache, leader, 20)
    follower = sequence([*range(40), 7, 7, 7], max_new_tokens=4)
    assert cache.prefix_in_prefill(follower) is leader
    assert 32 in leader.kept_states
    late = sequence([*range(18), 7, 7, 7], max_new_tokens=4)
    assert cache.prefix_in_prefill(late) is None  # the leader has passed it


def test_same_prompts_wait_for_the_longest_state():
    cache = cache_of(30)
    leader = sequence([*range(60)], max_new_tokens=4)
    leader.num_stable = 55
    assert cache.place(leader)
    compute(cache, leader, 20)
    assert cache.prefix_in_prefill(sequence([*range(60)], max_new_tokens=4)) is leader
    assert leader.kept_states == {55}


def test_collided_hashes_reuse_no_state(monkeypatch):
    monkeypatch.setattr("engine.scheduling.prefix_index.hash", lambda tokens: 1, raising=False)
    cache = cache_of(20)
    cache.release(computed(cache, [*range(45)]))
    assert reused(cache, [*range(200, 245), 1]) == 0


def test_states_unused_longest_go_first():
    cache = cache_of(9)
    cache.release(computed(cache, [*range(40)]))  # keeps two
    cache.release(computed(cache, [*range(100, 140)]))
    assert reused(cache, [*range(36), 1, 2]) == 32  # of use again
    while len(cache.states.pool.free) > 1:
        cache.states.pool.take()
    work = [(sequence([n] * 9, max_new_tokens=4), 9) for n in range(4)]
    cache.free_slots(work)  # three are given up
    assert reused(cache, [*range(100, 136), 1, 2]) == 0
    assert reused(cache, [*range(36), 1, 2]) == 32


def test_wishes_of_running_ones_go_last():
    cache = cache_of(4)
    seqs = [sequence([n] * 40, max_new_tokens=4) for n in (1, 2)]
    for seq in seqs:
        assert cache.place(seq)
        assert seq.kept_states == {32}
    work = [(seq, 40) for seq in seqs]
    cache.free_slots(work)
    assert not any(seq.kept_states for seq in seqs)
    state_groups(cache.states.pool, work, IDLE)
    assert counts(cache, *seqs) == cache.states.pool.users


def test_spoilt_sequence_leaves_nothing():
    cache = cache_of(9)
    cache.release(computed(cache, [*range(45)], spoilt=True))
    assert not cache.kept
    assert counts(cache) == cache.states.pool.users
    assert reused(cache, [*range(45), 1]) == 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([5, 7, 12, 40]))
def test_no_slot_is_lost(chance, slots):
    """Prompts that share beginnings come, are computed in chunks, move and go, at random."""
    cache = cache_of(slots, rows=400)
    most, running = cache.states.pool.most_sequences, []
    for _ in range(60):
        if len(running) < most and chance.random() < 0.5:
            shared = [chance.randrange(2)] * chance.choice([0, 16, 33])
            own = [chance.randrange(3) for _ in range(chance.randrange(1, 40))]
            seq = sequence([*shared, *own], max_new_tokens=chance.randrange(1, 30))
            seq.num_stable = chance.choice([None, len(seq.tokens) // 2])
            if cache.prefix_in_prefill(seq) is None and cache.place(seq):
                running.append(seq)
        work = [(s, min(s.pending, chance.randrange(1, 30))) for s in running if s.pending]
        cache.free_slots(work)
        if work:
            state_groups(cache.states.pool, work, IDLE)
        for seq, count in work:
            if chance.random() < 0.8:  # the others' step failed
                seq.num_computed_tokens += count
                cache.advance(seq)
                seq.tokens += [chance.randrange(3)] if not seq.pending else []
        for seq in [s for s in running if chance.random() < 0.2]:
            seq.spoilt = chance.random() < 0.2
            running.remove(seq)
            cache.release(seq)
        assert counts(cache, *running) == cache.states.pool.users
        for span in running:
            assert not span.num_computed_tokens or span.num_computed_tokens in span.states
    for seq in running:
        cache.release(seq)
    assert counts(cache) == cache.states.pool.users


def test_pool_keeps_what_it_does_not_write():
    pool = StatePool(4)
    pool.write((0, "conv", 0), torch.tensor([1, 2]), torch.tensor([[1.0], [2.0]]))
    pool.write((0, "conv", 0), torch.tensor([2]), torch.tensor([[3.0]]))
    assert pool.read((0, "conv", 0), torch.tensor([2, 1, 3])).tolist() == [[3.0], [1.0], [0.0]]
