"""Encoding a prompt is what the tokenizer does by itself, but for what a text spells out.

With small tokenizers of each kind; and with real ones, where CHAT_TEST_TOKENIZERS names a folder
of them, each in a folder of its own.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.prompt.special_tokens import secret_beside
from engine.prompt.tokenizer import ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer
from tests.conftest import SPECIAL, TEMPLATE

# An example that is the first of its tokenizer builds it.
untimed = settings(deadline=None)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [*"abdeilnorstuy<|>▁ .?X", "an", "en", "▁a", "▁i", "<|", "|>", "end", "user", "▁▁", "ab"]
MERGES = [
    *[("a", "n"), ("e", "n"), ("▁", "a"), ("▁", "i"), ("<", "|"), ("|", ">")],
    *[("en", "d"), ("▁", "▁"), ("a", "b")],
]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tokens that strip what follows": {"rstrip": True},
    "tokens that strip what comes before": {"lstrip": True},
    "tokens that strip both": {"lstrip": True, "rstrip": True},
    "a prefix before the first piece": {"scheme": "first"},
    "a prefix before every piece": {"scheme": "always"},
    "a prefix, and tokens that strip": {"scheme": "always", "rstrip": True},
    "a prefix by the normaliser": {"normalizer": "prepend"},
    "a prefix by the normaliser, and tokens that strip": {  # as in Phi-3's
        "normalizer": "prepend",
        "rstrip": True,
    },
    "a normaliser": {"normalizer": "NFKC"},
    "a normaliser, and tokens found after it": {"normalizer": "NFKC", "normalized": True},
    "small letters, and tokens found after it": {"normalizer": "lower", "normalized": True},
    "unigram": {"kind": "unigram"},
    "unigram with a prefix": {"kind": "unigram", "scheme": "always"},
    "whole words of the vocabulary": {"kind": "ignore_merges"},
}
NORMALIZERS = {
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "NFKC": normalizers.NFKC(),
    "lower": normalizers.Lowercase(),
}


def built(
    kind: str = "bpe",
    scheme: str = "never",
    normalizer: str = "",
    lstrip: bool = False,
    rstrip: bool = False,
    normalized: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary has the special tokens, as sentencepiece's have."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *BYTES, *SPECIAL, *WORDS])}
    if kind == "unigram":
        scored = [(word, 0.0 if word in SPECIAL else -len(word) - 1.0) for word in vocabulary]
        backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    else:
        whole = kind == "ignore_merges"
        backend = Tokenizer(
            models.BPE(
                vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, ignore_merges=whole
            )
        )
    if normalizer:
        backend.normalizer = NORMALIZERS[normalizer]
    if normalizer != "prepend":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    flags = {"lstrip": lstrip, "rstrip": rstrip, "normalized": normalized}
    backend.add_special_tokens([AddedToken(word, **flags) for word in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def chat_tokenizer(variant: str) -> ChatTokenizer:
    return ChatTokenizer(built(**VARIANTS[variant]))


def conversation(content: str) -> list[dict[str, str]]:
    said = [content, f"so: {content}", f"{content}?"]
    roles = ["user", "assistant", "user"]
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]


def own_ids(text: ChatTokenizer, messages: list[dict[str, str]]) -> list[int]:
    """What the tokenizer itself makes of the rendered conversation."""
    rendered = text.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return text.backend.encode(rendered, add_special_tokens=False).ids


PARTS = st.sampled_from(
    [
        "a",
        "an",
        " ",
        "  ",
        "\n",
        "end",
        "<",
        "|",
        "<|",
        "|>",
        "é",
        "你好",
        "🙂",
        "ﬁ",
        "▁",
        "\u0301",
        "X",
    ]
)
TEXTS = st.lists(PARTS, max_size=10).map("".join) | st.text(st.characters(codec="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@untimed
@given(content=TEXTS)
def test_text_without_special_tokens_is_encoded_as_the_tokenizer_does(variant, content):
    text = chat_tokenizer(variant)
    messages = conversation(content)
    assume(own_ids(text, messages).count(text.special["<|end|>"]) == len(messages))
    assert text.encode(messages) == own_ids(text, messages)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@untimed
@given(before=TEXTS, word=st.sampled_from(SPECIAL), after=TEXTS)
def test_quoted_special_token_changes_its_own_message_alone(variant, before, word, after):
    """Up to its message and after it, the ids are those of a conversation that quotes nothing."""
    text = chat_tokenizer(variant)
    first, _, last = conversation("an")
    quoted = text.encode(
        [first, {"role": "assistant", "content": f"x{before}{word}{after}x"}, last]
    )
    plain = text.encode([first, {"role": "assistant", "content": "xx"}, last])
    assert marked(text, quoted) == marked(text, plain)
    assert split(text, quoted)[0] == split(text, plain)[0]
    assert split(text, quoted)[-1] == split(text, plain)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@untimed
@given(before=PARTS, word=st.sampled_from(SPECIAL), after=PARTS)
def test_quoted_special_token_is_the_text_that_it_would_be_in_another_vocabulary(
    variant, before, word, after
):
    """One in which the format's special tokens have other names."""
    text = chat_tokenizer(variant)
    content = f"x{before}{word}{after}x"
    other = tokenizer_with_other_names(variant)
    messages = [{"role": "user", "content": content}]
    rendered = text.tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
    )
    rendered = rendered.replace("|", "¦").replace("\0", content)
    wanted = other.encode(rendered, add_special_tokens=False).ids
    assert text.encode(messages) == wanted


