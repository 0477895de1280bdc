"""The tokenizer that a GGUF file describes in its metadata."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from engine.checkpoint.formats.gguf_splits import COMPOSED, SPLITS, WHOLE_WORDS
from engine.errors import StartError
from engine.prompt.tokenizer_files import load_sentencepiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def read_tokenizer(fields: dict[str, Any], path: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a file, with its chat template.

    Raises StartError for one of a kind that is not known.
    """
    kind = fields.get(f"{PREFIX}model")
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(str(kind))
    if make is None:
        raise StartError(
            f"{path} has a tokenizer of the kind {kind}, which is not known; fetch the model in"
            " safetensors"
        )
    tokenizer = make(fields, path)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def end_ids(fields: dict[str, Any]) -> list[int]:
    """The tokens that end an answer."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [fields.get(f"{PREFIX}{name}") for name in names]
    return sorted({int(x) for x in ids if x is not None})


def _special(fields: dict[str, Any]) -> dict[str, str]:
    """The special tokens by transformers' names."""
    tokens = fields[f"{PREFIX}tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {key: fields.get(f"{PREFIX}{name}_token_id") for key, name in names.items()}
    return {f"{key}_token": tokens[n] for key, n in ids.items() if n is not None}


def _byte_level(fields: dict[str, Any], path: Path) -> "PreTrainedTokenizerFast":
    """BPE over bytes (GPT-2's), whose text is split as the vocabulary's merges were learnt."""
    from transformers import PreTrainedTokenizerFast

    split = str(fields.get(f"{PREFIX}pre", "default"))
    if split not in SPLITS:
        raise StartError(
            f"{path} splits text as {split} does, which is not known; fetch the model in"
            " safetensors"
        )
    tokens = fields[f"{PREFIX}tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields.get(f"{PREFIX}merges", ())]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    whole = split in WHOLE_WORDS
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=whole, fuse_unk=False))
    if split in COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[split]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    backend.decoder = decoders.ByteLevel()
    types = fields[f"{PREFIX}token_type"]
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **_special(fields))
    if fields.get(f"{PREFIX}add_bos_token") and tokenizer.bos_token:
        tokenizer.add_bos_token = True
    return tokenizer


def _sentencepiece(fields: dict[str, Any], path: Path) -> "PreTrainedTokenizerFast":
    """A vocabulary of sentencepiece's: the tokenizer.model that it was made of is written again,
    read as any other, and checked against sentencepiece itself."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(_model_of(fields))
        tokenizer = load_sentencepiece(Path(folder))
    for name, token in _special(fields).items():
        setattr(tokenizer, name, token)
    if fields.get(f"{PREFIX}add_bos_token", True) and tokenizer.bos_token:
        tokenizer.add_bos_token = True
    return tokenizer


def _model_of(fields: dict[str, Any]) -> bytes:
    """sentencepiece's file (sentencepiece_model.proto): BPE, with bytes for what it lacks."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model: Any = proto.ModelProto()
    columns = (fields[f"{PREFIX}{name}"] for name in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=token, score=score, type=int(kind))
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        found = fields.get(f"{PREFIX}{key}_token_id")
        setattr(model.trainer_spec, f"{name}_id", -1 if found is None else int(found))
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.name = "identity"
    prefix = bool(fields.get(f"{PREFIX}add_space_prefix", True))
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    written: bytes = model.SerializeToString()
    return written
