"""The answer of /v1/messages, whole and as events."""

import json
import uuid
from typing import Any

from pydantic import BaseModel

from engine import ChatModel, Delta, Prompt
from serving.dialects import Dialect, ErrorDetail
from serving.messages import MessagesRequest
from serving.parts import Choice, Part, PartEvent, PartStream, Reply, output_parser
from serving.thought_code import PREFIX, encode_thought

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "overloaded_error",
}


class MessagesError(BaseModel):
    """The body of an error, in Anthropic's shape."""

    class Detail(BaseModel):
        type: str
        message: str

    type: str
    error: Detail
    request_id: str


def _spell_messages_error(error: ErrorDetail) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error")
    detail: dict[str, Any] = {"type": kind, "message": error.message}
    if error.details:
        detail["details"] = error.details
    return {"type": "error", "error": detail, "request_id": error.request_id}


ANTHROPIC = Dialect(
    MessagesError,
    _spell_messages_error,
    keepalive='event: ping\ndata: {"type": "ping"}\n\n',
    end="",
    names_events=True,
    request_id_header="request-id",
)


_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


class MessagesReply(Reply):
    """Blocks of thinking, text and calls."""

    def __init__(self, model: ChatModel, body: MessagesRequest, prompts: list[Prompt]):
        self.model, self.body, self.prompt = model, body, prompts[0]
        self.stream = PartStream(output_parser(model, self.prompt))
        self.id = f"msg_{uuid.uuid4().hex[:24]}"
        self.has_begun = False

    def take(self, delta: Delta, choice: Choice) -> None:
        self.stream.push(delta, choice)

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        # A call that was cut off is none that a client should run.
        content = [self._block(part) for part in self.stream.parts if part.is_whole]
        return self._message(choices[0], content, self._end(choices[0]))

    def events(self, delta: Delta, choice: Choice) -> list[dict[str, Any]]:
        parts = self.stream.push(delta, choice)
        events = [event for part in parts for event in self._events(part)]
        if self.has_begun:
            return events
        self.has_begun = True
        message = self._message(choice, [], {"stop_reason": None, "stop_sequence": None})
        return [{"type": "message_start", "message": message}, *events]

    def final_events(self, choices: list[Choice]) -> list[dict[str, Any]]:
        usage = self._usage(choices[0])
        end = {"type": "message_delta", "delta": self._end(choices[0]), "usage": usage}
        return [end, {"type": "message_stop"}]

    def _events(self, event: PartEvent) -> list[dict[str, Any]]:
        """The events for one of a part's."""
        part, at = event.part, {"index": event.part.index}
        if event.kind == "begin":
            begun = self._block(Part(part.kind, part.index, part.name, part.call_id))
            return [{"type": "content_block_start", **at, "content_block": begun}]
        stop = {"type": "content_block_stop", **at}
        if event.kind == "more":
            told = self._delta(part, event.text)
        elif part.kind == "thought":
            told = {"type": "signature_delta", "signature": self._signature(part)}
        else:
            return [stop]
        deltas = [{"type": "content_block_delta", **at, "delta": told}] if told else []
        return deltas if event.kind == "more" else [*deltas, stop]

    def _delta(self, part: Part, text: str) -> dict[str, Any] | None:
        if part.kind == "call":
            return {"type": "input_json_delta", "partial_json": text}
        if part.kind == "text":
            return {"type": "text_delta", "text": text}
        return None if self.body.hides_thoughts else {"type": "thinking_delta", "thinking": text}

    def _block(self, part: Part) -> dict[str, Any]:
        """A part as a block, or one that has not begun as an empty one."""
        if part.kind == "text":
            # Without citations, not with null, which AI SDK refuses.
            return {"type": "text", "text": part.text}
        if part.kind == "call":
            call = json.loads(part.text or "{}")
            return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": call}
        shown = "" if self.body.hides_thoughts else part.text
        signature = self._signature(part) if part.text else ""
        return {"type": "thinking", "thinking": shown, "signature": signature}

    def _signature(self, part: Part) -> str:
        """The thought itself where it is not shown, so that it comes back with the next turn."""
        return encode_thought(part.text) if self.body.hides_thoughts else PREFIX

    def _message(
        self, choice: Choice, content: list[dict[str, Any]], end: dict[str, Any]
    ) -> dict[str, Any]:
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model.name}
        return message | {"content": content, **end, "usage": self._usage(choice)}

    def _end(self, choice: Choice) -> dict[str, Any]:
        """Why the answer ended: by the context, if that has less room than was asked for."""
        reason = _STOP_REASONS[choice.finish_reason or "stop"]
        asked = self.body.max_new_tokens or 0
        if reason == "max_tokens" and not 0 < asked <= self.prompt.params.max_new_tokens:
            reason = "model_context_window_exceeded"
        if choice.stop_string is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": choice.stop_string}

    def _usage(self, choice: Choice) -> dict[str, Any]:
        return {
            "input_tokens": choice.prompt_tokens - choice.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.cached_tokens,
            "output_tokens": choice.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.stream.thought_tokens},
        }
