"""A chat model behind HTTP, in one file.

    python api.py                          the small demo model, on port 6006
    python api.py --model ./my-model       any causal LM that transformers knows
    uvicorn --factory api:build_app        the same app, with settings from CHAT_... variables

    POST /                         prompt, history and sampling fields in; response, history,
                                   status and time out
    POST /v1/chat/completions      the same model in OpenAI's dialect; /v1/completions and
                                   /v1/models beside it
    GET  /chat                     a chat page; a browser that asks for / is sent there
    GET  /health                   what it is doing: loading, ready, draining or dead
    GET  /metrics                  numbers for Prometheus
    GET  /docs                     the fields of every call

Read it from top to bottom: each section uses only what stands above it. Errors and settings come
first, then the model families, how messages become token ids and token ids text, the engine
(sequences, attention, runner, sampling), how a model is loaded, the requests and responses, the
metrics, the chat page, the routes, and the start.
"""

import sys

# Checked first: on an older Python the imports below fail with an unclear error.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("api.py: Python 3.11 or newer is needed; choose a newer image, or use conda.")

import asyncio
import hmac
import json
import logging
import os
import queue
import random
import re
import socket
import tempfile
import threading
import time
import uuid
import warnings
from bisect import bisect_left, insort
from collections import Counter, abc, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import accumulate, groupby, pairwise, product
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

try:
    import numpy as np
    import prometheus_client
    import psutil
    import torch
    import torch.nn.functional as F
    import uvicorn
    from accelerate.utils import convert_file_size_to_int, send_to_device
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
    from fastapi_offline import FastAPIOffline
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from packaging.specifiers import SpecifierSet
    from pydantic import (
        AfterValidator,
        AliasChoices,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Discriminator,
        Field,
        PlainValidator,
        SecretStr,
        Tag,
        TypeAdapter,
        ValidationError,
        model_validator,
    )
    from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
    from safetensors import SafetensorError, safe_open
    from sentencepiece import SentencePieceProcessor
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import Mount
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
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError as missing:
    sys.exit(f"api.py cannot start ({missing}); run `pip install -r requirements.txt`.")

# The FlashAttention kernel itself: torch's wrapper, varlen_attn, has no seqused_k before 2.13, and
# on some GPUs dispatches to cuDNN, which does not support it.
flash_attention: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)

log = logging.getLogger("chat")

T = TypeVar("T")

# ---- Errors -----------------------------------------------------------------
# An error carries its HTTP status, and its message says how to mend the request.
# It is raised where the trouble is found and becomes a response in one place.


class ChatError(Exception):
    """A request that cannot be served."""

    status = 500
    type = "server_error"
    code = "internal_error"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.param, self.retry_after = param, retry_after


