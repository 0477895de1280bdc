"""A chat model behind HTTP.

    python api.py                          the small demo model, on port 6006
    python api.py --model ./my-model       any causal LM that transformers knows
    uvicorn --factory api:build_app        the same app, with settings from CHAT_... variables

    POST /                         prompt, history and sampling fields in; response, history,
                                   status and time out
    POST /v1/chat/completions      the same model in OpenAI's dialect; /v1/completions and
                                   /v1/models beside it
    POST /v1/responses             OpenAI's newer dialect, and its input_tokens
    POST /v1/messages              the same in Anthropic's dialect, and its count_tokens
    POST /tokenize, /detokenize    token ids of a text or messages, and back
    GET  /chat                     a chat page; a browser that asks for / is sent there
    GET  /health                   what it is doing: loading, ready, draining or dead
    GET  /metrics                  numbers for Prometheus
    GET  /docs                     the fields of every call

Read it from top to bottom: each section uses only what stands above it. Errors and settings come
first, then the docs, the metrics, the routes, and the start. What requests and responses look
like, how an answer is formatted, what a socket may bring, and what would block the event loop are
rooms of serving/; the model and its batch are in engine/. docs/how-it-works.md follows one POST /
through all of them.
"""

import sys

# Checked first: on an older Python the imports below fail with an unclear error.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("api.py: Python 3.11 or newer is needed; choose a newer image, or use conda.")

import signal

# Until the server takes the signal itself: one line, and no traceback out of some import.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\napi.py: stopped."))

import asyncio
import hmac
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    MutableMapping,
)
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

try:
    import prometheus_client
    import psutil
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
    from fastapi_offline import FastAPIOffline
    from pydantic import BaseModel, ValidationError
    from pydantic.json_schema import models_json_schema
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import Match
    from starlette.types import ASGIApp, Receive, Scope, Send

    import chat_page
    import engine
    from engine import (
        ChatModel,
        ContextTooLong,
        EngineError,
        EngineStopped,
        InvalidInput,
        ProcessUnavailable,
        QueueFull,
        StartError,
        StepFailed,
        TemplateTooCostly,
        TimedOut,
    )
    from hubs import DownloadError
    from model_download import find_base, find_model, is_adapter, name_of
    from serving import __version__
    from serving.body_limits import BodyBudget, BodyReservation, check_items
    from serving.chat import ChatCompletionReply, ChatCompletionRequest
    from serving.classic import ChatRequest, ChatResponse, ClassicReply
    from serving.completions import CompletionReply, CompletionRequest
    from serving.connection import Connection
    from serving.connection_limits import num_connectable
    from serving.counters import EngineCounters
    from serving.dialects import CLASSIC, OPENAI, Dialect, ErrorDetail
    from serving.kept import KeptAnswers, OwnAnswers
    from serving.live import LiveRequests
    from serving.log_queue import flush_log, num_dropped, start_log, still_logged
    from serving.messages import (
        CountTokensRequest,
        CountTokensResponse,
        MessagesRequest,
        MessagesResponse,
        ThreadUnsupported,
    )
    from serving.messages_reply import ANTHROPIC, MessagesReply
    from serving.openai_shared import Completion
    from serving.origins import foreign_origin, unknown_host
    from serving.parts import (
        Choice,
        Events,
        ReplyFactory,
        cached_tokens_of,
        choices_of,
        collect,
        events_of,
        usage_of,
    )
    from serving.request_model import BodyContext, InstantRequest, SamplingFields, validation_error
    from serving.responses import (
        InputTokensRequest,
        InputTokensResponse,
        ItemNotFound,
        ResponseNotFound,
        ResponsesRequest,
        ResponsesResponse,
    )
    from serving.responses_reply import RESPONSES, ResponsesReply
    from serving.settings import Settings, read_settings
    from serving.standard_streams import open_closed_streams
    from serving.tokens import (
        DetokenizeRequest,
        DetokenizeResponse,
        TokenizeRequest,
        TokenizeResponse,
    )
    from serving.unknown_fields import IgnoredFields, printable
    from serving.workers import Workers
except ImportError as missing:
    sys.exit(f"api.py cannot start ({missing}); run `pip install -r requirements.txt`.")


log = logging.getLogger("chat")

T = TypeVar("T")
BodyT = TypeVar("BodyT", bound=BaseModel)

# ---- Errors -----------------------------------------------------------------
# What the engine and the routes raise becomes a response here, in one table.


