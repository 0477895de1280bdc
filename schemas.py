"""Requests and responses as pydantic models; aliases and legacy shapes are resolved here."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from engine import (
    ChatModel,
    ContextTooLong,
    FinishReason,
    InvalidInput,
    Message,
    Prompt,
    SamplingParams,
)

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


def check_pair(pair: Any) -> Any:
    # Before its items are looked at, which may be a million.
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError('must be a ["question", "answer"] pair')
    return pair


Pair = Annotated[
    list[Text],
    Field(min_length=2, max_length=2, fail_fast=True),
    BeforeValidator(check_pair, json_schema_input_type=list[str]),
]


def history_shape(history: Any) -> str | None:
    """Tell pairs from messages by the items' types; None if the history is neither."""
    if not isinstance(history, list):
        return None
    kinds = {type(turn) for turn in history}
    if kinds <= {list}:
        return "pairs"
    if kinds <= {dict, HistoryMessage}:
        return "turns"
    return None


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
    Field(max_length=16, fail_fast=True),
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


def validation_error(error: ValidationError) -> InvalidInput:
    """Turn pydantic's first error into one sentence."""
    first = error.errors(include_url=False)[0]
    # Without the union's tags.
    path = [part for part in first["loc"] if part not in ("pairs", "turns")]
    if not path:
        return InvalidInput('the body must be a JSON object, such as {"prompt": "hello"}')
    name = str(path[0])
    for part in path[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    if first["type"] == "missing":
        return InvalidInput(f"{name} is missing", str(path[0]))
    message = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub("^(Input|List|Tuple|Value) should", "must", message)
    return InvalidInput(f"{name} {message[0].lower()}{message[1:]}", str(path[0]))


class SamplingFields(StrictModel):
    """SamplingParams parameters of a request; absent or null means the model's default."""

    unsupported: ClassVar[tuple[str, ...]] = UNSUPPORTED
    # The fields that stand for arguments of the engine's with other names.
    field_names: ClassVar[dict[str, str]] = {"max_new_tokens": "max_length"}

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

    _length_name: str | None = PrivateAttr(None)  # which of LENGTH_NAMES the request has

    @model_validator(mode="wrap")
    @classmethod
    def check_body(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return validate(body)
        for name in cls.unsupported:
            if body.get(name) not in (None, False, [], {}, NEUTRAL.get(name)):
                raise InvalidInput(f"{name} is not supported by this call; leave it out", name)
        lengths = [name for name in LENGTH_NAMES if body.get(name) is not None]
        if len(lengths) > 1:
            names = " and ".join(lengths)
            raise InvalidInput(f"{names} mean the same; send one of them", lengths[1])
        # AliasChoices takes the first alias that is present, even if it is null.
        request = validate(
            {k: v for k, v in body.items() if k not in LENGTH_NAMES or v is not None}
        )
        if lengths:
            request._length_name = lengths[0]
        return request

    def field_of(self, argument: str | None) -> str | None:
        """The request's own name for an argument of the engine's."""
        if argument == "max_new_tokens" and self._length_name:
            return self._length_name
        return self.field_names.get(argument or "", argument)

    @property
    def model_name(self) -> str | None:
        """The model that is asked for; None is the one that is served."""
        return None

    @property
    def num_answers(self) -> int:
        return 1

    @property
    def has_schema(self) -> bool:
        """Whether the answer is held to a JSON schema, which is to be compiled."""
        return False

    def overrides(self) -> dict[str, Any]:
        """The sampling parameters that the request sets, by their names in SamplingParams."""
        names = {parameter.name for parameter in fields(SamplingParams)}
        return self.model_dump(include=names, exclude_none=True)

    def prepare(self, model: ChatModel) -> Prompt:
        """Tokenize the request. Raises InvalidInput if it cannot be served."""
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
            raise InvalidInput("prompt is empty; send the user's text", "prompt")
        if self.system is not None and any(m["role"] == "system" for m in self._past()):
            raise InvalidInput("system is given here and in history; send one of them", "system")
        return self

    def prepare(self, model: ChatModel) -> Prompt:
        try:
            return model.prepare(self.messages(), self.overrides(), bool(self.truncate))
        except ContextTooLong as error:
            if not self.history or self.truncate:
                raise
            raise ContextTooLong(f'{error}, or send "truncate": true', error.argument) from error

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
            raise InvalidInput(
                'response_format needs "json_schema": {"schema": …}', "response_format"
            )
        given = self.json_schema.wanted if self.json_schema else {}
        return {"text": None, "json_object": {"type": "object"}, "json_schema": given}[self.type]


class OpenAIRequest(SamplingFields):
    """Fields shared by OpenAI's two endpoints."""

    field_names = {"max_new_tokens": "max_tokens"}

    model: Text | None = Field(None, description="absent is the one that is served")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="answers to give, computed together")

    @property
    def model_name(self) -> str | None:
        return self.model

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    unsupported = tuple(name for name in UNSUPPORTED if name != "response_format")
    field_names = {
        "max_new_tokens": "max_tokens",
        "prompt": "messages",
        "schema": "response_format",
    }

    messages: list[OpenAIMessage] = Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    @property
    def has_schema(self) -> bool:
        return self.response_format is not None

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
