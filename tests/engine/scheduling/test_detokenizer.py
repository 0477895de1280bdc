"""Ids become text: whole characters only, nothing after a stop string."""

import copy
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.prompt.tokenizer import ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer
from engine.scheduling.detokenizer import Detokenizer
from tests.conftest import ROOT


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
def test_pieces_join_to_the_whole_text(text, content):
    ids = text.plain.encode(content, add_special_tokens=False).ids
    pieces = pushed(Detokenizer(text.plain), ids)
    assert "".join(pieces) == content
    assert not any("\ufffd" in piece for piece in pieces)


def test_incomplete_character_is_not_sent(text):
    ids = text.plain.encode("你好", add_special_tokens=False).ids
    assert pushed(Detokenizer(text.plain), ids[:4]) == ["", "", "你", "", ""]


@pytest.mark.parametrize("kind", ["index_like", "xverse_like"])
@given(ids=st.lists(st.integers(3, 400), max_size=40))
def test_any_ids_can_be_decoded(kind, ids):
    """These tokenizers have a token a byte, and a hot model says bytes that are no text."""
    tokenizer = spoken(kind)
    ids += tokenizer.encode("hello", add_special_tokens=False).ids
    assert "".join(pushed(Detokenizer(tokenizer), ids)).endswith("hello")


@cache
def spoken(kind: str):
    folder = ROOT / "tests" / "fixtures" / "tokenizers" / kind
    return load_tokenizer(folder).backend_tokenizer


def test_added_tokens_that_are_not_special_are_text(tokenizer):
    """A model that thinks aloud says so in such tokens, and its callers look for them."""
    thinking = copy.deepcopy(tokenizer)
    thinking.add_tokens(["<think>", "</think>"])
    text = ChatTokenizer(thinking)
    ids = text.backend.encode("<think>why</think>ok", add_special_tokens=False).ids
    assert 260 in ids
    assert "".join(pushed(Detokenizer(text.plain), ids)) == "<think>why</think>ok"


def test_special_tokens_are_left_out_of_the_text(text):
    ids = [*text.plain.encode("a").ids, 258, *text.plain.encode("b").ids]
    assert "".join(pushed(Detokenizer(text.plain), ids)) == "ab"


@given(
    content=st.text("ab\n你", max_size=30),
    stops=st.lists(st.text("ab\n你", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_string_is_never_sent(text, content, stops):
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


def test_text_waits_only_while_it_may_begin_a_stop_string(text):
    detokenizer = Detokenizer(text.plain, ("END",))
    pieces = [detokenizer.push(i) for i in text.plain.encode("xENjoyEND").ids]
    assert pieces == ["x", "", "", "ENj", "o", "y", "", "", ""]
    assert detokenizer.stopped


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """As Llama 2's and Mistral's: a space goes in front of a text, and is left out again."""
    words = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *"▁abcdefgh你"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def test_answer_that_continues_a_text_keeps_its_first_space(sentencepiece_like):
    context = sentencepiece_like.encode("abc").ids
    answer = sentencepiece_like.encode("def").ids
    assert "".join(pushed(Detokenizer(sentencepiece_like, (), context), answer)) == " def"
    assert "".join(pushed(Detokenizer(sentencepiece_like), answer)) == "def"


@given(content=st.text("abc 你é🙂"), at=st.integers(0, 40))
def test_answer_and_the_text_that_it_continues_join_to_the_whole(sentencepiece_like, content, at):
    """Wherever between two characters the prompt ends."""
    ids = sentencepiece_like.encode(content).ids
    prompt, answer = ids[:at], ids[at:]
    before = sentencepiece_like.decode(prompt)
    assume("\ufffd" not in before)
    after = "".join(pushed(Detokenizer(sentencepiece_like, (), prompt), answer))
    assert before + after == sentencepiece_like.decode(ids)


def test_answer_that_completes_a_character_of_its_prompt_says_it(sentencepiece_like):
    first, *rest = sentencepiece_like.encode("a🙂b").ids[2:]
    assert "".join(pushed(Detokenizer(sentencepiece_like, (), [first]), rest)) == "🙂b"


def test_word_after_bytes_that_are_no_text_keeps_its_space(sentencepiece_like):
    words = sentencepiece_like.encode("ab").ids
    broken = [sentencepiece_like.token_to_id(byte) for byte in ("<0xFF>", "<0x9F>", "<0xFF>")]
    said = "".join(pushed(Detokenizer(sentencepiece_like), [*words, *broken, *words]))
    assert said.startswith("ab")
    assert said.endswith(" ab")


def test_stop_string_that_begins_in_the_prompt_does_not_end_the_answer(sentencepiece_like):
    context, answer = sentencepiece_like.encode("ab").ids, sentencepiece_like.encode("b").ids[1:]
    detokenizer = Detokenizer(sentencepiece_like, ("bb",), context)
    assert "".join(pushed(detokenizer, answer)) == "b"
    assert not detokenizer.stopped


@given(
    pieces=st.lists(st.text("ab你", min_size=1, max_size=6), max_size=6),
    stops=st.lists(st.text("ab你", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_of_stop_strings_in_one_token_the_earliest_cuts(pieces, stops):
    """Where tokens are whole words one can bring several: who is listed first does not matter."""
    words = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    words["<unk>"] = len(words)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    detokenizer = Detokenizer(tokenizer, tuple(stops))
    said, whole = "", ""
    for piece in pieces:
        said += detokenizer.push(words[piece])
        whole += piece
        found = [at for at in map(whole.find, stops) if at >= 0]
        assert detokenizer.stopped == bool(found)
        if found:
            assert said == whole[: min(found)]
            return
    assert said + detokenizer.flush() == whole
