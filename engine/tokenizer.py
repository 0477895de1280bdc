"""Messages become token ids, by the family's format or the checkpoint's own chat template.

Nothing that a user writes can become a special token.
"""

import json
import re
import threading
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from engine.errors import InvalidInput, StartError
from engine.families import PIECE_BREAK, Family, Message
from engine.guide import GUIDE_LIMITS, MAX_SCHEMA_CHARS, Guide

# ESCAPE, an index and ESCAPE_END replace a special token that a message spells out, so that it is
# encoded as ordinary text; noncharacters like PIECE_BREAK.
ESCAPE, ESCAPE_END = "\ufdd0", "\ufdd1"


def upgrade_metaspace(node: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a Metaspace node, as in XVERSE's tokenizer.json, for tokenizers 0.19 and later."""
    if node.get("type") == "Metaspace" and node.pop("add_prefix_space", True) is False:
        node["prepend_scheme"] = "never"
    return node


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder, from tokenizer.json or tokenizer.model; None if it has neither.

    Raises StartError if transformers encodes a text unlike sentencepiece.
    """
    if (folder / "tokenizer.json").is_file():
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        backend = Tokenizer.from_str(json.dumps(json.loads(text, object_hook=upgrade_metaspace)))
        return PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=backend)
    if not (folder / "tokenizer.model").is_file():
        return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for probe in ("Hello, world", "你好，世界", " two  spaces", "x = 1\n\ty", "🙂 1234"):
        if original.encode(probe) != tokenizer.encode(probe, add_special_tokens=False):
            raise StartError(f"{folder}/tokenizer.model encodes {probe!r} unlike sentencepiece")
    return tokenizer


def alternation(words: Iterable[str]) -> str:
    """A pattern that matches any of the words, the longest first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def token_ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """A text's ids, by encode_batch_fast: `encode` would block all threads during a long text."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


class ChatTokenizer:
    """Turns messages into token ids; raises InvalidInput where a chat template refuses them.

    Thread-safe: unlike transformers' own wrapper, it never modifies its tokenizers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, family: Family | None = None):
        if family is None and tokenizer.chat_template is None:
            raise StartError(
                "the checkpoint has no chat template; choose a chat model, or pass its template"
                " with --chat-template FILE"
            )
        self.tokenizer, self.family = tokenizer, family
        self._trie: LLTokenizer | None = None
        self._lock = threading.Lock()
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        # Training may have left these behind; transformers resets them at every call.
        spec["truncation"] = spec["padding"] = None
        markers = (*family.markers, *family.ends) if family else ()
        for token in spec["added_tokens"]:
            # DeepSeek's fill-in-the-middle tokens are not flagged as special, but are.
            token["special"] |= bool(re.fullmatch(r"<[|｜]\S+[|｜]>", token["content"]))
        self.backend = Tokenizer.from_str(json.dumps(spec))
        # The same, but it encodes a special token in a text as ordinary text.
        self.plain = Tokenizer.from_str(json.dumps(spec))
        self.plain.encode_special_tokens = True
        self._before = token_ids(self.plain, "a")
        added = [token["content"] for token in spec["added_tokens"] if token["special"]]
        find = self.backend.token_to_id
        self.special = {w: i for w in (*added, *markers) if (i := find(w)) is not None}
        self.words = [ESCAPE, ESCAPE_END, PIECE_BREAK, *self.special]
        self._word = re.compile(alternation(self.words))
        self._part = re.compile(f"({alternation(self.special)})|{PIECE_BREAK}")
        # A special token that is matched after normalisation can be spelled in other characters.
        hidden = any(token["special"] and token["normalized"] for token in spec["added_tokens"])
        self._whole = family is None and not (hidden and spec["normalizer"])
        # Of an answer with logprobs the same tokens are spelled over and over.
        self.spell = lru_cache(2**16)(self._spell)

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids, with the generation prompt."""
        shielded = [m | {"content": self._escape(m["content"])} for m in messages]
        text = self._render(shielded, ask=True)
        if self._whole and ESCAPE not in text:
            return token_ids(self.backend, text)
        # Split at the format's own special tokens; what lies between is encoded as plain text.
        return [i for run in self._part.split(text) if run for i in self._encode_run(run)]

    def encode_text(self, text: str) -> list[int]:
        """The ids of bare text, after BOS if the model has one."""
        if self.family is None:
            return token_ids(self.plain, text, True)
        begin = [self.special[self.family.begin]] if self.family.begin else []
        return begin + token_ids(self.plain, text)

    def _spell(self, token: int) -> str:
        """A token as the text that it adds to an answer, a leading space included."""
        decode = partial(self.backend.decode, skip_special_tokens=False)
        return decode([*self._before, token]).removeprefix(decode(self._before))

    def guide(self, schema: dict[str, Any], end_ids: frozenset[int]) -> Guide:
        """A guide for answers that match a JSON schema. Raises InvalidInput if it is invalid."""
        with self._lock:
            if self._trie is None:  # takes a second or two, so it is built on first use
                spec = self.backend.to_str()
                self._trie = LLTokenizer(spec, eos_token=sorted(end_ids), slices=[])
        spelled = json.dumps(schema)
        if len(spelled) > MAX_SCHEMA_CHARS:
            most = f"{MAX_SCHEMA_CHARS:,} characters"
            raise InvalidInput(f"the JSON schema is longer than {most}", "schema")
        try:
            # With flexible whitespace, a small model may indent for ever.
            grammar = LLMatcher.grammar_from_json_schema(
                spelled, overrides={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise InvalidInput(f"the JSON schema: {error}", "schema") from error
        matcher = LLMatcher(self._trie, grammar, log_level=0, limits=GUIDE_LIMITS)
        guide = Guide(matcher, sorted(end_ids), sorted({*self.special.values()} - end_ids))
        guide.check()
        # Some errors only show in use; and the first mask takes the longest.
        guide.copy().allowed()
        return guide

    def end_ids(self, config: GenerationConfig) -> set[int]:
        """Every id that ends an answer: the checkpoint's eos, and the template's end of turn."""
        listed = config.eos_token_id
        ends = {*(listed if isinstance(listed, list) else [listed])}
        if self.family:
            ends |= {self.special[word] for word in self.family.ends}
        else:
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ESCAPE}]
            after = self._render(turn).partition(ESCAPE)[2].lstrip()
            closing = self._word.match(after)
            ends |= {self.tokenizer.eos_token_id, self.special.get(closing[0]) if closing else None}
        return {i for i in ends if i is not None}

    def _render(self, messages: list[Message], ask: bool = False) -> str:
        if self.family:
            return self.family.render(messages, ask)
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        try:
            return render(messages, add_generation_prompt=ask)
        except Exception as error:  # jinja's errors, and whatever a template raises
            raise InvalidInput(f"the model's chat template refuses these turns: {error}") from error

    def _escape(self, content: str) -> str:
        return self._word.sub(lambda m: f"{ESCAPE}{self.words.index(m[0])}{ESCAPE_END}", content)

    def _encode_run(self, run: str) -> list[int]:
        if run in self.special:
            return [self.special[run]]
        spelled = re.sub(f"{ESCAPE}(\\d+){ESCAPE_END}", lambda m: self.words[int(m[1])], run)
        return token_ids(self.plain, spelled)
