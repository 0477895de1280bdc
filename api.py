"""A chat model behind HTTP, in one file.

    python api.py                          the small demo model, on port 6006
    python api.py --model ./my-model       any causal LM that transformers knows
    uvicorn --factory api:build_app        the same, with settings from CHAT_... variables

    POST /          prompt, history and sampling fields in; response, history, status, time out
    GET  /          a short page that says the server is up
    GET  /health    what it is doing: loading, ready or dead
    GET  /docs      the fields of every call

Read it from top to bottom: each section uses only what stands above it. Errors and settings
come first, then what differs between models, how messages become token ids and ids text, the
engine that generates, what goes over the wire, the routes, and how it all starts.
"""

import sys

# Before the other imports, which would fail with a riddle.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("api.py: Python 3.11 or newer is needed; choose a newer image, or use conda.")

import asyncio
import json
import logging
import os
import queue
import random
import re
import tempfile
import threading
import time
from bisect import bisect_left, insort
from collections import Counter, abc, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
)
from contextlib import aclosing, asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

try:
    import psutil
    import torch
    import torch.nn.functional as F
    import uvicorn
    from accelerate.utils import convert_file_size_to_int
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from fastapi_offline import FastAPIOffline
    from packaging.specifiers import SpecifierSet
    from pydantic import (
        AfterValidator,
        AliasChoices,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        ValidationError,
        model_validator,
    )
    from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
    from sentencepiece import SentencePieceProcessor
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream
    from transformers import (
        AttentionInterface,
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
except ImportError as missing:
    sys.exit(f"api.py cannot start ({missing}); run `pip install -r requirements.txt`.")

log = logging.getLogger("chat")

T = TypeVar("T")

# ---- Errors -----------------------------------------------------------------
# An error knows its HTTP status and says what would be right. It is raised
# where the trouble is found, and turned into an answer in one place.


class ChatError(Exception):
    """A request that cannot be served as it was asked."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.param, self.retry_after = param, retry_after


class BadRequest(ChatError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class BodyTooLarge(BadRequest):
    status, code = 413, "body_too_large"


class NotServing(ChatError):
    """The server cannot generate now: it is loading, or its engine is dead."""

    status, code = 503, "not_serving"


class QueueFull(ChatError):
    """As many requests wait as may."""

    status, type, code = 429, "rate_limit_error", "queue_full"


class TimedOut(ChatError):
    """The request took longer than the server lets any."""

    status, code = 504, "timed_out"


class StepFailed(ChatError):
    """The model failed while it computed this request."""

    code = "step_failed"


class StartError(Exception):
    """The server cannot start; the message is one sentence with the remedy."""


# ---- Settings ---------------------------------------------------------------
# One field is one flag (`--device-map`) and one variable (`CHAT_DEVICE_MAP`).


def check_memory(value: str) -> str:
    if value == "auto" or re.fullmatch(r"0?\.\d+|\d+(\.\d+)? ?[KMG]i?B", value):
        return value
    raise ValueError("must be auto, a fraction such as 0.5, or a size such as 4GiB")


class Settings(BaseSettings):
    """Serve a chat model over HTTP."""

    model_config = SettingsConfigDict(
        env_prefix="CHAT_",
        env_ignore_empty=True,
        frozen=True,
        cli_prog_name="api.py",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
    )

    model: str = Field("demo", description="a name under models/, or a folder with a checkpoint")
    host: str = Field("0.0.0.0", description="the address to listen on")
    port: int = Field(6006, ge=1, le=65535, description="the port to listen on")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="the type of the weights; auto is what the checkpoint was saved in"
    )
    device_map: str = Field(
        "auto", description="auto, a device such as cpu or cuda:0, or a JSON map of modules"
    )
    chat_template: Path | None = Field(None, description="a jinja file in place of the model's own")
    cache_memory: Annotated[str, AfterValidator(check_memory)] = Field(
        "auto", description="for keys and values: a size such as 4GiB, or a fraction of free memory"
    )
    max_batch: int = Field(64, ge=1, le=1024, description="most requests that are computed at once")
    max_waiting: int = Field(256, ge=1, description="most requests that wait; more are refused")
    reuse: bool = Field(True, description="keep what was computed, for prompts that begin the same")
    prefill_chunk: int = Field(512, ge=16, description="most prompt tokens that a step computes")
    check: bool = Field(False, description="load, show what was found, say eight tokens, and end")
    request_timeout: float = Field(600, gt=0, description="seconds after which a request is ended")


def read_settings(arguments: list[str]) -> Settings:
    """Settings from flags, then variables, then defaults; exits with one sentence on a bad one."""
    try:
        return Settings(_cli_parse_args=arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        sys.exit(f"api.py: {name}: {problem['msg']}, not {problem['input']!r}.")
    except SettingsError as error:
        sys.exit(f"api.py: {error}.")


# ---- Model families ---------------------------------------------------------
# What differs between models is data. A request's values override these.


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens, in transformers' names and meanings; temperature 0 is greedy."""

    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def override(self, given: dict[str, Any]) -> Self:
        """The same sampling but for the values given, zero included."""
        return replace(self, **given)


# In a format, it parts what the original code encodes apart. A code point that Unicode keeps for
# a program's own use, so no tokenizer and no text has it.
APART = "\ufdd2"

Message = dict[str, str]


@dataclass(frozen=True)
class Family:
    """How to talk to one kind of model: its formats, with {} for a message's content."""

    name: str
    model_type: str
    markers: tuple[str, ...]  # each is one token, wherever it stands in a format
    turns: dict[str, str]
    begin: str = ""
    ask: str = ""  # what makes the model answer
    ends: tuple[str, ...] = ()
    absent: str | None = None  # a token that only the family's namesakes have
    strip: bool = False
    defaults: Sampling = Sampling()
    own_defaults: bool = False  # the tutorial's program ignored generation_config.json

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        contents = [m["content"].strip() if self.strip else m["content"] for m in messages]
        turns = [self.turns[m["role"]].format(c) for m, c in zip(messages, contents, strict=True)]
        return self.begin + "".join(turns) + (self.ask if add_generation_prompt else "")


ROLES = ("system", "user", "assistant")
TUTORIAL = Sampling(1024, 0.95, 5, 0.7, repetition_penalty=1.1)

# The formats are those of each model's original code.
FAMILIES = (
    Family(
        "deepseek-v2",
        "deepseek_v2",
        markers=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        turns={
            "system": "{}\n\n",
            "user": "User: {}\n\n",
            "assistant": "Assistant: {}<｜end▁of▁sentence｜>",
        },
        begin="<｜begin▁of▁sentence｜>",
        ask="Assistant:",
        ends=("<｜end▁of▁sentence｜>",),
        defaults=TUTORIAL,
        own_defaults=True,
    ),
    Family(
        "index",
        "index",
        markers=("<unk>", "reserved_0", "reserved_1"),
        turns={"system": "<unk>{}", "user": "reserved_0{}", "assistant": "reserved_1{}"},
        ask="reserved_1",
        ends=("</s>",),
        defaults=TUTORIAL,
        own_defaults=True,
    ),
    Family(
        "llama-3",
        "llama",
        markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        turns={r: f"<|start_header_id|>{r}<|end_header_id|>\n\n{{}}<|eot_id|>" for r in ROLES},
        begin="<|begin_of_text|>",
        ask="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        absent="<|eom_id|>",  # Llama 3.1 and later, which have a format of their own
        strip=True,
        defaults=Sampling(512, 0.5, 0, 0.9, repetition_penalty=1.1),
        own_defaults=True,
    ),
    Family(
        "xverse",
        "xverse",
        markers=("<|endoftext|>",),
        turns={
            "system": f"Human: {APART}{{}}\n{APART}",
            "user": f"Human: {APART}{{}}\n\n{APART}",
            "assistant": f"Assistant: {APART}{{}}<|endoftext|>",
        },
        ask="Assistant: ",
        ends=("<|endoftext|>",),
        defaults=Sampling(2048, 0.5, 30, 0.85, repetition_penalty=1.1),
    ),
    Family(
        "internlm2",
        "internlm2",
        markers=("<s>", "<|im_start|>", "<|im_end|>"),
        turns={role: f"<|im_start|>{role}\n{{}}<|im_end|>\n" for role in ROLES},
        begin="<s>",
        ask="<|im_start|>assistant\n",
        ends=("</s>", "<|im_end|>"),
    ),
)


def family_of(model_type: str, tokenizer: PreTrainedTokenizerFast) -> Family | None:
    """The family of a checkpoint: many models are called llama, but few have these tokens."""
    has = tokenizer.backend_tokenizer.token_to_id
    for family in FAMILIES:
        known = all(has(marker) is not None for marker in (*family.markers, *family.ends))
        namesake = family.absent is not None and has(family.absent) is not None
        if family.model_type == model_type and known and not namesake:
            return family
    return None


def checkpoint_defaults(config: GenerationConfig, family: Family | None = None) -> Sampling:
    """What a checkpoint's generation_config.json sets, over the family's for the rest."""
    base = family.defaults if family else Sampling()
    if family and family.own_defaults:
        return base
    found = {knob.name: getattr(config, knob.name, None) for knob in fields(Sampling)}
    if config.do_sample is False:
        found["temperature"] = 0.0
    return base.override({name: x for name, x in found.items() if x is not None})


# ---- Text -------------------------------------------------------------------
# Messages become token ids, by the family's format or else the checkpoint's own
# chat template, and ids become text again as they come. Nothing that a user
# writes can turn into a special token.

# Like APART: around a number they stand in a message for a special token that the user spelled.
SHIELD, SHIELD_END = "\ufdd0", "\ufdd1"


def modern(node: dict[str, Any]) -> dict[str, Any]:
    """Spell a part of XVERSE's tokenizer.json as tokenizers has done since 0.19."""
    if node.get("type") == "Metaspace" and node.pop("add_prefix_space", True) is False:
        node["prepend_scheme"] = "never"
    return node


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder, from tokenizer.json or tokenizer.model; None if it has neither.

    Raises StartError if a tokenizer.model is read differently from how sentencepiece reads it.
    """
    if (folder / "tokenizer.json").is_file():
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        backend = Tokenizer.from_str(json.dumps(json.loads(text, object_hook=modern)))
        return PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=backend)
    if not (folder / "tokenizer.model").is_file():
        return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for probe in ("Hello, world", "你好，世界", " two  spaces", "x = 1\n\ty", "🙂 1234"):
        if original.encode(probe) != tokenizer.encode(probe, add_special_tokens=False):
            raise StartError(f"{folder}/tokenizer.model reads {probe!r} otherwise than it should")
    return tokenizer


def any_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


class ChatTokenizer:
    """Turns messages into token ids; raises BadRequest where a chat template refuses them.

    Many threads may call it: the tokenizers inside are never changed, which transformers' own
    wrapper does when it encodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, family: Family | None = None):
        if family is None and tokenizer.chat_template is None:
            raise StartError(
                "the checkpoint has no chat template; choose a chat model, or pass its template"
                " with --chat-template FILE"
            )
        self.tokenizer, self.family = tokenizer, family
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        markers = (*family.markers, *family.ends) if family else ()
        for token in spec["added_tokens"]:
            # DeepSeek's markers for filling in the middle are not marked special, but are.
            token["special"] |= bool(re.fullmatch(r"<[|｜]\S+[|｜]>", token["content"]))
        self.backend = Tokenizer.from_str(json.dumps(spec))
        # The same, but blind to special tokens: it encodes them as the text they are.
        self.plain = Tokenizer.from_str(json.dumps(spec))
        self.plain.encode_special_tokens = True
        added = [token["content"] for token in spec["added_tokens"] if token["special"]]
        ids = {word: self.backend.token_to_id(word) for word in (*added, *markers)}
        self.special = {word: i for word, i in ids.items() if i is not None}
        self.words = [SHIELD, SHIELD_END, APART, *self.special]
        self._word = re.compile(any_of(self.words))
        self._part = re.compile(f"({any_of(self.special)})|{APART}")
        # A special token that is looked for in normalised text can be spelled in other letters.
        hidden = any(token["special"] and token["normalized"] for token in spec["added_tokens"])
        self._whole = family is None and not (hidden and spec["normalizer"])

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids, up to where the assistant is to speak."""
        shielded = [m | {"content": self._shield(m["content"])} for m in messages]
        text = self._render(shielded, add_generation_prompt=True)
        if self._whole and SHIELD not in text:
            return self.backend.encode(text, add_special_tokens=False).ids
        return [i for run in self._runs(text) for i in self._encode_run(run)]

    def end_ids(self, config: GenerationConfig) -> set[int]:
        """Every id that ends an answer: the checkpoint's own, and the template's end of turn."""
        listed = config.eos_token_id
        ends = {*(listed if isinstance(listed, list) else [listed])}
        if self.family:
            ends |= {self.special[word] for word in self.family.ends}
        else:
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SHIELD}]
            after = self._render(turn).partition(SHIELD)[2].lstrip()
            closing = self._word.match(after)
            ends |= {self.tokenizer.eos_token_id, self.special.get(closing[0]) if closing else None}
        return {i for i in ends if i is not None}

    def _render(self, messages: list[Message], **options: Any) -> str:
        if self.family:
            return self.family.render(messages, **options)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # jinja's errors, and whatever a template raises
            raise BadRequest(f"the model's chat template refuses these turns: {error}") from error

    def _shield(self, content: str) -> str:
        return self._word.sub(lambda m: f"{SHIELD}{self.words.index(m[0])}{SHIELD_END}", content)

    def _runs(self, text: str) -> list[str]:
        """The text cut at the format's own special tokens, which are runs of their own."""
        return [run for run in self._part.split(text) if run]

    def _encode_run(self, run: str) -> list[int]:
        if run in self.special:
            return [self.special[run]]
        spelled = re.sub(f"{SHIELD}(\\d+){SHIELD_END}", lambda m: self.words[int(m[1])], run)
        return self.plain.encode(spelled, add_special_tokens=False).ids