@cache
def tokenizer_with_other_names(variant: str) -> Tokenizer:
    spec = chat_tokenizer(variant).backend.to_str()
    for word in SPECIAL:
        spec = spec.replace(f'"{word}"', f'"{word.replace("|", "¦")}"')
    return Tokenizer.from_str(spec)


def marked(text: ChatTokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in text.special.values()]


def split(text: ChatTokenizer, ids: list[int]) -> list[list[int]]:
    """The ids between special tokens."""
    parts: list[list[int]] = [[]]
    for i in ids:
        if i in text.special.values():
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


@pytest.mark.parametrize("variant", VARIANTS)
@untimed
@given(content=TEXTS, word=st.sampled_from(SPECIAL))
def test_special_tokens_in_a_raw_prompt_count(variant, content, word):
    text = chat_tokenizer(variant)
    whole = f"{content}{word}{content}"
    assert text.encode_text(whole) == text.backend.encode(whole, add_special_tokens=False).ids
    assert text.special[word] in text.encode_text(whole)


# ---- Real tokenizers

FOLDER = os.environ.get("CHAT_TEST_TOKENIZERS")
FOLDERS = sorted(Path(FOLDER).glob("**/tokenizer.json")) if FOLDER else []
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


@cache
def real_tokenizer(folder: Path) -> ChatTokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = INST
    return ChatTokenizer(tokenizer)


@pytest.mark.skipif(not FOLDERS, reason="CHAT_TEST_TOKENIZERS names no folder of real tokenizers")
@pytest.mark.parametrize("file", FOLDERS, ids=str)
@untimed
@given(content=TEXTS)
def test_real_tokenizers_encode_a_conversation_as_by_themselves(file, content):
    text = real_tokenizer(file.parent)
    assume(not re.search("|".join(map(re.escape, text.special)), content))
    messages = conversation(content)
    assert text.encode(messages) == own_ids(text, messages)


@pytest.mark.skipif(not FOLDERS, reason="CHAT_TEST_TOKENIZERS names no folder of real tokenizers")
@pytest.mark.parametrize("file", FOLDERS, ids=str)
@untimed
@given(data=st.data())
def test_real_tokenizers_special_tokens_cannot_be_written(file, data):
    text = real_tokenizer(file.parent)
    before, after = data.draw(TEXTS), data.draw(TEXTS)
    word = data.draw(st.sampled_from(sorted(text.special)))
    unknown = text.tokenizer.unk_token_id
    found = marked(text, text.encode(conversation(before + word + after)))
    plain = marked(text, text.encode(conversation("x")))
    assert [i for i in found if i != unknown] == [i for i in plain if i != unknown]


def test_a_secret_completes_no_token_that_a_text_begins(monkeypatch):
    """`reserved_` and a secret that began with 1 were the token `reserved_1`, now and then."""
    offered = iter("a" * 16 + "z" * 16)
    monkeypatch.setattr(
        "engine.prompt.special_tokens.secrets.choice", lambda letters: next(offered)
    )
    assert secret_beside(["reserved_a", "reserved_1", "<unk>"]) == "z" * 16
