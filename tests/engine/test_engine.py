"""The engine: what each request gets, whoever else is there."""

import asyncio
import gc
import random
import threading
import weakref
from dataclasses import replace
from itertools import pairwise

import psutil
import pytest
import torch
from conftest import ROOT, ScriptedRunner, chat_model, greedy, tiny_llama, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine import EngineError, EngineStopped
from engine.attention import Gathered, SpanLayer, Step
from engine.cache import Allocator
from engine.checkpoint import context_length, load_model
from engine.detokenizer import Detokenizer
from engine.engine import Engine
from engine.errors import ContextTooLong, QueueFull, StartError, StepFailed, TimedOut
from engine.families import Message
from engine.loading import attention_summary, load, probes, reference_logits, start_runner
from engine.model import ChatModel
from engine.runner import Runner, cache_budget, padded_size, why_not_in_place
from engine.sampler import draw_from_top, pick, pick_tokens
from engine.sampling_params import SamplingParams
from engine.sequence import Delta, Sequence, Span, Token
from engine.tokenizer import ChatTokenizer

FIXTURES = ROOT / "tests" / "fixtures"
FAMILIES = ["deepseek_v2", "index", "internlm2", "internlm2_ntk", "llama", "xverse"]


@pytest.fixture
def make(tokenizer):
    """Builds models and closes their engines afterwards."""
    made = []

    def build(runner: object, **options: int) -> ChatModel:
        made.append(chat_model(runner, tokenizer, **options))
        return made[-1]

    yield build
    for model in made:
        model.engine.close()


GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


async def reply(
    model: ChatModel, prompt: list[int], sampling: SamplingParams = GREEDY, **options: bool
):
    deltas = [delta async for delta in model.engine.stream(prompt, sampling, **options)]
    return "".join(delta.text for delta in deltas), deltas[-1]


# ---- A batch says what each would say alone


class Alone:
    """A family's tiny model: what `generate` says of a prompt by itself, and a runner."""

    def __init__(self, name: str):
        model, _ = load_model(FIXTURES / name, dtype="float32")
        self.context = min(context_length(model.config), 200)
        self.plain = [reference_logits(model, ids) for ids in probes(model)]
        generator = torch.Generator().manual_seed(1)
        lengths = [n for n in (1, 2, 3, 9, 17, 31, 64, 130) if n + 3 < self.context]
        self.prompts = [torch.randint(5, 290, (n,), generator=generator).tolist() for n in lengths]
        # Some begin alike, as a conversation's turns do.
        long = max(self.prompts, key=len)
        half = len(long) // 2
        self.prompts += [long[:half], [*long[:half], 9, 8, 7], [*long[: half + 3], 6, 5]]
        self.answers = [self._greedy(model, prompt) for prompt in self.prompts]
        turn = self.answers[-3][:6]
        self.prompts.append([*long[:half], *turn, 4, 3])
        self.answers.append(self._greedy(model, self.prompts[-1]))
        self.runner = Runner(model, "1GiB", max_rows=600)
        # What CUDA cards do, by the letter of what torch says of its own parts.
        with pytest.MonkeyPatch.context() as patch:
            as_on_a_card(patch)
            self.on_cards = Runner(model, "1GiB", max_rows=600)

    def _greedy(self, model, prompt: list[int]) -> list[int]:
        return greedy(model, prompt, min(24, self.context - len(prompt)))


ALONE: dict[str, Alone] = {}


def alone(name: str) -> Alone:
    if name not in ALONE:
        ALONE[name] = Alone(name)
    return ALONE[name]


def flash_attention(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale,
    seqused_k,
):
    """What the documentation of torch.nn.attention.varlen says of its kernel, in plain words."""
    assert not dropout_p
    assert not return_debug_mask
    for numbers in (cu_seq_q, cu_seq_k, seqused_k):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    begins, starts, used = cu_seq_q.tolist(), cu_seq_k.tolist(), seqused_k.tolist()
    assert starts == sorted(starts)
    assert len(begins) == len(starts) == len(used) + 1
    assert begins[-1] == len(query)
    assert max_k >= max(used)
    assert max_q == max(end - begin for begin, end in pairwise(begins))
    outs = []
    for (begin, end), start, total in zip(pairwise(begins), starts, used, strict=False):
        mask = None
        if is_causal:
            mask = torch.ones(end - begin, total).tril(total - (end - begin)).bool()
        states = query[begin:end], key[start : start + total], value[start : start + total]
        q, k, v = (x.transpose(0, 1)[None] for x in states)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs), *[torch.empty(0)] * 4


def capture(compute, device, memory):
    """A CUDA graph's manners: only what lies in the same tensors counts when it is replayed."""
    out = compute().clone()
    return out, lambda: out.copy_(compute())


def as_on_a_card(patch, attention=flash_attention, capturing=capture):
    """Let the CPU pass for a card, by the stand-ins above."""
    patch.setattr(Runner, "asynchronous", True)
    patch.setattr("engine.runner.why_not_in_place", lambda layers: None)
    patch.setattr("engine.attention.flash_attention", attention)
    patch.setattr("engine.cuda_graph.capture", capturing)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


class Told(Detokenizer):
    """Text that is the ids themselves, so that tests compare tokens."""

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


async def tokens(engine: Engine, prompt: list[int], count: int, **options) -> list[int]:
    sampling = SamplingParams(count, temperature=0)
    text = [d.text async for d in engine.stream(prompt, sampling, **options)]
    return [int(token) for token in "".join(text).split()]


