"""How each dialect words what is no answer: errors, signs of life, and the end of a stream."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel


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


class ErrorDetail(NamedTuple):
    """What is told of an error, in whichever shape."""

    status: int
    type: str
    code: str
    message: str
    param: str | None
    request_id: str
    details: dict[str, Any] | None = None  # what an SDK looks for


class Dialect(NamedTuple):
    """What the endpoints of one API have in common, beside their bodies."""

    error_model: type[BaseModel]
    spell_error: Callable[[ErrorDetail], dict[str, Any]]
    # In a stream: what keeps an idle connection alive, and what comes behind the last event.
    keepalive: str = ": keep-alive\n"
    end: str = "data: [DONE]\n\n"
    names_events: bool = False  # in a stream, by their type
    request_id_header: str = "X-Request-ID"  # where the SDKs look for it too


def local_time() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def spell_openai_error(error: ErrorDetail) -> dict[str, Any]:
    detail = {"message": error.message, "type": error.type}
    return {"error": detail | {"param": error.param, "code": error.code}}


def _spell_classic_error(error: ErrorDetail) -> dict[str, Any]:
    return spell_openai_error(error) | {"status": error.status, "time": local_time()}


CLASSIC = Dialect(ErrorBody, _spell_classic_error)
OPENAI = Dialect(OpenAIError, spell_openai_error)
