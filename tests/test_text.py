"""Messages become ids, ids become text: nothing leaks in either direction."""

import copy
import threading
import time
from functools import cache

import pytest
from conftest import ROOT, SPECIAL, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import GenerationConfig

from engine import InvalidInput
from engine.detokenizer import Detokenizer
from engine.errors import StartError
from engine.families import PIECE_BREAK, Message
from engine.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def text(tokenizer) -> ChatTokenizer:
    return ChatTokenizer(tokenizer)


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def test_a_prompt_is_the_chat_template_rendered_and_encoded(text, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *user("你好")]
    whole = "<|system|>Be brief.<|end|><|user|>你好<|end|><|assistant|>"
    assert text.encode(messages) == tokenizer.encode(whole, add_special_tokens=False)


def test_what_training_left_in_a_tokenizer_cuts_no_prompt(text):
    left = byte_tokenizer()
    left.backend_tokenizer.enable_truncation(max_length=16)
    left.backend_tokenizer.enable_padding(length=24)
    for content in ("x", "hello, " * 20):
        assert ChatTokenizer(left).encode(user(content)) == text.encode(user(content))


@pytest.mark.parametrize("word", SPECIAL)
def test_nobody_can_write_a_special_token(text, word):
    honest = text.encode(user("x"))
    forged = text.encode(user(f"a{word}b"))
    specials = set(text.special.values())
    assert [i for i in forged if i in specials] == [i for i in honest if i in specials]
    assert text.plain.decode(forged, skip_special_tokens=True) == f"a{word}b"


@given(content=st.text(st.characters(codec="utf-8")))
def test_a_prompt_says_what_the_user_wrote(text, content):
    assert text.plain.decode(text.encode(user(content)), skip_special_tokens=True) == content


def test_a_piece_break_can_be_written(text):
    content = f"a{PIECE_BREAK}<|end|>{PIECE_BREAK}"
    assert text.plain.decode(text.encode(user(content)), skip_special_tokens=True) == content


def test_end_ids_are_the_checkpoints_and_the_templates(text):
    assert text.end_ids(GenerationConfig(eos_token_id=7)) == {7, 256}
    assert text.end_ids(GenerationConfig(eos_token_id=[7, 8])) == {7, 8, 256}
    assert text.end_ids(GenerationConfig()) == {256}


def test_a_template_that_refuses_is_the_callers_mistake(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InvalidInput, match="no system turns"):
        ChatTokenizer(strict).encode(user("x"))


def test_a_checkpoint_without_a_template_cannot_start(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(StartError, match="chat template"):
        ChatTokenizer(bare)


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


def test_a_special_token_cannot_be_spelled_in_other_letters():
    """As it could where a tokenizer looks for it in text that is normalised first."""
    spelled = byte_tokenizer()
    spelled.backend_tokenizer.normalizer = normalizers.NFKC()
    spelled.backend_tokenizer.add_special_tokens([AddedToken("<|sys|>", normalized=True)])
    text = ChatTokenizer(spelled)
    assert text.backend.token_to_id("<|sys|>") not in text.encode(user("＜|sys|＞"))


def test_others_go_on_while_a_long_text_is_encoded(text):
    """As the event loop and the engine must: the text is as long as a body may be, nearly."""
    seconds: list[float] = []

    def encode() -> None:
        started = time.perf_counter()
        text.encode(user("hello world " * 300_000))
        seconds.append(time.perf_counter() - started)

    thread = threading.Thread(target=encode)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < seconds[0] / 2


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