class RequestError(Exception):
    """A request that never reached the engine; the message says how to mend it."""

    def __init__(self, message: str, argument: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.argument = argument
        self.retry_after = retry_after


class Forbidden(RequestError):
    """The request comes from a web page of another site, or may do so."""


class NotFound(RequestError):
    """There is nothing at this path."""


class MethodNotAllowed(RequestError):
    """The path does not take this method."""


class ModelNotFound(RequestError):
    """Another model is served than the one asked for."""


class BodyTooLarge(RequestError):
    """The body is larger than MAX_BODY."""


class BodyTooSlow(RequestError):
    """The body took longer than BODY_TIMEOUT."""


class UnsupportedEncoding(RequestError):
    """The body is compressed."""


class Unauthorized(RequestError):
    """The request has no valid API key."""


class NotServing(RequestError):
    """The model is still loading, or the server is stopping."""


class ErrorKind(NamedTuple):
    """What a client is told of an error beside its message."""

    status: int
    type: str
    code: str
    headers: Mapping[str, str] = MappingProxyType({})


INVALID = "invalid_request_error"
SERVER_FAILED = ErrorKind(500, "server_error", "internal_error")
ERRORS: Mapping[type[Exception], ErrorKind] = {
    InvalidInput: ErrorKind(400, INVALID, "invalid_value"),
    ResponseNotFound: ErrorKind(400, INVALID, "previous_response_not_found"),
    ItemNotFound: ErrorKind(404, INVALID, "item_not_found"),
    ThreadUnsupported: ErrorKind(400, INVALID, "thread_unsupported_request"),
    ContextTooLong: ErrorKind(400, INVALID, "context_length_exceeded"),
    TemplateTooCostly: ErrorKind(400, INVALID, "invalid_value"),
    Unauthorized: ErrorKind(
        401, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
    ),
    Forbidden: ErrorKind(403, "permission_error", "forbidden"),
    NotFound: ErrorKind(404, INVALID, "not_found"),
    ModelNotFound: ErrorKind(404, INVALID, "model_not_found"),
    MethodNotAllowed: ErrorKind(405, INVALID, "method_not_allowed"),
    BodyTooSlow: ErrorKind(408, INVALID, "body_too_slow", {"Connection": "close"}),
    BodyTooLarge: ErrorKind(413, INVALID, "body_too_large"),
    UnsupportedEncoding: ErrorKind(415, INVALID, "unsupported_encoding"),
    QueueFull: ErrorKind(429, "rate_limit_error", "queue_full"),
    StepFailed: ErrorKind(500, "server_error", "step_failed"),
    NotServing: ErrorKind(503, "server_error", "not_serving"),
    EngineStopped: ErrorKind(503, "server_error", "not_serving"),
    ProcessUnavailable: ErrorKind(503, "server_error", "not_serving"),
    TimedOut: ErrorKind(504, "server_error", "timed_out"),
}


def kind_of(error: Exception) -> ErrorKind:
    """The table's row for an error; one that it does not have is the server's own failure."""
    return next((ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS), SERVER_FAILED)


# ---- Settings ---------------------------------------------------------------
# What serving/settings.py was told becomes a loaded model.


def find_folder(settings: Settings) -> Path:
    """The folder of the settings' model; fetches the demo. Raises StartError with the remedy."""
    try:
        return find_model(settings.model)
    except DownloadError as error:
        raise StartError(str(error)) from error


def find_adapters_base(settings: Settings, folder: Path) -> Path | None:
    """The folder of an adapter's model; None of a whole model. Raises StartError."""
    if not is_adapter(folder):
        if settings.base is not None:
            raise StartError(f"--base is for a LoRA adapter in --model, and {folder} is none")
        return None
    try:
        return find_base(folder, settings.base)
    except DownloadError as error:
        raise StartError(str(error)) from error


def find_adapters(settings: Settings) -> dict[str, Path]:
    """The folders of the adapters by their names. Raises StartError with the remedy."""
    found: dict[str, Path] = {}
    for name, _, place in (pair.partition("=") for pair in settings.adapter):
        try:
            found[name] = find_model(place)
        except DownloadError as error:
            raise StartError(f"--adapter {name}: {error}") from error
        if not is_adapter(found[name]):
            raise StartError(f"--adapter {name}: {found[name]} is no folder of a LoRA adapter")
    return found


def read_template(settings: Settings) -> str | None:
    """The chat template that is set, if any. Raises StartError if it cannot be read."""
    path = settings.chat_template
    if path is None:
        return None
    if not path.is_file():
        raise StartError(f"--chat-template: there is no file {str(path)!r}")
    try:
        # Windows' editors begin a file with a byte order mark, which would be in every prompt.
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--chat-template: {path} cannot be read as UTF-8: {error}") from error


def check_files(settings: Settings) -> None:
    """Raise StartError at once for what loading would find missing after seconds."""
    if settings.model != "demo":  # which is fetched while the server answers already
        find_adapters_base(settings, find_folder(settings))
    find_adapters(settings)
    read_template(settings)


def load_served(settings: Settings) -> ChatModel:
    """Find and load the settings' model. Raises StartError with the remedy."""
    # Before engine.load is looked up, which imports torch: a download begins at once.
    folder = find_folder(settings)
    model = engine.load(
        folder,
        name=settings.served_model_name or name_of(folder),
        dtype=settings.dtype,
        device_map=settings.device_map,
        quantize=settings.quantize,
        base=find_adapters_base(settings, folder),
        adapters=find_adapters(settings),
        chat_template=read_template(settings),
        cache_memory=settings.cache_memory,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        prefill_chunk=settings.prefill_chunk,
        reuse=settings.reuse,
        speculate=settings.speculate,
        timeout=settings.request_timeout,
        measure_anew=settings.check,
    )
    return with_template_kwargs(model, json.loads(settings.chat_template_kwargs or "{}"))


def load_and_tell(load: Callable[[Settings], ChatModel], settings: Settings) -> ChatModel:
    """Load a model, and log that it is being loaded: at once, and as long as it takes."""
    log.info("chat-api %s: loading %s …", __version__, settings.model)
    with still_logged(f"loading {settings.model}"):
        return load(settings)


def start_error(error: BaseException) -> str:
    """What to say of an error that ends the start; if it is none of a user's, it is logged too."""
    if isinstance(error, StartError):
        return str(error)
    log.critical("the model could not be loaded", exc_info=error)
    return (
        "the model could not be loaded because of a mistake in this program, and not of the model's"
        " files; the traceback above tells its developers where it is"
    )


def with_template_kwargs(model: ChatModel, given: dict[str, Any]) -> ChatModel:
    """The model with these variables. Raises StartError if its chat template has none such."""
    model = replace(model, template_kwargs=given)
    try:
        model.encode([{"role": "user", "content": "hi"}])
    except EngineError as error:
        model.close()
        raise StartError(f"--chat-template-kwargs: {error}") from error
    return model


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


# ---- Endpoints --------------------------------------------------------------
# What takes a body, in one table: its routes, its labels in the metrics, its
# errors' shape and its docs come from there.

JSON_TYPE = "application/json"


class Endpoint(NamedTuple):
    """A path that takes a body; without a reply it responds at once, and generates nothing."""

    path: str
    request: type[SamplingFields] | type[InstantRequest]
    reply: ReplyFactory | None
    response: type[BaseModel]
    dialect: Dialect


ENDPOINTS = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/", ChatRequest, ClassicReply, ChatResponse, CLASSIC),
        Endpoint(
            "/v1/chat/completions", ChatCompletionRequest, ChatCompletionReply, Completion, OPENAI
        ),
        Endpoint("/v1/completions", CompletionRequest, CompletionReply, Completion, OPENAI),
        Endpoint("/v1/responses", ResponsesRequest, ResponsesReply, ResponsesResponse, RESPONSES),
        Endpoint(
            "/v1/responses/input_tokens", InputTokensRequest, None, InputTokensResponse, RESPONSES
        ),
        Endpoint("/v1/messages", MessagesRequest, MessagesReply, MessagesResponse, ANTHROPIC),
        Endpoint(
            "/v1/messages/count_tokens", CountTokensRequest, None, CountTokensResponse, ANTHROPIC
        ),
        Endpoint("/tokenize", TokenizeRequest, None, TokenizeResponse, CLASSIC),
        Endpoint("/detokenize", DetokenizeRequest, None, DetokenizeResponse, CLASSIC),
    )
}