class Detokenizer:
    """Turns one answer's ids into text as they come: whole characters, no stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, token: int) -> str:
        """Take the next id; return the text that can be sent now, often none or one word."""
        self._held += self._decode(token) or ""
        starts = [at for at in map(self._held.find, self.stop) if at >= 0]
        if starts:
            self.stopped = True
            self._held = self._held[: min(starts)]
            return self.flush()
        return self._release(len(self._held) - self._doubtful())

    def _decode(self, token: int) -> str | None:
        try:
            return self._stream.step(self.tokenizer, token)
        except Exception:
            # Bytes that are no text, as a model may say when it is very hot: they are dropped.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self.tokenizer, token)

    def flush(self) -> str:
        """What was held back, once it is sure that no more ids come."""
        return self._release(len(self._held))

    def _doubtful(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        most = max(map(len, self.stop), default=0)
        ends = (n for n in range(min(most, len(self._held)), 0, -1))
        return next((n for n in ends if any(s.startswith(self._held[-n:]) for s in self.stop)), 0)

    def _release(self, count: int) -> str:
        ready, self._held = self._held[:count], self._held[count:]
        return ready


# ---- Batches ----------------------------------------------------------------
# One thread owns the model. Every step is one forward pass over packed tokens:
# the next token of each sequence that is answering, and a chunk of each prompt
# that is not through yet. Keys and values lie in one pool a layer, in which a
# sequence owns a span of rows; its attention reads that span and no other.

FinishReason = Literal["stop", "length"]

# After so many seconds without text a stream yields an empty Delta, as a sign of life.
HEARTBEAT = 15.0
# An answer of no stated length reserves room for so many tokens at a time.
GROWTH = 1024
# Fewer tokens than these are computed again rather than kept or copied.
WORTH_KEEPING = 16
# So many ended requests are remembered, at most.
MAX_KEPT = 256
# So many smaller requests may pass one that waits for room; then they wait behind it.
MAX_PASSES = 16
# So many candidates are ranked first; few requests ever need more.
FEW = 128


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the last one says why it ended and how many tokens it took."""

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class Span:
    """Tokens, and the rows of the pool that are theirs: start to start + room.

    The keys and values of the first num_cached tokens are written there.
    """

    tokens: list[int]
    start: int = 0
    room: int = 0
    num_cached: int = 0

    def shared(self, tokens: list[int]) -> int:
        """How many cached tokens are also the first of these, the last of which is left over."""
        most = min(self.num_cached, len(tokens) - 1)
        mine, other = self.tokens[:most], tokens[:most]
        if mine == other or mine[:WORTH_KEEPING] != other[:WORTH_KEEPING]:
            return most if mine == other else 0
        return bisect_left(range(most), True, key=lambda n: mine[: n + 1] != other[: n + 1])

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet: the prompt's at first, and then one at a time."""
        return len(self.tokens) - self.num_cached


