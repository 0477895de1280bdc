"""Messages become ids: nothing leaks from a text into them."""

import copy
import threading
import time

import pytest
from conftest import SPECIAL, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import GenerationConfig

from engine import InvalidInput
from engine.errors import StartError
from engine.families import PIECE_BREAK, Message
from engine.tokenizer import ChatTokenizer


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
