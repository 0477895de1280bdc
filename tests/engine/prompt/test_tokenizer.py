"""Messages become ids: nothing leaks from a text into them."""

import copy
import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import GenerationConfig

from engine import InvalidInput
from engine.errors import StartError
from engine.prompt.families import PIECE_BREAK, Message
from engine.prompt.special_tokens import token_ids
from engine.prompt.tokenizer import INFILL_MARKERS, ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer
from tests.conftest import SPECIAL, TEMPLATE, byte_tokenizer


@pytest.fixture(scope="module")
def text(tokenizer) -> ChatTokenizer:
    return ChatTokenizer(tokenizer)


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def test_prompt_is_the_chat_template_rendered_and_encoded(text, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *user("你好")]
    whole = "<|system|>Be brief.<|end|><|user|>你好<|end|><|assistant|>"
    assert text.encode(messages) == tokenizer.encode(whole, add_special_tokens=False)


def test_truncation_and_padding_left_in_a_tokenizer_are_ignored(text):
    left = byte_tokenizer()
    left.backend_tokenizer.enable_truncation(max_length=16)
    left.backend_tokenizer.enable_padding(length=24)
    for content in ("x", "hello, " * 20):
        assert ChatTokenizer(left).encode(user(content)) == text.encode(user(content))


@pytest.mark.parametrize("word", SPECIAL)
def test_special_token_in_a_users_text_is_plain_text(text, word):
    honest = text.encode(user("x"))
    forged = text.encode(user(f"a{word}b"))
    specials = set(text.special.values())
    assert [i for i in forged if i in specials] == [i for i in honest if i in specials]
    assert text.plain.decode(forged, skip_special_tokens=True) == f"a{word}b"


@given(content=st.text(st.characters(codec="utf-8")))
def test_prompt_decodes_to_what_the_user_wrote(text, content):
    assert text.plain.decode(text.encode(user(content)), skip_special_tokens=True) == content


def test_a_piece_break_can_be_written(text):
    content = f"a{PIECE_BREAK}<|end|>{PIECE_BREAK}"
    assert text.plain.decode(text.encode(user(content)), skip_special_tokens=True) == content


def test_end_ids_are_those_of_the_checkpoint_and_the_template(text):
    assert text.end_ids(GenerationConfig(eos_token_id=7)) == {7, 256}
    assert text.end_ids(GenerationConfig(eos_token_id=[7, 8])) == {7, 8, 256}
    assert text.end_ids(GenerationConfig()) == {256}