def dialect_of(path: str) -> Dialect:
    """In which dialect a path's errors are told, if there is nothing there too."""
    if path in ENDPOINTS:
        return ENDPOINTS[path].dialect
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return OPENAI if path.startswith("/v1/") else CLASSIC


def extra_responses(dialect: Dialect, content: str = JSON_TYPE) -> dict[int | str, Any]:
    """Further responses of a route, for the docs."""
    error = dialect.error_model
    return {
        200: {"content": {content: {}}},
        "4XX": {
            "model": error,
            "description": "Refused: 400, 401, 403, 404, 405, 408, 413, 415 or 429",
        },
        "5XX": {"model": error, "description": "Not served: 500, 503 or 504"},
    }


class State(BaseModel):
    """What /health says."""

    status: Literal["loading", "ready", "draining", "dead"]
    running: int
    waiting: int


COMPONENTS = "#/components/schemas/"


def documented(endpoint: Endpoint) -> dict[str, Any]:
    """A route's options that show in the docs what read_body reads, and what comes back."""
    schema = {"schema": {"$ref": COMPONENTS + endpoint.request.__name__}}
    content = "text/event-stream" if endpoint.reply else JSON_TYPE
    return {
        "response_model": endpoint.response,
        "responses": extra_responses(endpoint.dialect, content),
        "openapi_extra": {"requestBody": {"required": True, "content": {JSON_TYPE: schema}}},
    }


