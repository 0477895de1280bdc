"""From logits to tokens, as transformers' own processors would."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.errors import InvalidInput
from engine.scheduling.sampler import sample_tokens, score_prompt
from engine.sequence import Sequence, Token
from tests.conftest import sequence


def openais_penalty(seq: Sequence, scores: torch.Tensor) -> torch.Tensor:
    """c[j] * frequency + (c[j] > 0) * presence, c counting the answer's tokens."""
    count = torch.zeros_like(scores)
    for token in seq.tokens[seq.num_prompt :]:
        count[0, token] += 1
    how = seq.params
    return count * how.frequency_penalty + (count > 0) * how.presence_penalty


def reference(seq: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities by transformers' own processors, in its order."""
    how = seq.params
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


def picked(seqs: list[Sequence], logits: torch.Tensor) -> list[int]:
    """Pick as the engine does, with the sequences' tokens in a pool of their own."""
    pool, at = [], 0
    for seq in seqs:
        seq.start = at
        pool += seq.tokens
        at = len(pool)
    return [token.id for token in sample_tokens(seqs, logits.clone(), torch.tensor(pool))]


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


@pytest.mark.slow
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
        patch.setattr("engine.scheduling.sampler.NUM_CANDIDATES", few)
        for _ in range(count):
            for seq, left in zip(seqs, draws, strict=True):
                seq.draw = left.random()
            for row, token in enumerate(picked(seqs, logits)):
                picks[row, token] += 1
    for row, probabilities in zip(picks, wanted, strict=True):
        assert not row[probabilities == 0].any(), "a token that the reference cuts off"
        assert torch.allclose(row / count, probabilities, atol=1.5 / count)


def test_temperature_zero_is_greedy_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.9], [1.0, 3.0, 2.9]])
    seqs = [sequence([1], temperature=0, repetition_penalty=p) for p in (1.0, 1.5)]
    assert picked(seqs, logits) == [1, 2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-30])
def test_tiny_temperatures_do_not_overflow(temperature):
    seqs = [sequence([1], temperature=temperature, top_k=k, top_p=1) for k in (0, 50)]
    assert picked(seqs, torch.linspace(-1e4, 1e4, 50).repeat(2, 1)) == [49, 49]


def test_draw_next_to_one_stays_within_top_k():
    seq = sequence([1], temperature=1.0, top_k=5, top_p=1)
    seq.draw = 1 - 2**-53
    logits = torch.linspace(0, 1, 300)[None]
    assert picked([seq], logits)[0] in logits[0].topk(5).indices


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.zeros(1, 10)
    logits[0, 3] = value
    with pytest.raises(ArithmeticError, match="finite"):
        picked([sequence([1], temperature=0)], logits)


class OnlyZero:
    """A guide that allows the first token alone."""

    def token_mask(self):
        return np.arange(4) == 0


@pytest.mark.parametrize(
    ("how", "more", "said"),
    [
        ({"frequency_penalty": 2.0}, {}, 2),
        ({"repetition_penalty": 9.0}, {}, 2),
        ({"logit_bias": ((0, 9.0), (1, -9.0))}, {}, 0),
        ({"suppress_tokens": (1, 2)}, {}, 0),
        ({"min_tokens": 5}, {"end_ids": frozenset({1})}, 2),
        ({}, {"guide": OnlyZero()}, 0),
        ({}, {"budget": SimpleNamespace(next_id=3)}, 3),
    ],
    ids=["penalty", "repetition", "bias", "banned", "no end yet", "guide", "budget"],
)
def test_what_is_told_is_the_models_own_whatever_the_parameters(how, more, said):
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).repeat(2, 1)
    seqs = [sequence([0], temperature=0, logprobs=n, **how) for n in (2, None)]
    for start, seq in enumerate(seqs):
        seq.start = 2 * start
        seq.tokens.append(1)
        for name, value in more.items():
            setattr(seq, name, value)
    told, silent = sample_tokens(seqs, logits.clone(), torch.tensor([0, 1, 0, 1]))
    own = logits[0].log_softmax(-1).tolist()
    assert told == Token(said, own[said], ((1, own[1]), (2, own[2])))
    assert silent == Token(said)


@pytest.mark.parametrize("chunks", [(7,), (3, 4), (1, 1, 5)])
@pytest.mark.parametrize("again", [1, 2])
def test_scores_of_a_prompt_that_is_computed_again(chunks, again):
    """A step that failed is tried once more; its scores are no more than those of its tokens."""
    ids = [1, 3, 0, 2, 2, 1, 3]
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    seq = sequence(ids, prompt_logprobs=1)
    for count in chunks:
        for _ in range(again):
            score_prompt(seq, logits[seq.num_computed_tokens :][:count])
        seq.num_computed_tokens += count
    own = logits.log_softmax(-1)
    assert [token.id for token in seq.prompt_scores] == ids[1:]
    for row, token in zip(own, seq.prompt_scores, strict=False):
        assert token.logprob == pytest.approx(row[token.id].item())
        assert token.top_logprobs == ((row.argmax().item(), pytest.approx(row.max().item())),)


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties_side_by_side_are_those_alone(penalty):
    """Answers of no, one and five tokens: what pads the shorter ones is not counted."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    logits[:, 7] += 4  # the last token of each, by which the shorter ones are padded
    how = {"temperature": 0.0, "min_p": 0.0, penalty: 2.0 if "rep" not in penalty else 3.0}
    seqs = []
    for said in ([], [7], [3, 3, 5, 3, 7]):
        seq = sequence([1, 2, 7][: 3 if penalty == "repetition_penalty" else 2], **how)
        seq.tokens += said
        seqs.append(seq)
    alone = [picked([seq], row[None])[0] for seq, row in zip(seqs, logits, strict=True)]
    assert picked(seqs, logits) == alone
    assert picked(seqs[::-1], logits.flip(0)) == alone[::-1]


def test_guide_that_fails_costs_its_own_sequence_only():
    class Broken:
        def token_mask(self):
            raise InvalidInput("the grammar is lost")

    seqs = [sequence([1], temperature=0.0) for _ in range(3)]
    seqs[1].guide = Broken()
    logits = torch.eye(3)
    tokens = sample_tokens(seqs, logits, torch.tensor([1, 1, 1]))
    assert [tokens[0].id, tokens[2].id] == [0, 2]
    assert isinstance(tokens[1], InvalidInput)


@pytest.mark.parametrize("least", [0, 1, 5])
def test_answer_may_end_exactly_behind_its_least_length(least):
    """An end that is wanted all along comes as the token after the last one that must be said."""
    seq = sequence([1], max_new_tokens=9, min_tokens=least, temperature=0.0)
    seq.end_ids = frozenset({4})
    wanted = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]])
    while not seq.done:
        (token,) = sample_tokens([seq], wanted.clone(), torch.tensor(seq.tokens))
        seq.append(token.id)
    assert seq.tokens == [1, *[3] * least, 4]
