"""Requests as pydantic models; what a request is to the engine is settled here."""

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from engine import ChatModel, ContextTooLong, InvalidInput, Message, Prompt, SamplingParams
from serving.field_types import (
    MAX_TEXT,
    MAX_TURNS,
    Biases,
    ClosedModel,
    Content,
    EndIds,
    History,
    HistoryMessage,
    StopStrings,
    StrictModel,
    TemplateKwargs,
    Text,
    TextToCount,
    check_json,
    history_shape,
    join_text_parts,
    parse_prompts,
)
from serving.tool_fields import NamedTool, Tool, ToolCalls, ToolChoice, Tools, check_arguments
from serving.unknown_fields import asks_for_nothing, printable, refusal_of

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


class RequestModel(StrictModel):
    """A body of which every field is honoured, or refused by its name, or cannot matter."""

    # The fields that stand for arguments of the engine's with other names.
    field_names: ClassVar[dict[str, str]] = {}

    model: Text | None = Field(None, description="absent is the one that is served")

    _sent: dict[str, str] = PrivateAttr(default_factory=dict)  # a field's name in the request

    @model_validator(mode="wrap")
    @classmethod
    def check_body(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return validate(body)
        sent = cls.names_sent(body)
        request = validate({name: body[name] for name in sent.values()})
        request._sent = {field: name for field, name in sent.items() if body[name] is not None}
        request.check()
        return request

    @classmethod
    def names_sent(cls, body: dict[str, Any]) -> dict[str, str]:
        """By which name each field is in a body. Raises InvalidInput for what is none.

        A field may be there by several names if they say the same.
        """
        names: dict[str, str] = cls.names()
        sent: dict[str, str] = {}
        for name, value in body.items():
            if name not in names:
                if not asks_for_nothing(name, value):
                    raise refusal_of(name, names)
                continue
            first = sent.setdefault(names[name], name)
            # NaN is not even equal to itself.
            if name == first or value is None or value == body[first]:
                continue
            if body[first] is not None:
                raise InvalidInput(f"{first} and {name} mean the same; send one of them", name)
            sent[names[name]] = name
        return sent

    def check(self) -> None:
        """What must hold between the fields. Raises InvalidInput."""

    def field_of(self, argument: str | None) -> str | None:
        """The request's own name for an argument of the engine's."""
        field = self.field_names.get(argument or "", argument)
        return self._sent.get(argument or "") or self._sent.get(field or "") or field


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


class ChatRequest(SamplingFields):
    """The body of POST /. `max_length` has always counted new tokens only."""

    field_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_length",
        "messages": "history",
        "template_kwargs": "chat_template_kwargs",
    }

    prompt: Text = Field(description="the user's text")
    history: History | None = Field(None, description="earlier turns, pairs or messages")
    system: Text | None = Field(None, description="a system text for the model")
    truncate: bool | None = Field(None, description="drop the oldest turns that do not fit")
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="variables of the model's chat template"
    )

    def check(self) -> None:
        super().check()
        if not self.prompt.strip():
            raise InvalidInput("prompt is empty; send the user's text", "prompt")
        if self.system is not None and any(m["role"] == "system" for m in self._past()):
            raise InvalidInput("system is given here and in history; send one of them", "system")

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        try:
            prompt = model.prepare(
                self.messages(),
                self.overrides(),
                bool(self.truncate),
                whole_context=self.has_no_limit,
                template_kwargs=self.chat_template_kwargs,
            )
        except ContextTooLong as error:
            if not self.history or self.truncate:
                raise
            raise ContextTooLong(f'{error}, or send "truncate": true', error.argument) from error
        return [prompt]

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


def check_role(role: Any) -> Any:
    if role == "function":
        raise ValueError('must be "tool" for the result of a tool; "function" is its old name')
    # OpenAI's newer name for the system role.
    return "system" if role == "developer" else role


