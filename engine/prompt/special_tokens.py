"""Special tokens: those of a prompt format count, those that a text spells out stay text."""

import json
import re
import secrets
import string
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from engine.errors import InvalidInput, StartError
from engine.prompt.families import PIECE_BREAK

# Added tokens of this form are special even where they are not flagged so, as DeepSeek's and
# Qwen's for filling in the middle.
_SPECIAL_FORM = re.compile(r"<[|｜]\S+[|｜]>")
# A text's bytes where no token fits; whoever flags them as special does not mean it.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _alternation(words: Iterable[str]) -> str:
    """A pattern that matches any of the words, the longest first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def secret_beside(words: Iterable[str]) -> str:
    """A secret word that completes none of the words where a text breaks off in one before it.

    `reserved_` and a secret that begins with 1 would be the token `reserved_1`.
    """
    endings = {word[n:] for word in words for n in range(1, len(word))}
    while True:
        secret = "".join(secrets.choice(string.ascii_lowercase) for _ in range(16))
        if not any(secret.startswith(ending) for ending in endings):
            return secret


def token_ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """A text's ids. Raises InvalidInput where the tokenizer gives up.

    By encode_batch_fast: `encode` would block all threads during a long text.
    """
    try:
        return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except BaseException as error:
        # Of a library in Rust, which no module exports: a pattern goes back and forth in the text
        # too often.
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidInput(f"the model's tokenizer gives up on this: {error}", "prompt") from error


class SpecialTokens:
    """A tokenizer's special tokens, and a way to encode prompts in which no text can spell one.

    `plain` is the tokenizer with each special token under a secret name instead of its text. In
    what users write, special tokens are first *quoted*, that is replaced by secret words too. When
    the prompt format has been rendered around it, `encode` gives the format's own special tokens
    their secret names, and the quoted ones their text back. So these are text to `plain`, and all
    the rest is encoded just as the tokenizer does it, dummy prefixes and stripped spaces included.

    `ids` are the special tokens' ids by their text, `backend` is the tokenizer as it is. `markers`
    are to be special though they may not be flagged so, `shown` are not though they may be.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Iterable[str], shown: Iterable[str] = ()):
        spec = json.loads(tokenizer.to_str())
        # Training may have left these behind; transformers resets them at every call.
        spec["truncation"] = spec["padding"] = None
        for token in spec["added_tokens"]:
            special = token["special"] or _SPECIAL_FORM.fullmatch(token["content"])
            token["special"] = bool(special) and token["content"] not in shown
        self.backend = Tokenizer.from_str(json.dumps(spec))
        self.ids = self._find(spec, markers)
        # Nobody can guess it, so nobody can write a secret name. Of ASCII letters, which neither
        # normalisers nor a template's filters change; the end of a name composes with no accent.
        self._secret = secret_beside([*self.ids, *self._longer(spec)])
        self.placeholder = f"{self._secret}p_"
        self._quotable = [PIECE_BREAK, *self.ids]
        self._quotes = {w: f"{self._secret}q{i}_" for i, w in enumerate(self._quotable)}
        self._names = {word: f"{self._secret}n{i}_" for i, word in enumerate(self.ids)}
        self.pattern = re.compile(_alternation(self._quotable))
        self._marked = re.compile(
            f"{self._secret}q(\\d+)_|{_alternation([*self.ids, *self._longer(spec)]) or '(?!)'}"
        )
        self.plain = self._renamed(spec)

    def quote(self, value: Any) -> Any:
        """The same value with the special tokens in its strings quoted, at any depth."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: self._quotes[found[0]], value)
        if isinstance(value, dict):
            return {self.quote(key): self.quote(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.quote(item) for item in value]
        return value

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered prompt, in which what was quoted is text."""
        return token_ids(self.plain, self._marked.sub(self._rename, text))

    def bare(self, text: str) -> str:
        """A rendered or a raw prompt without its special tokens; what was quoted is text again."""

        def text_of(found: re.Match[str]) -> str:
            return self._quotable[int(found[1])] if found[1] else ""

        return self._marked.sub(text_of, text).replace(PIECE_BREAK, "")

    def name(self, word: str) -> str:
        """The secret name of a special token, for a text that `plain` is to encode."""
        return self._names[word]

    def _rename(self, found: re.Match[str]) -> str:
        if found[1]:
            return self._quotable[int(found[1])]
        return self._names.get(found[0], found[0])

    def _find(self, spec: dict[str, Any], markers: Iterable[str]) -> dict[str, int]:
        flagged = [token["content"] for token in spec["added_tokens"] if token["special"]]
        words = [word for word in flagged if not _BYTE_TOKEN.fullmatch(word)]
        known = {word: self.backend.token_to_id(word) for word in (*words, *markers)}
        return {word: i for word, i in known.items() if i is not None}

    def _longer(self, spec: dict[str, Any]) -> list[str]:
        """Added tokens that are text and have a special one in them; the longest match counts."""
        texts = [token["content"] for token in spec["added_tokens"] if not token["special"]]
        return [text for text in texts if any(word in text for word in self.ids)]

    def _renamed(self, spec: dict[str, Any]) -> Tokenizer:
        """The tokenizer that knows the special tokens by their secret names alone."""
        normalizer = self.backend.normalizer
        added = {token["content"] for token in spec["added_tokens"]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for word in self.ids.keys() - added:
            spec["added_tokens"].append({"id": self.ids[word], "content": word, **flags})
        for token in spec["added_tokens"]:
            if name := self._names.get(token["content"]):
                intact = normalizer is None or name == normalizer.normalize_str(name)
                token["normalized"] = token["normalized"] and intact
                token |= {"content": name, "special": True}
        self._rename_in_model(spec["model"])
        renamed = Tokenizer.from_str(json.dumps(spec))
        if any(renamed.token_to_id(self._names[word]) != i for word, i in self.ids.items()):
            raise StartError(
                "this tokenizer's special tokens cannot be told from text that spells them; take"
                " another model"
            )
        return renamed

    def _rename_in_model(self, model: dict[str, Any]) -> None:
        """Rename them in the vocabulary too, or else it could make one of ordinary text."""
        names, special, vocabulary = self._names, self.ids.keys(), model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(word, word): i for word, i in vocabulary.items()}
        else:  # Unigram's is a list of words with their scores
            model["vocab"] = [(names.get(word, word), score) for word, score in vocabulary]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = model["merges"]
            model["merges"] = [(a, b) for a, b in pairs if not {a, b, a + b} & special]