@dataclass(eq=False, kw_only=True)
class Sequence(Span):
    """One request inside the engine: its tokens, its state, and where its text goes."""

    sampling: Sampling
    detokenizer: Detokenizer
    loop: asyncio.AbstractEventLoop
    open_ended: bool = False
    outbox: "asyncio.Queue[Delta | ChatError]" = field(default_factory=asyncio.Queue)
    done: bool = False
    finish_reason: FinishReason | None = None
    passed: int = 0
    arrived: float = field(default_factory=time.monotonic)
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.most = self.num_prompt + self.sampling.max_new_tokens
        self.random = random.Random(self.sampling.seed)

    @property
    def wanted_room(self) -> int:
        """Rows for all that it may still say, or for the next stretch of it."""
        return min(self.most, len(self.tokens) + GROWTH) if self.open_ended else self.most

    @property
    def num_completion(self) -> int:
        """An end token counts, as it was computed."""
        return len(self.tokens) - self.num_prompt

    def append(self, token: int, end_ids: set[int]) -> Delta:
        """Take the next token; return what it adds to the answer."""
        self.first_token = self.first_token or time.monotonic()
        self.tokens.append(token)
        text = "" if token in end_ids else self.detokenizer.push(token)
        if token in end_ids or self.detokenizer.stopped:
            return self._finish(text, "stop")
        if len(self.tokens) == self.most:
            return self._finish(text, "length")
        return Delta(text)

    def log(self) -> None:
        now = time.monotonic()
        first = (self.first_token or now) - self.arrived
        later = (now - self.first_token) / max(1, self.num_completion - 1)
        counts = self.num_prompt, self.num_completion, self.finish_reason or "left"
        log.info(
            "%d tokens in, %d out, %s; first after %.3f s, then %.3f s each", *counts, first, later
        )

    def _finish(self, text: str, reason: FinishReason) -> Delta:
        self.done, self.finish_reason = True, reason
        text += self.detokenizer.flush()
        return Delta(text, reason, self.num_prompt, self.num_completion)


# A step's work: the spans in it, and how many of each one's pending tokens are computed.
Work = abc.Sequence[tuple[Span, int]]


class Allocator:
    """Hands out spans of the pool's rows; free neighbours are joined again."""

    def __init__(self, rows: int):
        self.free = [(0, rows)]  # (first row, size), in order

    def take(self, size: int, at: int | None = None) -> int | None:
        """The first row of a span of that size; `at` that row, or from the tightest gap."""
        gaps = [
            (gap, start)
            for start, gap in self.free
            if (gap >= size if at is None else start <= at and at + size <= start + gap)
        ]
        if not gaps:
            return None
        gap, start = min(gaps)
        first = start if at is None else at
        self.free.remove((start, gap))
        rest = (start, first - start), (first + size, start + gap - first - size)
        for piece in rest:
            if piece[1]:
                insort(self.free, piece)
        return first

    def give(self, start: int, size: int) -> None:
        """Take a span back."""
        at = bisect_left(self.free, (start, 0))
        if at < len(self.free) and self.free[at][0] == start + size:
            size += self.free.pop(at)[1]
        if at > 0 and sum(self.free[at - 1]) == start:
            before = self.free.pop(at - 1)
            at, start, size = at - 1, before[0], before[1] + size
        self.free.insert(at, (start, size))


class Group(NamedTuple):
    """A part of a step that is one call of attention: single tokens, padded, or one chunk."""

    batch: int
    tokens: slice  # of the step's packed tokens
    rows: slice  # of the rows that the step reads
    mask: torch.Tensor | None  # bool, [batch, 1, 1, longest] or [new, total]


def attended_as(item: tuple[Span, int]) -> tuple[bool, int]:
    """Neighbours that agree in this are one group.

    Single tokens are, if their lengths agree within a factor of two; a chunk is always alone.
    """
    span, new = item
    return new > 1, id(span) if new > 1 else (span.num_cached + 1).bit_length()


class Step:
    """What one forward pass works on; a plain object, which accelerate's hooks leave alone."""

    def __init__(self, work: Work):
        self.ids = [i for span, n in work for i in span.tokens[span.num_cached :][:n]]
        ends = [(span.num_cached, span.num_cached + new) for span, new in work]
        self.positions = torch.cat([torch.arange(*both) for both in ends])
        news = torch.tensor([new for _, new in work])
        starts = torch.tensor([span.start for span, _ in work])
        # The pool's row of each packed token, and the packed token that ends each sequence.
        self.write = self.positions + starts.repeat_interleave(news)
        self.last = (news.cumsum(0) - 1).tolist()
        self.groups: list[Group] = []
        self.read = torch.cat([self._group(list(part)) for _, part in groupby(work, attended_as)])
        self.attended = 0
        self._copies: dict[torch.device, Step] = {}

    def _group(self, work: Work) -> torch.Tensor:
        """Add the group of these spans; return the rows that it reads, [batch * longest]."""
        token, row = (part.stop for part in self.groups[-1][1:3]) if self.groups else (0, 0)
        new = work[0][1]
        totals = torch.tensor([[span.num_cached + new] for span, _ in work])
        longest = torch.arange(int(totals.max()))
        # Where a span is shorter than the longest, its last row is read again, and masked.
        rows = torch.tensor([[span.start] for span, _ in work]) + longest.minimum(totals - 1)
        mask = None
        if new > 1:
            mask = longest <= longest[-new:, None]
        elif len(work) > 1:
            mask = (longest < totals)[:, None, None]
        tokens = slice(token, token + len(work) * new)
        self.groups.append(Group(len(work), tokens, slice(row, row + rows.numel()), mask))
        return rows.flatten()

    def on(self, device: torch.device) -> "Step":
        """The step with its tensors on a device; copied there once, for all its layers."""
        if device not in self._copies:
            there = self._copies[device] = copy(self)
            there.write, there.read = self.write.to(device), self.read.to(device)
            there.groups = [
                group if group.mask is None else group._replace(mask=group.mask.to(device))
                for group in self.groups
            ]
        return self._copies[device]


class SpanLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, width] each, wherever the layer lives."""

    def __init__(self, pool: "Pool"):
        super().__init__()
        self.pool = pool

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shapes = [(self.pool.rows, x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        # Not zeroed: no row is read before it is written, and an untouched page costs nothing.
        self.keys, self.values = map(key_states.new_empty, shapes)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's rows; return the rows that it reads, [1, heads, rows, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.pool.step.on(key_states.device)
        self.keys.index_copy_(0, step.write, key_states[0].transpose(0, 1))
        self.values.index_copy_(0, step.write, value_states[0].transpose(0, 1))
        keys, values = (x.index_select(0, step.read) for x in (self.keys, self.values))
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def row_bytes(self) -> int:
        return sum(x[0].numel() * x.element_size() for x in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.pool.rows


class Pool(Cache):
    """The keys and values of every sequence: each layer's rows, created on first use."""

    step: Step

    def __init__(self, num_layers: int, rows: int):
        self.rows = rows
        super().__init__(layers=[SpanLayer(self) for _ in range(num_layers)])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy a span's rows to where another span begins."""
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                x[target : target + count] = x[source : source + count]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: Step,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each group's tokens to its own rows: [1, heads, tokens, width] and back.

    Returns [1, tokens, heads, width]. Raises StartError for what it does not honour.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise StartError(f"the model's attention uses {name}, which this server does not do")
    step.attended += 1
    states = query[0].transpose(0, 1), key[0], value[0]
    parts = [attend(group, *states, scaling) for group in step.on(key.device).groups]
    return torch.cat(parts)[None], None


