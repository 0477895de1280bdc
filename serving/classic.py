"""POST /: prompt, history and sampling fields in; response, history, status and time out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from engine import ChatModel, ContextTooLong, Delta, FinishReason, InvalidInput, Message, Prompt
from serving.dialects import local_time
from serving.fields import History, HistoryMessage, TemplateKwargs, Text, history_shape
from serving.parts import Choice, Reply, usage_of
from serving.request_model import SamplingFields


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


@dataclass
class ClassicReply(Reply):
    """The deltas as they come, then the full response."""

    model: ChatModel
    body: ChatRequest
    prompts: list[Prompt]

    def events(self, delta: Delta, choice: Choice) -> list[dict[str, Any]]:
        return [{"delta": delta.text}] if delta.text else []

    def final_events(self, choices: list[Choice]) -> list[dict[str, Any]]:
        return [self.full_response(choices)]

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        response = {
            "response": choices[0].text,
            "history": self.body.with_answer(choices[0].text),
            "status": 200,
            "time": local_time(),
            "finish_reason": choices[0].finish_reason,
            "usage": usage_of(choices),
        }
        if self.body.truncate:
            response["dropped_turns"] = self.prompts[0].dropped_turns
        return response
