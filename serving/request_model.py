"""What all bodies share: every field honoured or refused, and how an answer is sampled."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from pydantic import (
    AliasChoices,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from engine import ChatModel, InvalidInput, Prompt, SamplingParams
from serving.fields import Biases, EndIds, StopStrings, StrictModel, Text
from serving.kept import OwnAnswers
from serving.unknown_fields import IgnoredFields, asks_for_nothing, is_reported, refusal_of

LENGTH_NAMES = ("max_length", "max_new_tokens", "max_tokens", "max_completion_tokens", "n_predict")


def validation_error(error: ValidationError) -> InvalidInput:
    """Turn pydantic's first error into one sentence."""
    first = error.errors(include_url=False)[0]
    # Without the union's tags.
    path = [part for part in first["loc"] if part not in ("pairs", "turns", "tuple[int, ...]")]
    if not path:
        return InvalidInput('the body must be a JSON object, such as {"prompt": "hello"}')
    name = str(path[0])
    for part in path[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    if first["type"] == "missing":
        return InvalidInput(f"{name} is missing", str(path[0]))
    message = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub("^(Input|List|String|Tuple|Value) should", "must", message)
    message = message.replace("a valid tuple", "a list")
    return InvalidInput(f"{name} {message[0].lower()}{message[1:]}", str(path[0]))


@dataclass(frozen=True)
class BodyContext:
    """What a body is read with: where to note what is left out, and the answers of its key."""

    ignored: IgnoredFields = field(default_factory=IgnoredFields)
    answers: OwnAnswers | None = None


class RequestModel(StrictModel):
    """A body of which every field is honoured, or refused by its name, or cannot matter."""

    # The fields that stand for arguments of the engine's with other names.
    field_names: ClassVar[dict[str, str]] = {}

    model: Text | None = Field(None, description="absent is the one that is served")

    _sent: dict[str, str] = PrivateAttr(default_factory=dict)  # a field's name in the request
    _ignored: IgnoredFields = PrivateAttr(default_factory=IgnoredFields)
    _answers: OwnAnswers | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def check_body(
        cls, body: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if not isinstance(body, dict):
            return validate(body)
        context = info.context if isinstance(info.context, BodyContext) else BodyContext()
        sent = cls.names_sent(body, context.ignored)
        request = validate({name: body[name] for name in sent.values()})
        request._sent = {field: name for field, name in sent.items() if body[name] is not None}
        request._ignored, request._answers = context.ignored, context.answers
        request.check()
        return request

    @classmethod
    def names_sent(cls, body: dict[str, Any], ignored: IgnoredFields) -> dict[str, str]:
        """By which name each field is in a body. Raises InvalidInput for what is none.

        A field may be there by several names if they say the same.
        """
        names: dict[str, str] = cls.names()
        sent: dict[str, str] = {}
        for name, value in body.items():
            if name not in names:
                cls.check_unknown(name, value, ignored)
                continue
            first = sent.setdefault(names[name], name)
            # NaN is not even equal to itself.
            if name == first or value is None or value == body[first]:
                continue
            if body[first] is not None:
                raise InvalidInput(f"{first} and {name} mean the same; send one of them", name)
            sent[names[name]] = name
        return sent

    @classmethod
    def check_unknown(cls, name: str, value: Any, ignored: IgnoredFields) -> None:
        """Raise InvalidInput for a field that the call does not have, if it asks for something."""
        if is_reported(name, value):
            ignored.add(name)
        elif not asks_for_nothing(name, value):
            raise refusal_of(name, cls.names())

    def check(self) -> None:
        """What must hold between the fields. Raises InvalidInput."""

    def field_of(self, argument: str | None) -> str | None:
        """The request's own name for an argument of the engine's."""
        field = self.field_names.get(argument or "", argument)
        return self._sent.get(argument or "") or self._sent.get(field or "") or field


class InstantRequest(RequestModel):
    """A body whose response needs no generation."""

    def result(self, model: ChatModel) -> dict[str, Any]:
        """The response. Raises InvalidInput where the model has none."""
        raise NotImplementedError


class SamplingFields(RequestModel):
    """SamplingParams parameters of a request; absent or null means the model's default."""

    stream: bool | None = Field(None, description="answer with server-sent events")

    max_new_tokens: int | None = Field(
        None,
        ge=-1,
        validation_alias=AliasChoices(*LENGTH_NAMES),
        description=f"most new tokens, -1 is no limit; also {', '.join(LENGTH_NAMES[1:])}",
    )
    do_sample: bool | None = Field(None, description="false is greedy, as temperature 0")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy")
    top_k: int | None = Field(None, ge=-1, le=10**6, description="0 or -1 is off")
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="as in OpenAI's API")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="as in OpenAI's API")
    seed: int | None = Field(
        None,
        ge=-1,
        lt=2**63,
        validation_alias=AliasChoices("seed", "random_seed"),
        description="-1 is none",
    )
    stop: StopStrings | None = Field(
        None,
        validation_alias=AliasChoices("stop", "stop_strings"),
        description="a text, or several, that ends the answer",
    )
    stop_token_ids: EndIds | None = Field(None, description="further token ids that end it")
    ignore_eos: bool | None = Field(None, description="only the length, or a stop, ends it")
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=10**7,
        validation_alias=AliasChoices("min_tokens", "min_new_tokens"),
        description="no end token before so many",
    )
    logit_bias: Biases | None = Field(None, description="token ids and -100 to 100, as OpenAI's")

    def check(self) -> None:
        super().check()
        length = self.field_of("max_new_tokens")
        if self.max_new_tokens == 0 and not self.may_be_empty:
            raise InvalidInput(f"{length} must be at least 1, or -1 for no limit", length)
        if self.do_sample and self.temperature == 0:
            raise InvalidInput("do_sample is true, but temperature 0 is greedy", "do_sample")

    @property
    def may_be_empty(self) -> bool:
        """Whether an answer of no tokens has a meaning."""
        return False

    @property
    def has_no_limit(self) -> bool:
        """Whether the answer may explicitly be as long as the context allows."""
        return self.max_new_tokens == -1

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return 1

    @property
    def has_schema(self) -> bool:
        """Whether the answer is held to JSON schemas, which are to be compiled."""
        return False

    def overrides(self) -> dict[str, Any]:
        """The sampling parameters that the request sets, by their names in SamplingParams."""
        names = {parameter.name for parameter in fields(SamplingParams)}
        given = self.model_dump(include=names, exclude_none=True)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        for name in ("max_new_tokens", "seed"):
            if given.get(name) == -1:
                del given[name]
        if self.do_sample is False:
            given["temperature"] = 0.0
        return given

    def check_ends_by_itself(self) -> None:
        """Raise InvalidInput if the request says when an answer ends that a grammar ends."""
        if self.ignore_eos or self.min_tokens:
            name = "ignore_eos" if self.ignore_eos else self.field_of("min_tokens")
            raise InvalidInput(
                f"{name} cannot go with tools or a JSON answer, which ends by itself", name
            )

    def prepare(self, model: ChatModel) -> list[Prompt]:
        """Tokenize the request's prompts. Raises InvalidInput if it cannot be served."""
        prompts = self.tokenize(model)
        if self.do_sample and prompts[0].params.temperature == 0:
            raise InvalidInput(
                "do_sample is true, but this model is greedy by default; send a temperature too",
                "do_sample",
            )
        return prompts

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        """The prompts, with their sampling settled."""
        raise NotImplementedError