class BadRequest(ChatError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class BodyTooLarge(BadRequest):
    status, code = 413, "body_too_large"


class BodyTooSlow(BadRequest):
    status, code = 408, "body_too_slow"
    headers = MappingProxyType({"Connection": "close"})


class NotServing(ChatError):
    """The server cannot generate now: it is loading, or its engine is dead."""

    status, code = 503, "not_serving"


class Unauthorized(ChatError):
    """The request has no valid API key."""

    status, type, code = 401, "authentication_error", "invalid_api_key"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class ModelNotFound(BadRequest):
    status, code = 404, "model_not_found"


class QueueFull(ChatError):
    """The waiting queue is full."""

    status, type, code = 429, "rate_limit_error", "queue_full"


class TimedOut(ChatError):
    """The request took longer than --request-timeout."""

    status, code = 504, "timed_out"


class StepFailed(ChatError):
    """The forward pass or the sampling of this request failed."""

    code = "step_failed"


class StartError(Exception):
    """The server cannot start; the message is one sentence with the remedy."""


# ---- Settings ---------------------------------------------------------------
# A field is a flag (`--device-map`) and an environment variable (`CHAT_DEVICE_MAP`).


def check_memory(value: str) -> str:
    if value == "auto" or re.fullmatch(r"0?\.\d+|\d+(\.\d+)? ?[KMG]i?B", value):
        return value
    raise ValueError("must be auto, a fraction such as 0.5, or a size such as 4GiB")


def split_list(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(str.strip, text.split(",")) if part)


class Settings(BaseSettings):
    """Serve a chat model over HTTP. Each flag is also a variable: CHAT_PORT is --port."""

    model_config = SettingsConfigDict(
        env_prefix="CHAT_",
        env_ignore_empty=True,
        frozen=True,
        cli_prog_name="api.py",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    model: str = Field(
        "demo", description="a name under models/, or a checkpoint's folder; the demo is downloaded"
    )
    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(6006, ge=1, le=65535, description="port to listen on")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="data type of the weights; auto: as in the checkpoint"
    )
    device_map: str = Field(
        "auto",
        description="auto, a device such as cpu or cuda:0, or a JSON map of module to device",
    )
    chat_template: Path | None = Field(
        None, description="Jinja file to use instead of the model's own chat template"
    )
    cache_memory: Annotated[str, AfterValidator(check_memory)] = Field(
        "auto",
        description="memory for the KV cache on each device: auto (most of a GPU's free memory; 2"
        " GiB on the CPU), a size such as 4GiB, or a fraction of the free memory such as 0.5",
    )
    max_batch: int = Field(64, ge=1, le=1024, description="most requests computed at once")
    max_waiting: int = Field(256, ge=1, description="most requests queued; further ones get 429")
    reuse: bool = Field(
        True, description="prefix caching: reuse the KV cache for prompts that begin alike"
    )
    prefill_chunk: int = Field(
        512, ge=16, description="most prompt tokens computed in a step (chunked prefill)"
    )
    check: bool = Field(
        False, description="load the model, print a summary and eight tokens, and exit"
    )
    request_timeout: float = Field(
        600, gt=0, description="most seconds for a request, its time in the queue included"
    )
    drain_timeout: float = Field(
        30, ge=0, description="seconds to finish running requests at shutdown"
    )
    chat_page: bool = Field(True, description="serve the chat page at /chat")
    root_path: str = Field(
        "", description="path prefix that a reverse proxy removes, for example /model"
    )
    api_key: SecretStr = Field(
        SecretStr(""), description="API keys, separated by commas; sent as a Bearer token"
    )
    cors_origins: str = Field(
        "", description="origins whose web pages may call, separated by commas, or *"
    )
    log_json: bool = Field(False, description="log as JSON lines")
    log_prompts: bool = Field(False, description="include prompts in the log")

    @property
    def keys(self) -> tuple[str, ...]:
        return split_list(self.api_key.get_secret_value())


def read_settings(arguments: list[str]) -> Settings:
    """Settings from flags, then variables, then defaults; exits with one sentence on a bad one."""
    try:
        return Settings(_cli_parse_args=arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        name = "--" + str(problem["loc"][0]).replace("_", "-")
        reason = problem["msg"].removeprefix("Value error, ")
        sys.exit(f"api.py: {name}: {reason}, not {problem['input']!r}.")
    except SettingsError as error:
        sys.exit(f"api.py: {error}.")


# ---- Model families ---------------------------------------------------------
# What differs between models is data: prompt formats and sampling defaults.


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens, in transformers' names and meanings; temperature 0 is greedy."""

    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    # OpenAI's: subtracted from the logit of a token in the answer, once and per occurrence.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many top tokens to report beside each; None: no logprobs


# In a format, it separates what the original code tokenizes separately. A Unicode noncharacter,
# reserved for a program's own use, so that no vocabulary and no text has it.
PIECE_BREAK = "\ufdd2"

Message = dict[str, str]


@dataclass(frozen=True)
class Family:
    """The prompt format of a kind of model, with {} for a message's content, and its defaults."""

    name: str
    model_type: str
    markers: tuple[str, ...]  # the special tokens of the format
    turns: dict[str, str]
    begin: str = ""
    ask: str = ""  # the generation prompt
    ends: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()  # tokens that only other models of this model_type have
    strip: bool = False
    defaults: Sampling = Sampling()
    ignores_generation_config: bool = False  # as the tutorial's program did

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
        ignores_generation_config=True,
    ),
    Family(
        "index",
        "index",
        markers=("<unk>", "reserved_0", "reserved_1"),
        turns={"system": "<unk>{}", "user": "reserved_0{}", "assistant": "reserved_1{}"},
        ask="reserved_1",
        ends=("</s>",),
        defaults=TUTORIAL,
        ignores_generation_config=True,
    ),
    Family(
        "llama-3",
        "llama",
        markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        turns={r: f"<|start_header_id|>{r}<|end_header_id|>\n\n{{}}<|eot_id|>" for r in ROLES},
        begin="<|begin_of_text|>",
        ask="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        # Llama 3.1 and later, and fine-tunes with ChatML, have templates of their own.
        absent=("<|eom_id|>", "<|im_start|>"),
        strip=True,
        defaults=Sampling(512, 0.5, 0, 0.9, repetition_penalty=1.1),
        ignores_generation_config=True,
    ),
    Family(
        "xverse",
        "xverse",
        markers=("<|endoftext|>",),
        turns={
            "system": f"Human: {PIECE_BREAK}{{}}\n{PIECE_BREAK}",
            "user": f"Human: {PIECE_BREAK}{{}}\n\n{PIECE_BREAK}",
            "assistant": f"Assistant: {PIECE_BREAK}{{}}<|endoftext|>",
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
    """The family of a checkpoint: of the many models called llama, only some have its tokens."""
    has = tokenizer.backend_tokenizer.token_to_id
    for family in FAMILIES:
        known = all(has(marker) is not None for marker in (*family.markers, *family.ends))
        other = any(has(token) is not None for token in family.absent)
        if family.model_type == model_type and known and not other:
            return family
    return None


def checkpoint_defaults(config: GenerationConfig, family: Family | None = None) -> Sampling:
    """The sampling of a checkpoint's generation_config.json, and the family's for the rest."""
    base = family.defaults if family else Sampling()
    if family and family.ignores_generation_config:
        return base
    found = {knob.name: getattr(config, knob.name, None) for knob in fields(Sampling)}
    if config.do_sample is False:
        found["temperature"] = 0.0
    found["top_k"] = found["top_k"] and max(0, found["top_k"])  # some write -1 for off
    return replace(base, **{name: x for name, x in found.items() if x is not None})


# ---- Text -------------------------------------------------------------------
# Messages become token ids, by the family's format or the checkpoint's own chat
# template, and token ids become text again as they come. Nothing that a user
# writes can become a special token.

# ESCAPE, an index and ESCAPE_END replace a special token that a message spells out, so that it is
# encoded as ordinary text; noncharacters like PIECE_BREAK.
ESCAPE, ESCAPE_END = "\ufdd0", "\ufdd1"
# A longer JSON schema takes too long to compile.
MAX_SCHEMA_CHARS = 2**16
# With the default limits, a pattern such as ^(a{1000}){1000}$ would block every answer for seconds.
GUIDE_LIMITS = LLParserLimits(initial_lexer_fuel=100_000)


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


@dataclass(frozen=True)
class Guide:
    """Constrains one answer to a JSON schema (guided decoding)."""

    matcher: LLMatcher
    ends: list[int]
    markers: list[int]  # the other special tokens

    def copy(self) -> "Guide":
        return replace(self, matcher=self.matcher.deep_copy())

    def allowed(self) -> Any:
        """Which tokens may come next, a boolean mask [vocabulary].

        Raises BadRequest if the matcher has failed, or if the schema requires a text that spells a
        special token: the matcher then allows only that token.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        allowed = np.unpackbits(bits, bitorder="little").astype(bool)
        allowed[self.markers if self.matcher.is_accepting() else self.markers + self.ends] = False
        if not allowed.any():
            raise BadRequest("the JSON schema asks for a special token", "response_format")
        return allowed

    def check(self) -> None:
        """Raise BadRequest if the matcher has failed, as it never raises by itself."""
        if self.matcher.is_error():
            reason = self.matcher.get_error().partition("\n")[0]
            raise BadRequest(f"the JSON schema: {reason}", "response_format")


class ChatTokenizer:
    """Turns messages into token ids; raises BadRequest where a chat template refuses them.

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

    def guide(self, schema: dict[str, Any], end_ids: set[int]) -> Guide:
        """A guide for answers that match a JSON schema. Raises BadRequest if it is invalid."""
        with self._lock:
            if self._trie is None:  # takes a second or two, so it is built on first use
                spec = self.backend.to_str()
                self._trie = LLTokenizer(spec, eos_token=sorted(end_ids), slices=[])
        spelled = json.dumps(schema)
        if len(spelled) > MAX_SCHEMA_CHARS:
            most = f"{MAX_SCHEMA_CHARS:,} characters"
            raise BadRequest(f"the JSON schema is longer than {most}", "response_format")
        try:
            # With flexible whitespace, a small model may indent for ever.
            grammar = LLMatcher.grammar_from_json_schema(
                spelled, overrides={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise BadRequest(f"the JSON schema: {error}", "response_format") from error
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
            raise BadRequest(f"the model's chat template refuses these turns: {error}") from error

    def _escape(self, content: str) -> str:
        return self._word.sub(lambda m: f"{ESCAPE}{self.words.index(m[0])}{ESCAPE_END}", content)

    def _encode_run(self, run: str) -> list[int]:
        if run in self.special:
            return [self.special[run]]
        spelled = re.sub(f"{ESCAPE}(\\d+){ESCAPE_END}", lambda m: self.words[int(m[1])], run)
        return token_ids(self.plain, spelled)


class Detokenizer:
    """Incremental detokenizer of one answer: whole characters only, and never a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._most, self._firsts = max(map(len, stop), default=0), {s[0] for s in stop}
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, token: int) -> str:
        """Add the next id; return the text that can be sent now, often none or one word."""
        self._held += self._decode(token) or ""
        starts = [at for at in map(self._held.find, self.stop) if at >= 0]
        if starts:
            self.stopped = True
            self._held = self._held[: min(starts)]
            return self.flush()
        return self._release(len(self._held) - self._partial_stop())

    def _decode(self, token: int) -> str | None:
        try:
            return self._stream.step(self.tokenizer, token)
        except Exception:
            # Invalid UTF-8, which a model may sample at a high temperature, is dropped.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self.tokenizer, token)

    def flush(self) -> str:
        """The text held back, once no more ids come."""
        return self._release(len(self._held))

    def _partial_stop(self) -> int:
        """How many characters at the end may begin a stop string."""
        last = range(max(0, len(self._held) - self._most), len(self._held))
        ends = (self._held[at:] for at in last if self._held[at] in self._firsts)
        return next((len(end) for end in ends if any(s.startswith(end) for s in self.stop)), 0)

    def _release(self, count: int) -> str:
        ready, self._held = self._held[:count], self._held[count:]
        return ready


# ---- Sequences --------------------------------------------------------------
# A request inside the engine, and its part of the KV cache: each layer has one
# pool of rows, of which a sequence owns a contiguous span.

FinishReason = Literal["stop", "length"]

# Rows that an answer without a stated length reserves at a time.
GROWTH = 1024
# A shorter prefix is computed again rather than kept or copied.
MIN_PREFIX = 16


class Token(NamedTuple):
    """A sampled token; with logprobs, also its log probability and those of the likeliest."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the last one has the finish reason and the token counts."""

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token: Token | None = None  # only with logprobs
    index: int = 0  # which of a request's n answers it belongs to

    @property
    def silent(self) -> bool:
        return not (self.text or self.finish_reason or self.token)


@dataclass(eq=False)
class Span:
    """Tokens and their rows of the pool, from start to start + room.

    The keys and values of the first num_cached tokens are there already.
    """

    tokens: list[int]
    start: int = 0
    room: int = 0
    num_cached: int = 0

    def common_prefix(self, tokens: list[int], beyond: int = 0) -> int:
        """How many of the cached tokens are a prefix of the given ones.

        Never all of the given ones, since the last one's logits are wanted. May return 0 for a
        prefix that is no longer than `beyond`, or shorter than MIN_PREFIX.
        """
        most = min(self.num_cached, len(tokens) - 1)
        if most <= beyond or self.tokens[beyond] != tokens[beyond]:
            return 0
        mine, other = self.tokens[:most], tokens[:most]
        if mine == other or mine[:MIN_PREFIX] != other[:MIN_PREFIX]:
            return most if mine == other else 0
        return bisect_left(range(most), True, key=lambda n: mine[: n + 1] != other[: n + 1])

    @property
    def pending(self) -> int:
        """Tokens not yet computed: the rest of the prompt, then one at a time."""
        return len(self.tokens) - self.num_cached


@dataclass(eq=False, kw_only=True)
class Sequence(Span):
    """One answer in the making: its tokens, its state, and where its text goes."""

    sampling: Sampling
    detokenizer: Detokenizer
    loop: asyncio.AbstractEventLoop
    open_ended: bool = False
    outbox: "asyncio.Queue[Delta | ChatError]" = field(default_factory=asyncio.Queue)
    index: int = 0
    label: Any = None  # the caller's own, for Engine.on_end
    guide: Guide | None = None
    done: bool = False
    finish_reason: FinishReason | None = None
    failed: bool = False
    passed: int = 0  # by how many smaller ones, while it waited for room
    follows: "Sequence | None" = None  # whose prefill it waits for, to copy the prefix
    num_reused: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.max_tokens = self.num_prompt + self.sampling.max_new_tokens
        self.random = random.Random(self.sampling.seed)
        # For the next token, however often its step is retried.
        self.draw = self.random.random()

    @property
    def wanted_room(self) -> int:
        """Rows for the longest possible answer, or for the next GROWTH tokens of it."""
        return (
            min(self.max_tokens, len(self.tokens) + GROWTH) if self.open_ended else self.max_tokens
        )

    @property
    def num_completion(self) -> int:
        """Tokens of the answer so far, an end token included."""
        return len(self.tokens) - self.num_prompt

    def append(self, token: Token, end_ids: set[int]) -> None:
        """Append the next token; set the finish reason if it is the last."""
        self.first_token = self.first_token or time.monotonic()
        self.tokens.append(token.id)
        self.draw = self.random.random()
        if self.guide:
            self.guide.matcher.consume_token(token.id)
        if token.id in end_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            self.done = True

    def emit(self, token: Token) -> Delta:
        """The Delta for the token appended last; a stop string in its text ends the answer."""
        ended = self.finish_reason == "stop"
        text = "" if ended else self.detokenizer.push(token.id)
        told = token if token.logprob is not None and not ended else None
        if self.detokenizer.stopped:
            self.done, self.finish_reason = True, "stop"
        if not self.finish_reason:
            return Delta(text, token=told, index=self.index)
        text += self.detokenizer.flush()
        counts = self.num_prompt, self.num_completion
        return Delta(text, self.finish_reason, *counts, told, self.index)


# A step's work: spans, and how many of each one's pending tokens to compute.
Work = abc.Sequence[tuple[Span, int]]


class Allocator:
    """Allocates contiguous spans of the pool's rows; adjacent gaps are merged."""

    def __init__(self, rows: int):
        self.gaps = [(0, rows)]  # (first row, size), in order

    def allocate(self, size: int, at: int | None = None) -> int | None:
        """The first row of a new span, in the tightest gap or the one that begins `at` that row.

        None if none fits.
        """
        gaps = [(gap, start) for start, gap in self.gaps if gap >= size and at in (None, start)]
        if not gaps:
            return None
        gap, start = min(gaps)
        self.gaps.remove((start, gap))
        if gap > size:
            insort(self.gaps, (start + size, gap - size))
        return start

    def release(self, start: int, size: int) -> None:
        """Free a span's rows."""
        at = bisect_left(self.gaps, (start, 0))
        if at < len(self.gaps) and self.gaps[at][0] == start + size:
            size += self.gaps.pop(at)[1]
        if at > 0 and sum(self.gaps[at - 1]) == start:
            before = self.gaps.pop(at - 1)
            at, start, size = at - 1, before[0], before[1] + size
        self.gaps.insert(at, (start, size))


# ---- Attention --------------------------------------------------------------
# Every step is one forward pass over packed tokens: one token of each sequence
# in decode, and chunks of the prompts in prefill. Each sequence's attention
# reads the rows of its own span and no others.


class Gathered(NamedTuple):
    """Part of a step: keys and values are copied side by side for sdpa, on any device.

    Either decode tokens of several sequences, padded to the longest, or one prefill chunk.
    """

    batch: int
    tokens: slice  # of the step's packed tokens
    rows: slice  # of the rows that the step reads
    mask: torch.Tensor | None  # bool, [batch, 1, 1, longest] or [new, total]

    @classmethod
    def of(cls, work: Work, token: int, row: int) -> tuple[Self, torch.Tensor]:
        """The group for this work, and the pool's rows to copy for it."""
        new, totals = work[0][1], torch.tensor([[span.num_cached + new] for span, new in work])
        longest = torch.arange(int(totals.max()))
        # A shorter span is padded with its last row, which is masked.
        rows = torch.tensor([[span.start] for span, _ in work]) + longest.minimum(totals - 1)
        mask = None
        if new > 1:
            mask = longest <= longest[-new:, None]
        elif len(work) > 1:
            mask = (longest < totals)[:, None, None]
        tokens = slice(token, token + len(work) * new)
        return cls(len(work), tokens, slice(row, row + rows.numel()), mask), rows.flatten()

    @property
    def is_prefill(self) -> bool:
        return self.tokens.stop - self.tokens.start > self.batch

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        key, value = (x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in (key, value))
        # The query heads of a group become the query's length, [batch, kv heads, sharing * new,
        # width], so that no key head is repeated: enable_gqa with a mask is slow on CUDA.
        query = query.unflatten(1, (key.shape[1], -1))
        if not self.is_prefill:
            out = F.scaled_dot_product_attention(query, key, value, self.mask, scale=scale)
            return out.flatten(1, 2)
        assert self.mask is not None
        new, sharing = len(query), query.shape[2]
        stacked, mask = query.permute(1, 2, 0, 3).flatten(1, 2)[None], self.mask.repeat(sharing, 1)
        out = F.scaled_dot_product_attention(stacked, key, value, mask, scale=scale)
        return out[0].unflatten(1, (sharing, new)).permute(2, 0, 1, 3).flatten(1, 2)


class InPlace(NamedTuple):
    """Part of a step: FlashAttention reads keys and values in place in the pool, on CUDA.

    Either all decode tokens or all prefill chunks; sizes are named as in torch's varlen_attn.
    """

    tokens: slice
    max_q: int
    max_k: int
    cu_seq_q: torch.Tensor  # int32, [sequences + 1]: where each one's packed tokens begin
    cu_seq_k: torch.Tensor  # int32, [sequences + 1]: where each one's span begins, in order
    seqused_k: torch.Tensor  # int32, [sequences]: how many of its rows are read
    rows: slice = slice(None)  # attend gets all of the pool

    @classmethod
    def of(cls, work: Work, token: int) -> Self:
        news = [new for _, new in work]
        starts = [span.start for span, _ in work]
        totals = [span.num_cached + new for span, new in work]
        # The last offset, the end of the last span, is not used: seqused_k gives the lengths.
        numbers = [*accumulate(news, initial=0)], [*starts, starts[-1]], totals
        cu_seq_q, cu_seq_k, seqused_k = (torch.tensor(x, dtype=torch.int32) for x in numbers)
        tokens = slice(token, token + sum(news))
        return cls(tokens, max(news), max(totals), cu_seq_q, cu_seq_k, seqused_k)

    @property
    def is_prefill(self) -> bool:
        return self.max_q > 1

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        # The causal mask is aligned bottom-right. A single token needs none, and without one the
        # kernel can split long sequences over more of the card, if heads share keys.
        out: torch.Tensor = flash_attention(
            query,
            key,
            value,
            self.cu_seq_q,
            self.cu_seq_k,
            self.max_q,
            self.max_k,
            0.0,  # dropout
            self.is_prefill,  # causal
            False,  # return_debug_mask
            scale=scale,
            seqused_k=self.seqused_k,
        )[0]
        return out


class Step:
    """The inputs of one forward pass; a plain object, which accelerate's hooks leave alone."""

    def __init__(self, work: Work, in_place: bool = False):
        self.in_place = in_place
        # Work that agrees in the first part of the key shares a call of attention: prefill in
        # place, decode in place, or gathered decode tokens of similar lengths.
        order = sorted(range(len(work)), key=lambda n: self._neighbourhood(*work[n]))
        work = [work[n] for n in order]
        places = [(span.start, span.num_cached + n) for span, new in work for n in range(new)]
        ends = dict(zip(order, accumulate(new for _, new in work), strict=True))
        # Python lists first: a step has too few tokens for tensor operations to be faster.
        self.ids = torch.tensor([i for span, n in work for i in span.tokens[span.num_cached :][:n]])
        self.positions = torch.tensor([position for _, position in places])
        # The pool's row of each packed token, and the index of each sequence's last token.
        self.write = torch.tensor([start + position for start, position in places])
        self.last = torch.tensor([ends[n] - 1 for n in range(len(work))])
        self.groups: list[Gathered | InPlace] = []
        reads = [torch.empty(0, dtype=torch.long)]
        for _, part in groupby(work, lambda item: self._neighbourhood(*item)[0]):
            token = self.groups[-1].tokens.stop if self.groups else 0
            if in_place:
                self.groups.append(InPlace.of(list(part), token))
            else:
                group, rows = Gathered.of(list(part), token, sum(map(len, reads)))
                self.groups.append(group)
                reads.append(rows)
        self.read = torch.cat(reads)  # the pool's rows to copy, for gathered groups
        self.attended = 0
        self._copies: dict[torch.device, Step] = {}

    def _neighbourhood(self, span: Span, new: int) -> tuple[tuple[bool, int], int]:
        if self.in_place:
            return (new > 1, 0), span.start
        # A prefill chunk is always alone; decode lengths agree within a factor of two.
        alike = span.start if new > 1 else (span.num_cached + 1).bit_length()
        return (new > 1, alike), span.num_cached

    def on(self, device: torch.device) -> "Step":
        """The step with its tensors on a device, copied there once for all layers."""
        if device not in self._copies:
            there = self._copies[device] = copy(self)
            there._copies = {}  # a shared dict would be a reference cycle that holds GPU memory
            for name in ("ids", "positions", "write", "read", "last", "groups"):
                here = getattr(self, name)
                setattr(there, name, send_to_device(here, device, non_blocking=True))
        return self._copies[device]


class SpanLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, width] each, wherever the layer lives."""

    def __init__(self, pool: "Pool"):
        super().__init__()
        self.pool = pool

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows = self.pool.rows + 1  # the last one is for padding
        shapes = [(rows, x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        # Not zeroed: no row is read before it is written, and untouched pages cost no memory.
        self.keys, self.values = map(key_states.new_empty, shapes)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's rows; return the rows it reads, or all: [1, heads, rows, width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.pool.step.on(key_states.device)
        self.keys.index_copy_(0, step.write, key_states[0].transpose(0, 1))
        self.values.index_copy_(0, step.write, value_states[0].transpose(0, 1))
        keys, values = self.keys, self.values
        if not step.in_place:
            keys, values = keys.index_select(0, step.read), values.index_select(0, step.read)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.pool.rows


class Pool(Cache):
    """The KV cache of every sequence; each layer's rows are created on first use."""

    step: Step

    def __init__(self, num_layers: int, rows: int):
        self.rows = rows
        super().__init__(layers=[SpanLayer(self) for _ in range(num_layers)])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` rows of every layer."""
        for layer in self.layers:
            for x in (layer.keys, layer.values):
                x[target : target + count] = x[source : source + count]


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: Step,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each group's tokens to their own rows, by transformers' interface.

    Takes [1, heads, tokens, width], returns [1, tokens, heads, width]. Raises StartError for
    options that it does not implement.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise StartError(f"the model's attention uses {name}, which this server does not do")
    step.attended += 1
    latent = getattr(module, "expand_kv", None) is keep_latent
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    parts = []
    for group in step.on(query.device).groups:
        attend = partial(attend_latent, module, group) if latent else group.attend
        parts.append(attend(query[group.tokens], key[group.rows], value[group.rows], scaling))
    return torch.cat(parts)[None], None


def attend_latent(
    module: Any,
    group: Gathered | InPlace,
    query: torch.Tensor,
    latent: torch.Tensor,
    rotated: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Multi-head latent attention over latents [rows, 1, rank] and rotated keys [rows, 1, width].

    In prefill, keys and values are expanded from the latents, as many queries share them. In
    decode that would dominate the step, so the up-projections are absorbed into the query and
    the output instead: q · (W c) = (Wᵀ q) · c (section 2.1.2 of arXiv 2405.04434, DeepSeek-V2).
    """
    if group.is_prefill:
        given = (x.transpose(0, 1)[None] for x in (latent, rotated))
        key, value = (x[0].transpose(0, 1) for x in type(module).expand_kv(module, *given))
        return group.attend(query, key, value, scale)
    widths = [module.qk_nope_head_dim, module.v_head_dim]
    make_key, make_value = module.kv_b_proj.weight.unflatten(0, (-1, sum(widths))).split(widths, 1)
    plain, turned = query.split([widths[0], rotated.shape[-1]], dim=-1)
    query = torch.cat([torch.einsum("thw,hwr->thr", plain, make_key), turned], dim=-1)
    out = group.attend(query, torch.cat([latent, rotated], dim=-1), latent, scale)
    return torch.einsum("thr,hwr->thw", out, make_value)


def keep_latent(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces MLA's expand_kv: the cache then holds latents, and attend_latent expands them."""
    return latent, rotated


def can_absorb(module: Any) -> bool:
    """Whether a module is MLA whose up-projection is a plain matrix, loaded on this device."""
    up = getattr(module, "kv_b_proj", None)
    plain = type(up) is torch.nn.Linear and up.bias is None and not up.weight.is_meta
    return plain and hasattr(module, "expand_kv")


AttentionInterface.register("packed", packed_attention)
# cuDNN makes a plan for each new length, and gathered keys have a new one at every step.
torch.backends.cuda.enable_cudnn_sdp(False)


# ---- Runner -----------------------------------------------------------------
# The model and its KV cache: from tokens to logits.


def to_device(
    values: list[Any], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of the values on a device, without synchronising with it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def input_device(model: Any) -> torch.device:
    """The device for token ids: the embedding's, or where accelerate moves it to compute."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if device is None else device)


def why_not_in_place(layers: Iterable[SpanLayer]) -> str | None:
    """Why FlashAttention cannot read these keys and values in place; None if it can."""
    if flash_attention is None or "seqused_k" not in str(flash_attention.default._schema):
        return f"torch {torch.__version__} has no FlashAttention for it"
    for keys, values in ((layer.keys, layer.values) for layer in layers):
        if keys.device.type != "cuda":
            return f"layers on {keys.device}"
        if torch.cuda.get_device_capability(keys.device) < (8, 0):
            return f"{torch.cuda.get_device_name(keys.device)} is older than Ampere"
        if keys.dtype not in (torch.bfloat16, torch.float16):
            return f"FlashAttention does not do {keys.dtype}"
        if keys.shape != values.shape or keys.shape[2] % 8 or keys.shape[2] > 256:
            return f"FlashAttention does not do keys {keys.shape[2]} wide, values {values.shape[2]}"
    return None


def capture(
    compute: Callable[[], torch.Tensor], device: torch.device, memory: Any
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Capture a computation as a CUDA graph; its output, and the function that replays it.

    Raises RuntimeError if it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # A failed capture leaves its own stream current; this restores ours.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        compute()  # what is created on first use must not be captured
        # A synchronisation during capture fails and leaves torch's allocator broken, so look for
        # one before. torch warns that this mode is a prototype.
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.set_sync_debug_mode("error")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            return compute(), graph.replay


class DecodeGraph:
    """A decode step of a fixed batch size as a CUDA graph: one launch instead of hundreds.

    `longest` bounds the sequences' lengths: by it, the kernel divides its work at capture.
    """

    def __init__(self, runner: "Runner", size: int, longest: int, memory: Any):
        self.size, self.longest = size, longest
        self.step = Step([(runner.idle, 1)] * size, in_place=True).on(runner.device)
        (group,) = self.step.groups
        assert isinstance(group, InPlace)
        self.group = group._replace(max_k=longest)
        self.step.groups = [self.group]
        compute = partial(runner.compute, self.step)
        self.logits, self.replay = capture(compute, runner.device, memory)

    def __call__(self, step: Step) -> torch.Tensor:
        """Replay with a step's inputs; the returned logits are overwritten by the next call."""
        (given,) = step.groups
        assert isinstance(given, InPlace)
        for name in ("ids", "positions", "write", "last"):
            getattr(self.step, name).copy_(getattr(step, name), non_blocking=True)
        for name in ("cu_seq_k", "seqused_k"):
            getattr(self.group, name).copy_(getattr(given, name), non_blocking=True)
        self.replay()
        return self.logits


def padded_size(total: int) -> int:
    """The number of tokens to pad a step to, one of a few dozen sizes."""
    return total + -total % (1 if total <= 16 else 8 if total <= 64 else 32)


class Runner:
    """Computes logits with the model, over the spans of its pool; knows nothing of requests.

    Raises StartError for a model that cannot be batched this way.
    """

    def __init__(self, model: Any, cache_memory: str = "auto", max_rows: int = 2**31 - 1):
        self.model = model
        self.device = input_device(model)
        self.split = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        # For every new shape in half precision oneDNN allocates memory that it never frees.
        self.pads = self.device.type == "cpu" and model.dtype != torch.float32
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        if other := {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
            raise StartError(f"the model has layers of {', '.join(other)}, which cannot be packed")
        for module in model.modules():
            if can_absorb(module):
                module.expand_kv = keep_latent
            # Up to its original length, to which context_length holds it, dynamic rope is constant;
            # its check for longer sequences would synchronise with the GPU in every step.
            if getattr(module, "rope_type", None) == "dynamic":
                module.rope_type = "default"
        model.set_attn_implementation("packed")
        self.difference = 0.0  # from the plain forward pass, as self_check measured it
        self.graphs: list[DecodeGraph] = []
        self.in_place = False
        self._create_pool(8)
        # One token makes each layer create its rows, which shows what a row costs on which device.
        self.forward([(Span([0]), 1)])
        rows = min(max_rows, self._affordable(cache_memory))
        if rows < 64:
            raise StartError(f"the KV cache holds only {rows} tokens; raise --cache-memory")
        self.fallback_reason = why_not_in_place(self.pool.layers)
        self.in_place = self.fallback_reason is None
        self._create_pool(rows)

    def _create_pool(self, rows: int) -> None:
        self.pool = Pool(self.num_layers, rows)
        # The token id in each row, for penalties; and the span that pads a step.
        self.ids = torch.zeros(rows + 1, dtype=torch.long, device=self.device)
        self.idle = Span([0], rows, 1)

    @property
    def asynchronous(self) -> bool:
        """Whether a call returns before its result is computed, as on a GPU."""
        return self.device.type == "cuda"

    @property
    def rows(self) -> int:
        """How many tokens the pool holds."""
        return self.pool.rows

    @torch.inference_mode()
    def forward(self, work: Work) -> torch.Tensor:
        """Compute the work; return float32 logits [sequences, vocabulary] of the last tokens."""
        total = sum(new for _, new in work)
        longest = max(span.num_cached + new for span, new in work)
        fitting = (g for g in self.graphs if g.size >= total and g.longest >= longest)
        graph = next(fitting, None) if total == len(work) else None
        size = graph.size if graph else padded_size(total) if self.pads else total
        step = Step([*work, *[(self.idle, 1)] * (size - total)], self.in_place)
        logits = graph(step) if graph else self.compute(step, len(work))
        return logits[: len(work)]

    def compute(self, step: Step, wanted: int | None = None) -> torch.Tensor:
        """A step's logits: of its first `wanted` sequences, or of all."""
        self.pool.step = step
        here = step.on(self.device)
        self.ids.index_copy_(0, here.write, here.ids)
        # On a split model accelerate's root hook would move a tensor to the first device, not ints.
        last = (step if self.split else here).last[:wanted]
        before = step.attended
        out = self.model(
            input_ids=here.ids[None],
            position_ids=here.positions[None],
            past_key_values=self.pool,
            use_cache=True,
            step=step,
            logits_to_keep=last.tolist() if self.split else last,
        )
        if step.attended - before != self.num_layers:
            raise StartError("the model's attention cannot be reached")
        return out.logits[0].float()

    @torch.inference_mode()
    def capture_graphs(self, max_batch: int, context: int) -> None:
        """Capture decode steps as CUDA graphs, for a few batch sizes and length limits each."""
        if not self.in_place or self.split:
            return
        sizes = sorted({*(2**n for n in range(11) if 2**n < max_batch), max_batch})
        lengths = sorted({*(2048 * 4**n for n in range(6) if 2048 * 4**n < context), context})
        log.info("capturing CUDA graphs for decode steps of up to %d sequences", max_batch)
        memory = torch.cuda.graph_pool_handle()
        try:
            # Largest first: the others then fit into its memory.
            for size, longest in reversed([*product(sizes, lengths)]):
                self.graphs.insert(0, DecodeGraph(self, size, longest, memory))
        except Exception as error:  # not every model's code can be captured
            log.warning("decode steps do not run as CUDA graphs: %s", error)
            self.graphs = []

    def fall_back(self, reason: str) -> None:
        """Copy rows for attention from now on, because reading them in place went wrong."""
        log.warning("attention in place is not used: %s", reason)
        self.in_place, self.fallback_reason, self.graphs = False, reason, []

    def check_device(self) -> None:
        """Raise if the device no longer computes, as after some CUDA errors."""
        torch.zeros(1, device=self.device).item()

    @torch.inference_mode()
    def copy(self, span: Span, start: int, count: int) -> None:
        """Copy the first `count` rows of a span to the rows from `start` on."""
        self.pool.copy(span.start, start, count)
        self.ids[start : start + count] = to_device(span.tokens[:count], self.device)

    def _affordable(self, cache_memory: str) -> int:
        """Rows that the memory budget holds, on the device where it holds the fewest."""
        costs: Counter[torch.device] = Counter()
        for layer in self.pool.layers:
            costs[layer.keys.device] += sum(x[0].nbytes for x in (layer.keys, layer.values))
        return min(cache_budget(cache_memory, device) // cost for device, cost in costs.items())


def cache_budget(setting: str, device: torch.device) -> int:
    """Bytes for the KV cache on a device: auto, a fraction of the free memory, or a size."""
    on_card = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_card else psutil.virtual_memory().available
    if setting == "auto":
        # The rest is for activations and CUDA graphs.
        return int(min(0.85 * free, max(free / 2, free - 2**30))) if on_card else 2**31
    try:
        return int(free * float(setting))
    except ValueError:
        return int(convert_file_size_to_int(setting))


# ---- Sampling ---------------------------------------------------------------
# From a step's logits to each sequence's next token, for the whole batch at once.

# Tokens that are ranked at first; few requests ever need more.
NUM_CANDIDATES = 128


def column(seqs: list[Sequence], knob: str, like: torch.Tensor) -> torch.Tensor:
    """One knob of every sequence, [sequences, 1]; a temperature is never 0 in float32."""
    values = to_device([[getattr(seq.sampling, knob)] for seq in seqs], like.device)
    return values.clamp(min=1e-30) if knob == "temperature" else values


def pick(
    seqs: list[Sequence],
    logits: torch.Tensor,
    pool_ids: torch.Tensor,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[int]:
    """Sample the next token of every sequence, as transformers' logits processors would.

    Modifies logits, float32 [sequences, vocabulary]; pool_ids has the token id in each row of the
    pool. Synchronises with a GPU once, at the end, after calling `meanwhile`.
    """
    sound = logits.amax(-1).isfinite()
    if any(seq.sampling.repetition_penalty != 1 for seq in seqs):
        apply_repetition_penalty(seqs, logits, pool_ids)
    if any(seq.sampling.presence_penalty or seq.sampling.frequency_penalty for seq in seqs):
        apply_openai_penalties(seqs, logits, pool_ids)
    warm = [row for row, seq in enumerate(seqs) if seq.sampling.temperature]
    free = [row for row in warm if not seqs[row].sampling.top_k and seqs[row].sampling.top_p >= 1]
    tokens, deeper = logits.argmax(-1), torch.zeros_like(sound)
    # Rows to draw, and among how many candidates; 0 stands for all, unranked.
    todo = [(free, 0), (sorted({*warm} - {*free}), NUM_CANDIDATES)]
    while True:
        for rows, depth in todo:
            if rows:
                there, some = to_device(rows, logits.device), [seqs[row] for row in rows]
                theirs = logits if len(rows) == len(seqs) else logits.index_select(0, there)
                numbers = to_device([[seq.draw] for seq in some], logits.device, torch.float64)
                draw = partial(draw_from_top, depth=depth) if depth else draw_unranked
                tokens[there], deeper[there] = draw(some, theirs, numbers)
        meanwhile()
        picked, again, right = torch.stack([tokens, deeper.long(), sound.long()]).tolist()
        if not all(right):
            raise ArithmeticError("the model's logits are not finite; try another --dtype")
        if not any(again):
            return picked
        todo = [([row for row, yes in enumerate(again) if yes], 8 * depth)]


def token_ids_from(
    seqs: list[Sequence], first: list[int], logits: torch.Tensor, pool_ids: torch.Tensor
) -> torch.Tensor:
    """The token ids of sequences from index `first` on, [sequences, longest].

    Shorter ones are padded with their last token.
    """
    begins = [seq.start + n for seq, n in zip(seqs, first, strict=True)]
    lasts = [seq.start + len(seq.tokens) - 1 for seq in seqs]
    starts, ends = to_device([begins, lasts], logits.device).unsqueeze(2)
    most = max(last - begin for begin, last in zip(begins, lasts, strict=True))
    longest = torch.arange(most + 1, device=logits.device)
    return pool_ids[(starts + longest).minimum(ends)]


def apply_repetition_penalty(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> None:
    """transformers' repetition penalty, on the tokens of prompt and answer."""
    seen = token_ids_from(seqs, [0] * len(seqs), logits, pool_ids)
    penalty = column(seqs, "repetition_penalty", logits)
    scores = logits.gather(1, seen)
    logits.scatter_(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def apply_openai_penalties(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> None:
    """OpenAI's presence and frequency penalties on the answers' tokens, as in its API guide."""
    said = token_ids_from(seqs, [seq.num_prompt for seq in seqs], logits, pool_ids)
    count = to_device([[seq.num_completion] for seq in seqs], logits.device)
    counted = torch.arange(said.shape[1], device=logits.device) < count
    times = torch.zeros_like(logits).scatter_add_(1, said, counted.to(logits))
    logits -= column(seqs, "frequency_penalty", logits) * times
    logits -= column(seqs, "presence_penalty", logits) * (times > 0)


# Tokens [sequences], and which of them need to be drawn again among more candidates.
Drawn = tuple[torch.Tensor, torch.Tensor]


def draw_unranked(seqs: list[Sequence], logits: torch.Tensor, draws: torch.Tensor) -> Drawn:
    """Sample where neither top-k nor top-p is on, so that nothing needs ranking."""
    scores = (logits - logits.amax(-1, True)) / column(seqs, "temperature", logits)
    mass = scores.exp()
    mass *= mass >= column(seqs, "min_p", logits)
    tokens = inverse_transform(mass, draws)[:, 0]
    return tokens, torch.zeros_like(tokens, dtype=torch.bool)


def inverse_transform(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: where draws [sequences, 1] from [0, 1) fall in the mass.

    The mass, [sequences, tokens], need not sum to 1.
    """
    reached = mass.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(reached, draws * reached[:, -1:], right=True)
    return place.clamp(max=mass.shape[1] - 1)


def draw_from_top(
    seqs: list[Sequence], logits: torch.Tensor, draws: torch.Tensor, depth: int
) -> Drawn:
    """Sample from logits [sequences, vocabulary] with draws [sequences, 1] from [0, 1).

    Ranks only the `depth` likeliest tokens, as sorting the whole vocabulary would take longer than
    all the rest; a sequence whose top-p reaches deeper needs to be drawn again.
    """
    temperature, top_k, top_p, min_p = (
        column(seqs, knob, logits) for knob in ("temperature", "top_k", "top_p", "min_p")
    )
    width = logits.shape[1]
    depth = min(width, max(depth, *(seq.sampling.top_k for seq in seqs)))
    ranked, ids = logits.topk(depth)
    top = ranked[:, :1]
    # At most 0, so that no temperature can overflow it.
    ranked = (ranked - top) / temperature
    lowest = ranked.gather(1, top_k.clamp(1, depth) - 1)
    ranked = ranked.masked_fill((top_k > 0) & (ranked < lowest), -torch.inf)
    rivals = ranked.logsumexp(-1, True)
    if not all(seq.sampling.top_k for seq in seqs):
        everyone = ((logits - top) / temperature).logsumexp(-1, True)
        rivals = torch.where(top_k > 0, rivals, everyone)
    mass = (ranked - rivals).exp()
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    keep = ((before < top_p) | (top_p >= 1)) & (mass >= min_p * mass[:, :1])
    keep[:, 0] = True
    tokens = ids.gather(1, inverse_transform(mass * keep, draws))[:, 0]
    return tokens, keep[:, -1] & (top_k[:, 0] == 0) & (depth < width)


def apply_guide(guide: Guide, logits: torch.Tensor) -> None:
    """Mask one sequence's logits [vocabulary] by its guide. Raises BadRequest if it has failed."""
    allowed = torch.from_numpy(guide.allowed()[: len(logits)])
    ruled_out = F.pad(~allowed, (0, len(logits) - len(allowed)), value=True)
    logits.masked_fill_(ruled_out.to(logits.device, non_blocking=True), -torch.inf)


@torch.inference_mode()
def pick_tokens(
    seqs: list[Sequence],
    logits: torch.Tensor,
    pool_ids: torch.Tensor,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Token]:
    """`pick` under the sequences' guides, and logprobs for those that ask for them.

    Logprobs are the model's own, before temperature and penalties.
    """
    told = [row for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    own = logits.index_select(0, to_device(told, logits.device, torch.long)).log_softmax(-1)
    for row, seq in enumerate(seqs):
        if seq.guide:
            apply_guide(seq.guide, logits[row])
    tokens = [Token(i) for i in pick(seqs, logits, pool_ids, meanwhile)]
    if told:
        most = max(seqs[row].sampling.logprobs or 0 for row in told)
        picked = to_device([[tokens[row].id] for row in told], own.device)
        logprobs = own.gather(1, picked)[:, 0].tolist()
        values, ids = (x.tolist() for x in own.topk(most))
        for n, row in enumerate(told):
            top_logprobs = tuple(zip(ids[n], values[n], strict=True))[: seqs[row].sampling.logprobs]
            tokens[row] = Token(tokens[row].id, logprobs[n], top_logprobs)
    return tokens


# ---- Engine -----------------------------------------------------------------
# One thread owns the model and computes step after step; a request is one or
# more Sequences in it, first waiting, then running.

# Seconds between the empty Deltas that keep an idle stream's connection alive.
HEARTBEAT = 15.0
# Most prefixes of finished requests that are kept.
MAX_PREFIXES = 256
# Most smaller requests that may overtake one that waits for room.
MAX_PASSES = 16


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
        # The prefix cache: spans of finished requests, least recently used first.
        self.prefixes: list[Span] = []
        self.num_reused = 0
        self.on_end: Callable[[Sequence], None] = lambda seq: None
        self._ended: deque[float] = deque(maxlen=64)
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        # The last step's tokens, until they are sent.
        self._unsent: list[tuple[Sequence, Token | ChatError]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What the routes call, on the event loop.

    async def stream(
        self,
        prompt: list[int],
        sampling: Sampling,
        open_ended: bool = False,
        *,
        n: int = 1,
        label: Any = None,
        guide: Guide | None = None,
    ) -> AsyncGenerator[Delta]:
        """Yield an answer piece by piece, or n of them interleaved; leaving the loop cancels.

        Raises ContextTooLong, QueueFull, NotServing if the engine is dead, StepFailed if the model
        fails, and TimedOut.
        """
        self.check_queue()
        outbox: asyncio.Queue[Delta | ChatError] = asyncio.Queue()
        shared = {"outbox": outbox, "open_ended": open_ended, "label": label}
        seqs = [self._sequence(prompt, sampling, index, guide, **shared) for index in range(n)]
        self._submit(seqs)
        beating = asyncio.create_task(heartbeat(outbox))
        try:
            while n:
                item = await outbox.get()
                if isinstance(item, ChatError):
                    raise item
                yield item
                n -= item.finish_reason is not None
        finally:
            beating.cancel()
            for seq in seqs:
                seq.done = True

    def _sequence(
        self, prompt: list[int], sampling: Sampling, index: int, guide: Guide | None, **shared: Any
    ) -> Sequence:
        if sampling.seed is not None:  # each of n answers has its own, or all would be the same
            sampling = replace(sampling, seed=sampling.seed + index)
        return Sequence(
            list(prompt),
            sampling=sampling,
            detokenizer=Detokenizer(self.tokenizer, sampling.stop),
            loop=asyncio.get_running_loop(),
            index=index,
            guide=guide.copy() if guide else None,
            **shared,
        )

    def _submit(self, seqs: list[Sequence]) -> None:
        most = seqs[0].max_tokens
        if most > self.runner.rows:
            raise ContextTooLong(
                f"prompt and answer of {most} tokens do not fit in the KV cache of"
                f" {self.runner.rows}; ask for a shorter answer"
            )
        for seq in seqs:
            self._inbox.put(seq)
        if self.failure:
            raise self._dead()

    def check_queue(self) -> None:
        """Raise QueueFull if no more may wait, with the time until the queue is half empty.

        Raises NotServing if the engine is dead.
        """
        if self.failure:
            raise self._dead()
        if self.num_waiting >= self.max_waiting:
            now = time.monotonic()
            recent = [ended for ended in list(self._ended) if now - ended < 60]
            rate = len(recent) / (now - recent[0] + 1e-3) if recent else 1.0
            seconds = min(60, 1 + int(self.num_waiting / 2 / rate))
            raise QueueFull(
                f"{self.num_waiting} requests are waiting; try again in {seconds} seconds",
                retry_after=seconds,
            )

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self._inbox.qsize()

    @property
    def num_used(self) -> int:
        """Rows of the KV cache in use; approximate, as other threads read it."""
        return self.runner.rows - sum(gap for _, gap in list(self.allocator.gaps))

    def close(self) -> None:
        """Stop the thread after its current step."""
        self._inbox.put(None)
        self._thread.join()

    # What the thread does.

    def _run(self) -> None:
        try:
            while self._receive():
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
        self._emit()
        self._send([(seq, self._dead()) for seq in [*self.running, *self.waiting]])

    def _receive(self) -> bool:
        """Move new sequences from the inbox to the queue, waiting if idle; False to stop."""
        while not (self.running or self.waiting) or not self._inbox.empty():
            seq = self._inbox.get()
            if seq is None:
                return False
            self.waiting.append(seq)
        return True

    def _admit(self) -> None:
        """Move waiting sequences into the batch, in order of arrival but for MAX_PASSES."""
        first_blocked, too_much = None, inf
        for seq in list(self.waiting):
            full = len(self.running) == self.max_batch
            if full or (first_blocked and first_blocked.passed >= MAX_PASSES):
                return
            # Where one found no room, nobody who wants as much needs to look.
            if seq.wanted_room < too_much and self.reuse and self._prefix_is_coming(seq):
                continue
            if seq.wanted_room >= too_much or not self._place(seq):
                first_blocked, too_much = first_blocked or seq, min(too_much, seq.wanted_room)
                continue
            if first_blocked:
                first_blocked.passed += 1
            self.running.append(seq)
            self.waiting.remove(seq)
            seq.admitted = seq.admitted or time.monotonic()

    def _prefix_is_coming(self, seq: Sequence) -> bool:
        """Whether a prompt in prefill will soon share a longer prefix than any cached one.

        Then waiting is faster: of n answers to one prompt, or of requests that arrive together
        with the same system prompt, one computes the prefix and the others copy it.
        """
        if seq.follows and seq.follows.pending > 1 and not seq.follows.done:
            return True  # without comparing long prompts again in every step
        seq.follows = None
        if filling := [other for other in self.running if other.pending > 1]:
            least = self._longest_prefix(seq)[0] + MIN_PREFIX
            leaders = (other for other in filling if other.tokens[:least] == seq.tokens[:least])
            seq.follows = next(leaders, None) if len(seq.tokens) > least else None
        return seq.follows is not None

    def _longest_prefix(self, seq: Sequence) -> tuple[int, Span | None]:
        """The most tokens of a sequence that a span holds already, and that span."""
        shared, source = 0, None
        for span in [*self.prefixes, *self.running]:
            count = span.common_prefix(seq.tokens, beyond=shared)
            if count > shared:
                shared, source = count, span
        return (shared, source) if shared >= MIN_PREFIX else (0, None)

    def _place(self, seq: Sequence) -> bool:
        """Allocate a sequence's span, with the longest cached prefix in it; False if none fits."""
        size = seq.wanted_room
        if size > self._num_free():
            return False
        shared, source = self._longest_prefix(seq) if self.reuse else (0, None)
        whole = source if source in self.prefixes and shared == source.num_cached else None
        if whole and self._extend_prefix(seq, whole):
            return True
        start = self._reserve(size, spare=source)
        if start is None:
            return False
        seq.start, seq.room = start, size
        # The source may have been evicted for the room.
        if source in self.prefixes:
            self.prefixes.append(self.prefixes.pop(self.prefixes.index(source)))
        held = source in [*self.prefixes, *self.running]
        if source and held and self._copied(source, seq, shared):
            self._reuse(seq, shared)
        return True

    def _reuse(self, seq: Sequence, count: int) -> None:
        seq.num_cached = count
        if not seq.admitted:  # a readmitted sequence finds its own rows, which is no reuse
            seq.num_reused = count
            self.num_reused += count

    def _copied(self, source: Span, seq: Sequence, count: int) -> bool:
        """Copy rows to a sequence's span; False if that failed and they must be recomputed."""
        try:
            self.runner.copy(source, seq.start, count)
        except Exception:
            log.exception("%d rows could not be copied", count)
            self.runner.check_device()
            return False
        return True

    def _num_free(self) -> int:
        """Rows that no running sequence owns."""
        free = sum(gap for _, gap in self.allocator.gaps)
        return free + sum(span.room for span in self.prefixes)

    def _extend_prefix(self, seq: Sequence, prefix: Span) -> bool:
        """Continue in a cached prefix's own rows, if those behind it are free."""
        more = seq.wanted_room - prefix.room
        if self.allocator.allocate(more, at=prefix.start + prefix.room) is None:
            return False
        self.prefixes.remove(prefix)
        seq.start, seq.room = prefix.start, seq.wanted_room
        self._reuse(seq, prefix.num_cached)
        return True

    def _reserve(self, size: int, spare: Span | None = None) -> int | None:
        """Allocate rows, evicting cached prefixes as needed, `spare` last.

        None if no gap becomes large enough; then nothing is evicted.
        """
        start = self.allocator.allocate(size)
        if start is not None or self._num_free() < size:
            return start
        gaps, prefixes = list(self.allocator.gaps), list(self.prefixes)
        for span in sorted(prefixes, key=lambda span: span is spare):
            self._evict(span)
            start = self.allocator.allocate(size)
            if start is not None:
                return start
        self.allocator.gaps, self.prefixes = gaps, prefixes
        return None

    def _step(self) -> None:
        """Compute one step; its tokens are sent at once, or while a GPU computes the next."""
        for seq in [seq for seq in self.running if len(seq.tokens) > seq.room and not seq.done]:
            self._grow(seq)
        computed = self._compute(self._plan())
        self._emit()  # unless picking did, while a GPU computed
        for seq, token in computed:
            if isinstance(token, Token):
                if seq.done:  # a stop string or its client has ended it meanwhile
                    continue
                seq.append(token, self.end_ids)
            self._unsent.append((seq, token))
        if not self.runner.asynchronous:
            self._emit()

    def _emit(self) -> None:
        """Detokenize and send the last step's tokens."""
        items: list[tuple[Sequence, Delta | ChatError]] = []
        for seq, token in self._unsent:
            try:
                items.append((seq, seq.emit(token) if isinstance(token, Token) else token))
            except Exception as error:  # of the detokenizer: only this request fails
                items.append((seq, self._failed(seq, error)))
        self._unsent = []
        self._send(items)

    def _grow(self, seq: Sequence) -> None:
        """Widen a sequence's span, or move it; if no room is found, it waits with its tokens."""
        more = seq.wanted_room - seq.room
        if self.allocator.allocate(more, at=seq.start + seq.room) is not None:
            seq.room += more
            return
        start = self._reserve(seq.wanted_room)
        if start is None:
            self._release(seq)
            self.waiting.appendleft(seq)
            self.running.remove(seq)
            return
        old = Span(seq.tokens, seq.start, seq.room, seq.num_cached)
        seq.start, seq.room = start, seq.wanted_room
        if not self._copied(old, seq, old.num_cached):
            seq.num_cached = 0
        self.allocator.release(old.start, old.room)

    def _plan(self) -> list[tuple[Sequence, int]]:
        """The next step's work: one token of each in decode, and chunks of prompts in order."""
        left = self.chunk
        work = []
        for seq in self.running:
            count = min(seq.pending, left) if seq.pending > 1 else 1
            left -= count if seq.pending > 1 else 0
            if count and not seq.done:
                work.append((seq, count))
        return work

    def _compute(
        self, work: list[tuple[Sequence, int]]
    ) -> list[tuple[Sequence, Token | ChatError]]:
        """The next token of each sequence whose prompt is through.

        If a step fails, its halves are retried, so that only the sequences at fault fail.
        """
        if not work:
            return []
        try:
            logits = self.runner.forward(work)
            through = [row for row, (seq, new) in enumerate(work) if seq.pending == new]
            seqs = [work[row][0] for row in through]
            if 0 < len(seqs) < len(work):
                logits = logits.index_select(0, to_device(through, logits.device))
            # The last step's tokens are sent while a GPU computes this one.
            tokens = pick_tokens(seqs, logits, self.runner.ids, self._emit) if seqs else []
        except Exception as error:
            if len(work) == 1:
                self.runner.check_device()
                return [(work[0][0], self._failed(work[0][0], error))]
            log.warning("a step of %d requests failed; retrying its halves", len(work))
        else:
            for seq, new in work:
                seq.num_cached += new
            return list(zip(seqs, tokens, strict=True))
        half = len(work) // 2
        return self._compute(work[:half]) + self._compute(work[half:])

    def _failed(self, seq: Sequence, error: Exception) -> ChatError:
        seq.done = seq.failed = True
        if isinstance(error, ChatError):
            return error
        log.error("a request of %d tokens failed", len(seq.tokens), exc_info=error)
        return StepFailed("the model failed on this request; try again")

    def _retire(self) -> None:
        """Remove sequences that are done, cancelled or too late, and free their rows."""
        everyone = [*self.running, *self.waiting]
        oldest = time.monotonic() - self.timeout
        late = [seq for seq in everyone if seq.arrived < oldest and not seq.done]
        for seq in late:
            seq.done = seq.failed = True
        reason = f"the request took longer than {self.timeout:g} seconds"
        self._send([(seq, TimedOut(reason)) for seq in late])
        # Read `done` once: the event loop may set it at any moment.
        gone = {seq for seq in everyone if seq.done} - {seq for seq, _ in self._unsent}
        for seq in [seq for seq in everyone if seq in gone]:
            if seq.room:
                self._release(seq)
                self._ended.append(time.monotonic())
            self.on_end(seq)
        self.running = [seq for seq in self.running if seq not in gone]
        self.waiting = deque(seq for seq in self.waiting if seq not in gone)

    def _evict(self, span: Span) -> None:
        self.prefixes.remove(span)
        self.allocator.release(span.start, span.room)

    def _release(self, seq: Sequence) -> None:
        """Free a sequence's rows, except for those kept as a cached prefix."""
        count = seq.num_cached if self.reuse and seq.num_cached >= MIN_PREFIX else 0
        if count:
            self.prefixes.append(Span(seq.tokens[:count], seq.start, count, count))
        if len(self.prefixes) > MAX_PREFIXES:
            self._evict(self.prefixes[0])
        if seq.room > count:
            self.allocator.release(seq.start + count, seq.room - count)
        seq.room = seq.num_cached = 0

    def _send(self, items: list[tuple[Sequence, Delta | ChatError]]) -> None:
        """Put items into their requests' outboxes, with one call per event loop for all."""
        for loop, group in groupby(items, key=lambda item: item[0].loop):
            said = [(s, d) for s, d in group if isinstance(d, ChatError) or not d.silent]
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(deliver, said)

    def _dead(self) -> NotServing:
        if isinstance(self.failure, NotServing):
            return self.failure
        return NotServing(f"the engine died ({self.failure!r}); restart the server")


async def heartbeat(outbox: "asyncio.Queue[Delta | ChatError]") -> None:
    """Put an empty Delta into the outbox now and then, until cancelled."""
    while True:
        await asyncio.sleep(HEARTBEAT)
        outbox.put_nowait(Delta(""))


def deliver(items: list[tuple[Sequence, Delta | ChatError]]) -> None:
    for seq, item in items:
        seq.outbox.put_nowait(item)


# ---- Model ------------------------------------------------------------------
# Tokenizer and engine together: a chat model, and how one is found and loaded by
# name. No code from a checkpoint is executed.


@dataclass(frozen=True)
class Prompt:
    """A tokenized request, with its sampling settled."""

    ids: list[int]
    sampling: Sampling
    open_ended: bool
    guide: Guide | None = None
    dropped_turns: int = 0


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, ready to answer."""

    name: str
    tokenizer: ChatTokenizer
    engine: Engine
    defaults: Sampling
    context_length: int
    prompt_length: int  # most tokens of a prompt, where the model has such a limit
    vocabulary: int  # token ids that the model has an embedding for
    facts: dict[str, str]
    loaded: int = field(default_factory=lambda: int(time.time()))

    def answer(self, prompt: Prompt, n: int = 1, label: Any = None) -> AsyncGenerator[Delta]:
        return self.engine.stream(
            prompt.ids, prompt.sampling, prompt.open_ended, n=n, label=label, guide=prompt.guide
        )

    def guided(self, prompt: Prompt, schema: dict[str, Any]) -> Prompt:
        """The same, to be answered with JSON of a schema. Raises BadRequest if it is invalid."""
        return replace(prompt, guide=self.tokenizer.guide(schema, self.engine.end_ids))

    def prepare(
        self,
        messages: list[Message],
        given: dict[str, Any],
        truncate: bool = False,
        whole_context: bool = False,
    ) -> Prompt:
        """Tokenize and check the lengths; slow, so call it off the event loop.

        `given` are the request's sampling parameters. A length that is not among them is the
        default, or with `whole_context` all that is left, and is cut to fit. Raises ContextTooLong
        if prompt and answer do not fit together.
        """
        # If no length is given, at least half of the context is for the prompt.
        default = min(self.defaults.max_new_tokens, self.context_length // 2)
        answer = given.get("max_new_tokens", default)
        dropped = self._turns_to_drop(messages, answer) if truncate else 0
        ids = self.tokenizer.encode(drop_turns(messages, dropped))
        return replace(self._with_length(ids, given, whole_context), dropped_turns=dropped)

    def prepare_text(self, prompt: str | list[int], given: dict[str, Any]) -> Prompt:
        """The same for a text to continue, or its token ids, without a chat format."""
        ids = self.tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise BadRequest("prompt is empty; send a text or token ids", "prompt")
        return self._with_length(ids, given, whole_context=True)

    def _with_length(self, ids: list[int], given: dict[str, Any], whole_context: bool) -> Prompt:
        sampling = replace(self.defaults, **given)
        asked = "max_new_tokens" in given
        most = sampling.max_new_tokens if asked or not whole_context else self.context_length
        room = self.context_length - len(ids)
        wanted = most if asked else 1
        if room < wanted or len(ids) > self.prompt_length:
            less = self.prompt_length < self.context_length
            limit = f" ({self.prompt_length} for the prompt)" if less else ""
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens and the answer may have {wanted}, but the"
                f" model's context is {self.context_length} tokens{limit}; shorten the prompt or"
                " the history, or ask for a shorter answer",
                param="max_length" if 0 < room < wanted else "prompt",
            )
        if max(ids) >= self.vocabulary:
            last = self.vocabulary - 1
            raise BadRequest(f"prompt has a token id of {max(ids)}; the last is {last}", "prompt")
        return Prompt(ids, replace(sampling, max_new_tokens=min(room, most)), not asked)

    def _turns_to_drop(self, messages: list[Message], answer: int) -> int:
        """The fewest of the oldest turns to drop so that the answer fits."""

        def fits(dropped: int) -> bool:
            ids = self.tokenizer.encode(drop_turns(messages, dropped))
            return len(ids) <= min(self.prompt_length, self.context_length - answer)

        turns = sum(m["role"] == "user" for m in messages) - 1
        return bisect_left(range(turns), True, key=fits)


def drop_turns(messages: list[Message], count: int) -> list[Message]:
    """The messages without the oldest `count` turns; a system text before them stays."""
    if not count:
        return messages
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return messages[: starts[0]] + messages[starts[count] :]


HERE = Path(__file__).resolve().parent
SUPPORTED = {"torch": ">=2.6,<2.14", "transformers": ">=5.17,<6"}


def check_versions(installed: Callable[[str], str] = version) -> None:
    """Raise StartError unless torch and transformers are in the supported ranges."""
    for name, wanted in SUPPORTED.items():
        if not SpecifierSet(wanted).contains(installed(name), prereleases=True):
            raise StartError(
                f"{name} {installed(name)} is not one that this server works with ({wanted});"
                f" run `pip install '{name}{wanted}'`, or choose another image"
            )


def check_gpus(device_map: str) -> None:
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


# Where hub clients put a model below a given folder: in the folder itself, in the cache layouts of
# huggingface_hub and modelscope, and in those of modelscope's older releases.
LAYOUTS = ("", "snapshots/*/", "*/snapshots/*/", "models/*/snapshots/*/", "hub/*/snapshots/*/",
           "*/*/", "models/*/*/", "hub/models/*/*/")  # fmt: skip


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which may be one or a hub's cache."""
    for layout in LAYOUTS:
        configs = folder.glob(f"{layout}config.json")
        if found := sorted(c.parent for c in configs if any(c.parent.glob("*model*"))):
            return found
    return []


def find_model(name: str) -> Path:
    """The folder of a model, given as a path or by its name under models/."""
    places = Path(name).expanduser(), HERE / "models" / name
    found = find_checkpoints(places[0]) or find_checkpoints(places[1])
    if len(found) > 1:
        several = ", ".join(map(str, found))
        raise StartError(f"{name} holds several models; give --model one of {several}")
    if found:
        return found[0]
    if name == "demo":
        return fetch_demo()
    raise StartError(
        f"there is no model {name!r}: neither {places[0].absolute()} nor {places[1]} holds a"
        f" checkpoint; fetch it with `python model_download.py {name}` (--help lists the names),"
        " or give --model the folder of one"
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
    """Splits InternLM2's fused wqkv.

    Its rows are grouped by key head: its query heads, the key, the value.
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
    """Index normalises its output head at every forward pass; doing so at load is the same."""

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


@contextmanager
def explained(folder: Path | str) -> Iterator[None]:
    """Turn any error about a folder's files into a StartError of one sentence."""
    try:
        yield
    except (StartError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise almost every kind
        broken = first_damaged(Path(folder)) if isinstance(error, SafetensorError) else folder
        # Without ANSI colours and other control characters.
        said = re.sub(r"\x1b\[\d*m|[\x00-\x09\x0b-\x1f]", "", str(error)).strip()
        reason = said.partition("\n")[0].rstrip(". :") or type(error).__name__
        raise StartError(
            f"the model could not be loaded from {broken} ({reason}); if a file is damaged, delete"
            " it and run the download again, as with `python model_download.py NAME`"
        ) from error


def first_damaged(folder: Path) -> Path:
    """The first safetensors file that cannot be opened; the error itself does not name it."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return folder


def best_placement(config: Any, dtype: str) -> str:
    """A device map: the first of several cards that has room for the whole model and a KV cache.

    On one card decode steps run as CUDA graphs, and no card waits for another; `auto`, accelerate's
    balanced map, would use all cards even for a small model.
    """
    if torch.backends.mps.is_available():
        return "cpu"  # sampling needs float64, which Apple's GPUs lack
    cards = range(torch.cuda.device_count())
    if len(cards) > 1:
        known = config.dtype if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config, dtype=known).get_memory_footprint()
        for card in cards:
            if size <= 0.7 * torch.cuda.mem_get_info(card)[0]:
                return f"cuda:{card}"
    return "auto"


def load_model(
    folder: Path | str, *, dtype: str = "auto", device_map: str = "auto"
) -> tuple[Any, PreTrainedTokenizerFast | None]:
    """A checkpoint's model, a plain transformers one placed by accelerate, and its tokenizer.

    Nothing in the folder is executed. The tokenizer is None where the folder has none. Raises
    StartError, ValueError, or whatever the libraries raise where its files do not make a model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if ratio := getattr(config, "rope_ratio", None):  # Index's model for long texts
        config.rope_parameters["rope_theta"] *= ratio
    if device_map == "auto":
        device_map = best_placement(config, dtype)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map=json.loads(device_map) if device_map.startswith("{") else device_map,
        offload_folder=tempfile.mkdtemp(prefix="chat-api-") if "disk" in device_map else None,
        # InternLM2's config asks for eager attention, which is slow.
        attn_implementation="sdpa",
        trust_remote_code=False,
        local_files_only=True,
        # Missing or mismatched tensors would otherwise be random, with only a line in the log.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = {"not there": report["missing_keys"], "of another shape": report["mismatched_keys"]}
    for how, names in wrong.items():
        if names:
            # Of a mismatch the shapes are told too.
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise ValueError(f"{len(names)} of its tensors are {how}, for example {first}")
    return model.eval(), load_tokenizer(Path(folder))


def device_summary(model: Any) -> str:
    """How many of the model's parts each device holds, and its free memory."""
    parts = Counter(map(str, getattr(model, "hf_device_map", {"": model.device}).values()))
    said = []
    for name, count in parts.items():
        device = f"cuda:{name}" if name.isdigit() else name
        free = torch.cuda.mem_get_info(device)[0] if "cuda" in device else 0
        left = f", {free / 2**30:.1f} GiB left" if free else ""
        said.append(f"{device} ({count} {'part' if count == 1 else 'parts'}{left})")
    return ", ".join(said)


def context_length(config: Any) -> int:
    """Most tokens of prompt and answer together.

    Dynamic and longrope RoPE depend on the longest sequence in the batch beyond the original
    length; up to it, their frequencies are constant.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    return int(getattr(config, "max_position_embeddings", 2048))


def probes(model: Any) -> tuple[list[int], list[int]]:
    """Two short sequences of common tokens: with rare ones, rounding dominates the logits."""
    middle = model.config.get_text_config().vocab_size // 3
    return list(range(middle, middle + 12)), list(range(middle + 12, middle + 19))


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The model's own logits for a sequence alone, [tokens, vocabulary]."""
    ids_there = torch.tensor([ids], device=input_device(model))
    return model(input_ids=ids_there, use_cache=False).logits[0]


def self_check(runner: Runner, alone: list[torch.Tensor]) -> float:
    """The relative error of packed and chunked steps against the probes' reference logits.

    Raises StartError if it is too large: such a model would read its neighbours' tokens.
    """
    spans = [Span(ids, start) for ids, start in zip(probes(runner.model), (0, 13), strict=True)]
    worst = 0.0
    for news in ((4, 5), (7, 1), (1, 1)):
        logits = runner.forward(list(zip(spans, news, strict=True)))
        for span, new, row, plain in zip(spans, news, logits, alone, strict=True):
            span.num_cached += new
            wanted = plain[span.num_cached - 1].to(row)
            # max would pass over the NaN that broken weights give.
            worst = max(float((row - wanted).norm() / wanted.norm()), worst)
    if worst != worst:
        raise StartError(
            "the model's logits are NaN; try another --dtype, or download the model again"
        )
    # In half precision two right answers differ by a few percent; a wrong one is far off.
    if not worst < (1e-3 if runner.model.dtype == torch.float32 else 0.1):
        raise StartError(f"this model does not batch: its logits come out {worst:.0%} off")
    return worst


def start_runner(model: Any, settings: Settings) -> Runner:
    """A runner whose logits were checked against the model's own. Raises StartError otherwise."""
    alone = [reference_logits(model, ids) for ids in probes(model)]
    try:
        most = settings.max_batch * context_length(model.config)
        runner = Runner(model, settings.cache_memory, most)
    except (TypeError, ValueError) as error:
        raise StartError(f"{type(model).__name__} cannot be batched: {error}") from error
    runner.capture_graphs(settings.max_batch, min(context_length(model.config), runner.rows))
    try:
        runner.difference = self_check(runner, alone)
    except (StartError, RuntimeError) as error:
        if not runner.in_place:
            raise
        runner.fall_back(str(error))
        runner.difference = self_check(runner, alone)
    return runner


def chat_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerFast | None, settings: Settings
) -> ChatTokenizer:
    """The tokenizer with the family's format, or else a chat template: a given one, its own."""
    if tokenizer is None:
        raise StartError(
            "the model's folder has no tokenizer.json and no tokenizer.model;"
            " run the download again"
        )
    if settings.chat_template is None:
        return ChatTokenizer(tokenizer, family_of(model.config.model_type, tokenizer))
    tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
    return ChatTokenizer(tokenizer)


def attention_summary(runner: Runner) -> str:
    if runner.fallback_reason:
        return f"sdpa over copied rows ({runner.fallback_reason})"
    sizes = sorted({recorded.size for recorded in runner.graphs})
    graphs = f"CUDA graphs for {', '.join(map(str, sizes)) or 'no'} sequences"
    return f"FlashAttention in place, {graphs}"


def summary_of(
    name: str, text: ChatTokenizer, runner: Runner, context: int, ends: set[int]
) -> dict[str, str]:
    """What the start log tells of a model."""
    model = runner.model
    kind, size = type(model).__name__, f"{model.num_parameters():,} parameters"
    return {
        "model": f"{name}, {kind} in {str(model.dtype).removeprefix('torch.')}, {size}",
        "prompt": text.family.name if text.family else "its own chat template",
        "devices": device_summary(model),
        "context": f"{context:,} tokens; the cache holds {runner.rows:,}",
        "end ids": f"{sorted(ends)}",
        "attention": attention_summary(runner),
        "check": f"packed and plain logits differ by {runner.difference:.1e}, relatively",
    }


def load_chat_model(settings: Settings) -> ChatModel:
    """Find, load and check a model, and start its engine; takes seconds to minutes.

    Raises StartError with the remedy.
    """
    check_versions()
    check_gpus(settings.device_map)
    folder = find_model(settings.model)
    with explained(folder):
        model, tokenizer = load_model(folder, dtype=settings.dtype, device_map=settings.device_map)
        text = chat_tokenizer(model, tokenizer, settings)
        ends = text.end_ids(model.generation_config)
    runner = start_runner(model, settings)
    context = min(context_length(model.config), runner.rows)
    name = folder.absolute().name
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
        name=name,
        tokenizer=text,
        engine=engine,
        defaults=checkpoint_defaults(model.generation_config, text.family),
        context_length=context,
        prompt_length=min(context, getattr(model.config, "max_tokenizer_truncation", context)),
        vocabulary=len(model.get_input_embeddings().weight),
        facts=summary_of(name, text, runner, context, ends),
    )


def check_model(model: ChatModel) -> str:
    """The report of --check: a summary, a prompt, and eight tokens."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "你好"},
    ]
    prompt = model.prepare(messages, {"max_new_tokens": 8, "temperature": 0.0})

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
# Requests and responses as pydantic models. Aliases and legacy shapes are resolved here.

# Fields that would change the answer's meaning: they are refused, not ignored.
UNSUPPORTED = (
    "tools", "tool_choice", "functions", "function_call", "logit_bias", "response_format",
    "best_of", "num_beams", "suffix", "echo", "audio", "prediction", "web_search_options",
)  # fmt: skip
# Values of them that change nothing.
NEUTRAL = {"n": 1, "best_of": 1, "num_beams": 1, "response_format": {"type": "text"}}
LENGTH_NAMES = ("max_length", "max_new_tokens", "max_tokens", "max_completion_tokens")


class StrictModel(BaseModel):
    """Strict: a number is not a string, and True is not 1."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def reject_lone_surrogates(text: str) -> str:
    """Reject half of a surrogate pair: JSON can express it, but no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain an unpaired surrogate") from None
    return text


Text = Annotated[str, AfterValidator(reject_lone_surrogates)]


class HistoryMessage(StrictModel):
    role: Literal["system", "user", "assistant"]
    content: Text


def check_pair(pair: list[str]) -> list[str]:
    if len(pair) != 2:
        raise ValueError('must be a ["question", "answer"] pair')
    return pair


Pair = Annotated[list[Text], AfterValidator(check_pair)]


def history_shape(history: Any) -> str | None:
    """Tell pairs from messages by the items' types; None if the history is neither."""
    if not isinstance(history, list):
        return None
    kinds = {type(turn) for turn in history}
    return "pairs" if kinds <= {list} else "turns" if kinds <= {dict, HistoryMessage} else None


# A body has room for millions of items; validation stops at the first error.
MAX_TURNS = 4096
TurnLimit = Field(max_length=MAX_TURNS, fail_fast=True)
Pairs = Annotated[list[Pair], TurnLimit, Tag("pairs")]
Messages = Annotated[list[HistoryMessage], TurnLimit, Tag("turns")]
History = Annotated[
    Pairs | Messages,
    Discriminator(
        history_shape,
        custom_error_type="history_shape",
        custom_error_message='must be a list of ["question", "answer"] pairs'
        ' or of {"role": ..., "content": ...} objects',
    ),
]


def as_stop_strings(stop: Any) -> Any:
    """Accept a single string as a list of one."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return tuple(texts)


StopStrings = Annotated[
    tuple[Annotated[Text, Field(max_length=256)], ...],
    Field(max_length=16),
    BeforeValidator(as_stop_strings, json_schema_input_type=str | list[str]),
]


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


def join_text_parts(content: Any) -> Any:
    """Join text content parts into one string."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("must be text; images, sound and files are not supported")
        if not isinstance(part.get("text"), str):
            raise ValueError('must hold parts such as {"type": "text", "text": "hello"}')
    return "".join(part["text"] for part in content)


# Validates millions of ids in a fraction of a second, unlike a Python loop.
TOKEN_IDS = TypeAdapter(
    Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(fail_fast=True)]
)


def parse_prompt(prompt: Any) -> str | list[int]:
    """Accept a string, a list of token ids, or a list that holds one of these."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return reject_lone_surrogates(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        raise ValueError("must be a single prompt; send one request for each, they are batched")
    try:
        return TOKEN_IDS.validate_python(prompt)
    except ValidationError:
        raise ValueError("must be a text, or a list of token ids") from None


def validation_error(error: ValidationError | RequestValidationError) -> BadRequest:
    """Turn pydantic's first error into one sentence."""
    first = error.errors()[0]
    # Without "body" and without the union's tags.
    path = [part for part in first["loc"] if part not in ("body", "pairs", "turns")]
    if first["type"] == "json_invalid":
        return BadRequest(
            f"the body is not valid JSON: {first['ctx']['error']}, near character {path[0]}"
        )
    if not path:
        return BadRequest('the body must be a JSON object, such as {"prompt": "hello"}')
    name = str(path[0]) + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path[1:])
    if first["type"] == "missing":
        return BadRequest(f"{name} is missing", str(path[0]))
    message = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub("^(Input|List|Tuple|Value) should", "must", message)
    return BadRequest(f"{name} {message[0].lower()}{message[1:]}", str(path[0]))


class SamplingFields(StrictModel):
    """Sampling parameters of a request; absent or null means the model's default."""

    unsupported: ClassVar[tuple[str, ...]] = UNSUPPORTED

    stream: bool | None = Field(None, description="answer with server-sent events")

    max_new_tokens: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices(*LENGTH_NAMES),
        description=f"most new tokens; {', '.join(LENGTH_NAMES[1:])} are other names for it",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy")
    top_k: int | None = Field(None, ge=0, le=10**6, description="0 is off")
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="as in OpenAI's API")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="as in OpenAI's API")
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopStrings | None = Field(None, description="a text, or several, that ends the answer")

    @model_validator(mode="before")
    @classmethod
    def check_body(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in cls.unsupported:
            if body.get(name) not in (None, False, [], {}, NEUTRAL.get(name)):
                raise BadRequest(f"{name} is not supported by this call; leave it out", name)
        lengths = [name for name in LENGTH_NAMES if body.get(name) is not None]
        if len(lengths) > 1:
            names = " and ".join(lengths)
            raise BadRequest(f"{names} mean the same; send one of them", lengths[1])
        # AliasChoices takes the first alias that is present, even if it is null.
        return {k: v for k, v in body.items() if k not in LENGTH_NAMES or v is not None}

    def overrides(self) -> dict[str, Any]:
        """The sampling parameters that the request sets, by their names in Sampling."""
        return self.model_dump(include={knob.name for knob in fields(Sampling)}, exclude_none=True)

    def prepare(self, model: ChatModel) -> Prompt:
        """Tokenize the request. Raises BadRequest if it cannot be served."""
        raise NotImplementedError


class ChatRequest(SamplingFields):
    """The body of POST /. `max_length` has always counted new tokens only."""

    unsupported = (*UNSUPPORTED, "n", "logprobs", "top_logprobs")

    prompt: Text = Field(description="the user's text")
    history: History | None = Field(None, description="earlier turns, pairs or messages")
    system: Text | None = Field(None, description="a system text for the model")
    truncate: bool | None = Field(None, description="drop the oldest turns that do not fit")

    @model_validator(mode="after")
    def check_texts(self) -> Self:
        if not self.prompt.strip():
            raise BadRequest("prompt is empty; send the user's text", "prompt")
        if self.system is not None and any(m["role"] == "system" for m in self._past()):
            raise BadRequest("system is given here and in history; send one of them", "system")
        return self

    def prepare(self, model: ChatModel) -> Prompt:
        try:
            return model.prepare(self.messages(), self.overrides(), bool(self.truncate))
        except ContextTooLong as error:
            if not self.history or self.truncate:
                raise
            raise ContextTooLong(f'{error}, or send "truncate": true', error.param) from error

    def messages(self) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self._past(), {"role": "user", "content": self.prompt}]

    def with_answer(self, answer: str) -> list[Any]:
        """The history in the shape of the request's, with this turn added."""
        if history_shape(self.history or []) == "pairs":
            return [*(self.history or []), [self.prompt, answer]]
        turn = {"user": self.prompt, "assistant": answer}
        return [*self._past(), *({"role": role, "content": text} for role, text in turn.items())]

    def _past(self) -> Iterator[Message]:
        for turn in self.history or []:
            if isinstance(turn, HistoryMessage):
                yield turn.model_dump()
            else:
                yield {"role": "user", "content": turn[0]}
                yield {"role": "assistant", "content": turn[1]}


class ChatResponse(BaseModel):
    """The response of POST /; its first four fields are the ones that clients rely on."""

    response: str
    history: list[Any]
    status: int
    time: str = Field(description="local time, YYYY-mm-dd HH:MM:SS")
    finish_reason: FinishReason
    usage: dict[str, int]
    dropped_turns: int | None = Field(
        None, description="with truncate: how many turns were left out"
    )


class OpenAIMessage(StrictModel):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        # OpenAI's newer name for the system role.
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]
    content: Annotated[Text, BeforeValidator(join_text_parts, json_schema_input_type=Content)]


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class JSONSchema(StrictModel):
    name: str | None = None
    wanted: dict[str, Any] = Field(validation_alias="schema")


class ResponseFormat(StrictModel):
    """https://platform.openai.com/docs/guides/structured-outputs"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def to_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None if any text is allowed."""
        if self.type == "json_schema" and self.json_schema is None:
            raise BadRequest(
                'response_format needs "json_schema": {"schema": …}', "response_format"
            )
        given = self.json_schema.wanted if self.json_schema else {}
        return {"text": None, "json_object": {"type": "object"}, "json_schema": given}[self.type]


class OpenAIRequest(SamplingFields):
    """Fields shared by OpenAI's two endpoints."""

    model: Text | None = Field(None, description="absent is the one that is served")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="answers to give, computed together")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    unsupported = tuple(name for name in UNSUPPORTED if name != "response_format")

    messages: list[OpenAIMessage] = Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    def overrides(self) -> dict[str, Any]:
        rest = {name: value for name, value in super().overrides().items() if name != "logprobs"}
        return {**rest, "logprobs": self.top_logprobs or 0} if self.logprobs else rest

    def prepare(self, model: ChatModel) -> Prompt:
        messages = [message.model_dump() for message in self.messages]
        prompt = model.prepare(messages, self.overrides(), whole_context=True)
        schema = self.response_format.to_schema() if self.response_format else None
        return prompt if schema is None else model.guided(prompt, schema)


class CompletionRequest(OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: Annotated[
        str | list[int], PlainValidator(parse_prompt, json_schema_input_type=str | list[int])
    ]
    logprobs: int | None = Field(None, ge=0, le=5)

    def prepare(self, model: ChatModel) -> Prompt:
        return model.prepare_text(self.prompt, self.overrides())


class OpenAIError(BaseModel):
    """The body of an error under /v1."""

    class Detail(BaseModel):
        message: str
        type: str
        param: str | None
        code: str

    error: Detail


class ErrorBody(OpenAIError):
    """The body of an error elsewhere."""

    status: int
    time: str


class State(BaseModel):
    status: Literal["loading", "ready", "draining", "dead"]
    running: int
    waiting: int


class Completion(BaseModel):
    """The response of OpenAI's two endpoints, as far as the docs show it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, int]


def extra_responses(
    error: type[OpenAIError], content: str = "application/json"
) -> dict[int | str, Any]:
    """Further responses of a route, for the docs."""
    return {
        200: {"content": {content: {}}},
        "4XX": {"model": error, "description": "Refused: 400, 401, 404, 405, 408, 413 or 429"},
        "5XX": {"model": error, "description": "Not served: 500, 503 or 504"},
    }


# ---- Replies ----------------------------------------------------------------
# How each endpoint formats what the engine generates. There is one generation
# path: a full response is built from the same deltas as a stream.

# An event is an object, or None for a keep-alive comment.
Events = AsyncGenerator[dict[str, Any] | None]


def local_time() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


@dataclass(eq=False)
class Choice:
    """One of a request's n answers, as it grows."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # only with logprobs
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: bool = False
    text_offset: int = 0  # characters of the tokens that were sent

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += [delta.token] if delta.token else []
        if delta.finish_reason:
            self.finish_reason = delta.finish_reason
            self.prompt_tokens = delta.prompt_tokens
            self.completion_tokens = delta.completion_tokens


def usage_of(choices: list[Choice]) -> dict[str, int]:
    """Token counts of a finished request; the prompt is counted once."""
    completion = sum(choice.completion_tokens for choice in choices)
    counts = {"prompt_tokens": choices[0].prompt_tokens, "completion_tokens": completion}
    return counts | {"total_tokens": sum(counts.values())}


class Reply(Protocol):
    """Formats the answer of one endpoint."""

    def chunk(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        """The event for a delta, which has already been added to the choice."""

    def final_event(self, choices: list[Choice]) -> dict[str, Any] | None:
        """The event that follows the last delta, if any."""

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        """The response without streaming."""


async def collect(deltas: AsyncGenerator[Delta], choices: list[Choice]) -> None:
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.index].add(delta)


async def events_of(deltas: AsyncGenerator[Delta], choices: list[Choice], reply: Reply) -> Events:
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.index].add(delta)
            yield None if delta.silent else reply.chunk(delta, choices[delta.index])
    if event := reply.final_event(choices):
        yield event


@dataclass
class ClassicReply:
    """POST /: the deltas as they come, then the full response."""

    model: ChatModel
    body: ChatRequest
    prompt: Prompt

    def chunk(self, delta: Delta, choice: Choice) -> dict[str, Any] | None:
        return {"delta": delta.text} if delta.text else None

    def final_event(self, choices: list[Choice]) -> dict[str, Any]:
        return self.full_response(choices)

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        return {
            "response": choices[0].text,
            "history": self.body.with_answer(choices[0].text),
            "status": 200,
            "time": local_time(),
            "finish_reason": choices[0].finish_reason,
            "usage": usage_of(choices),
            **({"dropped_turns": self.prompt.dropped_turns} if self.body.truncate else {}),
        }


class OpenAIReply:
    """What OpenAI's two endpoints share: the object around the choices."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: ChatModel, body: OpenAIRequest, _: Prompt):
        self.model, self.include_usage = model, body.include_usage
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        content = [
            self.choice(c, "message", c.text, c.tokens) | {"finish_reason": c.finish_reason}
            for c in choices
        ]
        return self._frame(self.kind, content) | {"usage": usage_of(choices)}

    def chunk(self, delta: Delta, choice: Choice) -> dict[str, Any]:
        content = self.choice(choice, "delta", delta.text, [delta.token] if delta.token else [])
        usage = {"usage": None} if self.include_usage else {}
        content["finish_reason"] = delta.finish_reason
        return self._frame(self.chunk_kind, [content]) | usage

    def final_event(self, choices: list[Choice]) -> dict[str, Any] | None:
        usage = {"usage": usage_of(choices)}
        return self._frame(self.chunk_kind, []) | usage if self.include_usage else None

    def choice(self, choice: Choice, key: str, text: str, tokens: list[Token]) -> dict[str, Any]:
        """A choice or a chunk of one, without its finish_reason."""
        raise NotImplementedError

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}
        return frame | {"choices": choices}


class ChatCompletionReply(OpenAIReply):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice, key: str, text: str, tokens: list[Token]) -> dict[str, Any]:
        logprobs = {"content": [self._logprob(token) for token in tokens]} if tokens else None
        role = {} if choice.started else {"role": "assistant"}
        choice.started = True
        return {"index": choice.index, key: role | {"content": text}, "logprobs": logprobs}

    def _logprob(self, token: Token) -> dict[str, Any]:
        top_logprobs = [self._scored(*pair) for pair in token.top_logprobs]
        return self._scored(token.id, token.logprob or 0.0) | {"top_logprobs": top_logprobs}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.model.tokenizer.spell(token)
        # Part of a multi-byte character: its bytes are not known from its text.
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


class CompletionReply(OpenAIReply):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, choice: Choice, key: str, text: str, tokens: list[Token]) -> dict[str, Any]:
        logprobs = self._logprobs(choice, tokens) if tokens else None
        return {"index": choice.index, "text": text, "logprobs": logprobs}

    def _logprobs(self, choice: Choice, tokens: list[Token]) -> dict[str, Any]:
        spell = self.model.tokenizer.spell
        texts = [spell(token.id) for token in tokens]
        *offsets, choice.text_offset = accumulate(map(len, texts), initial=choice.text_offset)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{spell(i): p for i, p in token.top_logprobs} for token in tokens],
            "text_offset": offsets,
        }


# ---- Metrics ----------------------------------------------------------------
# Prometheus metrics, under vLLM's names, and one log line for each finished
# request.


@dataclass(frozen=True)
class RequestInfo:
    """Identifies a request in metrics and logs."""

    id: str
    route: str


LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts and logs requests; `engine` returns the engine once it is loaded."""

    def __init__(self, engine: Callable[[], Engine | None], log_prompts: bool = False):
        self.log_prompts = log_prompts
        self.registry = prometheus_client.CollectorRegistry()
        mine: Any = {"namespace": "chat", "registry": self.registry}
        count: Any = partial(prometheus_client.Counter, **mine)
        times: Any = partial(prometheus_client.Histogram, buckets=LATENCY_BUCKETS, **mine)
        self.requests = count(
            "requests", "Requests that ended", ["route", "outcome", "finish_reason"]
        )
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts")
        self.reused_tokens = count("prefix_cache_hits", "Tokens of prompts found in the cache")
        self.generation_tokens = count("generation_tokens", "Tokens of answers")
        self.queue_time = times("request_queue_time_seconds", "Wait for a place in the batch")
        self.first_token = times("time_to_first_token_seconds", "Arrival to the first token")
        self.each_token = times("time_per_output_token_seconds", "Mean time of a later token")
        self.whole_time = times("e2e_request_latency_seconds", "Arrival to the last token")
        read: dict[str, Callable[[Engine], float]] = {
            "num_requests_running": lambda engine: len(engine.running),
            "num_requests_waiting": lambda engine: engine.num_waiting,
            "cache_tokens": lambda engine: engine.runner.rows,
            "cache_tokens_used": lambda engine: engine.num_used,
        }
        for name, value in read.items():
            gauge = prometheus_client.Gauge(name, name.replace("_", " "), **mine)
            gauge.set_function(partial(lambda value: value(e) if (e := engine()) else 0, value))

    def record_prompt(self, call: RequestInfo, body: SamplingFields) -> None:
        """Log the text of a request if --log-prompts is set."""
        if self.log_prompts:
            texts = body.model_dump(include={"prompt", "history", "system", "messages"})
            log.info("request_id=%s asked=%r", call.id, texts)

    def record_finished(self, seq: Sequence) -> None:
        """Record a sequence that has left the engine; called on the engine's thread."""
        now, call = time.monotonic(), seq.label or RequestInfo("-", "-")
        self.prompt_tokens.inc(seq.num_prompt)
        self.reused_tokens.inc(seq.num_reused)
        self.generation_tokens.inc(seq.num_completion)
        line = {
            "request_id": call.id,
            "route": call.route,
            "outcome": "failed" if seq.failed else "served" if seq.finish_reason else "left",
            "finish_reason": seq.finish_reason or "none",
            "prompt_tokens": seq.num_prompt,
            "reused_tokens": seq.num_reused,
            "completion_tokens": seq.num_completion,
        }
        if not seq.failed:  # record_error counts it
            self.requests.labels(call.route, line["outcome"], line["finish_reason"]).inc()
        if seq.admitted:
            line["queue_time"] = observed(self.queue_time, seq.admitted - seq.arrived)
        if seq.first_token:
            line["first_token"] = observed(self.first_token, seq.first_token - seq.arrived)
        if seq.num_completion > 1:
            mean = (now - seq.first_token) / (seq.num_completion - 1)
            line["each_token"] = observed(self.each_token, mean)
        line["seconds"] = observed(self.whole_time, now - seq.arrived)
        log_line(line)

    def record_error(self, call: RequestInfo, error: ChatError) -> None:
        """Record a request that was answered with an error."""
        self.requests.labels(call.route, error.code, "none").inc()
        log_line({"request_id": call.id, "route": call.route, "outcome": error.code})


def observed(histogram: Any, seconds: float) -> float:
    histogram.observe(seconds)
    return round(seconds, 4)


def log_line(line: dict[str, Any]) -> None:
    """One line, as key=value, or as JSON with --log-json."""
    log.info(" ".join(f"{name}={value}" for name, value in line.items()), extra=line)


def start_log(as_json: bool) -> None:
    """Log plain text lines, or JSON lines."""
    shape = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=shape)
    if as_json:
        from pythonjsonlogger.json import JsonFormatter

        logging.getLogger().handlers[0].setFormatter(JsonFormatter(shape))


# ---- Chat page --------------------------------------------------------------
# A chat in the browser, made with gradio, under /chat. It is a client like any other: a question
# becomes a ChatRequest, and ChatModel.answer answers it.

# The page's texts in English and Chinese; the browser's language decides.
TRANSLATIONS = {
    "ask": ("Write a message", "输入消息"),
    "new": ("New chat", "新对话"),
    "settings": ("Settings", "设置"),
    "default": ("default", "默认"),
    "system": ("System prompt", "系统提示词"),
    "max_new_tokens": ("Max new tokens", "最大生成 token 数"),
    "temperature": ("Temperature (0: greedy)", "温度（0 为贪心）"),
    "top_k": ("Top-k (0: off)", "Top-k（0 为关闭）"),
    "top_p": ("Top-p", "Top-p"),
    "min_p": ("Min-p (0: off)", "Min-p（0 为关闭）"),
    "repetition_penalty": ("Repetition penalty (1: off)", "重复惩罚（1 为关闭）"),
    "seed": ("Seed", "随机种子"),
}
# gradio does not translate these, so they hold both languages.
LOGIN_MESSAGE = "Any username; the password is the server's key. · 用户名任意，密码为服务器的密钥。"
DROPPED_MESSAGE = (
    "The oldest turns no longer fit and are left out. · 最早的几轮对话已超出长度，不再发送。"
)
PAGE_PARAMETERS = [knob.name for knob in fields(Sampling) if knob.name in TRANSLATIONS]
PAGE_CSS = """
#settings .form {display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr))}
#settings .form {background: none}
#settings .form > :first-child {grid-column: 1 / -1}
"""
# The only gradio routes that the page needs. Others read files, take uploads or fetch pages;
# heartbeat would hold a connection for each open page, of which a browser allows six per host and
# for which uvicorn would wait at shutdown.
PAGE_ROUTES = re.compile(
    r"/(login|theme\.css|(assets|static)/.+"
    r"|gradio_api/(run/predict|queue/join|queue/data|cancel))?"
)
# The browser loads nothing from other hosts, not even an image in an answer.
PAGE_CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'"
)
# The second turns off nginx's buffering of streams.
PAGE_HEADERS = {"Content-Security-Policy": PAGE_CSP, "X-Accel-Buffering": "no"}
# Seconds between updates of an answer: each costs CPU time that the model could use.
UPDATE_INTERVAL = 0.1
# Most sessions that gradio keeps, and most requests that it queues; the engine has limits of
# its own.
MAX_SESSIONS = 1024
FORMULAS = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False), ("$", "$", False))
# Code, a formula, or else the start of a tag. The bound on a formula's length keeps the search
# linear.
VERBATIM_OR_TAG = re.compile(
    r"(```.*?(?:```|\Z)|`[^`\n]+`|\$\$.{1,1000}?\$\$|\$[^$\n]+\$"
    r"|\\\(.{1,1000}?\\\)|\\\[.{1,1000}?\\\])|<(?=[a-z/!?])",
    re.DOTALL | re.IGNORECASE,
)


def escape_tags(text: str) -> str:
    """Escape HTML tags outside code and formulas, so that they are shown and not interpreted."""
    return VERBATIM_OR_TAG.sub(lambda m: m[1] or "&#60;", text)


def messages_from_gradio(history: list[dict[str, Any]]) -> list[Message]:
    """gradio's messages as ours, without questions that got no answer or an error."""
    turns = []
    for pair in pairwise(history):
        refused = (pair[1].get("metadata") or {}).get("title")
        if [m["role"] for m in pair] == ["user", "assistant"] and not refused:
            for m in pair:
                text = "".join(part.get("text", "") for part in m["content"])
                turns.append({"role": m["role"], "content": text.replace("&#60;", "<")})
    return turns


class ChatPage:
    """The page and its callbacks. gradio takes seconds to import, so it is imported here."""

    def __init__(self, model: Callable[[], ChatModel], metrics: Metrics):
        import gradio

        self.model, self.metrics, self.gradio = model, metrics, gradio
        english, chinese = (
            {name: words[i] for name, words in TRANSLATIONS.items()} for i in range(2)
        )
        self.words = gradio.I18n(en=english, **dict.fromkeys(("zh-CN", "zh-TW"), chinese))

    async def answer(self, *asked: Any) -> AsyncGenerator[Any]:
        """Yield the answer so far, again and again, or the error."""
        call = RequestInfo(uuid.uuid4().hex, "/chat")
        try:
            model = self.model()
            body = self._request(model, *asked)
            self.metrics.record_prompt(call, body)
            prompt = await asyncio.to_thread(body.prepare, model)
            if prompt.dropped_turns:
                self.gradio.Info(DROPPED_MESSAGE, title="")
            said, due = "", 0.0
            async with aclosing(model.answer(prompt, label=call)) as deltas:
                async for delta in deltas:
                    said += delta.text
                    if delta.finish_reason or (delta.text and time.monotonic() >= due):
                        due = time.monotonic() + UPDATE_INTERVAL
                        yield escape_tags(said)
            return
        except ChatError as error:
            refusal = error
        except Exception:
            log.exception("the chat page failed")
            refusal = ChatError("the server failed; its log says why")
        self.metrics.record_error(call, refusal)
        yield {"role": "assistant", "content": "", "metadata": {"title": f"⚠️ {refusal}"}}

    def _request(
        self, model: ChatModel, text: str, history: Any, system: str, *values: Any
    ) -> ChatRequest:
        knobs = zip(PAGE_PARAMETERS, values, strict=True)
        # An unchanged default is not sent: only a length that was set must fit as it is.
        given = {knob: x for knob, x in knobs if x not in (None, getattr(model.defaults, knob))}
        texts = {"prompt": text, "history": messages_from_gradio(history), "system": system or None}
        try:
            return ChatRequest.model_validate({**texts, **given, "truncate": True})
        except ValidationError as error:
            raise validation_error(error) from error

    def fill(self) -> list[Any]:
        """Once the model is loaded, stop the timer and show its name and defaults."""
        try:
            model = self.model()
        except ChatError:
            return [self.gradio.skip()] * (2 + len(PAGE_PARAMETERS))
        name = self.gradio.Chatbot(label=f"chat-api · {model.name}")
        values = [getattr(model.defaults, knob) for knob in PAGE_PARAMETERS]
        return [self.gradio.Timer(active=False), name, *values]

    def resume(self, saved: list[Any]) -> tuple[Any, ...]:
        """Open the browser's newest conversation: its index and, twice, its messages."""
        return (0, saved[0], saved[0]) if saved else (None, [], [])

    def check(self, text: str) -> Any:
        """Refuse a blank or malformed message."""
        try:
            reject_lone_surrogates(text)
        except ValueError as error:
            return self.gradio.validate(False, f"a message {error}")
        return self.gradio.validate(bool(text.strip()), "")

    def build(self) -> Any:
        gr, words = self.gradio, self.words
        page = gr.ChatInterface(
            self.answer,
            chatbot=gr.Chatbot(
                label="chat-api",
                scale=1,
                buttons=["copy", "copy_all"],
                latex_delimiters=[{"left": a, "right": b, "display": c} for a, b, c in FORMULAS],
            ),
            textbox=gr.Textbox(
                label=words("ask"), placeholder=words("ask"), submit_btn=True, stop_btn=True
            ),
            additional_inputs=[
                gr.Textbox(label=words("system")),
                *map(self._number_box, PAGE_PARAMETERS),
            ],
            additional_inputs_accordion=gr.Accordion(
                words("settings"), open=False, elem_id="settings"
            ),
            editable=True,
            save_history=True,
            validator=self.check,
            concurrency_limit=None,
            analytics_enabled=False,
            api_visibility="undocumented",
        )
        page.title, page.max_threads = "chat-api", MAX_SESSIONS
        page.state_session_capacity = MAX_SESSIONS
        page.new_chat_button.icon, page.new_chat_button.value = None, words("new")
        # The same at every start, so that saved conversations survive a restart.
        page.saved_conversations.storage_key = page.saved_conversations.secret = "chat-api"
        self._connect(page)
        return page.queue(max_size=MAX_SESSIONS)

    def _connect(self, page: Any) -> None:
        gr = self.gradio
        with page:
            timer = gr.Timer(2)
            quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
            filled = [timer, page.chatbot, *page.additional_inputs[1:]]
            gr.on([page.load, timer.tick], self.fill, None, filled, **quiet)
            resumed = [page.conversation_id, page.chatbot, page.chatbot_state]
            page.load(self.resume, page.saved_conversations, resumed, **quiet)
            # gradio clears the placeholder with the first message.
            page.saved_conversations.change(
                lambda: gr.update(placeholder=self.words("ask")), None, page.textbox, **quiet
            )

    def _number_box(self, knob: str) -> Any:
        whole = knob in ("max_new_tokens", "top_k", "seed")
        return self.gradio.Number(
            label=self.words(knob),
            placeholder=self.words("default"),
            precision=0 if whole else None,
            step=1 if whole else 0.05,
        )


def path_of(scope: Scope) -> str:
    """The path without the root_path that a proxy adds."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"


def with_headers(send: Send, headers: dict[str, str]) -> Send:
    """Wrap `send` so that every response has these headers."""

    async def named(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return named


class ChatPageMiddleware:
    """Closes the gradio routes that the page does not need, and sets its headers."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not PAGE_ROUTES.fullmatch(path_of(scope)):
            raise HTTPException(404)
        # gradio would allow any origin to read its responses.
        del MutableHeaders(scope=scope)["origin"]
        await self.app(scope, receive, with_headers(send, PAGE_HEADERS))


def is_valid_key(given: bytes, keys: tuple[str, ...]) -> bool:
    """Compare with every key in constant time."""
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    return any(matches)


def mount_chat_page(
    app: FastAPI, model: Callable[[], ChatModel], metrics: Metrics, keys: tuple[str, ...]
) -> bool:
    """Mount the page, with a login if there are keys; False if gradio is not installed."""
    try:
        page = ChatPage(model, metrics)
    except ImportError as missing:
        log.warning("there is no chat page: %s", missing)
        return False

    def known(_: str, given: str) -> bool:
        return is_valid_key(given.encode(), keys)

    page.gradio.mount_gradio_app(
        app,
        page.build(),
        "/chat",
        auth=known if keys else None,
        auth_message=LOGIN_MESSAGE,
        i18n=page.words,
        theme=page.gradio.themes.Default(
            primary_hue="blue", neutral_hue="slate", font="system-ui", font_mono="monospace"
        ),
        css=PAGE_CSS,
        footer_links=[],
        show_error=False,
        **dict.fromkeys(("run_history", "ssr_mode", "mcp_server", "pwa"), False),
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = ChatPageMiddleware(mount.app)
    return True


# ---- Routes -----------------------------------------------------------------
# Starlette cancels a stream when its client disconnects. A response that is
# still being computed is cancelled by `while_connected`.

MAX_BODY = 8 * 2**20
BODY_TIMEOUT = 120.0
# Routes that are labels in the metrics; all others are "other".
ROUTES = ("/", "/v1/chat/completions", "/v1/completions")


def error_body(error: ChatError, openai: bool = False) -> dict[str, Any]:
    """The body of an error, in our shape or in OpenAI's."""
    param = "max_tokens" if openai and error.param == "max_length" else error.param
    detail = {"message": str(error), "type": error.type, "param": param, "code": error.code}
    ours = {"status": error.status, "time": local_time()}
    return {"error": detail} | ({} if openai else ours)


def http_error(error: HTTPException, path: str) -> ChatError:
    """Turn an error of Starlette's or FastAPI's into ours."""
    if isinstance(error.__cause__, ChatError):
        return error.__cause__
    if isinstance(error.__cause__, UnicodeDecodeError):
        return BadRequest(
            "the body is not UTF-8; save the script as UTF-8, and in PowerShell send"
            " [Text.Encoding]::UTF8.GetBytes($body)"
        )
    if isinstance(error.__cause__, RecursionError):
        return BadRequest("the body is nested too deeply")
    if isinstance(error.__cause__, ValueError):
        return BadRequest("the body contains a number with too many digits")
    known = {404: f"there is nothing at {path!r}", 405: f"{path!r} does not take this method"}
    refusal = BadRequest(known.get(error.status_code, str(error.detail)))
    refusal.status, refusal.headers = error.status_code, error.headers or {}
    refusal.code = {404: "not_found", 405: "method_not_allowed"}.get(refusal.status, refusal.code)
    return refusal


def request_info(scope: Scope) -> RequestInfo:
    """What RequestIDMiddleware stored."""
    return scope["state"]["call"]


class RequestIDMiddleware:
    """Gives every request an id, the client's X-Request-ID or a new one, and returns it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none, whatever a library may bring
            return await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, given = path_of(scope), Headers(scope=scope).get("x-request-id", "")
        # Nothing that could forge or flood log lines.
        call_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        call = RequestInfo(call_id, path if path in ROUTES else "other")
        scope.setdefault("state", {})["call"] = call
        await self.app(scope, receive, with_headers(send, {"X-Request-ID": call.id}))


class APIKeyMiddleware:
    """Requires an API key, except for /health and the chat page, which has its own login."""

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], page: bool, error_response: Callable[..., Any]
    ):
        self.app, self.keys, self.page, self.error_response = app, keys, page, error_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_exempt(scope) or self._has_key(scope):
            return await self.app(scope, receive, send)
        error = Unauthorized("send one of the server's keys as `Authorization: Bearer KEY`")
        await self.error_response(scope, error)(scope, receive, send)

    def _is_exempt(self, scope: Scope) -> bool:
        path = path_of(scope)
        at_page = f"{path}/".startswith("/chat/") or (
            path == "/" and scope["method"] in ("GET", "HEAD")
        )
        return path == "/health" or (self.page and at_page)

    def _has_key(self, scope: Scope) -> bool:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return is_valid_key(given.strip().encode("latin-1"), self.keys) and kind.lower() == "bearer"


class BodyMiddleware:
    """Treats every body as JSON, as many curl examples omit the content type; limits its size
    and time.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = MutableHeaders(scope=scope)
        # gradio's own requests have the right content type.
        if not path_of(scope).startswith("/chat/"):
            headers["content-type"] = "application/json"
        size, declared = 0, int(headers.get("content-length", 0))
        deadline: float | None = asyncio.get_running_loop().time() + BODY_TIMEOUT

        async def limited_receive() -> MutableMapping[str, Any]:
            nonlocal size, deadline
            too_large = BodyTooLarge(f"the body is larger than {MAX_BODY // 2**20} MiB; send less")
            if declared > MAX_BODY:
                raise too_large
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(
                    f"the body took more than {BODY_TIMEOUT:.0f} seconds; send it at once"
                ) from None
            if not message.get("more_body"):
                deadline = None
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise too_large
            return message

        await self.app(scope, limited_receive, send)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect if the client disconnects first."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


class JSONText(JSONResponse):
    """JSON with its charset, without which Windows PowerShell assumes Latin-1."""

    media_type = "application/json; charset=utf-8"


class EventStream(StreamingResponse):
    """Server-sent events; the generator is closed as soon as the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]):
        self.events = events
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            await super().__call__(scope, receive, send)


def format_event(event: dict[str, Any] | None) -> str:
    """Format an event. ASCII, because some clients split lines at U+2028 and U+0085."""
    return ": keep-alive\n\n" if event is None else f"data: {json.dumps(event)}\n\n"


async def event_stream(
    request: Request, events: Events, error_payload: Callable[[ChatError], dict[str, Any]]
) -> EventStream:
    """Stream events; an error before the first event keeps its HTTP status."""
    first = await while_connected(request, anext(events))

    async def body() -> AsyncGenerator[str]:
        async with aclosing(events):
            yield format_event(first)
            try:
                async for event in events:
                    yield format_event(event)
            except ChatError as error:
                yield format_event(error_payload(error))
            except Exception:
                log.exception("a stream failed")
                yield format_event(error_payload(ChatError("the server failed; its log says why")))
            else:
                yield "data: [DONE]\n\n"

    return EventStream(body())


LOOPBACK = ("127.0.0.1", "::1", "localhost")


def local_address(host: str) -> str:
    """Where this machine itself reaches a server that listens on `host`, as URLs write it."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class Serving:
    """The model behind the routes, from loading to draining."""

    def __init__(self, settings: Settings, load: Callable[[Settings], ChatModel]):
        self.settings, self.load = settings, load
        self.metrics = Metrics(
            lambda: self._model.engine if self._model else None, settings.log_prompts
        )
        self._model: ChatModel | None = None
        self._drain_deadline = inf

    @property
    def health(self) -> dict[str, Any]:
        engine = self._model and self._model.engine
        status = "loading" if not engine else "dead" if engine.failure else "ready"
        status = "draining" if self.draining else status
        running, waiting = (len(engine.running), engine.num_waiting) if engine else (0, 0)
        return {"status": status, "running": running, "waiting": waiting}

    def model(self, name: str | None = None) -> ChatModel:
        """The loaded model. Raises NotServing, or ModelNotFound if it has another name."""
        if self.draining:
            seconds = 1 + max(0, int(self._drain_deadline - time.monotonic()))
            raise NotServing("the server is stopping; try again after its restart", None, seconds)
        if self._model is None:
            raise NotServing("the model is still loading; try again soon", retry_after=5)
        if name not in (None, self._model.name):
            message = f"there is no model {name!r} here; this server has {self._model.name!r}"
            raise ModelNotFound(message, "model")
        return self._model

    async def answer(
        self,
        request: Request,
        body: SamplingFields,
        reply_of: Callable[[ChatModel, Any, Prompt], Reply],
        name: str | None = None,
        n: int = 1,
    ) -> JSONText | EventStream:
        """Generate, and respond with a stream or a full response."""
        model = self.model(name)
        # Before tokenizing a request that would be refused.
        model.engine.check_queue()
        self.metrics.record_prompt(request_info(request.scope), body)
        prompt = await while_connected(request, asyncio.to_thread(body.prepare, model))
        reply = reply_of(model, body, prompt)
        choices = [Choice(index) for index in range(n)]
        deltas = model.answer(prompt, n, request_info(request.scope))
        if body.stream:
            events = events_of(deltas, choices, reply)
            return await event_stream(request, events, partial(self.error_payload, request.scope))
        await while_connected(request, collect(deltas, choices))
        # Decoding many tokens for logprobs can take seconds.
        return await asyncio.to_thread(lambda: JSONText(reply.full_response(choices)))

    def error_payload(self, scope: Scope, error: ChatError) -> dict[str, Any]:
        """Record an error, and return its body in the client's dialect."""
        self.metrics.record_error(request_info(scope), error)
        return error_body(error, openai=path_of(scope).startswith("/v1/"))

    def error_response(self, scope: Scope, error: ChatError) -> JSONText:
        # Unexpected errors are handled outside RequestIDMiddleware, so set its header here too.
        headers = {"X-Request-ID": request_info(scope).id, **error.headers}
        if error.retry_after:
            headers["Retry-After"] = str(error.retry_after)
        return JSONText(self.error_payload(scope, error), error.status, headers)

    @property
    def draining(self) -> bool:
        return self._drain_deadline < inf

    def start_draining(self) -> None:
        """Refuse new requests, and give running ones until the deadline."""
        self._drain_deadline = time.monotonic() + self.settings.drain_timeout
        log.info("stopping when running requests are finished; signal again to stop at once")

    def drained(self, busy: bool) -> bool:
        """Whether to stop now: no request is running, or the deadline has passed."""
        return self.draining and (not busy or time.monotonic() >= self._drain_deadline)

    async def close(self) -> None:
        """Close the engine; requests that are still generating get an error."""
        if self._model:
            await asyncio.to_thread(self._model.engine.close)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        # A daemon, so that Ctrl-C need not wait for the weights.
        threading.Thread(target=self._load, name="loader", daemon=True).start()
        yield
        await self.close()

    def _load(self) -> None:
        try:
            model = self.load(self.settings)
        except BaseException as error:
            if not isinstance(error, StartError):
                log.exception("the model could not be loaded")
                error = StartError(f"the model could not be loaded: {error}")
            # No request can be running yet, and none can be served.
            sys.stderr.write(f"api.py: {error}.\n")
            os._exit(1)
        model.engine.on_end = self.metrics.record_finished
        self._model = model
        self._greet(model)

    def _greet(self, model: ChatModel) -> None:
        """Log what is served, where, and how to reach it from elsewhere."""
        port, here = self.settings.port, local_address(self.settings.host)
        url = f"http://{here}:{port}"
        lines = model.facts | {
            "calls": f"{url} (prompt and history), {url}/v1 (OpenAI's), {url}/docs",
            **({"chat page": f"{url}/chat"} if self.settings.chat_page else {}),
            "from a laptop": f"ssh -CNg -L {port}:{here}:{port} -p PORT USER@THIS-MACHINE",
        }
        for name, fact in lines.items():
            log.info("%s: %s", name, fact)
        if self.settings.host not in LOOPBACK and not self.settings.keys:
            log.warning(
                "anyone who reaches port %d can use this server; set a key with CHAT_API_KEY or"
                " --api-key, or listen with --host 127.0.0.1",
                port,
            )
        log.info("ready")


def add_error_handlers(app: FastAPI, serving: Serving) -> None:
    """Turn every exception into a ChatError and its response."""

    async def handle(request: Request, error: Exception) -> Response:
        # FastAPI wraps exceptions that are raised while it reads the body.
        if isinstance(error, ClientDisconnect) or isinstance(error.__cause__, ClientDisconnect):
            return Response(status_code=499)
        if isinstance(error, RequestValidationError):
            error = validation_error(error)
        elif isinstance(error, HTTPException):
            error = http_error(error, request.url.path)
        elif not isinstance(error, ChatError):
            error = ChatError("the server failed; its log says why")
        return serving.error_response(request.scope, error)

    for kind in (ChatError, ClientDisconnect, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)


def build_app(
    settings: Settings | None = None, load: Callable[[Settings], ChatModel] = load_chat_model
) -> FastAPI:
    """The application; its model loads in a thread once it is started."""
    if settings is None:
        settings = read_settings([])
        start_log(settings.log_json)
    serving = Serving(settings, load)
    # FastAPI whose /docs loads nothing from other hosts, which a rented machine may not reach.
    app = FastAPIOffline(redoc_url=None, title="chat-api", lifespan=serving.lifespan)
    app.state.serving = serving
    app.add_middleware(BodyMiddleware)
    if settings.keys:
        app.add_middleware(
            APIKeyMiddleware,
            keys=settings.keys,
            page=settings.chat_page,
            error_response=serving.error_response,
        )
    app.add_middleware(RequestIDMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=split_list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    add_error_handlers(app, serving)
    has_page = settings.chat_page and mount_chat_page(
        app, serving.model, serving.metrics, settings.keys
    )

    # HEAD is for monitors, and not for the docs.
    @app.head("/", include_in_schema=False)
    @app.get("/", status_code=307, response_class=RedirectResponse)
    async def front() -> Response:
        return RedirectResponse("chat/" if has_page else "docs")

    down: Any = {503: {"model": State, "description": "Loading, draining or dead"}}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=State, responses=down)
    async def health() -> JSONText:
        state = serving.health
        return JSONText(state, 200 if state["status"] == "ready" else 503)

    @app.get(
        "/metrics", response_class=Response, responses=extra_responses(ErrorBody, "text/plain")
    )
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(serving.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    events = "text/event-stream"

    @app.post("/", response_model=ChatResponse, responses=extra_responses(ErrorBody, events))
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await serving.answer(request, body, ClassicReply)

    @app.get("/v1/models", responses=extra_responses(OpenAIError))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(serving.model())]}

    @app.get("/v1/models/{name:path}", responses=extra_responses(OpenAIError))
    async def model(name: str) -> dict[str, Any]:
        return model_card(serving.model(name))

    openai: Any = {"response_model": Completion, "responses": extra_responses(OpenAIError, events)}

    @app.post("/v1/chat/completions", **openai)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Any:
        return await serving.answer(request, body, ChatCompletionReply, body.model, body.n or 1)

    @app.post("/v1/completions", **openai)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        return await serving.answer(request, body, CompletionReply, body.model, body.n or 1)

    return app


def model_card(model: ChatModel) -> dict[str, Any]:
    """The model as OpenAI lists it, with vLLM's max_model_len."""
    card = {"id": model.name, "object": "model", "created": model.loaded, "owned_by": "chat-api"}
    return card | {"max_model_len": model.context_length}


# ---- Main -------------------------------------------------------------------

# Limits on what precedes the body.
MAX_HEADER_BYTES = 64 * 2**10
HEADER_TIMEOUT = 30.0
# Longer than the 60 seconds for which load balancers commonly reuse idle connections.
KEEP_ALIVE = 75


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits on the size and time of headers.

    It also ignores `Upgrade: h2c`, which Java's client sends with each request and at which the
    parser would stop reading the body.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.header_bytes: float = 0
        self.header_timer = self.loop.call_later(HEADER_TIMEOUT, transport.close)

    def _restart_timer(self, seconds: float) -> None:
        self.header_timer.cancel()
        self.header_timer = self.loop.call_later(seconds, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if not self.header_bytes:  # the first bytes of a request
            head, blank, rest = data.partition(b"\r\n\r\n")
            # A name of the same length, so that the byte counts stay right.
            data = re.sub(rb"(?i)(?<=\r\n)upgrade(?=: *h2c)", b"ignored", head) + blank + rest
        self.header_bytes += len(data)
        super().data_received(data)
        # Checked after parsing, when it is known how much was body.
        if self.header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        self._restart_timer(HEADER_TIMEOUT)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.header_timer.cancel()
        self.header_bytes = -inf  # the body has a limit of its own
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.header_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # uvicorn's own timer is cancelled by any byte, even one that begins no request.
        super().on_response_complete()
        if self.timeout_keep_alive_task:  # no other request is pending
            self._restart_timer(KEEP_ALIVE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.header_timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """On the first signal it finishes the running requests, on the second it exits."""

    def __init__(self, config: uvicorn.Config, serving: Serving):
        super().__init__(config)
        self.serving = serving

    def handle_exit(self, sig: int, frame: Any) -> None:
        # uvicorn's own handler would close the socket at once, and re-raise the signal at exit.
        if self.serving.draining:
            os._exit(128 + sig)
        self.serving.start_draining()

    async def on_tick(self, counter: int) -> bool:
        if self.serving.drained(busy=bool(self.server_state.tasks)):
            await self.serving.close()
            self.should_exit = True
        return await super().on_tick(counter)


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind the socket before the model is loaded; exits with one sentence if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        sys.exit(
            f"api.py: cannot listen on {host!r}, port {port}: {why};"
            " choose another --port or --host, or stop the program that uses it."
        )


def main() -> None:
    """Serve until told to stop."""
    settings = read_settings(sys.argv[1:])
    start_log(settings.log_json)
    if settings.check:
        try:
            sys.stdout.write(check_model(load_chat_model(settings)))
        except StartError as error:
            sys.exit(f"api.py: {error}.")
        return
    sockets = [bind_socket(settings.host, settings.port)]
    app = build_app(settings)
    here = f"{local_address(settings.host)}:{settings.port}"
    log.info("loading; http://%s/health tells when it is done", here)
    config = uvicorn.Config(
        app,
        root_path=settings.root_path,
        log_config=None,  # uvicorn logs through the root logger
        log_level="warning",
        http=Connection,
        timeout_keep_alive=KEEP_ALIVE,
        # Requests have been drained by then; this is for connections that stay open.
        timeout_graceful_shutdown=5,
    )
    Server(config, app.state.serving).run(sockets)
    logging.shutdown()
    # A loading model cannot be interrupted, and torch would abort at interpreter exit.
    os._exit(0)


if __name__ == "__main__":
    main()