def document_bodies(app: FastAPI) -> None:
    """Add the schemas that `documented` refers to; FastAPI knows nothing of these bodies."""
    build = app.openapi
    bodies = {endpoint.request for endpoint in ENDPOINTS.values()}

    def openapi() -> dict[str, Any]:
        document = build()
        _, schemas = models_json_schema(
            [(body, "validation") for body in bodies], ref_template=COMPONENTS + "{model}"
        )
        document["components"]["schemas"].update(schemas["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


# ---- Metrics ----------------------------------------------------------------
# Prometheus metrics, under vLLM's names, and one log line for each finished
# request.


@dataclass(eq=False)
class RequestInfo:
    """What is known of a request, from its arrival until its line in the log."""

    id: str
    route: str
    reservation: BodyReservation  # what its body takes of what there is for all
    dialect: Dialect
    headers: dict[str, str]  # of the response, whatever it will be
    ignored: IgnoredFields
    answers: OwnAnswers | None  # that are kept for its key
    arrived: float = field(default_factory=time.monotonic)
    choices: list[Choice] = field(default_factory=list)
    # How it ended: served, or an error's code, or else its client left.
    outcome: str = "left"
    streaming: bool = False
    adapter: str = ""  # by its name, of a request that chose one
    # The request's own name for an argument of the engine's, once its body is read.
    field_of: Callable[[str | None], str | None] = lambda argument: argument


MAX_IGNORED_LOGGED = 1024  # names of fields, each of them once
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Gauges, and the counts of ChatService that they show.
GAUGES = {
    "num_requests_running": "num_running",
    "num_requests_waiting": "num_waiting",
    "cache_tokens": "cache_tokens",
    "cache_tokens_used": "cache_tokens_used",
    "state_slots": "state_slots",
    "state_slots_used": "state_slots_used",
}


SAMPLED = (
    "cache_tokens",
    "cache_tokens_used",
    "cache_tokens_kept",
    "state_slots",
    "state_slots_used",
)


class Metrics:
    """Counts and logs requests; `count_of` returns what the gauges show."""

    def __init__(self, count_of: Callable[[str], float], log_prompts: bool = False):
        self.log_prompts = log_prompts
        self.registry = prometheus_client.CollectorRegistry()
        mine: Any = {"namespace": "chat", "registry": self.registry}
        count: Any = partial(prometheus_client.Counter, **mine)
        times: Any = partial(prometheus_client.Histogram, buckets=LATENCY_BUCKETS, **mine)
        self.requests = count(
            "requests", "Requests that ended", ["route", "outcome", "finish_reason"]
        )
        self.ignored_fields = count("ignored_fields", "Fields that were left out", ["route"])
        self.ignored_names: set[str] = set()
        self.adapter_requests = count(
            "adapter_requests", "Requests for an adapter that ended", ["adapter", "outcome"]
        )
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = count("prefix_cache_hits", "Tokens of prompts found in the cache")
        self.generation_tokens = count("generation_tokens", "Tokens of answers")
        self.queue_time = times("request_queue_time_seconds", "Wait for a place in the batch")
        self.first_token = times("time_to_first_token_seconds", "Arrival to the first token")
        self.each_token = times("time_per_output_token_seconds", "Mean time of a later token")
        self.whole_time = times("e2e_request_latency_seconds", "Arrival to the end")
        self.live = LiveRequests()
        for name, counted in GAUGES.items():
            gauge = prometheus_client.Gauge(name, name.replace("_", " "), **mine)
            gauge.set_function(partial(count_of, counted))
        self.registry.register(EngineCounters(count_of))
        dropped = prometheus_client.Gauge("log_lines_dropped", "Lines nobody read", **mine)
        dropped.set_function(num_dropped)

    def record_ignored(self, info: RequestInfo, names: list[str]) -> None:
        """Count the fields that were left out, and log each name once."""
        self.ignored_fields.labels(info.route).inc(len(names))
        new = [name for name in names if name not in self.ignored_names]
        if new and len(self.ignored_names) < MAX_IGNORED_LOGGED:
            self.ignored_names.update(new)
            log.warning("request_id=%s ignored fields: %s", info.id, ", ".join(new))

    def record_prompt(self, info: RequestInfo, body: SamplingFields) -> None:
        """Log the text of a request if --log-prompts is set."""
        if self.log_prompts:
            texts = body.model_dump(include={"prompt", "history", "system", "messages"})
            log.info("request_id=%s asked=%r", info.id, texts)

    def record(self, info: RequestInfo) -> None:
        """Count a request that has ended, however it did, and log one line of it."""
        line: dict[str, Any] = {"request_id": info.id, "route": info.route, "outcome": info.outcome}
        if info.adapter:
            line["adapter"] = info.adapter
            self.adapter_requests.labels(info.adapter, info.outcome).inc()
        finish_reason = "none"
        if info.choices:
            if info.outcome == "served":
                finish_reason = finish_reason_of(info.choices)
            line["finish_reason"] = finish_reason
            line |= self._record_answers(info)
        self.live.end(info, line)
        self.requests.labels(info.route, info.outcome, finish_reason).inc()
        log.info(" ".join(f"{name}={value}" for name, value in line.items()), extra=line)

    def _record_answers(self, info: RequestInfo) -> dict[str, float]:
        """Record the counts and times of a request that reached the engine."""
        usage = usage_of(info.choices)
        cached = cached_tokens_of(info.choices)
        longest = max(info.choices, key=lambda choice: choice.completion_tokens)
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.cached_tokens.inc(cached)
        self.generation_tokens.inc(usage["completion_tokens"])
        line: dict[str, float] = {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": cached,
            "completion_tokens": usage["completion_tokens"],
        }
        if longest.completion_tokens:
            line["queue_time"] = observe(self.queue_time, longest.queue_time)
            line["first_token"] = observe(self.first_token, longest.first_token - info.arrived)
        if longest.completion_tokens > 1:
            seconds = longest.last_token - longest.first_token
            line["each_token"] = observe(self.each_token, seconds / (longest.completion_tokens - 1))
        line["seconds"] = observe(self.whole_time, time.monotonic() - info.arrived)
        return line


def finish_reason_of(choices: list[Choice]) -> str:
    """Why a request's answers ended; length if any was cut, else tool_calls if any called tools."""
    reasons = {choice.finish_reason for choice in choices}
    return next((reason for reason in ("length", "tool_calls") if reason in reasons), "stop")


def observe(histogram: Any, seconds: float) -> float:
    histogram.observe(seconds)
    return round(seconds, 4)


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


def is_valid_key(given: bytes, keys: tuple[str, ...]) -> bool:
    """Compare with every key in constant time."""
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    return any(matches)


# ---- Routes -----------------------------------------------------------------
# Starlette cancels a stream when its client disconnects. A response that is
# still being computed is cancelled by `while_connected`.

MAX_BODY = 8 * 2**20
BODY_TIMEOUT = 120.0
# Seconds after which a step that has not ended is taken for one that never will.
STEP_TIMEOUT = 60.0
# Tokens with logprobs, whose wording takes longer than others should wait for.
MANY_SCORED = 512
# Seconds that a step of the model has to end, once all else has.
STOP_TIMEOUT = 2.0
# Seconds after which to try again while there are too many requests that are not in the batch yet.
BUSY_RETRY = 5
MAX_IGNORED_SHOWN = 16  # names of fields in a header


def log_failure(error: Exception) -> None:
    """Log an error that is the server's own; of the others the client is told all."""
    if kind_of(error) is SERVER_FAILED:
        log.error("a request failed", exc_info=error)


def from_starlette(error: HTTPException, path: str) -> Exception:
    """Turn an error of Starlette's into ours."""
    if error.status_code == 404:
        return NotFound(f"there is nothing at {printable(path)!r}")
    if error.status_code == 405:
        return MethodNotAllowed(f"{printable(path)!r} does not take this method")
    return InvalidInput(str(error.detail))


def request_info(scope: Scope) -> RequestInfo:
    """What RequestIDMiddleware stored."""
    return scope["state"]["info"]


class RequestIDMiddleware:
    """Gives every request an id, the client's X-Request-ID or a new one, and returns it."""

    def __init__(self, app: ASGIApp, kept_answers: int):
        self.app = app
        self.budget = BodyBudget()
        kept = KeptAnswers(kept_answers * 2**20) if kept_answers else None
        self.answers = OwnAnswers(kept, "") if kept else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none, whatever a library may bring
            return await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = Headers(scope=scope).get("x-request-id", "")
        # Nothing that could forge or flood log lines.
        if not re.fullmatch(r"[\w.:-]{1,128}", request_id, re.ASCII):
            request_id = uuid.uuid4().hex
        path = path_of(scope)
        route = path if path in ENDPOINTS else "other"  # as a label in the metrics
        dialect = dialect_of(path)
        headers = {"X-Request-ID": request_id, dialect.request_id_header: request_id}
        ignored = IgnoredFields(strict="handling=strict" in Headers(scope=scope).get("prefer", ""))
        send = with_headers(send, headers)
        with self.budget.reserve() as reservation:
            info = RequestInfo(
                request_id, route, reservation, dialect, headers, ignored, self.answers
            )
            scope.setdefault("state", {})["info"] = info
            await self.app(scope, receive, send)


class APIKeyMiddleware:
    """Requires an API key, except for /health and the chat page's files, which hold no secret."""

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], page: bool, refuse: Callable[..., ASGIApp]
    ):
        self.app = app
        self.keys = keys
        self.page = page
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_exempt(scope):
            return await self.app(scope, receive, send)
        if (key := self._key_of(scope)) is not None:
            info = request_info(scope)
            info.answers = replace(info.answers, owner=key) if info.answers else None
            return await self.app(scope, receive, send)
        error = Unauthorized("send one of the server's keys as `Authorization: Bearer KEY`")
        await self.refuse(scope, error)(scope, receive, send)

    def _is_exempt(self, scope: Scope) -> bool:
        path = path_of(scope)
        at_page = path == "/" or path in chat_page.PUBLIC_PATHS
        read = scope["method"] in ("GET", "HEAD")
        return path == "/health" or (self.page and at_page and read)

    def _key_of(self, scope: Scope) -> str | None:
        """The valid key that a request has."""
        headers = Headers(scope=scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        bearer = given.strip() if kind.lower() == "bearer" else ""
        # Anthropic's SDKs send it in a header of its own.
        sent = (bearer, headers.get("x-api-key", "").strip())
        valid = (key for key in sent if is_valid_key(key.encode("latin-1"), self.keys))
        return next(valid, None)


class OriginMiddleware:
    """Refuses what a web page of another site sends, whose browser may reach us where it cannot.

    Without a key, also requests for a name that such a page may have (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: Settings, refuse: Callable[..., ASGIApp]):
        self.app, self.refuse = app, refuse
        self.origins, self.hosts = settings.origins, settings.hosts
        self.has_key = bool(settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._refusal(Headers(scope=scope), scope)):
            return await self.refuse(scope, Forbidden(why))(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers, scope: Scope) -> str | None:
        if origin := foreign_origin(headers, scope["method"], self.origins):
            return f"web pages of {printable(origin)!r} may not call; --cors-origins names those"
        if not self.has_key and (host := unknown_host(headers, self.hosts)):
            return (
                f"{printable(host)!r} is no known name of this server, which has no key: set one"
                " with CHAT_API_KEY, or name it with --allowed-hosts"
            )
        return None


def too_large(what: str = "the body is") -> BodyTooLarge:
    return BodyTooLarge(f"{what} larger than {MAX_BODY // 2**20} MiB; send less")


async def reserve_body(headers: Headers, reservation: BodyReservation) -> None:
    """Hold as many bytes as the headers say that a body has.

    Raises BodyTooLarge, UnsupportedEncoding or QueueFull.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedEncoding(
            f"the body's Content-Encoding is {printable(encoding)!r}; send it uncompressed,"
            " without that header"
        )
    length = int(headers.get("content-length", 0))
    if length > MAX_BODY:
        raise too_large()
    await reservation.grow_to(length)


class BodyMiddleware:
    """Refuses a body by its headers, before the routes take their time for one of very many."""

    def __init__(self, app: ASGIApp, refuse: Callable[..., ASGIApp]):
        self.app = app
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                await reserve_body(Headers(scope=scope), request_info(scope).reservation)
            except (BodyTooLarge, UnsupportedEncoding, QueueFull) as error:
                return await self.refuse(scope, error)(scope, receive, send)
        await self.app(scope, receive, send)


async def read_bytes(request: Request) -> bytes:
    """The body. Raises BodyTooLarge, BodyTooSlow, QueueFull or ClientDisconnect."""
    reservation = request_info(request.scope).reservation
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large()
                await reservation.grow_to(len(body))
    except TimeoutError:
        raise BodyTooSlow(
            f"the body took more than {BODY_TIMEOUT:.0f} seconds; send it at once"
        ) from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """The value that a body holds, whatever its content type. Raises InvalidInput.

    By the json module and not by pydantic's parser, which refuses half a surrogate pair and deep
    nesting before it is known in which field.
    """
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise InvalidInput(f"the body is encoded as {encoding.upper()}; send it as UTF-8")
    check_items(body)
    try:
        return json.loads(body.decode(encoding)) if body else None
    except UnicodeDecodeError:
        raise InvalidInput(
            "the body is not UTF-8; save the script as UTF-8, and in PowerShell send"
            " [Text.Encoding]::UTF8.GetBytes($body)"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"the body is not valid JSON: {error.msg}, near character {error.pos}"
        ) from None
    except RecursionError:
        raise InvalidInput("the body is nested too deeply") from None
    except ValueError:
        raise InvalidInput("the body contains a number with too many digits") from None


async def read_body(request: Request, schema: type[BodyT]) -> BodyT:
    """Read, parse and validate a request's body."""
    info = request_info(request.scope)
    budget, context = info.reservation.budget, BodyContext(info.ignored, info.answers)
    body = await read_bytes(request)
    try:
        async with budget.exclusive_parse(len(body)):
            value = parse_json(body)
            referred = info.answers.num_bytes_referred(value) if info.answers else 0
            if not referred:
                return schema.model_validate(value, context=context)
        # What was kept of earlier answers is read again, and bounded as if it had been sent.
        if len(body) + referred > MAX_BODY:
            raise too_large("the body and what it refers to are")
        async with budget.exclusive_parse(len(body) + referred):
            return schema.model_validate(value, context=context)
    except ValidationError as error:
        raise validation_error(error) from None


@asynccontextmanager
async def time_limit(info: RequestInfo, seconds: float) -> AsyncIterator[None]:
    """Raise TimedOut when so many seconds have passed since the request came."""
    try:
        async with asyncio.timeout(info.arrived + seconds - time.monotonic()):
            yield
    except TimeoutError:
        raise TimedOut(f"the request took longer than {seconds:g} seconds") from None


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect if the client disconnects first."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        # What is cancelled has an end of its own, and is not left to come to it some time.
        await asyncio.gather(task, gone, return_exceptions=True)


class JSONText(JSONResponse):
    """JSON with its charset, without which Windows PowerShell assumes Latin-1."""

    media_type = "application/json; charset=utf-8"


class EventStream(StreamingResponse):
    """Server-sent events; the generator is closed as soon as the client disconnects.

    `first` is the first event, for which the generator was already asked.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncGenerator[str]):
        self.events = events
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._all(first), headers=headers)

    async def _all(self, first: str) -> AsyncIterator[str]:
        yield first
        async for event in self.events:
            yield event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            await super().__call__(scope, receive, send)


def format_event(event: dict[str, Any], named: bool = False) -> str:
    """Format an event. ASCII, because some clients split lines at U+2028 and U+0085."""
    name = f"event: {event['type']}\n" if named else ""
    return f"{name}data: {json.dumps(event)}\n\n"


LOOPBACK = ("127.0.0.1", "::1", "localhost")


def local_address(host: str) -> str:
    """Where this machine itself reaches a server that listens on `host`, as URLs write it."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class ChatService:
    """The model behind the routes, from loading to draining."""

    def __init__(self, settings: Settings, load: Callable[[Settings], ChatModel]):
        self.settings = settings
        self.load = load
        self.metrics = Metrics(self.count, settings.log_prompts)
        self.workers = Workers()  # tokenizing
        self.compilers = Workers(1)  # so that nobody else waits for a schema that takes long
        self.writers = Workers(1)  # nor for the wording of very many logprobs
        self._model: ChatModel | None = None
        self._drain_deadline: float | None = None

    @property
    def health(self) -> dict[str, Any]:
        return {
            "status": self._status(),
            "running": self.count("num_running"),
            "waiting": self.count("num_waiting"),
        }

    def count(self, name: str) -> int:
        """One of the model's counts; requests in the workers' hands wait as those in its queue."""
        counted: int = getattr(self._model, name, 0)
        if name == "num_waiting":
            counted += self.workers.num_pending + self.compilers.num_pending
            counted += self.writers.num_pending
        return counted

    def observe(self) -> dict[str, Any]:
        """What the server does at this moment, for the dashboard."""
        return {
            "time": round(time.time(), 3),
            **self.health,
            **{name: self.count(name) for name in SAMPLED},
            "memory": psutil.Process().memory_info().rss,
            "device_memory": engine.device_memory(),
            **self.metrics.live.sample(),
        }

    def facts(self) -> dict[str, str]:
        """What the start of the model decided, once it is loaded."""
        return {"name": self._model.name, **self._model.facts} if self._model else {}

    def _status(self) -> str:
        if self._model and self._is_dead(self._model):
            return "dead"
        if self.draining:
            return "draining"
        return "ready" if self._model else "loading"

    @staticmethod
    def _is_dead(model: ChatModel) -> bool:
        """Whether it has failed, or computes or renders nothing any more; not if it was closed."""
        has_failed = model.failure is not None and not isinstance(model.failure, EngineStopped)
        return has_failed or model.seconds_late > STEP_TIMEOUT or not engine.can_render()

    def model(self, name: str | None = None) -> ChatModel:
        """The loaded model. Raises NotServing, or ModelNotFound if it has another name."""
        if self._drain_deadline is not None:
            seconds = 1 + max(0, int(self._drain_deadline - time.monotonic()))
            raise NotServing("the server is stopping; try again after its restart", None, seconds)
        if self._model is None:
            raise NotServing("the model is still loading; try again soon", retry_after=5)
        if name in (None, self._model.name):
            return self._model
        if name in self._model.variants:
            return self._model.variants[name]
        names = ", ".join(repr(known) for known in (self._model.name, *self._model.variants))
        message = f"there is no model {printable(name)!r} here; this server has {names}"
        raise ModelNotFound(message, "model")

    def chosen(self, info: RequestInfo, body: SamplingFields | InstantRequest) -> ChatModel:
        """The model that a request asks for, itself or with an adapter; see `model`."""
        model = self.model(body.model)
        if model.base:
            info.adapter = model.name
        return model

    def check_queue(self, model: ChatModel) -> None:
        """Raise QueueFull if no more requests may wait, for the workers or for the model."""
        model.check_queue()
        most = self.settings.max_batch + self.settings.max_waiting
        present = self.count("num_running") + self.count("num_waiting")
        if present >= most:
            raise QueueFull(f"{present} requests are being served; try again soon", BUSY_RETRY)

    async def wait_for_queue(self, request: Request, model: ChatModel) -> None:
        """The same, but when a refusal is due; there may be room by then."""
        try:
            self.check_queue(model)
        except QueueFull:
            budget = request_info(request.scope).reservation.budget
            await while_connected(request, budget.wait_to_refuse())
            self.check_queue(model)

    async def answer(
        self, request: Request, schema: type[SamplingFields], reply_of: ReplyFactory
    ) -> Response:
        """Read the body, generate, and respond with a stream, a full response, or an error."""
        info = request_info(request.scope)
        self.metrics.live.begin(info)
        try:
            async with time_limit(info, self.settings.request_timeout):
                body = await read_body(request, schema)
                return await self._respond(request, body, reply_of)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - one request fails, not the server
            log_failure(error)
            return self.error_response(request.scope, error)
        finally:
            if not info.streaming:  # a stream goes on from here
                self.metrics.record(info)

    async def _respond(
        self, request: Request, body: SamplingFields, reply_of: ReplyFactory
    ) -> Response:
        info = request_info(request.scope)
        model = self.chosen(info, body)
        # Before tokenizing a request that would be refused.
        await self.wait_for_queue(request, model)
        self.metrics.record_prompt(info, body)
        info.field_of = body.field_of
        workers = self.compilers if body.has_schema else self.workers
        prompts = await while_connected(request, workers.run(partial(body.prepare, model)))
        self.tell_ignored(info)
        reply = reply_of(model, body, prompts)
        info.choices = choices_of(len(prompts), body.num_answers)
        deltas = model.answer_all(prompts, body.num_answers, arrived=info.arrived)
        if body.stream:
            events = self._events(
                request.scope, events_of(deltas, info.choices, reply), reply.failure
            )
            first = await while_connected(request, anext(events))
            info.streaming = True
            return EventStream(first, events)
        await while_connected(request, collect(deltas, info.choices, reply))
        # Decoding many tokens for logprobs can take seconds.
        scored = sum(len(c.tokens) + len(c.prompt_logprobs) for c in info.choices)
        workers = self.writers if scored > MANY_SCORED else self.workers
        response = await while_connected(
            request, workers.run(lambda: JSONText(reply.full_response(info.choices)))
        )
        info.outcome = "served"
        return response

    async def _events(
        self,
        scope: Scope,
        events: Events,
        failure: Callable[[dict[str, Any]], list[dict[str, Any]]],
    ) -> AsyncGenerator[str]:
        """A stream's text; an error before its first event is raised and keeps its HTTP status."""
        info = request_info(scope)
        try:
            async with aclosing(events):
                async for event in events:
                    if event is None:
                        yield info.dialect.keepalive
                    else:
                        yield format_event(event, info.dialect.names_events)
            info.outcome = "served"
            yield info.dialect.end
        except Exception as error:
            if not info.streaming:
                raise
            log_failure(error)
            for event in failure(self.error_payload(scope, error)):
                yield format_event(event, info.dialect.names_events)
        finally:
            if info.streaming:
                self.metrics.record(info)

    def tell_ignored(self, info: RequestInfo) -> None:
        """Tell the client and the operator which fields of a request were left out."""
        names = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII) for name in info.ignored.names]
        if names:
            info.headers["X-Ignored-Fields"] = ", ".join(names[:MAX_IGNORED_SHOWN])
            self.metrics.record_ignored(info, names)

    async def answer_at_once(self, request: Request, schema: type[InstantRequest]) -> Response:
        """Read the body, and respond with what needs no generation."""
        info = request_info(request.scope)
        async with time_limit(info, self.settings.request_timeout):
            body = await read_body(request, schema)
            info.field_of = body.field_of
            model = self.chosen(info, body)
            await self.wait_for_queue(request, model)
            work = self.workers.run(partial(body.result, model))
            response = JSONText(await while_connected(request, work))
            self.tell_ignored(info)
        info.outcome = "served"
        self.metrics.record(info)
        return response

    def error_payload(self, scope: Scope, error: Exception) -> dict[str, Any]:
        """The body of an error in the client's dialect; its code is how the request ended."""
        info = request_info(scope)
        kind = kind_of(error)
        info.outcome = kind.code
        message = "the server failed; its log says why" if kind is SERVER_FAILED else str(error)
        param = info.field_of(getattr(error, "argument", None))
        details = getattr(error, "details", None)
        detail = ErrorDetail(kind.status, kind.type, kind.code, message, param, info.id, details)
        return info.dialect.spell_error(detail)

    def error_response(self, scope: Scope, error: Exception) -> JSONText:
        payload = self.error_payload(scope, error)
        kind = kind_of(error)
        # Unexpected errors are handled outside RequestIDMiddleware, so set its header here too.
        headers = {**request_info(scope).headers, **kind.headers}
        if seconds := getattr(error, "retry_after", None):
            headers["Retry-After"] = str(seconds)
        return JSONText(payload, kind.status, headers)

    def refuse(self, scope: Scope, error: Exception) -> JSONText:
        """Respond with an error to what never became a request for an answer, and record it."""
        response = self.error_response(scope, error)
        self.metrics.record(request_info(scope))
        return response

    @property
    def draining(self) -> bool:
        return self._drain_deadline is not None

    def start_draining(self) -> None:
        """Refuse new requests, and give running ones until the deadline.

        In a signal's handler, so it takes no lock that may be held just then, as the log's is.
        """
        self._drain_deadline = time.monotonic() + self.settings.drain_timeout

    def drained(self, busy: bool) -> bool:
        """Whether to stop now: no request is running, or the deadline has passed."""
        if self._drain_deadline is None:
            return False
        return not busy or time.monotonic() >= self._drain_deadline

    async def close(self) -> bool:
        """Close the engine; requests that are still generating get an error.

        False if a step of the model has not ended after STOP_TIMEOUT, and perhaps never will.
        """
        self.workers.close()
        self.compilers.close()
        self.writers.close()
        if self._model is None:
            return True
        # A thread of its own, for which nobody waits, unlike for those of the event loop.
        model, loop, closed = self._model, asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            model.close()
            with suppress(RuntimeError):  # the loop is closed: it has taken too long
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=close, name="closing", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), STOP_TIMEOUT)
        return closed.is_set()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        # A daemon, so that Ctrl-C need not wait for the weights.
        threading.Thread(target=self._load, name="loader", daemon=True).start()
        yield
        await self.close()

    def _load(self) -> None:
        try:
            model = load_and_tell(self.load, self.settings)
        except BaseException as error:  # noqa: BLE001 - told, and the process ends
            said = start_error(error)
            # No request can be running yet, and none can be served.
            flush_log()
            with suppress(OSError, AttributeError):  # a full disk; a program without a console
                sys.stderr.write(f"api.py: {said}.\n")
            os._exit(1)
        self._model = model
        self._greet(model)
        # Meanwhile it serves; the first request with tools would wait for it.
        model.warm_up()

    def _greet(self, model: ChatModel) -> None:
        """Log what is served, where, and how to reach it from elsewhere."""
        for name, fact in model.facts.items():
            log.debug("%s: %s", name, fact)
        port = self.settings.port
        here = local_address(self.settings.host)
        for name, fact in model.summary.items():
            log.info("%s: %s", name, fact)
        page = "the chat page, " if self.settings.chat_page else ""
        log.info("paths: / (%sPOST), /v1 (OpenAI API), /docs, /health, /metrics", page)
        log.info("ready: http://%s:%d", here, port)
        log.info(
            "from your laptop: ssh -CN -L %d:%s:%d -p PORT USER@THIS-MACHINE", port, here, port
        )
        if self.settings.host not in LOOPBACK and not self.settings.keys:
            log.warning(
                "there is no API key: anyone who reaches port %d can use this server; set one with"
                " CHAT_API_KEY, or listen with --host 127.0.0.1",
                port,
            )


