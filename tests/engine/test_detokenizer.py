"""Ids become text: whole characters only, nothing after a stop string."""

import copy
from functools import cache

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer
from engine.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def text(tokenizer) -> ChatTokenizer:
    return ChatTokenizer(tokenizer)


def pushed(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    pieces = []
    for i in ids:
        pieces.append(detokenizer.push(i))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.flush()]


@given(content=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_pieces_join_to_the_text(text, content):
    ids = text.plain.encode(content, add_special_tokens=False).ids
    pieces = pushed(Detokenizer(text.plain), ids)
    assert "".join(pieces) == content
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_never_sent(text):
    ids = text.plain.encode("你好", add_special_tokens=False).ids
    assert pushed(Detokenizer(text.plain), ids[:4]) == ["", "", "你", "", ""]


@pytest.mark.parametrize("kind", ["index_like", "xverse_like"])
@given(ids=st.lists(st.integers(3, 400), max_size=40))
def test_no_ids_are_an_error(kind, ids):
    """These tokenizers have a token a byte, and a hot model says bytes that are no text."""
    tokenizer = spoken(kind)
    ids += tokenizer.encode("hello", add_special_tokens=False).ids
    assert "".join(pushed(Detokenizer(tokenizer), ids)).endswith("hello")


@cache
def spoken(kind: str):
    folder = ROOT / "tests" / "fixtures" / "tokenizers" / kind
    return load_tokenizer(folder).backend_tokenizer


def test_words_that_are_tokens_but_not_special_are_text(tokenizer):
    """A model that thinks aloud says so in such tokens, and its callers look for them."""
    thinking = copy.deepcopy(tokenizer)
    thinking.add_tokens(["<think>", "</think>"])
    text = ChatTokenizer(thinking)
    ids = text.backend.encode("<think>why</think>ok", add_special_tokens=False).ids
    assert 260 in ids
    assert "".join(pushed(Detokenizer(text.plain), ids)) == "<think>why</think>ok"


def test_special_tokens_are_not_text(text):
    ids = [*text.plain.encode("a").ids, 258, *text.plain.encode("b").ids]
    assert "".join(pushed(Detokenizer(text.plain), ids)) == "ab"


@given(
    content=st.text("ab\n你", max_size=30),
    stops=st.lists(st.text("ab\n你", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_is_never_sent(text, content, stops):
    ids = text.plain.encode(content, add_special_tokens=False).ids
    detokenizer = Detokenizer(text.plain, tuple(stops))
    said = "".join(pushed(detokenizer, ids))
    found = [content.find(stop) for stop in stops if stop in content]
    assert not any(stop in said for stop in stops)
    assert detokenizer.stopped == bool(found)
    if not found:
        assert said == content
    else:
        # What was said ends where some stop string begins, and at none that ended earlier.
        assert content.startswith(said)
        assert any(content[len(said) :].startswith(stop) for stop in stops)


def test_text_that_may_begin_a_stop_string_waits_and_no_more(text):
    detokenizer = Detokenizer(text.plain, ("END",))
    pieces = [detokenizer.push(i) for i in text.plain.encode("xENjoyEND").ids]
    assert pieces == ["x", "", "", "ENj", "o", "y", "", "", ""]
    assert detokenizer.stopped