asks = st.lists(
    st.tuples(
        st.integers(0, 100),  # which prompt
        st.integers(1, 24),  # how many tokens
        st.integers(0, 3),  # event-loop turns before the next one arrives
        st.booleans(),  # whether its length is open
    ),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    asks=asks,
    chunk=st.integers(1, 40),
    rows=st.integers(160, 600),
    batch=st.integers(1, 6),
    reuse=st.booleans(),
    card=st.booleans(),
)
def test_a_batch_says_what_each_would_say_alone(
    monkeypatch, name, asks, chunk, rows, batch, reuse, card
):
    """Staggered arrivals, mixed lengths, chunks, tiny budgets, spans that move and are reused.

    Half of them as a card would do it: in place, and single tokens as CUDA graphs.
    """
    family = alone(name)
    assert family.on_cards.in_place
    assert not family.runner.in_place
    as_on_a_card(monkeypatch)
    monkeypatch.setattr("engine.engine.Detokenizer", Told)
    monkeypatch.setattr("engine.sequence.GROWTH", 5)
    monkeypatch.setattr("engine.sequence.MIN_PREFIX", 2)
    runner = family.on_cards if card else family.runner
    if card and not runner.graphs:
        runner.capture_graphs(6, 200)
        assert [r.size for r in runner.graphs] == [1, 2, 4, 6]
    runner.pool.rows, whole = rows, runner.pool.rows
    engine = Engine(runner, None, set(), max_batch=batch, chunk=chunk, reuse=reuse)
    runner.pool.rows = whole

    async def ask_all():
        tasks, expected = [], []
        for which, count, pause, open_ended in asks:
            prompt = family.prompts[which % len(family.prompts)]
            answer = family.answers[which % len(family.prompts)][:count]
            expected.append(answer)
            ask = tokens(engine, prompt, len(answer), open_ended=open_ended)
            tasks.append(asyncio.create_task(ask))
            for _ in range(pause):
                await asyncio.sleep(0.002)
        return await asyncio.gather(*tasks), expected

    try:
        answers, expected = asyncio.run(ask_all())
        assert answers == expected
        wait_for(lambda: not engine.running)
        assert whole_of(engine) == rows
        assert reuse or not engine.num_reused
    finally:
        engine.close()


def whole_of(engine: Engine) -> int:
    """All rows there are, free or kept; none twice."""
    spans = [(span.start, span.room) for span in engine.prefixes]
    pieces = sorted(spans + engine.allocator.gaps)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(pieces))
    return sum(size for _, size in pieces)


def test_packing_the_wrong_span_is_noticed():
    """The property above would fail if a sequence read its neighbour's rows."""
    family = alone("llama")
    one, other = Span(family.prompts[4], start=0), Span(family.prompts[5], start=100)
    right = family.runner.forward([(one, 17), (other, 31)])
    one.num_cached = other.num_cached = 10
    one.start = 100
    assert not torch.allclose(family.runner.forward([(one, 7)])[0], right[0], atol=1e-2)


# ---- Sampling


def openais_penalty(seq: Sequence, scores: torch.Tensor) -> torch.Tensor:
    """c[j] * frequency + (c[j] > 0) * presence, c counting the answer's tokens."""
    count = torch.zeros_like(scores)
    for token in seq.tokens[seq.num_prompt :]:
        count[0, token] += 1
    how = seq.sampling
    return count * how.frequency_penalty + (count > 0) * how.presence_penalty


def reference(seq: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities by transformers' own processors, in its order."""
    how = seq.sampling
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(how.repetition_penalty)])
    chain.append(lambda _, scores: scores - openais_penalty(seq, scores))
    chain.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        chain.append(TopKLogitsWarper(how.top_k))
    chain.append(TopPLogitsWarper(how.top_p))
    chain.append(MinPLogitsWarper(how.min_p))
    return chain(torch.tensor([seq.tokens]), logits[None].clone())[0].softmax(-1)


class Draws(random.Random):
    """Hands out evenly spaced draws, so that counting picks measures probabilities."""

    def __init__(self, count: int):
        super().__init__()
        self.left = [(i + 0.5) / count for i in range(count)]

    def random(self) -> float:
        return self.left.pop()


def sequence(prompt: list[int], **how: float) -> Sequence:
    return Sequence(prompt, sampling=SamplingParams(**how), detokenizer=None, loop=None)


def picked(seqs: list[Sequence], logits: torch.Tensor) -> list[int]:
    """Pick as the engine does, with the sequences' tokens in a pool of their own."""
    pool, at = [], 0
    for seq in seqs:
        seq.start = at
        pool += seq.tokens
        at = len(pool)
    return pick(seqs, logits.clone(), torch.tensor(pool))


hows = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 50, 150, 299, 300, 1000]),
        "top_p": st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.1, 2.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.75, -1.0]),
    }
)


