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
import re
import threading
import time
from bisect import bisect_left
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    MutableMapping,
)
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

try:
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
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
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream
    from transformers import (
        AutoModelForCausalLM,
        DynamicCache,
        GenerationConfig,
        LogitsProcessorList,
        MinPLogitsWarper,
        PreTrainedTokenizerFast,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
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


class StepFailed(ChatError):
    """The model failed while it computed this request."""

    code = "step_failed"


class StartError(Exception):
    """The server cannot start; the message is one sentence with the remedy."""


# ---- Settings ---------------------------------------------------------------
# One field is one flag (`--device-map`) and one variable (`CHAT_DEVICE_MAP`).


class Settings(BaseSettings):
    """Serve a chat model over HTTP."""

    model_config = SettingsConfigDict(
        env_prefix="CHAT_",
        env_ignore_empty=True,
        frozen=True,
        cli_prog_name="api.py",
        cli_kebab_case=True,
        cli_avoid_json=True,
    )

    model: str = Field("demo", description="a name under models/, or a folder with a checkpoint")
    host: str = Field("0.0.0.0", description="the address to listen on")
    port: int = Field(6006, ge=1, le=65535, description="the port to listen on")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="the type of the weights; auto is what the checkpoint was saved in"
    )
    device_map: str = Field("auto", description="auto, or a device such as cpu or cuda:0")


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


def checkpoint_defaults(config: GenerationConfig) -> Sampling:
    """What a checkpoint's generation_config.json sets, over our defaults for the rest."""
    names = [knob.name for knob in fields(Sampling)]
    found = {name: getattr(config, name, None) for name in names}
    if config.do_sample is False:
        found["temperature"] = 0.0
    return Sampling().override({name: x for name, x in found.items() if x is not None})


# ---- Text -------------------------------------------------------------------
# Messages become token ids by the checkpoint's chat template, ids become text
# again as they come. Nothing that a user writes can turn into a special token.

Message = dict[str, str]

# Two code points that Unicode keeps for a program's own use: around a number,
# they stand in a message for the special token that the user spelled out.
SHIELD, SHIELD_END = "\ufdd0", "\ufdd1"