def allowed_methods(app: FastAPI, scope: Scope, known: str) -> str:
    """What a path takes: the methods of all its routes. Starlette knows those of the first one."""
    methods = set(known.split(", "))
    for route in app.routes:
        if route.matches(scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return ", ".join(sorted(methods))


def add_error_handlers(app: FastAPI, service: ChatService) -> None:
    """Give every exception its response."""

    async def handle(request: Request, error: Exception) -> Response:
        headers: dict[str, str] = {}
        if isinstance(error, HTTPException):
            headers = dict(error.headers or {})
            if known := headers.get("Allow"):
                headers["Allow"] = allowed_methods(app, request.scope, known)
            error = from_starlette(error, request.url.path)
        response = service.refuse(request.scope, error)
        response.headers.update(headers)
        return response

    for kind in (EngineError, RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))


def route_of(service: ChatService, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """What FastAPI calls for an endpoint."""
    _, schema, reply, _, _ = endpoint

    async def route(request: Request) -> Response:
        if issubclass(schema, InstantRequest):
            return await service.answer_at_once(request, schema)
        assert reply, f"{endpoint.path} generates, and has no reply"
        return await service.answer(request, schema, reply)

    return route


def build_app(
    settings: Settings | None = None, load: Callable[[Settings], ChatModel] = load_served
) -> FastAPI:
    """The application; its model loads in a thread once it is started."""
    if settings is None:
        settings = read_settings([])
        start_log(settings.log_json, settings.log_level)
    service = ChatService(settings, load)
    # FastAPI whose /docs loads nothing from other hosts, which a rented machine may not reach.
    about: Any = {"title": "chat-api", "version": __version__}
    app = FastAPIOffline(redoc_url=None, lifespan=service.lifespan, **about)
    app.state.service = service
    app.add_middleware(BodyMiddleware, refuse=service.refuse)
    if settings.keys:
        app.add_middleware(
            APIKeyMiddleware, keys=settings.keys, page=settings.chat_page, refuse=service.refuse
        )
    app.add_middleware(OriginMiddleware, settings=settings, refuse=service.refuse)
    app.add_middleware(RequestIDMiddleware, kept_answers=settings.kept_answers)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "request-id", "Retry-After", "X-Ignored-Fields"],
        )
    add_error_handlers(app, service)
    if settings.chat_page:
        config = lambda: page_config(service.model()) | {"version": app.version}  # noqa: E731
        chat_page.mount(app, config, service.observe, service.facts)

    # HEAD is for monitors, and not for the docs.
    @app.head("/", include_in_schema=False)
    @app.get("/", status_code=307, response_class=RedirectResponse)
    async def front() -> Response:
        return RedirectResponse("chat/" if settings.chat_page else "docs")

    down: Any = {503: {"model": State, "description": "Loading, draining or dead"}}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=State, responses=down)
    async def health() -> JSONText:
        state = service.health
        return JSONText(state, 200 if state["status"] == "ready" else 503)

    @app.get("/metrics", response_class=Response, responses=extra_responses(CLASSIC, "text/plain"))
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(service.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=extra_responses(OPENAI))
    async def models() -> dict[str, Any]:
        model = service.model()
        served = [model, *model.variants.values()]
        return {"object": "list", "data": [model_card(each) for each in served]}

    @app.get("/v1/models/{name:path}", responses=extra_responses(OPENAI))
    async def model(name: str) -> dict[str, Any]:
        return model_card(service.model(name))

    for endpoint in ENDPOINTS.values():
        app.post(endpoint.path, **documented(endpoint))(route_of(service, endpoint))
    document_bodies(app)
    return app


