"""What responses look like, as pydantic models for the docs."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from engine import FinishReason


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


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str


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
    usage: dict[str, Any]
    system_fingerprint: str
