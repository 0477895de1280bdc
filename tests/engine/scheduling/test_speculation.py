"""A draft changes no token, whoever made it; and it is given where it makes answers faster."""

import asyncio
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import StepFailed
from engine.layers.weight_format import convert
from engine.runner.create import create_runner
from engine.runner.runner import Runner
from engine.sampling_params import SamplingParams
from engine.scheduling.draft_source import NUM_KINDS, Draft, DraftSource
from engine.scheduling.engine import Engine
from engine.scheduling.speculation import Drafts, Speculation
from engine.sequence import Prompt, Sequence
from tests.conftest import tiny_llama, wait_for, whole_of
from tests.engine.alone import alone, needs_kernels
from tests.engine.scheduling.test_batching import Told, fixtures_once

# A row more costs a tenth of a step.
CHEAP = {1: 1.0, 11: 2.0}
VOCABULARY = 260


class Hostile(Speculation):
    """Any drafts: the answers that will come, with faults, ends and special tokens in them."""

    def __init__(self, seed: int, truths: list[list[int]]):
        super().__init__(CHEAP)
        self.random, self.truths = random.Random(seed), truths

    def plan(self, decoding, prompt_tokens):
        for seq in decoding:
            most = min(seq.room - len(seq.tokens), seq.max_tokens - len(seq.tokens) - 1)
            truth = self.random.choice(self.truths)[seq.num_completion :]
            draft = truth[: max(0, self.random.randrange(-1, most + 1))] if most > 0 else []
            seq.draft = [
                self.random.randrange(VOCABULARY) if self.random.random() < 0.2 else token
                for token in draft
            ]


class Counting:
    """A guide whose next tokens depend on all before: what llguidance's does, without a grammar."""

    def __init__(self, state: int = 1):
        self.state = state
        self.matcher = SimpleNamespace(consume_token=self.take, validate_tokens=len)

    def copy(self):
        return Counting(self.state)

    def take(self, token: int) -> None:
        self.state = (self.state * 31 + token) % 997

    def token_mask(self):
        return (np.arange(VOCABULARY) * 7 + self.state) % 3 > 0


how = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 20]),
    top_p=st.sampled_from([0.8, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    logit_bias=st.sampled_from([(), ((9, 2.0), (40, -1.0))]),
    min_tokens=st.integers(0, 5),
    stop=st.sampled_from([(), ("9",)]),
    stop_token_ids=st.sampled_from([(), (7, 41), tuple(range(0, 260, 11))]),
    begin_suppress_tokens=st.sampled_from([(), (3, 4)]),
)
asks = st.lists(
    st.tuples(st.integers(0, 11), how, st.booleans(), st.booleans()), min_size=1, max_size=4
)


@cache
def exact_runner() -> Runner:
    """A tiny model's whose layers are our kernels' calls."""
    model = tiny_llama(head_dim=16).bfloat16()
    convert(model, "our kernels")
    return create_runner(model, "64MiB", max_rows=600)


PROMPTS = [
    [(7 * n + which) % 11 + 6 for n in range(size)]
    for which, size in enumerate((1, 2, 3, 9, 17, 31, 33, 40, 40, 64, 64, 90))
]


def answers_of(engine: Engine, prompts: list[Prompt]) -> list[list[tuple]]:
    """What each answer says, piece by piece: text, tokens with their logprobs, how it ends."""

    async def one(prompt: Prompt) -> list[tuple]:
        told = [d async for d in engine.stream_all([prompt])]
        return [(d.text, d.token, d.finish_reason, d.completion_tokens) for d in told]

    async def all_of_them() -> list[list[tuple]]:
        return await asyncio.gather(*map(one, prompts))

    try:
        return asyncio.run(all_of_them())
    finally:
        wait_for(lambda: not engine.scheduler.running)
        assert whole_of(engine) == engine.cache.rows
        engine.close()


@needs_kernels
@settings(max_examples=12, **fixtures_once)
@given(asks=asks, seed=st.integers(0, 99), chunk=st.integers(3, 40))
def test_draft_changes_no_token(monkeypatch, asks, seed, chunk):
    monkeypatch.setattr("engine.scheduling.output.Detokenizer", Told)
    monkeypatch.setattr("engine.sequence.DECODE_RESERVE", 7)
    runner = exact_runner()
    assert runner.same_bits
    prompts = [
        Prompt(PROMPTS[which], params, open_ended, Counting() if guide else None)
        for which, params, open_ended, guide in asks
    ]
    chunks = {"prefill_chunk": chunk}
    without = answers_of(Engine(runner, None, {5}, **chunks), prompts)
    truths = [[int(n) for text, *_ in told for n in text.split()] for told in without]
    hostile = Hostile(seed, truths)
    for speculation in (hostile, Speculation(CHEAP)):
        engine = Engine(runner, None, {5}, speculation=speculation, **chunks)
        assert answers_of(engine, prompts) == without


def speculating(monkeypatch, prompts: list[Prompt], speculation: Speculation) -> list[list[int]]:
    """The tokens of the tiny model's answers."""
    monkeypatch.setattr("engine.scheduling.output.Detokenizer", Told)
    engine = Engine(alone("llama").runner, None, set(), speculation=speculation)
    answers = answers_of(engine, prompts)
    return [[int(n) for text, *_ in told for n in text.split()] for told in answers]


def test_repetition_takes_fewer_steps(monkeypatch):
    family = alone("llama")
    steps = []
    forward = family.runner.forward
    monkeypatch.setattr(
        family.runner, "forward", lambda work: (steps.append(work), forward(work))[1]
    )
    prompt = Prompt(family.prompts[3], SamplingParams(100, temperature=0))
    (once,) = speculating(monkeypatch, [prompt], Speculation({1: 1.0, 2: 9.0}))
    assert len(steps) == len(once) == 100  # where rows cost that much there are no drafts
    steps.clear()
    told = Prompt(prompt.ids, prompt.params, prediction=tuple(once))
    speculation = Speculation({1: 1.0, 33: 1.01})
    assert speculating(monkeypatch, [told], speculation) == [once]
    assert len(steps) < 12
    assert speculation.num_accepted == 100 - len(steps)
    assert speculation.num_drafted >= speculation.num_accepted


def test_prediction_is_counted():
    family = alone("llama")
    prompt = Prompt(family.prompts[3], SamplingParams(20, temperature=0))

    async def last(prompt: Prompt):
        engine = Engine(family.runner, None, set(), speculation=Speculation({1: 1.0, 33: 1.01}))
        try:
            return [d async for d in engine.stream_all([prompt])][-1]
        finally:
            engine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.scheduling.output.Detokenizer", Told)
        answer = family.answers[3]
        right = asyncio.run(last(Prompt(prompt.ids, prompt.params, prediction=tuple(answer))))
        wrong = asyncio.run(last(Prompt(prompt.ids, prompt.params, prediction=(7, 7, 7))))
        none = asyncio.run(last(prompt))
    assert right.accepted_prediction_tokens > 12
    assert right.rejected_prediction_tokens == 0
    assert wrong.rejected_prediction_tokens > 0
    assert (none.accepted_prediction_tokens, none.rejected_prediction_tokens) == (0, 0)


def test_failing_draft_fails_no_request(monkeypatch):
    """A step that fails with drafts is computed without; rows that fail are tried again."""
    family = alone("llama")
    forward = family.runner.forward
    failed = []

    def failing(work):
        if any(span.tokens[-1] == 13 and new > 1 and len(span.tokens) > 9 for span, new in work):
            failed.append(work)
            raise RuntimeError("a fault of the model")
        logits = forward(work)
        if len(logits) > 1 and len(failed) % 2:
            logits[1:] = float("nan")
        return logits

    monkeypatch.setattr(family.runner, "forward", failing)
    prompt = Prompt(family.prompts[3], SamplingParams(20, temperature=0))
    hostile = Hostile(3, [family.answers[3], [13] * 24])
    assert speculating(monkeypatch, [prompt], hostile) == [family.answers[3][:20]]
    assert failed


def test_failing_request_fails_with_its_draft(monkeypatch):
    family = alone("llama")
    monkeypatch.setattr(family.runner, "forward", lambda work: 1 / 0)
    with pytest.raises(StepFailed):
        speculating(monkeypatch, [Prompt([1, 2, 3], SamplingParams(9))], Speculation(CHEAP))


# ---- How long drafts are


class Certain:
    """Proposes the same kind of match at all times."""

    def __init__(self, kind: int):
        self.kind = kind

    def propose(self, most: int) -> Draft:
        return Draft([1] * most, self.kind, False)


def decoding(kinds: list[int | None]) -> list[Sequence]:
    seqs = []
    for kind in kinds:
        seq = Sequence([1, 2, 3], params=SamplingParams(100), room=100)
        seq.drafts = None if kind is None else Drafts(Certain(kind))
        seqs.append(seq)
    return seqs


def planned(speculation: Speculation, seqs: list[Sequence]) -> list[int]:
    speculation.plan(seqs, 0)
    return [len(seq.draft) for seq in seqs]


SURE = NUM_KINDS - 1


def test_surer_drafts_are_longer():
    (unsure, sure) = (planned(Speculation(CHEAP), decoding([kind]))[0] for kind in (1, SURE))
    assert 0 < unsure < sure
    assert planned(Speculation(CHEAP), decoding([None])) == [0]


def test_wrong_drafts_end_by_themselves():
    speculation, seqs = Speculation(CHEAP), decoding([SURE, SURE])
    for _ in range(60):
        speculation.plan(seqs, 0)
        speculation.note(seqs[0], 0)
        speculation.note(seqs[1], len(seqs[1].draft))
    assert planned(speculation, seqs)[0] == 0
    assert planned(speculation, seqs)[1] > 3
    for _ in range(1000):  # and are tried again after a while
        speculation.plan(seqs, 0)
    assert planned(speculation, seqs[:1])[0] > 0


def test_expensive_rows_are_not_taken():
    seqs = decoding([SURE] * 4)
    assert sum(planned(Speculation({1: 1.0, 2: 2.0, 4: 4.0}), seqs)) == 0
    assert sum(planned(Speculation({1: 1.0, 4: 1.1, 16: 1.2}), seqs)) > 20


def test_others_are_not_held_up():
    """Beside a sequence without a draft a step is only a little longer."""
    costs = {1: 1.0, 101: 11.0}
    alone_, (beside, _) = (
        planned(Speculation(costs), decoding([SURE])),
        planned(Speculation(costs), decoding([SURE, None])),
    )
    assert beside <= 2 < alone_[0]


def test_slow_drafts_are_given_up():
    speculation, seqs = Speculation(CHEAP), decoding([SURE])
    for _ in range(20):
        (drafted,) = planned(speculation, seqs)
        speculation.costs.note(1, drafted, 8.0 if drafted else 1.0)
    assert planned(speculation, seqs) == [0]


def test_draft_ends_where_its_answer_does():
    seq = Sequence([9, 1, 2, 3, 5, 6, 7, 1, 2, 3], params=SamplingParams(50), room=60)
    seq.end_ids = frozenset({6})
    seq.drafts = Drafts(DraftSource(seq.tokens))
    Speculation({1: 1.0, 33: 1.0}).plan([seq], 0)
    assert seq.draft == [5, 6]