@pytest.mark.parametrize("few", [4, 100, 1000])
@settings(max_examples=30, deadline=None)
@given(hows=st.lists(hows, min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_sampling_equals_transformers_processors(few, hows, seed):
    """In a batch of mixed settings, each row's picks have the reference's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, count = 300, 400
    logits = torch.randn(len(hows), vocabulary, generator=generator) * 3
    seqs = [sequence([1, 2, 3, 5, 8, 1][: 3 + i], **how) for i, how in enumerate(hows)]
    for i, seq in enumerate(seqs):
        seq.tokens += [7, 7, 2][:i]
    wanted = [reference(seq, row) for seq, row in zip(seqs, logits, strict=True)]
    picks = torch.zeros(len(hows), vocabulary)
    draws = [Draws(count) for _ in seqs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.sampler.NUM_CANDIDATES", few)
        for _ in range(count):
            for seq, left in zip(seqs, draws, strict=True):
                seq.draw = left.random()
            for row, token in enumerate(picked(seqs, logits)):
                picks[row, token] += 1
    for row, probabilities in zip(picks, wanted, strict=True):
        assert not row[probabilities == 0].any(), "a token that the reference cuts off"
        assert torch.allclose(row / count, probabilities, atol=1.5 / count)


def test_temperature_zero_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.9], [1.0, 3.0, 2.9]])
    seqs = [sequence([1], temperature=0, repetition_penalty=p) for p in (1.0, 1.5)]
    assert picked(seqs, logits) == [1, 2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-30])
def test_no_temperature_overflows(temperature):
    seqs = [sequence([1], temperature=temperature, top_k=k, top_p=1) for k in (0, 50)]
    assert picked(seqs, torch.linspace(-1e4, 1e4, 50).repeat(2, 1)) == [49, 49]


def test_a_draw_next_to_one_takes_nothing_that_was_cut_off():
    seq = sequence([1], temperature=1.0, top_k=5, top_p=1)
    seq.draw = 1 - 2**-53
    logits = torch.linspace(0, 1, 300)[None]
    assert picked([seq], logits)[0] in logits[0].topk(5).indices


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(value):
    logits = torch.zeros(1, 10)
    logits[0, 3] = value
    with pytest.raises(ArithmeticError, match="finite"):
        picked([sequence([1], temperature=0)], logits)


def test_a_seed_gives_the_same_answer_whoever_else_is_there(make):
    family = alone("llama")
    model = make(family.runner)
    how = SamplingParams(20, temperature=1.5, top_k=0, top_p=0.95, seed=5)

    async def crowd(others: int):
        jobs = [reply(model, p, SamplingParams(24, 2.0)) for p in family.prompts[:others]]
        return (await asyncio.gather(reply(model, [9, 8, 7], how), *jobs))[0][0]

    once, again = asyncio.run(crowd(0)), asyncio.run(crowd(6))
    assert once == again
    assert asyncio.run(reply(model, [9, 8, 7], SamplingParams(20, 1.5, 0, 0.95, seed=6)))[0] != once


def test_a_seeded_answer_stays_what_it_is_when_a_neighbour_fails(make):
    family = alone("llama")
    how = SamplingParams(20, temperature=1.5, top_k=0, top_p=0.95, seed=5)

    async def crowd(fault: bool) -> str:
        model = make(family.runner)
        asked = asyncio.create_task(reply(model, [9, 8, 7], how))
        await asyncio.sleep(0)
        other = asyncio.create_task(reply(model, [1, 2, 3], replace(how, seed=6)))
        with pytest.MonkeyPatch.context() as patch:
            if fault:  # in the middle of the answer, where both are sampled together
                patch.setattr("engine.sampler.draw_from_top", failing_beside(5, draw_from_top))
                with pytest.raises(StepFailed):
                    await other
            return (await asked)[0]

    assert asyncio.run(crowd(True)) == asyncio.run(crowd(False))


def failing_beside(seed: int, draw):
    """Fails, once the seeded answer has begun, for whoever else is sampled."""

    def drawn(seqs: list[Sequence], *given: object, **named: object) -> object:
        if any(seq.sampling.seed != seed and seq.num_completion > 2 for seq in seqs):
            raise RuntimeError("a fault of the sampler")
        return draw(seqs, *given, **named)

    return drawn


def test_what_is_told_is_the_models_own_whatever_the_knobs():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).repeat(2, 1)
    how = {"temperature": 0, "frequency_penalty": 2.0}
    seqs = [sequence([0], logprobs=2, **how), sequence([0], **how)]
    for start, seq in enumerate(seqs):
        seq.start = 2 * start
        seq.tokens.append(1)
    told, silent = pick_tokens(seqs, logits.clone(), torch.tensor([0, 1, 0, 1]))
    own = logits[0].log_softmax(-1).tolist()
    assert told == Token(2, own[2], ((1, own[1]), (2, own[2])))
    assert silent == Token(2)


# ---- Room


def test_no_room_is_lost_in_ten_thousand_operations():
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


@pytest.mark.parametrize("queues", [False, True])
def test_no_room_is_lost_whatever_becomes_of_requests(tokenizer, monkeypatch, queues):
    """Add, step, cancel, finish, move and fail at random, 10,000 operations in all."""
    monkeypatch.setattr("engine.sequence.GROWTH", 3)
    chance = random.Random(1)
    runner = ScriptedRunner(tokenizer, "x" * 30, rows=300)
    runner.asynchronous = queues
    text = ChatTokenizer(tokenizer)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    engine = Engine(runner, text.plain, {256}, max_batch=6, chunk=16)
    loop = asyncio.new_event_loop()
    live: list[Sequence] = []
    for _ in range(10_000):
        chosen = chance.random()
        if chosen < 0.3 and engine.num_waiting < 10:
            prompt = [1] * chance.randint(0, 40) + chance.choices((1, 2), k=chance.randint(1, 20))
            sampling = SamplingParams(chance.randint(1, 40))
            seq = Sequence(
                prompt,
                sampling=sampling,
                detokenizer=Detokenizer(text.plain),
                loop=loop,
                open_ended=chance.random() < 0.5,
            )
            live.append(seq)
            engine._inbox.put(seq)
        elif chosen < 0.4 and live:
            live.pop(chance.randrange(len(live))).done = True
        else:
            runner.failure = RuntimeError("a fault") if chosen > 0.97 else None
            runner.poison = live[-1].tokens[: live[-1].num_prompt] if live else None
            if engine._inbox.qsize() or engine.running or engine.waiting:
                engine._receive()
                engine._admit()
                engine._step()
                engine._retire()
        assert sum(seq.room for seq in engine.running) + whole_of(engine) == 300
    assert runner.moved > 100
    for seq in live:
        seq.done = True
    engine._inbox.put(live[-1])
    engine._receive()
    engine._emit()
    engine._retire()
    assert whole_of(engine) == 300
    assert engine.num_reused > 100
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_the_budget_is_a_size_or_a_fraction():
    cpu = torch.device("cpu")
    assert cache_budget("4GiB", cpu) == 4 * 2**30
    assert cache_budget("500MB", cpu) == 500 * 10**6
    free = psutil.virtual_memory().available
    assert 0.4 * free < cache_budget("0.5", cpu) < 0.6 * free


def test_the_budget_buys_rows(tiny_model):
    runner = Runner(tiny_llama(), "1MiB")
    # Two layers of keys and values, two heads of eight float32 each.
    assert runner.rows == 2**20 // (2 * 2 * 2 * 8 * 4)


def test_a_budget_that_holds_nothing_is_refused():
    with pytest.raises(StartError, match="--cache-memory"):
        Runner(tiny_llama(), "1KB")


def test_a_client_that_leaves_while_others_are_retired_loses_no_room(tokenizer, monkeypatch):
    """`done` is set by the event loop at any moment, so it may be looked at only once."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    runner = ScriptedRunner(tokenizer, rows=100)
    engine = Engine(runner, tokenizer.backend_tokenizer, {256}, reuse=False)
    loop = asyncio.new_event_loop()
    seqs = [
        Sequence([1], sampling=GREEDY, detokenizer=Detokenizer(engine.tokenizer), loop=loop)
        for _ in range(3)
    ]
    for seq in seqs:
        engine._inbox.put(seq)
    engine._receive()
    engine._admit()
    seqs[0].done = True
    engine.on_end = lambda seq: setattr(seqs[2], "done", True)
    engine._retire()
    assert engine.running == seqs[1:]
    seqs[1].done = True
    engine._retire()
    loop.close()
    assert engine.allocator.gaps == [(0, 100)]


@pytest.fixture
def by_hand(tokenizer, monkeypatch):
    """An engine beside a pretended card, without a thread, and one sequence in it."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    runner = ScriptedRunner(tokenizer, rows=100)
    runner.asynchronous = True
    engine = Engine(runner, tokenizer.backend_tokenizer, {256}, reuse=False)
    loop = asyncio.new_event_loop()
    detokenizer = Detokenizer(engine.tokenizer)
    seq = Sequence(
        [1], sampling=replace(GREEDY, max_new_tokens=1), detokenizer=detokenizer, loop=loop
    )
    engine._inbox.put(seq)
    engine._receive()
    engine._admit()
    yield engine, seq
    loop.close()


def said(seq: Sequence) -> list[Delta | EngineError]:
    seq.loop.run_until_complete(asyncio.sleep(0))
    return [seq.outbox.get_nowait() for _ in range(seq.outbox.qsize())]


def test_an_answer_that_is_through_is_told_though_the_engine_ends(by_hand):
    engine, seq = by_hand
    engine._step()
    assert said(seq) == []
    engine._inbox.put(None)
    engine._run()
    (last, dead) = said(seq)
    assert (last.text, last.finish_reason) == ("h", "length")
    assert isinstance(dead, EngineStopped)


def test_an_answer_that_is_through_is_not_late(by_hand):
    engine, seq = by_hand
    ended = []
    engine.timeout, engine.on_end = 0.0, ended.append
    engine._step()
    engine._retire()
    assert not ended, "its text is not told yet"
    engine._step()
    engine._retire()
    assert ended == [seq]
    assert not seq.failed
    assert [item.finish_reason for item in said(seq)] == ["length"]
    assert engine.allocator.gaps == [(0, 100)]


def test_what_a_request_finds_of_itself_is_no_reuse(by_hand):
    engine, seq = by_hand
    engine._reuse(seq, 1)
    assert (seq.num_cached, seq.num_reused, engine.num_reused) == (1, 0, 0)


def test_a_steps_memory_is_free_as_soon_as_it_is_done():
    """Not at a collection, which may be hundreds of steps away."""
    gc.disable()
    try:
        step = Step([(Span([1, 2], room=2), 2)])
        there = weakref.ref(step.on(torch.device("meta")).read)
        assert there() is not None
        del step
        assert there() is None
    finally:
        gc.enable()


def test_those_who_leave_are_told_of_once_wherever_they_were(make, runner):
    """Running, waiting, served or failed: each sequence is accounted for once, with its label."""
    ended: list[tuple[str, str | None, bool]] = []
    model = make(runner, max_batch=2)
    model.engine.on_end = lambda seq: ended.append((seq.label, seq.finish_reason, seq.failed))
    runner.hold()

    async def ask(label: str, prompt: list[int]) -> None:
        async for _ in model.engine.stream(prompt, SamplingParams(20), label=label):
            pass

    async def main() -> None:
        jobs = {name: asyncio.create_task(ask(name, [n])) for n, name in enumerate("abcd", 1)}
        await asyncio.to_thread(wait_for, lambda: len(model.engine.running) == 2)
        jobs["d"].cancel()
        runner.poison, runner.failure = [2], RuntimeError("broken")
        runner.free()
        await asyncio.gather(*jobs.values(), return_exceptions=True)
        await asyncio.to_thread(wait_for, lambda: len(ended) == 4)

    asyncio.run(main())
    assert sorted(ended) == [
        ("a", "stop", False),
        ("b", None, True),
        ("c", "stop", False),
        ("d", None, False),
    ]


@pytest.mark.parametrize(
    ("queues", "order"),
    [
        (False, "compute tell compute tell compute tell"),
        (True, "compute compute tell compute tell"),
    ],
)
def test_a_card_computes_while_the_text_before_is_told(make, runner, monkeypatch, queues, order):
    done, forward, tell = [], runner.forward, Sequence.emit
    runner.asynchronous = queues

    def noted(self: Sequence, token: Token) -> Delta:
        done.append("tell")
        return tell(self, token)

    monkeypatch.setattr(runner, "forward", lambda work: done.append("compute") or forward(work))
    monkeypatch.setattr(Sequence, "emit", noted)
    assert asyncio.run(reply(make(runner), [1]))[0] == "hello"
    assert " ".join(done).startswith(order)
    assert done.count("tell") == 6


def test_what_a_card_computed_beyond_a_stop_string_is_not_told(make, runner):
    runner.asynchronous = True
    model = make(runner)
    text, last = asyncio.run(reply(model, [1], replace(GREEDY, stop=("ll",))))
    assert (text, last.finish_reason, last.completion_tokens) == ("he", "stop", 4)
    assert len(runner.steps) == 5
    # A stop string at the very end is still the reason.
    text, last = asyncio.run(reply(model, [2], replace(GREEDY, stop=("ll",), max_new_tokens=4)))
    assert (text, last.finish_reason, last.completion_tokens) == ("he", "stop", 4)
    wait_for(lambda: not model.engine.running)


def test_a_prompt_waits_for_one_that_computes_the_same(make, tokenizer):
    """A class that asks at once with one long system text has it computed once."""
    runner = ScriptedRunner(tokenizer)
    model = make(runner, chunk=50)
    system = list(range(100, 220))

    async def main() -> None:
        runner.hold()
        jobs = [reply(model, [*system, n]) for n in range(5)]
        everyone = asyncio.gather(*jobs)
        await asyncio.to_thread(wait_for, lambda: model.engine.num_waiting == 4)
        runner.free()
        assert {text for text, _ in await everyone} == {"hello"}

    asyncio.run(main())
    computed = sum(n for step in runner.steps for n in step)
    assert computed == 121 + 4 * 1 + 5 * 5
    assert model.engine.num_reused == 4 * 120


def test_who_waits_for_another_keeps_nobody_from_passing(make, tokenizer, monkeypatch):
    """As many as like: it needs no room, and will have what it waits for."""
    monkeypatch.setattr("engine.engine.MAX_PASSES", 2)
    runner = ScriptedRunner(tokenizer)
    model = make(runner, chunk=16)
    prompt = list(range(60, 260)) * 2

    async def main() -> None:
        runner.hold()
        asking = [asyncio.create_task(reply(model, [*prompt, n])) for n in range(2)]
        await asyncio.to_thread(wait_for, lambda: model.engine.num_waiting == 1)
        asking += [asyncio.create_task(reply(model, [n])) for n in range(5)]
        await asyncio.sleep(0.1)
        runner.permits.release(2)
        await asyncio.to_thread(wait_for, lambda: len(model.engine.running) == 6)
        assert len(model.engine.waiting) == 1
        runner.free()
        await asyncio.gather(*asking)

    asyncio.run(main())


def test_who_waits_for_another_goes_on_when_that_one_leaves(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    model = make(runner, chunk=16)
    prompt = list(range(100, 200))

    async def main() -> None:
        runner.hold()
        first = asyncio.create_task(reply(model, [*prompt, 1]))
        await asyncio.to_thread(wait_for, lambda: model.engine.running)
        second = asyncio.create_task(reply(model, [*prompt, 2]))
        await asyncio.to_thread(wait_for, lambda: model.engine.num_waiting == 1)
        runner.permits.release()
        first.cancel()
        runner.free()
        assert (await second)[0] == "hello"

    asyncio.run(main())


def test_rows_that_cannot_be_copied_are_computed_again(make, tokenizer, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("engine.sequence.GROWTH", 10)
    runner = ScriptedRunner(tokenizer, "x" * 30)
    monkeypatch.setattr(runner, "copy", full)
    model = make(runner)
    whole = model.engine.allocator.allocate
    # Nothing grows where it is, so all that grows is moved.
    monkeypatch.setattr(
        model.engine.allocator, "allocate", lambda size, at=None: None if at else whole(size)
    )
    text, _ = asyncio.run(reply(model, [1] * 20, SamplingParams(40), open_ended=True))
    assert text == "x" * 30
    assert max(max(step) for step in runner.steps[1:]) > 20
    assert asyncio.run(reply(model, [1] * 20 + [2] * 5))[0] == "x" * 12


def engine_at_rest(tokenizer, monkeypatch, rows: int) -> Engine:
    """Whose thread does not run, so that a test takes its steps."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    text = ChatTokenizer(tokenizer)
    return Engine(ScriptedRunner(tokenizer, rows=rows), text.plain, {256})


def test_prefixes_are_not_evicted_where_the_rows_between_would_not_join(tokenizer, monkeypatch):
    engine = engine_at_rest(tokenizer, monkeypatch, 1000)
    engine.allocator.gaps = []
    kept = [Span([1] * 400, 0, 400, 400), Span([2] * 398, 602, 398, 398)]
    engine.prefixes = list(kept)
    assert engine._reserve(700) is None
    assert (engine.prefixes, engine.allocator.gaps) == (kept, [])
    assert engine._reserve(398) is not None
    assert engine.prefixes == kept[1:]


def test_who_wants_as_much_as_one_that_found_no_room_does_not_look(tokenizer, monkeypatch):
    engine = engine_at_rest(tokenizer, monkeypatch, 1000)
    engine.allocator.gaps = [(0, 400), (602, 398)]
    engine.running = [sequence([9] * 20)]
    tried = []
    reserve = engine._reserve
    monkeypatch.setattr(
        engine, "_reserve", lambda size, **how: tried.append(size) or reserve(size, **how)
    )
    wanted = [500, 700, 500, 600, 300]
    for size in wanted:
        engine.waiting.append(sequence([1] * 10, max_new_tokens=size - 10))
    engine._admit()
    assert tried == [500, 300]
    assert [seq.max_tokens for seq in engine.running[1:]] == [300]
    assert [seq.max_tokens for seq in engine.waiting] == wanted[:4]


def test_an_answer_grows_in_place_where_the_rows_behind_it_are_free(make, tokenizer, monkeypatch):
    monkeypatch.setattr("engine.sequence.GROWTH", 10)
    runner = ScriptedRunner(tokenizer, "x" * 30)
    model = make(runner)
    assert asyncio.run(reply(model, [1], SamplingParams(40), open_ended=True))[0] == "x" * 30
    assert runner.moved == 0


def test_a_long_prompt_that_waits_for_another_is_compared_once(tokenizer, monkeypatch):
    engine = engine_at_rest(tokenizer, monkeypatch, 20_000)
    seqs = [
        Sequence([5] * 2000 + [n], sampling=GREEDY, detokenizer=None, loop=None) for n in range(5)
    ]
    compared = []
    whole = Span.common_prefix
    monkeypatch.setattr(
        Span, "common_prefix", lambda *given, **how: compared.append(1) or whole(*given, **how)
    )
    engine.waiting.extend(seqs)
    for step in range(4):
        engine._admit()
        assert engine.running == seqs[:1]
        assert len(compared) == 4, step
        seqs[0].num_cached += 500
    seqs[0].num_cached = 2001
    engine._admit()
    assert engine.running == seqs
    assert [seq.num_reused for seq in seqs] == [0, 2000, 2000, 2000, 2000]


# ---- Who goes when


def test_answers_keep_flowing_while_a_long_prompt_is_read(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x" * 50)
    model = make(runner, chunk=16)

    async def both():
        first = asyncio.create_task(reply(model, [1], SamplingParams(50)))
        await asyncio.to_thread(wait_for, lambda: len(runner.steps) > 3)
        return await asyncio.gather(first, reply(model, [2] * 160, SamplingParams(3)))

    asyncio.run(both())
    chunked = [step for step in runner.steps if max(step) > 1]
    assert len(chunked) >= 10
    assert all(max(step) <= 16 and 1 in step for step in chunked)


def test_prompts_share_a_step_up_to_the_chunk(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x")
    runner.hold()
    model = make(runner, chunk=12)

    async def three():
        jobs = [reply(model, [i] * 8, GREEDY) for i in (1, 2, 3)]
        tasks = [asyncio.create_task(job) for job in jobs]
        await asyncio.sleep(0.1)
        runner.free()
        await asyncio.gather(*tasks)

    asyncio.run(three())
    chunks = [[new for new in step if new > 1] for step in runner.steps]
    assert sum(map(sum, chunks)) == 24
    assert max(map(sum, chunks)) == 12
    assert [4, 8] in map(sorted, chunks)


def test_a_small_request_passes_a_large_one_only_so_often(make, tokenizer, monkeypatch):
    """While one request holds most of the room, a large one waits; small ones pass, a few."""
    monkeypatch.setattr("engine.engine.MAX_PASSES", 3)
    runner = ScriptedRunner(tokenizer, "x" * 500, rows=200)
    runner.pause = 0.01
    model = make(runner, max_batch=8, context_length=200)
    order = []

    async def ask(name: str, prompt: int, most: int):
        await reply(model, [1] * prompt, SamplingParams(most))
        order.append(name)

    async def crowd():
        jobs = [asyncio.create_task(ask("holder", 50, 100))]
        await asyncio.to_thread(wait_for, lambda: model.engine.running)
        jobs.append(asyncio.create_task(ask("large", 100, 20)))
        await asyncio.sleep(0.05)
        jobs += [asyncio.create_task(ask(f"small{i}", 5, 5)) for i in range(8)]
        await asyncio.gather(*jobs)

    asyncio.run(crowd())
    assert order[: order.index("holder")] == ["small0", "small1", "small2"]


def test_an_open_answer_that_finds_no_room_waits_and_goes_on(make, tokenizer, monkeypatch):
    monkeypatch.setattr("engine.sequence.GROWTH", 10)
    runner = ScriptedRunner(tokenizer, "x" * 60, rows=120)
    model = make(runner)

    async def two():
        jobs = [reply(model, [i] * 20, SamplingParams(70), open_ended=True) for i in (1, 2)]
        return await asyncio.gather(*jobs)

    answers = asyncio.run(two())
    assert [text for text, _ in answers] == ["x" * 60] * 2
    assert any(step.count(1) < len(step) and max(step) > 20 for step in runner.steps), "it waited"


def test_what_never_fits_is_refused(make, tokenizer):
    model = make(ScriptedRunner(tokenizer, rows=50))
    with pytest.raises(ContextTooLong, match="50"):
        asyncio.run(reply(model, [1] * 30, SamplingParams(21)))


# ---- Reuse and back-pressure


def talk(model: ChatModel, turns: int) -> list[str]:
    """The answers of a conversation, each turn's history holding those before."""
    answers, messages = [], []

    async def turn() -> str:
        prompt = model.prepare(messages, {"max_new_tokens": 8, "temperature": 0.0}, False)
        return "".join([delta.text async for delta in model.answer(prompt)])

    for number in range(turns):
        messages.append({"role": "user", "content": f"{number} more words" * 9})
        answers.append(asyncio.run(turn()))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_the_tenth_turn_does_not_pay_for_the_first_nine(demo_folder, monkeypatch):
    """The real model in float32: the same answers, for a small part of the prompts' tokens."""
    computed: dict[bool, int] = {True: 0, False: 0}
    answers = {}
    for reuse in (True, False):
        model = load(demo_folder, dtype="float32", reuse=reuse)
        right = model.engine.runner.forward

        def counted(work, right=right, reuse=reuse):
            computed[reuse] += sum(new for _, new in work)
            return right(work)

        monkeypatch.setattr(model.engine.runner, "forward", counted)
        answers[reuse] = talk(model, 10)
        model.engine.close()
    assert answers[True] == answers[False]
    assert computed[False] > 4 * computed[True]


def test_a_conversation_goes_on_in_the_span_it_left(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    model = make(runner)
    asyncio.run(reply(model, [1] * 40))
    wait_for(lambda: not model.engine.running)
    (kept,) = model.engine.prefixes
    asyncio.run(reply(model, [*kept.tokens, 9, 9]))
    assert runner.moved == 0
    assert model.engine.num_reused == len(kept.tokens)


def test_what_is_kept_gives_way_to_who_needs_the_room(make, tokenizer):
    runner = ScriptedRunner(tokenizer, rows=100)
    model = make(runner)
    for number in range(1, 8):
        assert asyncio.run(reply(model, [number] * 40))[0] == "hello"
    wait_for(lambda: not model.engine.running)
    assert [span.tokens[0] for span in model.engine.prefixes][-1] == 7
    assert whole_of(model.engine) == 100


def test_other_tokens_are_never_taken_for_ones_own(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    model = make(runner)
    asyncio.run(reply(model, [1] * 40))
    wait_for(lambda: not model.engine.running)
    asyncio.run(reply(model, [1] * 30 + [2] * 10))
    assert model.engine.num_reused == 30
    assert sum(map(sum, runner.steps)) == 40 + 5 + 10 + 5


def test_a_full_queue_is_refused_and_says_when_to_come_back(make, tokenizer):
    runner = ScriptedRunner(tokenizer)
    runner.hold()
    model = make(runner, max_batch=1, max_waiting=2)

    async def crowd():
        jobs = [asyncio.create_task(reply(model, [1])) for _ in range(8)]
        await asyncio.sleep(0.2)
        runner.free()
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(crowd())
    refused = [answer for answer in answers if isinstance(answer, QueueFull)]
    assert 5 <= len(refused) <= 6
    assert all(1 <= refusal.retry_after <= 60 for refusal in refused)
    assert sum(isinstance(answer, tuple) for answer in answers) == 8 - len(refused)


# ---- Ending, leaving, failing


def test_an_end_token_ends_and_is_not_text(make, tokenizer):
    text, last = asyncio.run(reply(make(ScriptedRunner(tokenizer, "bye")), [1]))
    assert (text, last.finish_reason) == ("bye", "stop")
    assert (last.prompt_tokens, last.completion_tokens) == (1, 4)


def test_leaving_early_cancels(make, tokenizer):
    model = make(ScriptedRunner(tokenizer, "x" * 100))

    async def leave():
        stream = model.engine.stream([1], SamplingParams(100))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    wait_for(lambda: not model.engine.running)
    assert len(model.engine.runner.steps) < 100


def test_a_request_that_takes_too_long_is_ended(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x" * 400)
    runner.pause = 0.01
    model = make(runner, timeout=0.2)
    with pytest.raises(TimedOut):
        asyncio.run(reply(model, [1], SamplingParams(400)))
    wait_for(lambda: not model.engine.running)
    assert whole_of(model.engine) == runner.rows


def test_a_request_that_waits_too_long_is_ended_too(make, tokenizer):
    runner = ScriptedRunner(tokenizer, "x" * 400)
    runner.pause = 0.01
    model = make(runner, timeout=0.3, max_batch=1)

    async def two():
        first = asyncio.create_task(reply(model, [1], SamplingParams(400)))
        await asyncio.sleep(0.05)
        return await asyncio.gather(first, reply(model, [1]), return_exceptions=True)

    assert [type(answer) for answer in asyncio.run(two())] == [TimedOut] * 2


@pytest.mark.parametrize("fault", [RuntimeError("a fault"), torch.OutOfMemoryError("full")])
def test_a_fault_costs_only_the_request_that_causes_it(make, tokenizer, fault):
    runner = ScriptedRunner(tokenizer)
    runner.failure, runner.poison = fault, [7, 7]
    model = make(runner)

    async def crowd():
        prompts = [[1], [2, 3], [7, 7], [4] * 30, [5]]
        return await asyncio.gather(*(reply(model, p) for p in prompts), return_exceptions=True)

    answers = asyncio.run(crowd())
    assert isinstance(answers.pop(2), StepFailed)
    assert [text for text, _ in answers] == ["hello"] * 4
    wait_for(lambda: not model.engine.running)
    assert whole_of(model.engine) == runner.rows


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_is_gone_ends_the_engine(make, tokenizer, monkeypatch):
    def gone() -> None:
        raise RuntimeError("CUDA error: device-side assert")

    runner = ScriptedRunner(tokenizer)
    runner.failure = RuntimeError("CUDA error")
    monkeypatch.setattr(runner, "check_device", gone)
    model = make(runner)
    with pytest.raises(EngineStopped, match="device-side assert"):
        asyncio.run(reply(model, [1]))


def test_a_failed_step_costs_only_its_own_request(make, tokenizer):
    model = make(ScriptedRunner(tokenizer))
    model.engine.runner.failure = RuntimeError("a fault")
    with pytest.raises(StepFailed):
        asyncio.run(reply(model, [1]))
    model.engine.runner.failure = None
    assert asyncio.run(reply(model, [1]))[0] == "hello"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_fails_everyone_at_once(make, tokenizer):
    model = make(ScriptedRunner(tokenizer))
    model.engine.runner.failure = SystemExit("the end")
    with pytest.raises(EngineStopped, match="the end"):
        asyncio.run(reply(model, [1]))
    with pytest.raises(EngineStopped, match="the end"):
        asyncio.run(reply(model, [1]))
    assert isinstance(model.engine.failure, SystemExit)


# ---- The check at start


def start(model) -> Runner:
    return start_runner(model, "1MiB")


def test_a_model_that_packs_is_let_in():
    assert start(tiny_llama()).rows > 1000


def test_a_model_whose_attention_is_not_reached_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(StartError, match=r"Bloom|attention"):
        start(model.eval())


def test_a_model_whose_attention_we_do_not_honour_is_refused():
    config = MistralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    )
    with pytest.raises(StartError, match="sliding_window"):
        start(MistralForCausalLM(config).eval())


def test_a_model_with_layers_of_another_kind_is_refused():
    """Their window may stand in the mask alone, where the short check would not notice it."""
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(StartError, match="chunked_attention"):
        start(model)


def test_a_model_that_comes_out_differently_is_refused(monkeypatch):
    """As one would whose attention read a neighbour's row."""
    right = Gathered.attend
    monkeypatch.setattr(Gathered, "attend", lambda *given: right(*given) * 1.01)
    with pytest.raises(StartError, match="does not batch"):
        start(tiny_llama())


def test_a_card_is_used_for_what_it_can(monkeypatch):
    as_on_a_card(monkeypatch)
    runner = start(tiny_llama())
    assert {r.size for r in runner.graphs} == {1, 2, 4, 8, 16, 32, 64}
    assert attention_summary(runner).endswith(
        "in place, CUDA graphs for 1, 2, 4, 8, 16, 32, 64 sequences"
    )


def test_a_kernel_that_attends_otherwise_is_not_used(monkeypatch, caplog):
    """As one would that aligns a chunk's first token with the span's first row."""
    as_on_a_card(monkeypatch, lambda *given, **named: [1.01 * flash_attention(*given, **named)[0]])
    runner = start(tiny_llama())
    assert not runner.in_place
    assert not runner.graphs
    assert runner.difference < 1e-5
    assert "does not batch" in caplog.text
    assert "over copied rows (this model does not batch" in attention_summary(runner)


def test_what_cannot_be_captured_is_computed(monkeypatch, caplog):
    def refuse(compute, device, memory):
        raise RuntimeError("operation not permitted when stream is capturing")

    as_on_a_card(monkeypatch, capturing=refuse)
    runner = start(tiny_llama())
    assert runner.in_place
    assert not runner.graphs
    assert "not permitted when stream is capturing" in caplog.text
    assert attention_summary(runner).endswith("CUDA graphs for no sequences")


class Lying(torch.Tensor):
    """A tensor of the CPU's that says it is a card's."""

    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("key", "value", "dtype", "capability", "reason"),
    [
        ((2, 64), (2, 64), torch.bfloat16, (8, 6), None),
        ((2, 64), (2, 64), torch.float16, (9, 0), None),
        ((2, 64), (2, 64), torch.float32, (8, 6), "float32"),
        ((2, 64), (2, 64), torch.float16, (7, 5), "older than Ampere"),
        ((1, 512), (1, 64), torch.bfloat16, (8, 6), "512 wide, values 64"),
        ((2, 264), (2, 264), torch.bfloat16, (8, 6), "264 wide"),
        ((2, 20), (2, 20), torch.bfloat16, (8, 6), "20 wide"),
    ],
)
def test_attention_is_in_place_where_the_kernel_can(
    monkeypatch, key, value, dtype, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    layer = SpanLayer(None)
    layer.keys, layer.values = (
        torch.zeros(3, *shape, dtype=dtype).as_subclass(Lying) for shape in (key, value)
    )
    found = why_not_in_place([layer])
    assert found is None if reason is None else reason in found
    layer.keys = layer.keys.as_subclass(torch.Tensor)
    assert why_not_in_place([layer]) == "layers on cpu"
    monkeypatch.setattr("engine.attention.flash_attention", None)
    assert "no FlashAttention" in why_not_in_place([layer])


@pytest.mark.parametrize("news", [(1, 1), (5, 3)])
def test_the_kernel_takes_what_it_is_given(news):
    """Torch's own, which here is told shapes alone: its arguments, and the shape of its answer."""
    work = [(Span([7] * (9 + new), n * 20, 20, 9), new) for n, new in enumerate(news)]
    (group,) = Step(work, in_place=True).on(torch.device("meta")).groups
    query = torch.empty(sum(news), 4, 64, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(50, 2, 64, dtype=torch.bfloat16, device="meta")
    assert group.attend(query, keys, keys, 0.5).shape == query.shape


def test_steps_of_half_precision_have_few_sizes(monkeypatch):
    """Of each size something stays in memory; and what fills a step up changes nothing in it."""
    model = tiny_llama().bfloat16()
    runner = Runner(model, "4MiB")
    sizes, right = set(), Step

    def step(work, in_place):
        sizes.add(sum(new for _, new in work))
        return right(work, in_place)

    monkeypatch.setattr("engine.attention.Step", step)
    neighbour = Span(list(range(40)), 700, 40)
    runner.forward([(neighbour, 40)])
    kept = [x[700:740].clone() for layer in runner.pool.layers for x in (layer.keys, layer.values)]
    for total in [*range(1, 200), 300, 500, 512, 576]:
        work = [(Span([7] * total, 0, total), total)]
        filled = runner.forward(work)
        assert filled.shape == (1, 260)
        runner.pads = False
        assert torch.allclose(filled, runner.forward(work), atol=0.05)
        runner.pads = True
    for total in range(200, 577):
        assert total <= padded_size(total) < 1.5 * total
    assert len({padded_size(total) for total in range(1, 577)}) == 38
    after = [x[700:740] for layer in runner.pool.layers for x in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert not Runner(tiny_llama(), "4MiB").pads


@pytest.mark.parametrize(("kind", "most"), [("dynamic", 64), ("longrope", 32), ("linear", 64)])
def test_rope_that_moves_with_the_batch_is_held_to_its_first_length(kind, most):
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = {"rope_type": kind, "factor": 2.0}
    if kind == "longrope":
        config.rope_parameters["original_max_position_embeddings"] = 32
    assert context_length(config) == most


# ---- Preparing a prompt


def test_nobody_waits_for_an_engine_that_has_ended(tokenizer):
    model = chat_model(ScriptedRunner(tokenizer), tokenizer)
    model.engine.close()
    with pytest.raises(EngineStopped, match="stopping"):
        asyncio.run(reply(model, [1]))


def test_silence_brings_a_sign_of_life(make, runner, monkeypatch):
    monkeypatch.setattr("engine.engine.HEARTBEAT", 0.05)
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


def turns(*lengths: int) -> list[Message]:
    """A conversation whose turns have so many characters, each a token, in each message."""
    roles = ("user", "assistant")
    return [{"role": role, "content": "x" * n} for n in lengths for role in roles][:-1]


def test_a_default_length_is_cut_to_the_room(make, runner):
    model = make(runner, context_length=100)
    prompt = model.prepare(turns(50), {}, False)
    assert prompt.sampling.max_new_tokens == 100 - len(prompt.ids)


def test_a_length_that_does_not_fit_is_refused_with_both_numbers(make, runner):
    model = make(runner, context_length=100)
    with pytest.raises(ContextTooLong, match=r"53 tokens.*48.*100") as refusal:
        model.prepare(turns(50), {"max_new_tokens": 48}, False)
    assert refusal.value.param == "max_length"
    with pytest.raises(ContextTooLong) as refusal:
        model.prepare(turns(100), {}, False)
    assert refusal.value.param == "prompt"


def test_truncate_drops_the_oldest_turns_and_as_few_as_it_can(make, runner):
    model = make(runner, context_length=100)
    messages = [{"role": "system", "content": "s"}, *turns(10, 10, 10, 10)]
    for answer, dropped in ((12, 0), (13, 1), (36, 1), (60, 2), (84, 3)):
        prompt = model.prepare(messages, {"max_new_tokens": answer}, True)
        assert prompt.dropped_turns == dropped, answer
        assert model.tokenizer.special["<|system|>"] in prompt.ids
    with pytest.raises(ContextTooLong):
        model.prepare(messages, {"max_new_tokens": 90}, True)


def test_truncate_keeps_what_fits_where_the_default_answer_would_fill_the_context(make, runner):
    model = make(runner, context_length=200)
    prompt = model.prepare(turns(10, 10, 10), {}, True)
    assert (prompt.dropped_turns, prompt.sampling.max_new_tokens) == (0, 200 - len(prompt.ids))


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