class OpenAIMessage(ClosedModel):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"annotations": ([],), "function_call": ({},)}

    role: Annotated[
        Literal["system", "user", "assistant", "tool"],
        BeforeValidator(
            check_role,
            json_schema_input_type=Literal["system", "developer", "user", "assistant", "tool"],
        ),
    ]
    content: Annotated[
        Text, BeforeValidator(join_text_parts, json_schema_input_type=Content | None)
    ]
    tool_calls: ToolCalls | None = Field(None, description="of the assistant; content may be null")
    tool_call_id: Text | None = Field(None, description="whose result a tool's message is")
    name: Text | None = Field(None, description="who speaks, for templates that say it")
    reasoning_content: Text | None = Field(
        None,
        validation_alias=AliasChoices("reasoning_content", "reasoning"),
        description="what the assistant thought, for templates that repeat it",
    )
    prefix: bool | None = Field(None, description="of the last one: the answer goes on from it")
    parsed: Any = Field(
        None, exclude=True, description="not read; OpenAI's clients add it to an answer's message"
    )

    @model_validator(mode="before")
    @classmethod
    def check_calls(cls, given: Any) -> Any:
        """Calls are the assistant's, and stand for a content; the results of them name them."""
        if not isinstance(given, dict):
            return given
        if given.get("tool_calls") and given.get("role") != "assistant":
            raise ValueError("has tool_calls, which only the assistant makes")
        if given.get("tool_call_id") is not None and given.get("role") != "tool":
            raise ValueError('has a tool_call_id, so its role must be "tool"')
        if given.get("tool_calls") and given.get("content") is None:
            return given | {"content": ""}
        return given

    def as_turn(self) -> Message:
        """The message for the engine."""
        turn = self.model_dump(exclude={"prefix"}, exclude_none=True)
        if not self.tool_calls:
            turn.pop("tool_calls", None)
        return turn


Turns = Annotated[
    list[OpenAIMessage],
    Field(min_length=1, max_length=MAX_TURNS, fail_fast=True),
    BeforeValidator(check_arguments, json_schema_input_type=list[OpenAIMessage]),
]


class StreamOptions(ClosedModel):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # which changes no answer


Schema = Annotated[dict[str, Any], AfterValidator(check_json)]


class JSONSchema(ClosedModel):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # whatever it says, an answer keeps to its schema
    wanted: Schema = Field(validation_alias="schema")


class ResponseFormat(ClosedModel):
    """https://platform.openai.com/docs/guides/structured-outputs"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None
    # Beside json_object, as in llama.cpp.
    wanted: Schema | None = Field(None, validation_alias="schema")

    def to_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None if any text is allowed."""
        given = self.json_schema.wanted if self.json_schema else self.wanted
        if self.type == "json_object" and self.json_schema is None:
            return {"type": "object"} if given is None else given
        if self.type == "json_schema" and given is not None:
            return given
        if self.type == "json_schema":
            problem = 'response_format needs "json_schema": {"schema": …}'
        elif given is not None:
            problem = f'response_format has a schema; its type is "json_schema", not "{self.type}"'
        else:
            return None
        raise InvalidInput(problem, "response_format")


# Of all tokens of a request's answers, and of its prompts with echo: each takes some 100 bytes.
MAX_LOGPROBS = 2**20


def with_few_logprobs(prompts: list[Prompt], num_answers: int) -> list[Prompt]:
    """The prompts, their answers shortened to what has room if no length was stated.

    Raises InvalidInput if one was stated that would make more than MAX_LOGPROBS.
    """
    params = prompts[0].params
    each = 0 if params.logprobs is None else max(1, params.logprobs)
    each_of_prompt = 0 if params.prompt_logprobs is None else max(1, params.prompt_logprobs)
    most = MAX_LOGPROBS // num_answers - each_of_prompt * sum(len(p.ids) for p in prompts)
    if each * sum(p.params.max_new_tokens for p in prompts) <= most:
        return prompts
    room = most // (max(1, each) * len(prompts))
    if room < 1 or not prompts[0].open_ended:
        raise InvalidInput(
            f"there would be more than {MAX_LOGPROBS:,} logprobs; ask for fewer of them, or for"
            " fewer or shorter answers",
            "logprobs",
        )
    return [
        replace(p, params=replace(p.params, max_new_tokens=min(room, p.params.max_new_tokens)))
        for p in prompts
    ]