def attend(
    group: Group, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One group's attention: query [tokens, heads, width], keys [kv heads, rows, width]."""
    query = query[group.tokens]
    key, value = (
        x[:, group.rows].reshape(len(x), group.batch, -1, x.shape[-1]).transpose(0, 1)
        for x in (key, value)
    )
    # The query heads that share a key head become the query's length, so that none is repeated:
    # [batch, kv heads, sharing * new, width], as a masked enable_gqa is slow on CUDA.
    new = len(query) // group.batch
    query = query.unflatten(0, (group.batch, new)).unflatten(2, (key.shape[1], -1))
    mask = group.mask if new == 1 or group.mask is None else group.mask.repeat(query.shape[3], 1)
    stacked = query.permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(stacked, key, value, mask, scale=scaling)
    return out.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


AttentionInterface.register("packed", packed_attention)


def input_device(model: Any) -> torch.device:
    """Where token ids go: to the embedding, or to where accelerate brings it to compute."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or embedding.weight.device)


class Runner:
    """Computes logits with the model, over the spans of its pool; knows nothing of requests."""

    def __init__(self, model: Any, cache_memory: str = "auto", max_rows: int = 2**31 - 1):
        self.model = model
        self.device = input_device(model)
        self.split = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        if other := {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
            raise StartError(f"the model has layers of {', '.join(other)}, which cannot be packed")
        model.set_attn_implementation("packed")
        self.difference = 0.0  # to the plain forward pass, as the check at start found it
        self._make_room(8)
        # One token creates each layer's rows, whose size tells what a row costs on which device.
        self.forward([(Span([0]), 1)])
        rows = min(max_rows, self._affordable(cache_memory))
        if rows < 64:
            raise StartError(f"the cache memory holds {rows} tokens; raise --cache-memory")
        self._make_room(rows)

    def _make_room(self, rows: int) -> None:
        self.pool = Pool(self.num_layers, rows)
        # The token id in each row, for penalties.
        self.ids = torch.zeros(rows, dtype=torch.long, device=self.device)

    @property
    def rows(self) -> int:
        """How many tokens the pool holds."""
        return self.pool.rows

    @torch.inference_mode()
    def forward(self, work: Work) -> torch.Tensor:
        """Compute the work; return float32 logits [sequences, vocabulary] of the last tokens."""
        step = self.pool.step = Step(work)
        ids = torch.tensor(step.ids, device=self.device)
        self.ids[step.on(self.device).write] = ids
        # On a split model the root hook would move a tensor to the first device, but not ints.
        last = step.last if self.split else torch.tensor(step.last, device=self.device)
        out = self.model(
            input_ids=ids[None],
            position_ids=step.positions[None].to(self.device),
            past_key_values=self.pool,
            use_cache=True,
            step=step,
            logits_to_keep=last,
        )
        if step.attended != self.num_layers:
            raise StartError("the model's attention cannot be reached")
        return out.logits[0].float()

    def check_device(self) -> None:
        """Raise if the device does not compute any more, as after some CUDA errors."""
        torch.zeros(1, device=self.device).item()

    @torch.inference_mode()
    def copy(self, span: Span, start: int, count: int) -> None:
        """Copy the first rows of a span to where another starts."""
        self.pool.copy(span.start, start, count)
        self.ids[start : start + count] = torch.tensor(span.tokens[:count])

    def _affordable(self, cache_memory: str) -> int:
        """Rows that the budget holds on the device where it holds the fewest."""
        costs: Counter[torch.device] = Counter()
        for layer in self.pool.layers:
            costs[layer.keys.device] += layer.row_bytes()
        return min(cache_budget(cache_memory, device) // cost for device, cost in costs.items())


def cache_budget(setting: str, device: torch.device) -> int:
    """Bytes for keys and values on a device: auto, a fraction of what is free, or a size."""
    on_card = device.type == "cuda"
    if setting == "auto":
        setting = "0.85" if on_card else "2GiB"
    try:
        fraction = float(setting)
    except ValueError:
        return int(convert_file_size_to_int(setting))
    free = torch.cuda.mem_get_info(device)[0] if on_card else psutil.virtual_memory().available
    return int(free * fraction)


# ---- Sampling ---------------------------------------------------------------
# From a step's logits to each sequence's next token, for the whole batch at once.


def column(seqs: list[Sequence], knob: str, like: torch.Tensor) -> torch.Tensor:
    """One knob of every sequence, [sequences, 1]; a temperature is never nothing in float32."""
    values = torch.tensor([[getattr(seq.sampling, knob)] for seq in seqs], device=like.device)
    return values.clamp(min=1e-30) if knob == "temperature" else values


def pick(seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor) -> list[int]:
    """The next token of every sequence, by transformers' rules and in its order.

    Takes float32 logits [sequences, vocabulary], which it changes, and the token id in each of
    the pool's rows.
    """
    if not logits.amax(-1).isfinite().all():
        raise ArithmeticError("the model's logits are not finite; try another --dtype")
    if any(seq.sampling.repetition_penalty != 1 for seq in seqs):
        penalise(seqs, logits, pool_ids)
    tokens: list[int] = logits.argmax(-1).tolist()
    warm = [row for row, seq in enumerate(seqs) if seq.sampling.temperature > 0]
    free = [row for row in warm if not seqs[row].sampling.top_k and seqs[row].sampling.top_p >= 1]
    for rows, draw in ((sorted({*warm} - {*free}), draw_ranked), (free, draw_any)):
        if rows:
            some = [seqs[row] for row in rows]
            numbers = [[seq.random.random()] for seq in some]
            draws = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
            theirs = logits if len(rows) == len(seqs) else logits[rows]
            for row, token in zip(rows, draw(some, theirs, draws), strict=True):
                tokens[row] = token
    return tokens


def penalise(seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor) -> None:
    """Make the tokens that a sequence holds less likely; all of them are in its span by now."""
    starts, ends = torch.tensor(
        [(seq.start, seq.start + len(seq.tokens) - 1) for seq in seqs], device=logits.device
    ).T[:, :, None]
    longest = torch.arange(int((ends - starts).max()) + 1, device=logits.device)
    seen = pool_ids[(starts + longest).minimum(ends)]
    penalty = column(seqs, "repetition_penalty", logits)
    scores = logits.gather(1, seen)
    logits.scatter_(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def draw_any(seqs: list[Sequence], logits: torch.Tensor, draws: torch.Tensor) -> list[int]:
    """Sample where neither top-k nor top-p cuts anything off, so that nothing is ranked."""
    scores = (logits - logits.amax(-1, True)) / column(seqs, "temperature", logits)
    mass = scores.exp()
    mass *= mass >= column(seqs, "min_p", logits)
    return place_in(mass, draws)[:, 0].tolist()


def place_in(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where draws [sequences, 1] from [0, 1) fall in mass [sequences, tokens] of any sum."""
    reached = mass.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(reached, draws * reached[:, -1:], right=True)
    return place.clamp(max=mass.shape[1] - 1)


def draw_ranked(
    seqs: list[Sequence], logits: torch.Tensor, draws: torch.Tensor, depth: int = FEW
) -> list[int]:
    """Sample from logits [sequences, vocabulary] with draws [sequences, 1] from [0, 1).

    Only the likeliest `depth` tokens are ranked, as a sort of the vocabulary takes longer than
    all else; a sequence whose top-p reaches deeper is drawn again, among more.
    """
    temperature, top_k, top_p, min_p = (
        column(seqs, knob, logits) for knob in ("temperature", "top_k", "top_p", "min_p")
    )
    width = logits.shape[1]
    depth = min(width, max(depth, int(top_k.max())))
    ranked, ids = logits.topk(depth)
    top = ranked[:, :1]
    # At most zero, so that no temperature can overflow it.
    ranked = (ranked - top) / temperature
    lowest = ranked.gather(1, top_k.clamp(1, depth) - 1)
    ranked = ranked.masked_fill((top_k > 0) & (ranked < lowest), -torch.inf)
    rivals = ranked.logsumexp(-1, True)
    if not top_k.all():
        everyone = ((logits - top) / temperature).logsumexp(-1, True)
        rivals = torch.where(top_k > 0, rivals, everyone)
    mass = (ranked - rivals).exp()
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    keep = ((before < top_p) | (top_p >= 1)) & (mass >= min_p * mass[:, :1])
    keep[:, 0] = True
    tokens: list[int] = ids.gather(1, place_in(mass * keep, draws))[:, 0].tolist()
    deeper = (keep[:, -1] & (top_k[:, 0] == 0)).nonzero()[:, 0].tolist() if depth < width else []
    if deeper:
        some = [seqs[row] for row in deeper]
        again = draw_ranked(some, logits[deeper], draws[deeper], 8 * depth)
        for row, token in zip(deeper, again, strict=True):
            tokens[row] = token
    return tokens


# ---- Engine -----------------------------------------------------------------
# One thread owns the model; a request is a Sequence in it, until it is done.


class Engine:
    """Generates for every request; `stream` is how to ask."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        end_ids: set[int],
        *,
        max_batch: int = 64,
        max_waiting: int = 256,
        chunk: int = 512,
        timeout: float = 600.0,
        reuse: bool = True,
    ):
        self.runner, self.tokenizer, self.end_ids = runner, tokenizer, end_ids
        self.max_batch, self.max_waiting, self.reuse = max_batch, max_waiting, reuse
        self.chunk, self.timeout = chunk, timeout
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.failure: BaseException | None = None
        self.allocator = Allocator(runner.rows)
        # What is cached of requests that ended, the longest unused first.
        self.kept: list[Span] = []
        self.num_reused = 0
        self._ended: deque[float] = deque(maxlen=64)
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What the routes call, on the event loop.

    async def stream(
        self, prompt: list[int], sampling: Sampling, open_ended: bool = False
    ) -> AsyncGenerator[Delta]:
        """Yield an answer piece by piece; leaving the loop early cancels it.

        Raises QueueFull, NotServing if the engine is dead, StepFailed if the model fails, and
        TimedOut.
        """
        self.check_queue()
        seq = Sequence(
            list(prompt),
            sampling=sampling,
            detokenizer=Detokenizer(self.tokenizer, sampling.stop),
            loop=asyncio.get_running_loop(),
            open_ended=open_ended,
        )
        if seq.most > self.runner.rows:
            raise ContextTooLong(f"{seq.most} tokens do not fit in a cache of {self.runner.rows}")
        self._inbox.put(seq)
        if self.failure:
            raise self._dead()
        try:
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        item = await seq.outbox.get()
                except TimeoutError:
                    item = Delta("")
                if isinstance(item, ChatError):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            seq.done = True

    def check_queue(self) -> None:
        """Raise QueueFull if no more may wait; it says when the queue should be half empty."""
        if self.num_waiting >= self.max_waiting:
            now = time.monotonic()
            rate = len(self._ended) / (now - self._ended[0] + 1e-3) if self._ended else 1.0
            seconds = min(60, 1 + int(self.num_waiting / 2 / rate))
            raise QueueFull(
                f"{self.num_waiting} requests are waiting; try again in {seconds} seconds",
                retry_after=seconds,
            )

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self._inbox.qsize()

    def close(self) -> None:
        """End the thread once its present step is done."""
        self._inbox.put(None)
        self._thread.join()

    # What the thread does.

    def _run(self) -> None:
        try:
            while self._take_in():
                self._admit()
                self._step()
                self._retire()
        except BaseException as failure:
            log.exception("the engine died")
            self.failure = failure
        self.failure = self.failure or NotServing("the server is stopping")
        while not self._inbox.empty():
            if seq := self._inbox.get():
                self.waiting.append(seq)
        self._deliver([(seq, self._dead()) for seq in [*self.running, *self.waiting]])

    def _take_in(self) -> bool:
        """Let the inbox in, and wait for it where there is nothing to do; False at the end."""
        idle = not (self.running or self.waiting)
        while idle or not self._inbox.empty():
            seq = self._inbox.get()
            if seq is None:
                return False
            self.waiting.append(seq)
            idle = False
        return True

    def _admit(self) -> None:
        """Give room to those who wait, in the order of arrival; see MAX_PASSES."""
        first_left = None
        for seq in list(self.waiting):
            full = len(self.running) == self.max_batch
            if full or (first_left and first_left.passed >= MAX_PASSES):
                return
            if not self._place(seq):
                first_left = first_left or seq
                continue
            if first_left:
                first_left.passed += 1
            self.waiting.remove(seq)
            self.running.append(seq)

    def _place(self, seq: Sequence) -> bool:
        """Give a sequence a span, with what is cached already of its first tokens."""
        size = seq.wanted_room
        if size > self._num_free():
            return False
        donors = [*self.kept, *self.running] if self.reuse else []
        shared, _, donor = max(
            ((span.shared(seq.tokens), -n, span) for n, span in enumerate(donors)),
            default=(0, 0, None),
        )
        if shared < WORTH_KEEPING:
            shared, donor = 0, None
        if donor in self.kept and shared == donor.num_cached and self._take_over(seq, donor):
            return True
        start = self._make_room(size, spare=donor)
        if start is None:
            return False
        seq.start, seq.room, seq.num_cached = start, size, 0
        # The donor may have been given up for the room.
        if donor in self.kept:
            self.kept.append(self.kept.pop(self.kept.index(donor)))
        alive = donor and (donor in self.kept or donor in self.running)
        if donor and alive and self._copied(donor, seq, shared):
            seq.num_cached = shared
            self.num_reused += shared
        return True

    def _copied(self, source: Span, seq: Sequence, count: int) -> bool:
        """Copy rows to a sequence's span; where that fails, they can be computed again."""
        try:
            self.runner.copy(source, seq.start, count)
        except Exception:
            log.exception("%d rows could not be copied", count)
            self.runner.check_device()
            return False
        return True

    def _num_free(self) -> int:
        """Rows that no running sequence has."""
        free = sum(gap for _, gap in self.allocator.free)
        return free + sum(span.room for span in self.kept)

    def _take_over(self, seq: Sequence, donor: Span) -> bool:
        """Continue in a kept span, if it can be widened where it lies."""
        self.allocator.give(donor.start, donor.room)
        start = self.allocator.take(seq.wanted_room, at=donor.start)
        if start is None:
            self.allocator.take(donor.room, at=donor.start)
            return False
        self.kept.remove(donor)
        seq.start, seq.room, seq.num_cached = start, seq.wanted_room, donor.num_cached
        self.num_reused += donor.num_cached
        return True

    def _make_room(self, size: int, spare: Span | None = None) -> int | None:
        """Rows for a span; kept ones are given up for it, the spared one last."""
        start = self.allocator.take(size)
        if start is not None or self._num_free() < size:
            return start
        for span in sorted(self.kept, key=lambda span: span is spare):
            self._forget(span)
            start = self.allocator.take(size)
            if start is not None:
                break
        return start

    def _step(self) -> None:
        """Compute one step, and send what it adds to each answer."""
        for seq in [seq for seq in self.running if len(seq.tokens) > seq.room]:
            self._grow(seq)
        items: list[tuple[Sequence, Delta | ChatError]] = []
        for seq, token in self._compute(self._plan()):
            try:
                item = token if isinstance(token, ChatError) else seq.append(token, self.end_ids)
            except Exception as error:  # from the detokenizer: it is this request's alone
                item = self._failed(seq, error)
            items.append((seq, item))
        self._deliver(items)

    def _grow(self, seq: Sequence) -> None:
        """Move a sequence to a larger span; where there is none, it waits with its tokens."""
        start = self._make_room(seq.wanted_room)
        if start is None:
            self._release(seq)
            self.running.remove(seq)
            self.waiting.appendleft(seq)
            return
        old = Span(seq.tokens, seq.start, seq.room, seq.num_cached)
        seq.start, seq.room = start, seq.wanted_room
        if not self._copied(old, seq, old.num_cached):
            seq.num_cached = 0
        self.allocator.give(old.start, old.room)

    def _plan(self) -> list[tuple[Sequence, int]]:
        """The next step's work: every answer's next token, and chunks of prompts in order."""
        left = self.chunk
        work = []
        for seq in self.running:
            count = min(seq.pending, left) if seq.pending > 1 else 1
            left -= count if seq.pending > 1 else 0
            if count and not seq.done:
                work.append((seq, count))
        # Equals side by side, because neighbours share a call of attention.
        return sorted(work, key=lambda item: (item[1] > 1, item[0].num_cached))

    def _compute(self, work: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int | ChatError]]:
        """The next token of each sequence whose tokens are all computed.

        If a step fails, its halves are tried, so that only those fail who fail alone.
        """
        if not work:
            return []
        try:
            logits = self.runner.forward(work)
            through = [row for row, (seq, new) in enumerate(work) if seq.pending == new]
            seqs = [work[row][0] for row in through]
            tokens = pick(seqs, logits[through], self.runner.ids) if seqs else []
        except Exception as error:
            if len(work) == 1:
                self.runner.check_device()
                return [(work[0][0], self._failed(work[0][0], error))]
            log.warning("a step of %d requests failed; its halves are tried", len(work))
        else:
            for seq, new in work:
                seq.num_cached += new
            return list(zip(seqs, tokens, strict=True))
        half = len(work) // 2
        return self._compute(work[:half]) + self._compute(work[half:])

    def _failed(self, seq: Sequence, error: Exception) -> StepFailed:
        log.error("a request of %d tokens failed", len(seq.tokens), exc_info=error)
        seq.done = True
        return StepFailed("the model failed on this request; try again")

    def _retire(self) -> None:
        """Take back the room of those who are done, have left, or took too long."""
        oldest = time.monotonic() - self.timeout
        late = [seq for seq in [*self.running, *self.waiting] if seq.arrived < oldest]
        for seq in late:
            seq.done = True
        self._deliver([(seq, TimedOut("the answer took too long")) for seq in late])
        # Asked once: a client may leave at any moment, also between two looks.
        gone = [seq for seq in self.running if seq.done]
        self.running = [seq for seq in self.running if seq not in gone]
        for seq in gone:
            self._release(seq)
            self._ended.append(time.monotonic())
            seq.log()
        self.waiting = deque(seq for seq in self.waiting if not seq.done)

    def _forget(self, span: Span) -> None:
        self.kept.remove(span)
        self.allocator.give(span.start, span.room)

    def _release(self, seq: Sequence) -> None:
        """Take back a sequence's span, but for the rows that another prompt may begin with."""
        count = seq.num_cached if self.reuse and seq.num_cached >= WORTH_KEEPING else 0
        if count:
            self.kept.append(Span(seq.tokens[:count], seq.start, count, count))
        if len(self.kept) > MAX_KEPT:
            self._forget(self.kept[0])
        if seq.room > count:
            self.allocator.give(seq.start + count, seq.room - count)
        seq.room = seq.num_cached = 0

    def _deliver(self, items: list[tuple[Sequence, Delta | ChatError]]) -> None:
        """Put each item into its request's outbox, with one call a step for all of them."""
        for loop, group in groupby(items, key=lambda item: item[0].loop):
            said = [(seq, item) for seq, item in group if item != Delta("")]
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(put_all, said)

    def _dead(self) -> NotServing:
        if isinstance(self.failure, NotServing):
            return self.failure
        return NotServing(f"the engine died ({self.failure!r}); restart the server")


