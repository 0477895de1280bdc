"""Folders with a tokenizer.model alone are read as sentencepiece reads it, or refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast

from engine.errors import StartError
from engine.prompt.tokenizer_files import load_tokenizer

PARTS = st.sampled_from(["a", "the", " ", "  ", "\n", "你好", "é", "x = 1", "."])


def trained(folder: Path, tokenizer_class: str | None = None, **options: object) -> Path:
    """A folder with a small sentencepiece model, as Llama's is: a space goes before a text."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\na  the then than they\n" * 20)
    settings = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True} | options
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["LlamaTokenizer", "LlamaTokenizerFast", "OursTokenizer"])
def pair(request, tmp_path_factory) -> tuple[SentencePieceProcessor, PreTrainedTokenizerFast]:
    """sentencepiece itself, and what is loaded for a class."""
    folder = trained(tmp_path_factory.mktemp("llama"), request.param)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return original, load_tokenizer(folder)


@given(text=st.lists(PARTS).map("".join))
def test_tokenizer_that_puts_a_space_first_is_read_as_its_class(pair, text):
    original, tokenizer = pair
    text = text.lstrip(" ")  # no second space is put before one
    assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    assert tokenizer.encode("a")[0] == original.bos_id()


def test_merges_are_in_the_order_of_their_scores(tmp_path):
    """As in Llama's and Mistral's, whose pieces of many spaces come first and count least."""
    file = trained(tmp_path, "LlamaTokenizer") / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    learnt = [piece for piece in model.pieces if len(piece.piece) > 1 and piece.type == 1]
    shuffled = [(piece.piece, piece.score) for piece in reversed(learnt)]
    for piece, (word, score) in zip(learnt, shuffled, strict=True):
        piece.piece, piece.score = word, score
    file.write_bytes(model.SerializeToString())
    original = SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the quick brown fox", "a  the then than they", "lazy dogs jump"):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)


def test_tokenizer_that_no_class_reads_right_is_refused_with_the_remedy(tmp_path):
    folder = trained(tmp_path, "LlamaTokenizer", treat_whitespace_as_suffix=True)
    with pytest.raises(StartError, match=r"unlike sentencepiece.*has a tokenizer\.json"):
        load_tokenizer(folder)