class OpenAIRequest(SamplingFields):
    """Fields shared by OpenAI's two endpoints."""

    field_names: ClassVar[dict[str, str]] = {"max_new_tokens": "max_tokens"}

    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="answers to give, computed together")

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options needs stream to be true", "stream_options")

    def prepare(self, model: ChatModel) -> list[Prompt]:
        return with_few_logprobs(super().prepare(model), self.num_answers)

    @property
    def num_answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Conversation(RequestModel):
    """Messages, and how the model's chat template is to render them."""

    tools: Tools | None = Field(None, description="functions that the answer may call")
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="variables of the model's chat template"
    )
    continue_final_message: bool | None = Field(
        None, description="the answer goes on from the last message, the assistant's"
    )
    add_generation_prompt: bool | None = Field(
        None, description="false only with continue_final_message"
    )

    def continues(self, messages: list[OpenAIMessage]) -> bool:
        """Whether the answer goes on from the last message. Raises InvalidInput."""
        if any(message.prefix for message in messages[:-1]):
            raise InvalidInput("only the last message can have prefix", "messages")
        continued = bool(self.continue_final_message or messages[-1].prefix)
        if continued and messages[-1].role != "assistant":
            raise InvalidInput("only a last message of the assistant can be continued", "messages")
        if self.add_generation_prompt is not None and self.add_generation_prompt is continued:
            name = "add_generation_prompt"
            raise InvalidInput(f"{name} is the contrary of continue_final_message", name)
        return continued


