"""What is proposed behind a text, and what that costs."""

import random

from engine.scheduling import draft_source
from engine.scheduling.draft_source import NUM_KINDS, DraftSource


def test_repetition_is_proposed_from_the_prompt():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 31, 3, 4, 5]
    source = DraftSource(text)
    draft = source.propose(4)
    assert draft.tokens == [6, 7, 8, 9]
    text += [6, 7]
    assert source.propose(3).tokens == [8, 9, 30]


def test_longest_match_is_proposed_from():
    one, other = [1, 5, 6, 7, 8], [2, 5, 6, 7, 9]
    text = [*one, *other, *one[:4]]
    assert DraftSource(text).propose(1).tokens == [8]
    assert DraftSource([*text[:-4], *other[:4]]).propose(1).tokens == [9]


def test_unknown_text_gets_no_draft():
    assert DraftSource([*range(100)]).propose(8).tokens == []
    assert DraftSource([1, 2]).propose(8).tokens == []
    assert DraftSource([]).propose(8).tokens == []


def test_loop_is_proposed_for_ever():
    assert DraftSource([9, 8, *[1, 2, 3] * 3]).propose(7).tokens == [1, 2, 3, 1, 2, 3, 1]


def test_edited_text_is_found_again():
    file = [*range(10, 60)]
    text = [*file, 1]
    source = DraftSource(text)

    def after(*tokens: int) -> list[int]:
        text.extend(tokens)
        return source.propose(3).tokens

    assert after(10, 11, 12) == [13, 14, 15]
    assert after(70) == [14, 15, 16]  # in the place of 13
    assert after(14, 15) == [16, 17, 18]
    text += [71, 72, 73, 74]  # more than was there
    assert source.propose(3).tokens == []
    assert after(16, 17) == [18, 19, 20]
    assert after(22, 23) == [24, 25, 26]  # some left out


def test_prediction_begins_with_the_answer():
    text = [1, 2, 3]
    source = DraftSource(text, (50, 51, 52, 53))
    draft = source.propose(2)
    assert (draft.tokens, draft.predicted) == ([50, 51], True)
    text += [50, 51, 60]
    assert source.propose(2).tokens == [53]


def test_another_answer_is_proposed_from():
    text = [1, 2, 3, 4]
    source = DraftSource(text)
    source.add([3, 4, 20, 21, 22, 23])
    text += [20, 21, 22]
    draft = source.propose(2)
    assert (draft.tokens, draft.predicted) == ([23], False)


def test_surer_kinds_are_of_longer_matches():
    text = [*range(40)]
    kinds = [DraftSource([*text, *text[: n + 3]]).propose(1).kind for n in range(36)]
    assert kinds == sorted(kinds)
    assert kinds[0] > 0
    assert kinds[-1] == NUM_KINDS - 1


def test_index_keeps_within_its_bounds(monkeypatch):
    monkeypatch.setattr(draft_source, "_MAX_INDEXED", 50)
    monkeypatch.setattr(draft_source, "_CATCH_UP", 20)
    text = [random.Random(n).randrange(9) for n in range(400)]
    source = DraftSource(text, tuple(range(400)))
    (own, predicted) = source.indexes
    for _ in range(4):
        before = own.end
        source.propose(8)
        assert own.end - before <= 20
    assert own.end == 400
    assert len(own._earlier) == 50
    assert len(predicted.tokens) == 50