class ChatTokenizer:
    """Turns messages into token ids, as the checkpoint's own chat template says.

    Raises BadRequest where the template refuses the messages. Many threads may call it: the
    tokenizers inside are never changed, which transformers' own wrapper does when it encodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        if tokenizer.chat_template is None:
            raise StartError("the checkpoint has no chat template; choose a chat model")
        self.tokenizer = tokenizer
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # The same, but blind to special tokens: it encodes them as the text they are.
        self.plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.plain.encode_special_tokens = True
        added = tokenizer.added_tokens_decoder.items()
        self.special = {token.content: i for i, token in added if token.special}
        self.words = [SHIELD, SHIELD_END, *self.special]
        self._word = re.compile("|".join(map(re.escape, sorted(self.words, key=len, reverse=True))))

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt's token ids, up to where the assistant is to speak."""
        shielded = [m | {"content": self._shield(m["content"])} for m in messages]
        text = self._render(shielded, add_generation_prompt=True)
        if SHIELD not in text:
            return self.backend.encode(text, add_special_tokens=False).ids
        return [i for run in self._runs(text) for i in self._encode_run(run)]

    def end_ids(self, config: GenerationConfig) -> set[int]:
        """Every id that ends an answer: the checkpoint's own, and the template's end of turn."""
        listed = config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SHIELD}]
        after = self._render(turn).partition(SHIELD)[2].lstrip()
        if first := self._word.match(after):
            ends.add(self.special.get(first[0]))
        return ends - {None}

    def _render(self, messages: list[Message], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # jinja's errors, and whatever a template raises
            raise BadRequest(f"the model's chat template refuses these turns: {error}") from error

    def _shield(self, content: str) -> str:
        return self._word.sub(lambda m: f"{SHIELD}{self.words.index(m[0])}{SHIELD_END}", content)

    def _runs(self, text: str) -> list[str]:
        """The text cut at the template's own special tokens, which are runs of their own."""
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        return [run for run in re.split(f"({names})", text) if run]

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
        self._held += self._stream.step(self.tokenizer, token) or ""
        starts = [at for at in map(self._held.find, self.stop) if at >= 0]
        if starts:
            self.stopped = True
            self._held = self._held[: min(starts)]
            return self.flush()
        return self._release(len(self._held) - self._doubtful())

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


# ---- Engine -----------------------------------------------------------------
# One thread owns the model. A request is a Sequence; the thread admits it,
# steps it token by token and retires it, and its text goes to its own queue.

FinishReason = Literal["stop", "length"]

# After so many seconds without text a stream yields an empty Delta, as a sign of life.
HEARTBEAT = 15.0


@dataclass(frozen=True)
class Usage:
    """How many tokens went in and came out; an end token counts, as it was computed."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        return asdict(self) | {"total_tokens": self.prompt_tokens + self.completion_tokens}


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the last one says why it ended and what it cost."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(eq=False)
class Sequence:
    """One request inside the engine: its tokens, its state, and where its text goes."""

    prompt: list[int]
    sampling: Sampling
    detokenizer: Detokenizer
    loop: asyncio.AbstractEventLoop
    outbox: "asyncio.Queue[Delta | ChatError]" = field(default_factory=asyncio.Queue)
    completion: list[int] = field(default_factory=list)
    done: bool = False
    arrived: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    # What only the runner looks at.
    cache: Any = None
    generator: torch.Generator | None = None

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.completion))

    def append(self, token: int, end_ids: set[int]) -> Delta:
        """Take the next token; return what it adds to the answer."""
        self.first_token = self.first_token or time.monotonic()
        self.completion.append(token)
        text = "" if token in end_ids else self.detokenizer.push(token)
        if token in end_ids or self.detokenizer.stopped:
            return self._finish(text, "stop")
        if len(self.completion) == self.sampling.max_new_tokens:
            return self._finish(text, "length")
        return Delta(text)

    def _finish(self, text: str, reason: FinishReason) -> Delta:
        self.done = True
        return Delta(text + self.detokenizer.flush(), reason, self.usage)


class Runner:
    """Computes the next token of a sequence with the model, and nothing else."""

    def __init__(self, model: Any):
        self.model = model
        self.device = model.get_input_embeddings().weight.device

    @torch.inference_mode()
    def next_token(self, seq: Sequence) -> int:
        fresh = seq.cache is None
        if fresh:
            seq.cache = DynamicCache(config=self.model.config)
            seq.generator = torch.Generator()
            if seq.sampling.seed is not None:
                seq.generator.manual_seed(seq.sampling.seed)
            else:
                seq.generator.seed()
        ids = torch.tensor([seq.prompt if fresh else seq.completion[-1:]], device=self.device)
        out = self.model(input_ids=ids, past_key_values=seq.cache, use_cache=True, logits_to_keep=1)
        return self._pick(seq, out.logits[:, -1].float().cpu())

    def _pick(self, seq: Sequence, logits: torch.Tensor) -> int:
        """Choose from logits of shape [1, vocabulary]."""
        how = seq.sampling
        chain = LogitsProcessorList()
        if how.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
        if how.temperature > 0:
            chain.append(TemperatureLogitsWarper(how.temperature))
            if how.top_k > 0:
                chain.append(TopKLogitsWarper(how.top_k))
            chain.append(TopPLogitsWarper(how.top_p))
            chain.append(MinPLogitsWarper(how.min_p))
        scores = chain(torch.tensor([seq.prompt + seq.completion]), logits)
        if how.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=seq.generator))


class Engine:
    """Generates for every request; `stream` is how to ask."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, end_ids: set[int]):
        self.runner, self.tokenizer, self.end_ids = runner, tokenizer, end_ids
        self.running: list[Sequence] = []
        self.waiting: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What the routes call, on the event loop.

    async def stream(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Delta]:
        """Yield an answer piece by piece; leaving the loop early cancels it.

        Raises NotServing if the engine is dead, StepFailed if the model fails.
        """
        if self.failure:
            raise self._dead()
        detokenizer = Detokenizer(self.tokenizer, sampling.stop)
        seq = Sequence(prompt, sampling, detokenizer, asyncio.get_running_loop())
        self.waiting.put(seq)
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

    def close(self) -> None:
        """End the thread once its present step is done."""
        self.waiting.put(None)
        self._thread.join()

    # What the thread does.

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
                self._retire()
        except BaseException as failure:
            log.exception("the engine died")
            self.failure = failure
            while not self.waiting.empty():
                if seq := self.waiting.get():
                    self.running.append(seq)
            self._deliver([(seq, self._dead()) for seq in self.running])

    def _admit(self) -> bool:
        """Take in all that wait, and wait for one where nothing runs; False at the end."""
        while not self.running or not self.waiting.empty():
            seq = self.waiting.get()
            if seq is None:
                return False
            self.running.append(seq)
        return True

    def _step(self) -> None:
        for seq in self.running:
            if seq.done:
                continue
            try:
                item: Delta | ChatError = seq.append(self.runner.next_token(seq), self.end_ids)
            except Exception:
                log.exception("a step failed")
                seq.done = True
                item = StepFailed("the model failed while it computed this answer; try again")
            if not isinstance(item, Delta) or item.text or item.finish_reason:
                self._deliver([(seq, item)])

    def _retire(self) -> None:
        self.running = [seq for seq in self.running if not seq.done]

    def _deliver(self, items: list[tuple[Sequence, Delta | ChatError]]) -> None:
        for seq, item in items:
            if not seq.loop.is_closed():
                seq.loop.call_soon_threadsafe(seq.outbox.put_nowait, item)

    def _dead(self) -> NotServing:
        return NotServing(f"the engine died ({self.failure!r}); restart the server")


@dataclass(frozen=True)
class Prompt:
    """A request that is ready to be generated."""

    ids: list[int]
    sampling: Sampling
    dropped_turns: int = 0


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, ready to answer: text above, engine below."""

    name: str
    tokenizer: ChatTokenizer
    engine: Engine
    defaults: Sampling
    context_length: int

    def prepare(self, messages: list[Message], given: dict[str, Any], truncate: bool) -> Prompt:
        """Tokenize and check the lengths; takes a while, so not on the event loop.

        Raises ContextTooLong if prompt and answer do not fit together. A length that
        was not asked for is cut to the room instead.
        """
        sampling = self.defaults.override(given)
        dropped = self._turns_to_drop(messages, sampling.max_new_tokens) if truncate else 0
        ids = self.tokenizer.encode(without_turns(messages, dropped))
        room = self.context_length - len(ids)
        wanted = given.get("max_new_tokens", 1)
        if room < wanted:
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens and the answer may have {wanted}, but the"
                f" model's context holds {self.context_length}; shorten the prompt or the history,"
                ' ask for a shorter answer, or send "truncate": true',
                param="prompt" if room < 1 else "max_length",
            )
        sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        return Prompt(ids, sampling, dropped)

    def _turns_to_drop(self, messages: list[Message], answer: int) -> int:
        """The fewest of the oldest turns to leave out, so that the answer has its room."""

        def fits(dropped: int) -> bool:
            ids = self.tokenizer.encode(without_turns(messages, dropped))
            return len(ids) + answer <= self.context_length

        turns = sum(m["role"] == "user" for m in messages) - 1
        return bisect_left(range(turns), True, key=fits)


def without_turns(messages: list[Message], count: int) -> list[Message]:
    """The messages without the oldest `count` turns; what comes before the first turn stays."""
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return messages[: starts[0]] + messages[starts[count] :]


# ---- Loading ----------------------------------------------------------------
# From a name to a model that answers. Nothing that a checkpoint brings is run.

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


def load_model(folder: Path, dtype: str = "auto", device_map: str = "auto") -> Any:
    """The checkpoint's model, a plain transformers one, placed and ready for inference."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map,
        attn_implementation="sdpa",
        trust_remote_code=False,
        local_files_only=True,
    ).eval()