def put_all(items: list[tuple[Sequence, Delta | ChatError]]) -> None:
    for seq, item in items:
        seq.outbox.put_nowait(item)


# ---- Model ------------------------------------------------------------------
# Text above, engine below: a model that answers, and the way to it from a name.
# Nothing that a checkpoint brings is run.


@dataclass(frozen=True)
class Prompt:
    """A request that is ready to be generated."""

    ids: list[int]
    sampling: Sampling
    open_ended: bool
    dropped_turns: int = 0


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, ready to answer: text above, engine below."""

    name: str
    tokenizer: ChatTokenizer
    engine: Engine
    defaults: Sampling
    context_length: int
    prompt_length: int  # most tokens of a prompt, where the model has such a limit
    facts: dict[str, str]

    def answer(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        return self.engine.stream(prompt.ids, prompt.sampling, prompt.open_ended)

    def prepare(self, messages: list[Message], given: dict[str, Any], truncate: bool) -> Prompt:
        """Tokenize and check the lengths; takes a while, so not on the event loop.

        Raises ContextTooLong if prompt and answer do not fit together. A length that
        was not asked for is cut to the room instead.
        """
        sampling = self.defaults.override(given)
        # An answer of no stated length gets its whole default, but not more than half of it all.
        answer = min(sampling.max_new_tokens, self.context_length // 2)
        answer = given.get("max_new_tokens", answer)
        dropped = self._turns_to_drop(messages, answer) if truncate else 0
        ids = self.tokenizer.encode(without_turns(messages, dropped))
        room = self.context_length - len(ids)
        wanted = given.get("max_new_tokens", 1)
        if room < wanted or len(ids) > self.prompt_length:
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens and the answer may have {wanted}, but the"
                f" model's context holds {self.context_length}, {self.prompt_length} of them for"
                " the prompt; shorten the prompt or the history, ask for a shorter answer, or send"
                ' "truncate": true',
                param="max_length" if 0 < room < wanted else "prompt",
            )
        sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        return Prompt(ids, sampling, "max_new_tokens" not in given, dropped)

    def _turns_to_drop(self, messages: list[Message], answer: int) -> int:
        """The fewest of the oldest turns to leave out, so that the answer has its room."""

        def fits(dropped: int) -> bool:
            ids = self.tokenizer.encode(without_turns(messages, dropped))
            return len(ids) <= min(self.prompt_length, self.context_length - answer)

        turns = sum(m["role"] == "user" for m in messages) - 1
        return bisect_left(range(turns), True, key=fits)


def without_turns(messages: list[Message], count: int) -> list[Message]:
    """The messages without the oldest `count` turns; what comes before the first turn stays."""
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return messages[: starts[0]] + messages[starts[count] :]


HERE = Path(__file__).resolve().parent
SUPPORTED = {"torch": ">=2.6,<2.14", "transformers": ">=5.17,<6"}


def check_versions(installed: Callable[[str], str] = version) -> None:
    """Raise StartError unless the libraries that matter are ones that we know."""
    for name, wanted in SUPPORTED.items():
        if not SpecifierSet(wanted).contains(installed(name), prereleases=True):
            raise StartError(
                f"{name} {installed(name)} is not one that this server works with ({wanted});"
                f" run `pip install '{name}{wanted}'`, or choose another image"
            )


def check_cards(device_map: str) -> None:
    """Raise StartError if the machine has an NVIDIA card that torch cannot use.

    A model that falls back to the CPU without a word would seem to hang.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_card = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if device_map == "cpu" or hidden or not has_card:
        return
    try:
        for index in range(max(1, torch.cuda.device_count())):
            torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise StartError(
            f"this machine has a card that torch {torch.__version__} cannot use ({reason});"
            " install the torch build that fits the driver (see pytorch.org/get-started),"
            " or start with --device-map cpu"
        ) from error