def model_card(model: ChatModel) -> dict[str, Any]:
    """The model as OpenAI lists it, with vLLM's max_model_len and OpenRouter's context_length."""
    card = {"id": model.name, "object": "model", "created": model.loaded, "owned_by": "chat-api"}
    card |= {"max_model_len": model.context_length, "context_length": model.context_length}
    card |= {"parent": model.base.name} if model.base else {}
    return card | {"version": f"chat-api {__version__}"}


def page_config(model: ChatModel) -> dict[str, Any]:
    """What the chat page shows of the model, and whether answers can be continued."""
    defaults = asdict(model.defaults)
    if not model.states_length:
        defaults["max_new_tokens"] = None  # a chat's answer may take the whole context
    return {
        "model": model.name,
        "models": [model.name, *model.variants],
        "context_length": model.context_length,
        "defaults": defaults,
        "continue_final_message": model.can_continue,
    }


# ---- Main -------------------------------------------------------------------

# For connections that stay open at the end, when all requests are through.
CLOSE_TIMEOUT = 5


def leave(status: int) -> NoReturn:
    """End the process at once; Python's own end would wait for the model's threads."""
    engine.end_children()
    os._exit(status)


class Server(uvicorn.Server):
    """On the first signal it finishes the running requests, on the second it exits."""

    def __init__(self, config: uvicorn.Config, service: ChatService):
        super().__init__(config)
        self.service = service
        self.is_told = False  # that it is stopping

    def handle_exit(self, sig: int, frame: Any) -> None:
        # uvicorn's own handler would close the socket at once, and re-raise the signal at exit.
        if self.service.draining:
            leave(128 + sig)
        self.service.start_draining()

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and not self.is_told:
            self.is_told = True
            log.info("stopping when running requests are finished; signal again to stop at once")
        if self.service.drained(busy=bool(self.server_state.tasks)):
            self.should_exit = True
            if not await self.service.close():
                log.warning("a step of the model has not ended; stopping without it")
                self.force_exit = True
        return await super().on_tick(counter)


