"""A bound on a text's tokens that never says too much, and says enough to refuse floods."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from engine import ContextTooLong
from engine.checkpoint.formats.gguf import GGUFFile
from engine.prompt.token_bound import MIN_CHARS, TokenBound
from engine.prompt.tokenizer import INFILL_MARKERS, ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer
from tests.conftest import TEMPLATE, byte_tokenizer
from tests.engine.prompt.test_families import DATA, FIXTURES

FOLDERS = sorted((FIXTURES / "tokenizers").iterdir())
if DATA:
    FOLDERS += sorted(Path(DATA, "tokenizers").iterdir())
ALPHABETS = [
    "0123456789", "abc xyz", "你好世界，。", " \n\t", "=-_*", "é̂ụö\u0301가", "🙂\x04\x16", "▁_ <|>",
]  # fmt: skip


def special_of(tokenizer: Tokenizer) -> list[str]:
    added = json.loads(tokenizer.to_str())["added_tokens"]
    return [token["content"] for token in added if token["special"]]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_bound_is_never_above_the_tokens(folder):
    check_bound(load_tokenizer(folder).backend_tokenizer)


@pytest.mark.slow
def test_bound_is_never_above_the_tokens_of_the_demo(demo_folder):
    check_bound(GGUFFile(demo_folder / "demo.gguf").tokenizer().backend_tokenizer)


def check_bound(tokenizer: Tokenizer) -> None:
    bound = TokenBound(tokenizer, special_of(tokenizer))
    assert bound.is_known
    for alphabet in ALPHABETS:
        mixed = "".join(random.Random(0).choices(alphabet, k=MIN_CHARS))
        for text in (mixed, alphabet[0] * MIN_CHARS):
            count = len(tokenizer.encode(text, add_special_tokens=False).ids)
            assert not bound.exceeds(text, count)
    assert bound.exceeds("0" * MIN_CHARS, MIN_CHARS // 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Strip()),
        lambda t: setattr(t, "normalizer", normalizers.Replace("  ", " ")),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda t: t.add_special_tokens([AddedToken("<|x|>", rstrip=True)]),
    ],
    ids=["strip", "replace", "whitespace", "a token that strips"],
)
def test_tokenizer_that_loses_text_has_no_bound(change):
    tokenizer = byte_tokenizer().backend_tokenizer
    assert TokenBound(tokenizer).is_known
    change(tokenizer)
    assert not TokenBound(tokenizer).exceeds("  " * MIN_CHARS, 1)


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def tokenizer() -> ChatTokenizer:
    tokenizer = ChatTokenizer(byte_tokenizer())
    tokenizer.most_tokens = 2 * MIN_CHARS
    return tokenizer


def test_flood_is_refused_without_being_tokenized(tokenizer, monkeypatch):
    monkeypatch.setattr("engine.prompt.tokenizer.token_ids", None)
    monkeypatch.setattr("engine.prompt.special_tokens.token_ids", None)
    flood = "x" * (2 * MIN_CHARS + 100)
    for refuse in (
        lambda: tokenizer.encode(messages(flood)),
        lambda: tokenizer.check_length(flood),
    ):
        with pytest.raises(ContextTooLong, match="maximum context length is 131072 tokens"):
            refuse()
    assert tokenizer.num_tokens(flood) == float("inf")


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_flood_around_a_gap_is_refused_without_being_tokenized(monkeypatch, share):
    backend = byte_tokenizer()
    backend.add_tokens(list(INFILL_MARKERS[0]))
    tokenizer = ChatTokenizer(backend)
    tokenizer.most_tokens = 2 * MIN_CHARS
    flood = "x" * (2 * MIN_CHARS + 100)
    before = int(share * len(flood))
    monkeypatch.setattr("engine.prompt.tokenizer.token_ids", None)
    with pytest.raises(ContextTooLong):
        tokenizer.encode_infill(flood[:before], flood[before:])


def test_text_at_the_limit_is_tokenized(tokenizer):
    for text in ("x" * 2 * MIN_CHARS, "<|end|>" * MIN_CHARS + "x" * MIN_CHARS):
        tokenizer.check_length(text)
        assert len(tokenizer.encode_text(text)) == 2 * MIN_CHARS


def test_text_that_a_template_leaves_out_does_not_count():
    """As those of thinking models leave earlier thoughts out."""
    backend = byte_tokenizer()
    backend.chat_template = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = ChatTokenizer(backend)
    tokenizer.most_tokens = MIN_CHARS
    thought = [*messages("a"), {"role": "assistant", "content": "x" * 2 * MIN_CHARS + "</think>b"}]
    assert len(tokenizer.encode([*thought, *messages("c")])) < 20