def load_chat_model(settings: Settings) -> ChatModel:
    """Everything between a name and an answer; takes from seconds to minutes.

    Raises StartError with the remedy.
    """
    check_versions()
    check_cards(settings.device_map)
    folder = find_model(settings.model)
    tokenizer = ChatTokenizer(PreTrainedTokenizerFast.from_pretrained(folder))
    model = load_model(folder, settings.dtype, settings.device_map)
    runner = Runner(model)
    log.info("%s: %s in %s on %s", folder.name, type(model).__name__, model.dtype, runner.device)
    ends = tokenizer.end_ids(model.generation_config)
    return ChatModel(
        name=folder.name,
        tokenizer=tokenizer,
        engine=Engine(runner, tokenizer.plain, ends),
        defaults=checkpoint_defaults(model.generation_config),
        context_length=model.config.max_position_embeddings,
    )


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


StopTexts = Annotated[
    tuple[Annotated[WireText, Field(min_length=1, max_length=256)], ...],
    Field(max_length=16),
    BeforeValidator(
        lambda stop: (
            (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
        ),
        json_schema_input_type=str | list[str],
    ),
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
    top_k: int | None = Field(None, ge=0, description="0 is off")
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


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def error_body(error: ChatError) -> dict[str, Any]:
    detail = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    return {"error": detail, "status": error.status, "time": now()}


def error_response(error: ChatError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(error_body(error), error.status, headers)


def from_validation(error: RequestValidationError) -> BadRequest:
    """Say in one sentence what pydantic found first."""
    first = error.errors()[0]
    # The location without "body" and without the tags of a union's branches.
    path = [part for part in first["loc"][1:] if part not in ("pairs", "messages")]
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {first['ctx']['error']}, near {path[0]}")
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
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY or (declared.isdecimal() and int(declared) > MAX_BODY):
                raise HTTPException(413)  # the one kind that FastAPI lets through
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
        running, waiting = (len(engine.running), engine.waiting.qsize()) if engine else (0, 0)
        return {"status": status, "running": running, "waiting": waiting}

    def model(self) -> ChatModel:
        if self._model is None:
            raise NotServing("the model is still loading; try again soon", retry_after=5)
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
        log.info("ready")


def build_app(
    settings: Settings | None = None, load: Callable[[Settings], ChatModel] = load_chat_model
) -> FastAPI:
    """The application; its model loads in a thread once it is started."""
    settings = settings or read_settings([])
    serving = Serving(partial(load, settings))
    app = FastAPI(title="chat-api", lifespan=serving.lifespan)
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
                "time": now(),
                "finish_reason": last.finish_reason,
                "usage": last.usage and last.usage.body(),
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

        deltas = model.engine.stream(prompt.ids, prompt.sampling)
        if body.stream:
            return await event_stream(request, events())
        return JSONResponse(answer(*await while_connected(request, collect(deltas))))

    return app


# ---- Main -------------------------------------------------------------------


def main() -> None:
    """Serve until told to stop."""
    settings = read_settings(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
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