class ChatCompletionRequest(Conversation, OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    field_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_tokens",
        "prompt": "messages",
        "schema": "response_format",
        "template_kwargs": "chat_template_kwargs",
    }

    messages: Turns
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: ToolChoice | None = Field(
        None, description="none, auto, required, or the function that must be called"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")

    def check(self) -> None:
        super().check()
        self.check_tools()
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs to be true", "top_logprobs")

    def check_tools(self) -> None:
        """What tools cannot go with, and what cannot go without. Raises InvalidInput."""
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in names:
                raise InvalidInput(
                    f"tool_choice is {printable(name)!r}, which is not in tools", "tool_choice"
                )
        elif self.tool_choice == "required" and not names:
            raise InvalidInput("tool_choice is required, but there are no tools", "tool_choice")
        if not self.usable_tools:
            return
        if self.response_format and self.response_format.type != "text":
            raise InvalidInput("response_format cannot go with tools; send one of them", "tools")
        if self.continues(self.messages):
            raise InvalidInput("an answer with tools cannot go on from the last message", "tools")

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def has_schema(self) -> bool:
        return self.response_format is not None or bool(self.usable_tools)

    def overrides(self) -> dict[str, Any]:
        given = {name: value for name, value in super().overrides().items() if name != "logprobs"}
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        if self.usable_tools:
            # A penalty that a model has by default would keep it from quoting the tools' JSON.
            given.setdefault("repetition_penalty", 1.0)
        return given

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        schema = self.response_format.to_schema() if self.response_format else None
        tools = [tool.model_dump(exclude_none=True) for tool in self.usable_tools]
        if (tools or schema is not None) and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else self.field_of("min_tokens")
            raise InvalidInput(
                f"{name} cannot go with tools or a JSON answer, which ends by itself", name
            )
        prompt = model.prepare(
            [message.as_turn() for message in self.messages],
            self.overrides(),
            whole_context=self.has_no_limit or not model.states_length,
            template_kwargs=self.chat_template_kwargs,
            continue_final=self.continues(self.messages),
            tools=tools,
        )
        if tools:
            return [self._with_tools(model, prompt, tools)]
        return [prompt if schema is None else model.guided(prompt, schema)]

    def _with_tools(self, model: ChatModel, prompt: Prompt, tools: list[Any]) -> Prompt:
        named = isinstance(self.tool_choice, NamedTool)
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            tools = [tool for tool in tools if tool["function"]["name"] == name]
        return model.with_tools(
            prompt,
            tools,
            required=named or self.tool_choice == "required",
            parallel=self.parallel_tool_calls is not False and not named,
        )


MAX_ANSWERS = 128  # to all of a request's prompts


class CompletionRequest(OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(
            parse_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
        ),
    ]
    suffix: Text | None = Field(None, description="fill in what is missing between the two")
    echo: bool | None = Field(None, description="repeat the prompt before the answer")
    logprobs: Annotated[
        int | None, BeforeValidator(lambda value: None if value is False else value)
    ] = Field(None, ge=0, le=20)

    def check(self) -> None:
        super().check()
        if len(self.prompt) * self.num_answers > MAX_ANSWERS:
            raise InvalidInput(f"n for each prompt makes more than {MAX_ANSWERS} answers", "n")
        if self.suffix and self.echo:
            raise InvalidInput("echo cannot go with suffix; leave one of them out", "echo")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise InvalidInput("suffix needs prompt to be a text", "suffix")

    @property
    def may_be_empty(self) -> bool:
        return bool(self.echo)

    def overrides(self) -> dict[str, Any]:
        given = super().overrides()
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = self.logprobs
        return given

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        given = self.overrides()
        return [self._prompt(model, text, given) for text in self.prompt]

    def _prompt(self, model: ChatModel, text: str | list[int], given: dict[str, Any]) -> Prompt:
        # An empty suffix asks a model that fills in for the end of a text, and others for nothing.
        wanted = self.suffix or (self.suffix == "" and model.can_infill and not self.echo)
        if wanted and isinstance(text, str):
            return model.prepare_infill(text, self.suffix or "", given)
        return model.prepare_text(text, given)


MAX_TOKENS = 2**18


class TokenizeRequest(Conversation):
    """A text or messages to count, as in vLLM."""

    field_names: ClassVar[dict[str, str]] = {"template_kwargs": "chat_template_kwargs"}

    prompt: TextToCount | None = None
    messages: Turns | None = None
    add_special_tokens: bool | None = Field(None, description="whether BOS goes before a text")
    return_token_strs: bool | None = Field(None, description="tell the tokens' texts too")

    def check(self) -> None:
        super().check()
        if (self.prompt is None) is (self.messages is None):
            raise InvalidInput("send prompt or messages, one of the two", "prompt")
        if self.messages and self.add_special_tokens:
            raise InvalidInput(
                "add_special_tokens is for prompt; a chat template sets its own",
                "add_special_tokens",
            )
        if self.messages and sum(len(m.content) for m in self.messages) > MAX_TEXT:
            raise InvalidInput(f"messages must have at most {MAX_TEXT} characters", "messages")
        if self.messages is None and self.field_of_conversation():
            name = self.field_of_conversation()
            raise InvalidInput(f"{name} is for messages", name)

    def field_of(self, argument: str | None) -> str | None:
        return super().field_of("messages" if argument == "prompt" and self.messages else argument)

    def field_of_conversation(self) -> str | None:
        """A field that is given and only has a meaning beside messages."""
        return next((name for name in Conversation.model_fields if self._asks(name)), None)

    def _asks(self, name: str) -> bool:
        return name != "model" and getattr(self, name) not in (None, {}, [], False)

    def result(self, model: ChatModel) -> dict[str, Any]:
        """The response. Raises InvalidInput where the model's format refuses the messages."""
        if self.messages:
            ids = model.encode(
                [message.as_turn() for message in self.messages],
                self.chat_template_kwargs,
                continue_final=self.continues(self.messages),
                tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            )
        else:
            ids = model.tokenizer.encode_text(
                self.prompt or "", begin=self.add_special_tokens is not False
            )
        texts = (
            [model.tokenizer.backend.id_to_token(i) for i in ids]
            if self.return_token_strs
            else None
        )
        size = {"count": len(ids), "max_model_len": model.context_length}
        return {**size, "tokens": ids, "token_strs": texts}


class DetokenizeRequest(RequestModel):
    """Token ids to spell, as in vLLM."""

    tokens: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS, fail_fast=True)
    ]

    def result(self, model: ChatModel) -> dict[str, Any]:
        """The response. Raises InvalidInput for an id that the model does not have."""
        return {"prompt": model.decode(self.tokens)}