def find_model(name: str) -> Path:
    """The folder of a model, given as a path or by its name under models/."""
    for folder in (Path(name).expanduser(), HERE / "models" / name):
        if (folder / "config.json").is_file():
            return folder
    if name == "demo":
        return fetch_demo()
    raise StartError(
        f"there is no model {name!r}: neither {Path(name).absolute()} nor {HERE / 'models' / name}"
        " has a config.json; give --model the folder of a checkpoint"
    )


def fetch_demo() -> Path:
    try:
        from model_download import DownloadError, fetch_demo
    except ImportError as error:
        raise StartError(
            "the demo model is fetched by model_download.py, which is not beside api.py;"
            " copy it there, or give --model the folder of a checkpoint"
        ) from error
    try:
        return fetch_demo()
    except DownloadError as error:
        raise StartError(str(error)) from error


class UngroupQKV(ConversionOps):
    """Splits InternLM2's one matrix for queries, keys and values.

    A key head's rows stand together: those of its query heads, its own, its value's.
    """

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((matrix,),) = input_dict.values()
        queries = config.num_attention_heads // config.num_key_value_heads
        groups = matrix.unflatten(0, (config.num_key_value_heads, queries + 2, config.head_dim))
        parts = groups.split([queries, 1, 1], dim=1)
        named = zip(target_patterns, parts, strict=True)
        return {name: part.flatten(0, 2).contiguous() for name, part in named}


class NormalizeRows(ConversionOps):
    """Index's output head has rows of length one; making them so once, at load, is the same."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((matrix,),) = input_dict.values()
        return {target_patterns[0]: F.normalize(matrix, dim=-1) if config.norm_head else matrix}


# Models that are Llama but for their names: model_type, and how the checkpoint's tensors differ.
LLAMA_LIKE = {
    "xverse": [],
    "index": [WeightConverter("lm_head.weight", "lm_head.weight", [NormalizeRows()])],
    "internlm2": [
        WeightRenaming("tok_embeddings", "embed_tokens"),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming("attention_norm", "input_layernorm"),
        WeightRenaming("ffn_norm", "post_attention_layernorm"),
        WeightRenaming("attention.wo", "self_attn.o_proj"),
        WeightRenaming("feed_forward.w1", "mlp.gate_proj"),
        WeightRenaming("feed_forward.w3", "mlp.up_proj"),
        WeightRenaming("feed_forward.w2", "mlp.down_proj"),
        WeightConverter(
            "attention.wqkv",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [UngroupQKV()],
        ),
    ],
}
for name, mapping in LLAMA_LIKE.items():
    # Once registered, transformers' own code is used and a checkpoint's `auto_map` is not.
    config_class = type(f"{name}Config", (LlamaConfig,), {"model_type": name})
    model_class = type(f"{name}ForCausalLM", (LlamaForCausalLM,), {"config_class": config_class})
    AutoConfig.register(name, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def load_model(
    folder: Path | str, *, dtype: str = "auto", device_map: str = "auto"
) -> tuple[Any, PreTrainedTokenizerFast | None]:
    """A checkpoint's model, a plain transformers one placed by accelerate, and its tokenizer.

    Nothing in the folder is executed. The tokenizer is None where the folder has none. Raises
    StartError where the folder's files do not make a model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if ratio := getattr(config, "rope_ratio", None):  # Index's model for long texts
        config.rope_parameters["rope_theta"] *= ratio
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map=json.loads(device_map) if device_map.startswith("{") else device_map,
        offload_folder=tempfile.mkdtemp(prefix="chat-api-") if "disk" in device_map else None,
        # InternLM2's config asks for eager attention, which is slow.
        attn_implementation="sdpa",
        trust_remote_code=False,
        local_files_only=True,
    )
    return model.eval(), load_tokenizer(Path(folder))


def placement(model: Any) -> str:
    """Which devices hold how many of the model's parts, and what they have left."""
    parts = Counter(map(str, getattr(model, "hf_device_map", {"": model.device}).values()))
    said = []
    for name, count in parts.items():
        device = torch.device("cuda", int(name)) if name.isdigit() else name
        free = torch.cuda.mem_get_info(device)[0] if "cuda" in str(device) else 0
        left = f", {free / 2**30:.1f} GiB left" if free else ""
        said.append(f"{device} ({count} {'part' if count == 1 else 'parts'}{left})")
    return ", ".join(said)


