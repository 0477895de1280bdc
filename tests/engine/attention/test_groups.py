"""Attention over spans where they lie says what it says over each span alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.attention import groups
from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import PADDING, Scoring, SlicedAttention
from engine.attention.kv_pool import LayerKVCache
from engine.sequence import KVSpan

HEADS, SHARING, WIDTH = 2, 3, 8

spans = st.lists(
    st.tuples(
        st.integers(0, 3),  # rows between it and the one before
        st.integers(1, 40),  # its room
        st.floats(0, 1),  # how much of that it has used
    ),
    min_size=1,
    max_size=9,
)


def work_of(drawn: list[tuple[int, int, float]]) -> list[tuple[KVSpan, int]]:
    work, start = [], 0
    for gap, room, used in drawn:
        cached = int(used * (room - 1))
        work.append((KVSpan([1] * (cached + 1), start + gap, room, cached), 1))
        start += gap + room
    return work


def regular(*counts: int, room: int) -> list[tuple[KVSpan, int]]:
    return [(KVSpan([1] * n, place * room, room, n - 1), 1) for place, n in enumerate(counts)]


@given(spans, st.none() | st.integers(1, 45))
def test_spans_read_together_are_read_as_if_alone(drawn, window):
    work = work_of(drawn)
    rows = max(span.start + span.room for span, _ in work)
    torch.manual_seed(0)
    # As the pool lies on a CPU, in the midst of other memory.
    keys, values = torch.randn(2, HEADS, rows, WIDTH).transpose(1, 2)
    query = torch.randn(len(work), HEADS * SHARING, WIDTH)
    parts = ForwardBatch(work, "sliced").groups
    together = torch.cat(
        [group.attend(query[group.tokens], keys, values, Scoring(window=window)) for group in parts]
    )
    for place, (span, _) in enumerate(work):
        own = range(span.start, span.start + span.num_computed_tokens + 1)[
            -window if window else None :
        ]
        key, value = (x[list(own)].transpose(0, 1)[None] for x in (keys, values))
        one = query[place].unflatten(0, (HEADS, SHARING))[None]
        alone = F.scaled_dot_product_attention(one, key, value).flatten(1, 2)
        torch.testing.assert_close(together[place], alone[0])


SCORINGS = {
    "plain": Scoring(),
    "a window": Scoring(window=7),
    "soft cap": Scoring(softcap=2.0),
    "sinks": Scoring(sinks=torch.linspace(-1, 2, HEADS * SHARING)),
    "sinks and a window": Scoring(window=7, sinks=torch.linspace(-1, 2, HEADS * SHARING)),
}


@pytest.mark.parametrize("how", SCORINGS)
@pytest.mark.parametrize("backend", ["sliced", "copied"])
def test_attention_in_parts_says_the_same_in_little_memory(monkeypatch, how, backend):
    """Of a chunk's and of a batch's scores and masks, no more are held than there may be."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, HEADS, 300, WIDTH).transpose(1, 2)
    decoding = [(KVSpan([1] * 25, 100 + 40 * n, 30, 20 + n), 1) for n in range(5)]
    work = [*decoding, (KVSpan([1] * 60, 3, 60, 13), 47)]
    query = torch.randn(52, HEADS * SHARING, WIDTH)
    sizes = []
    product = groups._scaled_dot_product
    scored = groups._scored_product

    def whole(q, k, v, mask, scoring):
        if mask is not None:
            sizes.append(mask.numel())
        return product(q, k, v, mask, scoring)

    def held(q, k, v, mask, scoring):
        sizes.append(q[..., 0].numel() * k.shape[2])
        return scored(q, k, v, mask, scoring)

    def attended() -> torch.Tensor:
        return torch.cat(
            [
                group.attend(
                    query[group.tokens], group.select(keys), group.select(values), SCORINGS[how]
                )
                for group in ForwardBatch(work, backend).groups
            ]
        )

    monkeypatch.setattr(groups, "_scaled_dot_product", whole)
    monkeypatch.setattr(groups, "_scored_product", held)
    wanted = attended()
    most = max(sizes)
    sizes.clear()
    monkeypatch.setattr(groups, "_MAX_SCORES", 700)
    torch.testing.assert_close(attended(), wanted)
    assert max(sizes) <= 700 < most


def test_spans_of_one_room_are_one_call():
    (group,) = ForwardBatch(regular(5, 3, 9, 7, room=10), "sliced").groups
    assert group.tokens == slice(0, 4)


def test_a_span_much_longer_than_its_neighbours_is_read_by_itself():
    runs = SlicedAttention.runs(regular(5, 6, PADDING + 20, 7, room=500))
    assert [len(run) for run in runs] == [2, 1, 1]


def test_nothing_is_read_behind_the_room_of_the_last_span():
    (first, _), (last, _) = work = regular(9, 2, room=10)
    last.room = 8
    assert [len(run) for run in SlicedAttention.runs(work)] == [1, 1]
    last.room = 9
    assert [len(run) for run in SlicedAttention.runs(work)] == [2]
    assert first.room == 10


def test_what_is_not_finite_in_the_cache_stays_with_its_own():
    layer = LayerKVCache(20)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).view(4, 1, 1)
    keys, values = layer.write(torch.arange(10, 14), bad, bad)
    assert keys.isfinite().all()
    assert values.isfinite().all()
    work = regular(3, 9, room=10)
    (group,) = ForwardBatch(work, "sliced").groups
    out = group.attend(torch.ones(2, 1, 1), keys, values, Scoring())
    assert out.isfinite().all()
    assert out[0] == 0  # its own rows, none of which is written