def allow_many_files() -> None:
    """Let this process have as many connections as it may: by default it is often 1,024 files."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS states no limit, and grants no more than its OPEN_MAX.
        for number in (most, max(now, 10_240)):
            with suppress(OSError, ValueError):
                return resource.setrlimit(resource.RLIMIT_NOFILE, (number, most))


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
    open_closed_streams()
    settings = read_settings(sys.argv[1:])
    start_log(settings.log_json, settings.log_level)
    try:
        check_files(settings)
        if settings.check:
            # A console's or a pipe's own encoding may lack the text of a model.
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
            sys.stdout.write(check_model(load_and_tell(load_served, settings)))
            return
    except Exception as error:  # noqa: BLE001 - a start's error is told in words
        said = start_error(error)
        flush_log()
        sys.exit(f"api.py: {said}.")
    allow_many_files()
    sockets = [bind_socket(settings.host, settings.port)]
    app = build_app(settings)
    config = uvicorn.Config(
        app,
        root_path=settings.root_path,
        log_config=None,  # uvicorn logs through the root logger
        log_level="warning",
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=CLOSE_TIMEOUT,
        # Also how many connections are accepted before any of them is looked at.
        backlog=min(2048, num_connectable() // 4),
    )
    Server(config, app.state.service).run(sockets)
    flush_log()
    # A loading model cannot be interrupted, and torch would abort at interpreter exit.
    leave(0)


if __name__ == "__main__":
    main()