def context_length(config: Any) -> int:
    """Most tokens of prompt and answer together.

    Rope of these two kinds depends on the longest sequence of a batch once that is longer
    than what the model was first trained on; up to there, the frequencies do not move.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    return int(getattr(config, "max_position_embeddings", 2048))


def probes(model: Any) -> tuple[list[int], list[int]]:
    """Two short sequences of ordinary tokens: rare ones give logits that are mostly rounding."""
    middle = model.config.get_text_config().vocab_size // 3
    return list(range(middle, middle + 12)), list(range(middle + 12, middle + 19))


@torch.inference_mode()
def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """What the model says of one sequence alone, [tokens, vocabulary]."""
    ids_there = torch.tensor([ids], device=input_device(model))
    return model(input_ids=ids_there, use_cache=False).logits[0]


def self_check(runner: Runner, alone: list[torch.Tensor]) -> float:
    """How far packed and chunked steps are from the probes' plain logits, by their size.

    Raises StartError where that is too far: such a model would read its neighbours' tokens.
    """
    spans = [Span(ids, start) for ids, start in zip(probes(runner.model), (0, 13), strict=True)]
    worst = 0.0
    for news in ((4, 5), (7, 1), (1, 1)):
        logits = runner.forward(list(zip(spans, news, strict=True)))
        for span, new, row, plain in zip(spans, news, logits, alone, strict=True):
            span.num_cached += new
            wanted = plain[span.num_cached - 1].to(row)
            worst = max(worst, float((row - wanted).norm() / wanted.norm()))
    # In half precision two right answers differ by a few percent; a wrong one is far off.
    if not worst < (1e-3 if runner.model.dtype == torch.float32 else 0.1):
        raise StartError(f"this model does not batch: its logits come out {worst:.0%} off")
    return worst


def start_runner(model: Any, settings: Settings) -> Runner:
    """A runner that was shown to compute what the model does. Raises StartError if none can."""
    alone = [plain_logits(model, ids) for ids in probes(model)]
    try:
        most = settings.max_batch * context_length(model.config)
        runner = Runner(model, settings.cache_memory, most)
    except (TypeError, ValueError) as error:
        raise StartError(f"{type(model).__name__} cannot be batched: {error}") from error
    runner.difference = self_check(runner, alone)
    return runner


def chat_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerFast | None, settings: Settings
) -> ChatTokenizer:
    """The tokenizer with the family's format, or else a chat template: a given one, its own."""
    if tokenizer is None:
        raise StartError("the model's folder has no tokenizer.json and no tokenizer.model")
    if settings.chat_template is None:
        return ChatTokenizer(tokenizer, family_of(model.config.model_type, tokenizer))
    tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
    return ChatTokenizer(tokenizer)


def facts_of(
    name: str, text: ChatTokenizer, runner: Runner, context: int, ends: set[int]
) -> dict[str, str]:
    """What a user wants to know of a model that is ready."""
    model = runner.model
    kind, size = type(model).__name__, f"{model.num_parameters():,} parameters"
    return {
        "model": f"{name}, {kind} in {str(model.dtype).removeprefix('torch.')}, {size}",
        "prompt": text.family.name if text.family else "its own chat template",
        "devices": placement(model),
        "context": f"{context:,} tokens; the cache holds {runner.rows:,}",
        "end ids": f"{sorted(ends)}",
        "check": f"packed steps differ from plain ones by {runner.difference:.1e}",
    }


def load_chat_model(settings: Settings) -> ChatModel:
    """Everything between a name and an answer; takes from seconds to minutes.

    Raises StartError with the remedy.
    """
    check_versions()
    check_cards(settings.device_map)
    folder = find_model(settings.model)
    model, tokenizer = load_model(folder, dtype=settings.dtype, device_map=settings.device_map)
    text = chat_tokenizer(model, tokenizer, settings)
    ends = text.end_ids(model.generation_config)
    runner = start_runner(model, settings)
    context = min(context_length(model.config), runner.rows)
    engine = Engine(
        runner,
        text.plain,
        ends,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        reuse=settings.reuse,
        chunk=settings.prefill_chunk,
        timeout=settings.request_timeout,
    )
    return ChatModel(
        name=folder.name,
        tokenizer=text,
        engine=engine,
        defaults=checkpoint_defaults(model.generation_config, text.family),
        context_length=context,
        prompt_length=min(context, getattr(model.config, "max_tokenizer_truncation", context)),
        facts=facts_of(folder.name, text, runner, context, ends),
    )


def check_model(model: ChatModel) -> str:
    """What a user runs first on a new machine: what was found, a prompt, and eight tokens."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "你好"},
    ]
    prompt = model.prepare(messages, {"max_new_tokens": 8, "temperature": 0.0}, False)

    async def answer() -> str:
        return "".join([delta.text async for delta in model.answer(prompt)])

    shown = {
        **model.facts,
        "a prompt": repr(model.tokenizer.backend.decode(prompt.ids, skip_special_tokens=False)),
        "its ids": " ".join(map(str, prompt.ids)),
        "eight tokens": repr(asyncio.run(answer())),
    }
    return "".join(f"{name + ':':14}{fact}\n" for name, fact in shown.items())


# ---- Schemas ----------------------------------------------------------------
# What goes over the wire. Old names and shapes stop here.

# They would change what an answer means, so they are refused and not ignored.
NOT_HONOURED = (
    "n", "best_of", "tools", "tool_choice", "functions", "function_call", "logprobs",
    "top_logprobs", "logit_bias", "response_format", "frequency_penalty", "presence_penalty",
    "num_beams", "suffix", "echo",
)  # fmt: skip
LENGTH_NAMES = ("max_length", "max_new_tokens", "max_tokens")


class WireModel(BaseModel):
    """Strict: a number is not a string, and True is not 1."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def whole_characters(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("must not hold half of a surrogate pair")
    return text


WireText = Annotated[str, AfterValidator(whole_characters)]


class WireMessage(WireModel):
    role: Literal["system", "user", "assistant"]
    content: WireText


Pair = Annotated[list[WireText], Field(min_length=2, max_length=2)]


def history_shape(history: Any) -> str | None:
    """Which of the two shapes a history has; None if neither."""
    if not isinstance(history, list):
        return None
    kinds = {type(turn) for turn in history}
    return "pairs" if kinds <= {list} else "messages" if kinds <= {dict, WireMessage} else None


History = Annotated[
    Annotated[list[Pair], Tag("pairs")] | Annotated[list[WireMessage], Tag("messages")],
    Discriminator(
        history_shape,
        custom_error_type="history_shape",
        custom_error_message='must be a list of ["question", "answer"] pairs'
        ' or of {{"role": ..., "content": ...}} objects',
    ),
]


def several_texts(stop: Any) -> Any:
    """One text is a list of one."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return tuple(texts)


StopTexts = Annotated[
    tuple[Annotated[WireText, Field(max_length=256)], ...],
    Field(max_length=16),
    BeforeValidator(several_texts, json_schema_input_type=str | list[str]),
]


class SamplingFields(WireModel):
    """The sampling knobs of a request; absent or null is the model's default."""

    max_new_tokens: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices(*LENGTH_NAMES),
        description="most new tokens; max_new_tokens and max_tokens are other names for it",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy")
    top_k: int | None = Field(None, ge=0, le=10**6, description="0 is off")
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopTexts | None = Field(None, description="a text, or several, that ends the answer")

    def given(self) -> dict[str, Any]:
        """The knobs that were really given, by the names of Sampling."""
        values = {knob.name: getattr(self, knob.name) for knob in fields(Sampling)}
        return {name: value for name, value in values.items() if value is not None}