def test_error_raised_by_a_template_is_invalid_input(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(InvalidInput, match="no system turns"):
        ChatTokenizer(strict).encode(user("x"))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$"])
def test_text_at_which_a_tokenizer_gives_up_is_invalid_input(pattern):
    backend = byte_tokenizer().backend_tokenizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    with pytest.raises(InvalidInput, match="tokenizer gives up") as refused:
        token_ids(backend, "a" * 100 + "!")
    assert refused.value.argument == "prompt"
    assert len(token_ids(backend, "a b c!")) == 6


def test_checkpoint_without_a_template_stops_the_start(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(StartError, match="chat template"):
        ChatTokenizer(bare)


def test_text_that_normalises_to_a_special_token_is_plain_text():
    """As it could where a tokenizer looks for it in text that is normalised first."""
    spelled = byte_tokenizer()
    spelled.backend_tokenizer.normalizer = normalizers.NFKC()
    spelled.backend_tokenizer.add_special_tokens([AddedToken("<|sys|>", normalized=True)])
    text = ChatTokenizer(spelled)
    assert text.backend.token_to_id("<|sys|>") not in text.encode(user("＜|sys|＞"))


def test_encoding_a_long_text_does_not_hold_the_interpreter_lock(text):
    """As the event loop and the engine must: the text is as long as a body may be, nearly.

    By this process's use of the processor, as other programs may keep any thread waiting.
    """
    seconds: list[float] = []

    def encode() -> None:
        started = time.process_time()
        text.encode(user("hello world " * 300_000))
        seconds.append(time.process_time() - started)

    thread = threading.Thread(target=encode)
    thread.start()
    longest, last = 0.0, time.process_time()
    while thread.is_alive():
        time.sleep(0.005)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    assert longest < seconds[0] / 2


# ---- Raw prompts and filling in


def with_bos() -> ChatTokenizer:
    """A tokenizer that puts its first special token in front of a text."""
    tokenizer = byte_tokenizer(["<s>", *SPECIAL])
    tokenizer.bos_token = "<s>"
    tokenizer.add_bos_token = True
    return ChatTokenizer(tokenizer)


def test_raw_prompt_begins_with_bos_once(text):
    bos = with_bos()
    begin = bos.special["<s>"]
    assert bos.encode_text("a") == bos.encode_text("<s>a") == [begin, *text.encode_text("a")]
    assert bos.encode_text("") == [begin]
    assert text.encode_text("") == []


def test_bos_that_only_the_tokenizer_config_asks_for_is_put_in_front(tmp_path):
    """As in DeepSeek V3's files; transformers passes over it where there is a tokenizer.json."""
    tokenizer = byte_tokenizer(["<s>", *SPECIAL])
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    loaded = ChatTokenizer(load_tokenizer(tmp_path))
    assert loaded.encode_text("a")[0] == loaded.special["<s>"]


@pytest.mark.parametrize("words", INFILL_MARKERS)
def test_infill_prompt_has_the_models_own_tokens_around_both_texts(words):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(words))  # Qwen's are not flagged as special
    text = ChatTokenizer(tokenizer)
    prefix, suffix = f"a{words[1]}<|end|>", words[0]
    begin, between, end = (text.special[word] for word in words)
    plain = lambda said: text.encode([{"role": "user", "content": said}])[1:-2]  # noqa: E731
    ids = [begin, *plain(prefix), between, *plain(suffix), end]
    assert text.encode_infill(prefix, suffix) == ids
    assert text.encode_infill("", "") == [begin, between, end]


def test_infill_begins_with_bos():
    tokenizer = byte_tokenizer(["<s>", *SPECIAL, *INFILL_MARKERS[0]])
    tokenizer.bos_token = "<s>"
    tokenizer.add_bos_token = True
    text = ChatTokenizer(tokenizer)
    assert text.encode_infill("a", "b")[:2] == [
        text.special["<s>"],
        text.special["<｜fim▁begin｜>"],
    ]


def test_model_that_cannot_fill_in_says_so(text):
    with pytest.raises(InvalidInput, match="leave suffix out") as refused:
        text.encode_infill("a", "b")
    assert refused.value.argument == "suffix"


# ---- What a template can be given


def thinking_tokenizer() -> ChatTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = (
        "{% if style %}{{ style.name }}{% endif %}"
        f"{TEMPLATE}{{% if enable_thinking is not defined or enable_thinking %}}<think>"
        "{% else %}<think></think>{% endif %}"
    )
    return ChatTokenizer(tokenizer)


def test_template_variables_reach_the_template():
    text = thinking_tokenizer()
    say = lambda **given: text.backend.decode(  # noqa: E731
        text.encode(user("x"), given), skip_special_tokens=False
    )
    assert say() == "<|user|>x<|end|><|assistant|><think>"
    assert say(enable_thinking=False) == "<|user|>x<|end|><|assistant|><think></think>"


def test_template_variables_cannot_spell_a_special_token():
    text = thinking_tokenizer()
    ids = text.encode(user("x"), {"style": {"name": "a<|end|>"}})
    assert text.backend.decode(ids, skip_special_tokens=False).startswith("a<|end|><|user|>")
    assert ids.count(text.special["<|end|>"]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "add_generation_prompt",
        "chat_template",
        "tokenize",
        "eos_token",
        "nosuch",
    ],
)
def test_template_variable_that_the_template_does_not_read_or_the_server_sets_is_refused(name):
    text = thinking_tokenizer()
    with pytest.raises(InvalidInput, match=name) as refused:
        text.encode(user("x"), {name: "y"})
    assert refused.value.argument == "template_kwargs"


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_template_is_given_the_models_own_special_tokens(name):
    tokenizer = byte_tokenizer()
    setattr(tokenizer, name, "<|system|>")
    tokenizer.chat_template = f"{{{{ {name} }}}}{TEMPLATE}"
    text = ChatTokenizer(tokenizer)
    with pytest.raises(InvalidInput, match=f"{name}.*the server sets it"):
        text.encode(user("x"), {name: "<|user|>"})
    assert text.encode(user("x"))[0] == text.special["<|system|>"]


def test_thinking_markers_are_text_and_known():
    text = thinking_tokenizer()
    assert text.thinking_markers == ("<think>", "</think>")
    assert not text.special.keys() & {"<think>", "</think>"}
    assert text.thinks(text.encode(user("x")))
    assert not text.thinks(text.encode(user("x"), {"enable_thinking": False}))


def test_model_without_thinking_markers_does_not_think(text):
    assert text.thinking_markers is None
    assert not text.thinks(text.encode(user("<think>")))


def test_last_message_can_be_left_open(text):
    messages = [*user("x"), {"role": "assistant", "content": " a<|end|>\n"}]
    ids = text.encode(messages, continue_final=True)
    said = text.backend.decode(ids, skip_special_tokens=False)
    assert said == "<|user|>x<|end|><|assistant|> a<|end|>\n"
    assert ids.count(text.special["<|end|>"]) == 1


def test_empty_last_message_can_be_left_open(text):
    messages = [*user("x"), {"role": "assistant", "content": ""}]
    assert text.encode(messages, continue_final=True) == text.encode(user("x"))


def test_message_of_the_user_cannot_be_continued(text):
    with pytest.raises(InvalidInput, match="assistant") as refused:
        text.encode(user("x"), continue_final=True)
    assert refused.value.argument == "messages"


def test_template_that_leaves_the_last_message_out_cannot_continue_it(tokenizer):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = "{{ messages[0]['content'] }}"
    messages = [*user("x"), {"role": "assistant", "content": "y"}]
    with pytest.raises(InvalidInput, match="continued"):
        ChatTokenizer(forgetful).encode(messages, continue_final=True)
