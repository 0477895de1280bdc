"""A tokenizer from the files of a checkpoint, checked where transformers may read them wrongly."""

import json
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from engine.blame import damaged, read_object, read_text
from engine.errors import StartError
from engine.prompt.named_templates import add_lone_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Texts that a wrongly read tokenizer.model encodes otherwise.
_PROBES = ("Hello, world", "你好，世界", " two  spaces", "x = 1\n\ty", "🙂 1234")


def _upgrade_metaspace(node: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a Metaspace node, as in XVERSE's tokenizer.json, for tokenizers 0.19 and later."""
    if node.get("type") == "Metaspace" and node.pop("add_prefix_space", True) is False:
        node["prepend_scheme"] = "never"
    return node


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a folder, from tokenizer.json or tokenizer.model; None if it has neither.

    Raises StartError if transformers encodes a text unlike sentencepiece.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        text = read_text(folder / "tokenizer.json")
        with damaged(folder / "tokenizer.json"):
            held = json.loads(text, object_hook=_upgrade_metaspace)
            backend = Tokenizer.from_str(json.dumps(held))
        with damaged(folder):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=backend)
        # transformers leaves this to tokenizer.json, but DeepSeek's says nothing of BOS.
        if tokenizer_config(folder).get("add_bos_token") and tokenizer.bos_token:
            tokenizer.add_bos_token = True
        add_lone_template(tokenizer, folder)
        return tokenizer
    if (folder / "tokenizer.model").is_file():
        return load_sentencepiece(folder)
    return None


def load_sentencepiece(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder that has a tokenizer.model alone, checked against sentencepiece.

    Read without a class it is right where a text begins without a space, as InternLM2's; else it is
    read as the class that tokenizer_config.json names, or as Llama's.
    """
    import transformers
    from sentencepiece import SentencePieceProcessor

    plain = transformers.PreTrainedTokenizerFast
    named = getattr(transformers, str(tokenizer_config(folder).get("tokenizer_class")), None)
    classes = [plain, transformers.LlamaTokenizer]
    if isinstance(named, type) and issubclass(named, plain):
        classes.insert(1, named)
    with damaged(folder / "tokenizer.model"):
        original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for kind in classes:
        with damaged(folder):
            read = kind.from_pretrained(folder).backend_tokenizer
        backend = _merge_by_score(read, original)
        with damaged(folder):
            tokenizer = plain.from_pretrained(folder, tokenizer_object=backend)
        add_lone_template(tokenizer, folder)
        # The classes put no second space in front of a text that begins with one.
        probes = _PROBES if kind is plain else [probe.lstrip() for probe in _PROBES]
        encode = partial(tokenizer.encode, add_special_tokens=False)
        wrong = [probe for probe in probes if original.encode(probe) != encode(probe)]
        if not wrong:
            return tokenizer
    raise StartError(
        f"{folder}/tokenizer.model encodes {wrong[0]!r} unlike sentencepiece when it is read by"
        " transformers; take a repository of the model that has a tokenizer.json"
    )


def _merge_by_score(backend: Tokenizer, original: Any) -> Tokenizer:
    """The tokenizer with its merges in the order of sentencepiece's scores.

    transformers orders them by id, which is another order where pieces were added to a vocabulary.
    """
    scores = {original.id_to_piece(i): original.get_score(i) for i in range(len(original))}
    learnt = [score for score in scores.values() if score]  # of bytes and special tokens it is 0
    spec = json.loads(backend.to_str()) if learnt != sorted(learnt, reverse=True) else {}
    if "merges" not in spec.get("model", {}):
        return backend
    spec["model"]["merges"].sort(key=lambda pair: -scores.get("".join(pair), -inf))
    return Tokenizer.from_str(json.dumps(spec))


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing where there is none."""
    file = folder / "tokenizer_config.json"
    return read_object(file) if file.is_file() else {}