class ChatRequest(SamplingFields):
    """The classic call. `max_length` always counted new tokens only."""

    prompt: WireText = Field(description="the user's text")
    history: History | None = Field(None, description="earlier turns, pairs or messages")
    system: WireText | None = Field(None, description="a system text for the model")
    stream: bool | None = Field(None, description="answer with server-sent events")
    truncate: bool | None = Field(None, description="drop the oldest turns that do not fit")

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_honoured(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name in NOT_HONOURED:
                if body.get(name) is not None:
                    raise BadRequest(f"{name} is not supported by this call; leave it out", name)
            lengths = [name for name in LENGTH_NAMES if body.get(name) is not None]
            if len(lengths) > 1:
                names = " and ".join(lengths)
                raise BadRequest(f"{names} mean the same; send one of them", lengths[1])
        return body

    @model_validator(mode="after")
    def check_texts(self) -> Self:
        if not self.prompt.strip():
            raise BadRequest("prompt is empty; send the user's text", "prompt")
        if self.system is not None and any(m["role"] == "system" for m in self._past()):
            raise BadRequest("system is given here and in history; send one of them", "system")
        return self

    def messages(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self._past(), {"role": "user", "content": self.prompt}]

    def with_answer(self, answer: str) -> list[Any]:
        """The history in the shape it came in, with this turn added."""
        if history_shape(self.history or []) == "pairs":
            return [*(self.history or []), [self.prompt, answer]]
        turn = {"user": self.prompt, "assistant": answer}
        return [*self._past(), *({"role": role, "content": text} for role, text in turn.items())]

    def _past(self) -> Iterator[Message]:
        for turn in self.history or []:
            if isinstance(turn, WireMessage):
                yield turn.model_dump()
            else:
                yield {"role": "user", "content": turn[0]}
                yield {"role": "assistant", "content": turn[1]}


class ChatResponse(BaseModel):
    """The classic answer: the first four fields are what its callers have always read."""

    response: str
    history: list[Any]
    status: int
    time: str = Field(description="local time, YYYY-mm-dd HH:MM:SS")
    finish_reason: FinishReason
    usage: dict[str, int]
    dropped_turns: int | None = Field(
        None, description="with truncate: how many turns were left out"
    )


class ErrorBody(BaseModel):
    """What went wrong, with which field, and what would be right."""

    class Detail(BaseModel):
        message: str
        type: str
        param: str | None
        code: str

    error: Detail
    status: int
    time: str


# ---- Routes -----------------------------------------------------------------
# Starlette cancels a streamed answer when its client leaves. One that is still
# being computed, or still waits, is ended by `while_connected`.

MAX_BODY = 8 * 2**20
PAGE = """<!doctype html><meta charset="utf-8"><title>chat-api</title>
<p>The chat server is up: <code>POST /</code> with <code>{"prompt": "..."}</code>.
See <a href="docs">the fields of every call</a> and <a href="health">its health</a>."""


def local_time() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def error_body(error: ChatError) -> dict[str, Any]:
    detail = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    return {"error": detail, "status": error.status, "time": local_time()}


def error_response(error: ChatError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(error_body(error), error.status, headers)


def from_validation(error: RequestValidationError) -> BadRequest:
    """Say in one sentence what pydantic found first."""
    first = error.errors()[0]
    # The location without "body" and without the tags of a union's branches.
    path = [part for part in first["loc"][1:] if part not in ("pairs", "messages")]
    if first["type"] == "json_invalid":
        return BadRequest(
            f"the body is not valid JSON: {first['ctx']['error']}, near character {path[0]}"
        )
    if not path:
        return BadRequest('the body must be a JSON object, such as {"prompt": "hello"}')
    name = str(path[0]) + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path[1:])
    if first["type"] == "missing":
        return BadRequest(f"{name} is missing", str(path[0]))
    message = first["msg"].replace("Input should", "must").replace("Value error, ", "")
    return BadRequest(f"{name} {message[0].lower()}{message[1:]}", str(path[0]))


def from_http(error: HTTPException, path: str) -> ChatError:
    """Starlette's and FastAPI's own refusals, in our words."""
    if error.status_code == 413:
        return BodyTooLarge(f"the body is larger than {MAX_BODY // 2**20} MiB; send less")
    if isinstance(error.__cause__, UnicodeDecodeError):
        return BadRequest(
            "the body is not UTF-8; save the script as UTF-8, and in PowerShell send"
            " [Text.Encoding]::UTF8.GetBytes($body)"
        )
    known = {404: f"there is nothing at {path}", 405: f"{path} does not take this method"}
    refusal = BadRequest(known.get(error.status_code, str(error.detail)))
    refusal.status = error.status_code
    refusal.code = {404: "not_found", 405: "method_not_allowed"}.get(refusal.status, refusal.code)
    return refusal


class JSONBodies:
    """Takes every body for JSON, as the tutorials' curl lines send it without saying so.

    Refuses one that is too large: unread if its length is declared, else as it comes.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = MutableHeaders(scope=scope)
        headers["content-type"] = "application/json"
        size, declared = 0, headers.get("content-length", "")

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size
            # HTTPException is the one kind that FastAPI lets through.
            if declared.isdecimal() and int(declared) > MAX_BODY:
                raise HTTPException(413)
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413)
            return message

        await self.app(scope, limited, send)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect if the client hangs up first."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
        task.cancel()


def usage_of(last: Delta) -> dict[str, int]:
    counts = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
    return counts | {"total_tokens": sum(counts.values())}


async def collect(deltas: AsyncGenerator[Delta]) -> tuple[str, Delta]:
    """A whole answer is a streamed one, joined: there is no second path."""
    async with aclosing(deltas):
        pieces = [delta async for delta in deltas]
    return "".join(delta.text for delta in pieces), pieces[-1]


# One event: an object, or None for a comment that keeps proxies from hanging up.
Events = AsyncGenerator[dict[str, Any] | None]


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed the moment that the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]):
        self.events = events
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            await super().__call__(scope, receive, send)


def sse(event: dict[str, Any] | None) -> str:
    """One event. ASCII, because some readers also break lines at U+2028 and U+0085."""
    return ": waiting\n\n" if event is None else f"data: {json.dumps(event)}\n\n"


async def event_stream(request: Request, events: Events) -> EventStream:
    """Answer with events, once the first is there: an error before it keeps its status."""
    first = await while_connected(request, anext(events))

    async def body() -> AsyncGenerator[str]:
        async with aclosing(events):
            yield sse(first)
            try:
                async for event in events:
                    yield sse(event)
            except ChatError as error:
                yield sse(error_body(error))
            except Exception:
                log.exception("a stream failed")
                yield sse(error_body(ChatError("the server failed; its log says why")))
            else:
                yield "data: [DONE]\n\n"

    return EventStream(body())


class Serving:
    """The model behind the routes: first it loads, then it answers."""

    def __init__(self, load: Callable[[], ChatModel]):
        self.load = load
        self._model: ChatModel | None = None

    @property
    def health(self) -> dict[str, Any]:
        engine = self._model and self._model.engine
        status = "loading" if not engine else "dead" if engine.failure else "ready"
        running, waiting = (len(engine.running), engine.num_waiting) if engine else (0, 0)
        return {"status": status, "running": running, "waiting": waiting}

    def model(self) -> ChatModel:
        if self._model is None:
            raise NotServing("the model is still loading; try again soon", retry_after=5)
        # Before anything is spent on a request that would be refused.
        self._model.engine.check_queue()
        return self._model

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(self._load())
        yield
        loading.cancel()
        if self._model:
            await asyncio.to_thread(self._model.engine.close)

    async def _load(self) -> None:
        loaded: asyncio.Future[ChatModel] = asyncio.get_running_loop().create_future()

        def load() -> None:
            try:
                outcome = partial(loaded.set_result, self.load())
            except BaseException as error:
                outcome = partial(loaded.set_exception, error)
            loaded.get_loop().call_soon_threadsafe(outcome)

        # A daemon, so that Ctrl-C need not wait for the weights.
        threading.Thread(target=load, name="loader", daemon=True).start()
        try:
            self._model = await loaded
        except Exception as error:
            if not isinstance(error, StartError):
                log.exception("the model could not be loaded")
                error = StartError(f"the model could not be loaded: {error}")
            # Nothing is under way that could be lost, and nothing can be served.
            sys.stderr.write(f"api.py: {error}.\n")
            os._exit(1)
        for name, fact in self._model.facts.items():
            log.info("%s: %s", name, fact)
        log.info("ready")


def build_app(
    settings: Settings | None = None, load: Callable[[Settings], ChatModel] = load_chat_model
) -> FastAPI:
    """The application; its model loads in a thread once it is started."""
    settings = settings or read_settings([])
    serving = Serving(partial(load, settings))
    # FastAPI, but /docs fetches nothing from another host, which a rented machine may not reach.
    app = FastAPIOffline(redoc_url=None, title="chat-api", lifespan=serving.lifespan)
    app.add_middleware(JSONBodies)

    @app.exception_handler(ChatError)
    async def refuse(_: Request, error: ChatError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(from_validation(error))

    @app.exception_handler(HTTPException)
    async def refuse_call(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(from_http(error, request.url.path))

    @app.exception_handler(ClientDisconnect)
    async def forget(_: Request, error: ClientDisconnect) -> HTMLResponse:
        return HTMLResponse(status_code=499)

    @app.exception_handler(Exception)
    async def apologise(_: Request, error: Exception) -> JSONResponse:
        return error_response(ChatError("the server failed; its log says why"))

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = serving.health
        return JSONResponse(state, 200 if state["status"] == "ready" else 503)

    @app.post("/", responses={200: {"model": ChatResponse}, 400: {"model": ErrorBody}})
    async def chat(body: ChatRequest, request: Request) -> Any:
        model = serving.model()
        prompt = await asyncio.to_thread(
            model.prepare, body.messages(), body.given(), bool(body.truncate)
        )

        def answer(text: str, last: Delta) -> dict[str, Any]:
            return {
                "response": text,
                "history": body.with_answer(text),
                "status": 200,
                "time": local_time(),
                "finish_reason": last.finish_reason,
                "usage": usage_of(last),
                **({"dropped_turns": prompt.dropped_turns} if body.truncate else {}),
            }

        async def events() -> Events:
            text = ""
            async with aclosing(deltas):
                async for delta in deltas:
                    text += delta.text
                    if delta.text:
                        yield {"delta": delta.text}
                    elif not delta.finish_reason:
                        yield None
            yield answer(text, delta)

        deltas = model.answer(prompt)
        if body.stream:
            return await event_stream(request, events())
        return JSONResponse(answer(*await while_connected(request, collect(deltas))))

    return app


# ---- Main -------------------------------------------------------------------


def main() -> None:
    """Serve until told to stop."""
    settings = read_settings(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if settings.check:
        try:
            sys.stdout.write(check_model(load_chat_model(settings)))
        except StartError as error:
            sys.exit(f"api.py: {error}.")
        return
    app = build_app(settings)
    log.info("serving on http://127.0.0.1:%d, fields at /docs", settings.port)
    log.info(
        "from a laptop: ssh -CNg -L %d:127.0.0.1:%d -p PORT USER@THIS-MACHINE",
        settings.port,
        settings.port,
    )
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning")


if __name__ == "__main__":
    main()
