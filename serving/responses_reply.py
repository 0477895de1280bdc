"""The answer of /v1/responses, whole and as events."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from engine import ChatModel, Delta, Prompt, Token
from serving.dialects import Dialect, OpenAIError, spell_openai_error
from serving.openai_shared import spell_logprobs
from serving.parts import Choice, Part, PartEvent, PartStream, Reply, output_parser
from serving.responses import ResponsesRequest
from serving.responses_tools import InputDecoder
from serving.thought_code import encode_thought

RESPONSES = Dialect(OpenAIError, spell_openai_error, names_events=True)
# Of the items' ids, each with 24 hexadecimal digits behind it.
_PREFIXES = {
    "reasoning": "rs",
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "tool_search_call": "tsc",
}

Event = dict[str, Any]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


class Item:
    """A part of the answer as an item of the output, and the events that tell of it."""

    def __init__(self, part: Part, body: ResponsesRequest, model: ChatModel):
        self.part, self.model = part, model
        tool = body.toolbox.tools.get(part.name) if part.kind == "call" else None
        kinds = {"thought": "reasoning", "text": "message", "call": "function_call"}
        self.kind = kinds[part.kind]
        if tool and tool.kind != "function":
            self.kind = "custom_tool_call" if tool.kind == "custom" else "tool_search_call"
        self.input = InputDecoder() if self.kind == "custom_tool_call" else None
        self.names = {"name": tool.name if tool else part.name}
        if tool and tool.namespace:
            self.names["namespace"] = tool.namespace
        self.id = _new_id(_PREFIXES[self.kind])
        self.value: dict[str, Any] = self.spelled("in_progress")

    @property
    def text(self) -> str:
        return self.input.text if self.input else self.part.text

    def spelled(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        part, begins = self.part, status == "in_progress"
        item: dict[str, Any] = {"type": self.kind, "id": self.id}
        if self.kind == "reasoning":
            content = [] if begins else [{"type": "reasoning_text", "text": part.text}]
            code = None if begins else encode_thought(part.text)
            item |= {"summary": [], "content": content, "encrypted_content": code}
        elif self.kind == "message":
            content = [] if begins else [self.text_part(part.text, part.tokens)]
            item |= {"role": "assistant", "content": content}
        else:
            item |= {"call_id": part.call_id, **self.names}
            if self.kind == "custom_tool_call":
                return item | {"input": self.text}
            if self.kind == "function_call":
                item["arguments"] = part.text
            else:
                del item["name"]
                arguments = json.loads(part.text) if part.is_whole else {}
                item |= {"execution": "client", "arguments": arguments}
        return item | {"status": status}

    def text_part(self, text: str, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        logprobs = spell_logprobs(self.model, tokens)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def begin(self) -> list[Event]:
        events: list[Event] = [{"type": "response.output_item.added", "item": self.value}]
        if self.kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        elif self.kind == "message":
            part = self.text_part("")
        else:
            return events
        return [*events, {"type": "response.content_part.added", "content_index": 0, "part": part}]

    def more(self, text: str, tokens: Sequence[Token]) -> list[Event]:
        if self.input:
            text = self.input.push(text)
        if not text or self.kind == "tool_search_call":
            return []
        event: Event = {"type": f"response.{self._stem}.delta", "delta": text}
        if self.part.kind != "call":
            event["content_index"] = 0
        if self.kind == "message":
            event["logprobs"] = self._logprobs(tokens)
        return [event]

    def end(self) -> list[Event]:
        self.value = self.spelled("completed" if self.part.is_whole else "incomplete")
        done: Event = {"type": "response.output_item.done", "item": self.value}
        if self.kind == "tool_search_call":
            return [done]
        event: Event = {"type": f"response.{self._stem}.done"}
        if self.part.kind == "call":
            last = {"input": self.text} if self.input else {"arguments": self.text}
            return [event | last, done]
        event |= {"content_index": 0, "text": self.text}
        if self.kind == "message":
            event["logprobs"] = self._logprobs(self.part.tokens)
        part = self.value["content"][0]
        ended: Event = {"type": "response.content_part.done", "content_index": 0, "part": part}
        return [event, ended, done]

    @property
    def _stem(self) -> str:
        """The middle of its events' names."""
        stems = {
            "reasoning": "reasoning_text",
            "message": "output_text",
            "function_call": "function_call_arguments",
        }
        return stems.get(self.kind, "custom_tool_call_input")

    def _logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """In events, tokens are told without their bytes."""
        if not tokens:
            return []
        told = spell_logprobs(self.model, tokens)
        for each in told:
            for scored in (each, *each["top_logprobs"]):
                scored.pop("bytes")
        return told


class ResponsesReply(Reply):
    """Items of reasoning, text and calls."""

    def __init__(self, model: ChatModel, body: ResponsesRequest, prompts: list[Prompt]):
        self.model, self.body, self.prompt = model, body, prompts[0]
        self.stream = PartStream(output_parser(model, self.prompt))
        self.items: list[Item] = []
        self.id, self.created = _new_id("resp"), int(time.time())
        self.num_events = 0
        self.is_kept = False

    def take(self, delta: Delta, choice: Choice) -> None:
        for event in self._parts(delta, choice):
            self._events(event)

    def full_response(self, choices: list[Choice]) -> dict[str, Any]:
        self._end_empty()
        self._keep()
        return self._response(choices[0])

    def _keep(self) -> None:
        """Keep the answer, if it is to be kept and there is room for it."""
        own = self.body.keeper
        if own is None:
            return
        output = [item.value for item in self.items]
        self.is_kept = own.answers.keep(
            own.owner, self.id, self.body.previous_response_id, self.body.whole_items, output
        )

    def events(self, delta: Delta, choice: Choice) -> list[Event]:
        events = self._begin()
        for part in self._parts(delta, choice):
            events += self._events(part)
        return self._numbered(events)

    def final_events(self, choices: list[Choice]) -> list[Event]:
        events = self._end_empty()
        self._keep()
        response = self._response(choices[0])
        events.append({"type": f"response.{response['status']}", "response": response})
        return self._numbered(events)

    def failure(self, error: dict[str, Any]) -> list[Event]:
        told = {"code": "server_error", "message": error["error"]["message"]}
        response = self._response(None) | {"status": "failed", "error": told}
        events = [*self._begin(), {"type": "response.failed", "response": response}]
        return self._numbered(events)

    def _begin(self) -> list[Event]:
        if self.num_events:
            return []
        response = self._response(None)
        kinds = ("response.created", "response.in_progress")
        return [{"type": kind, "response": response} for kind in kinds]

    def _parts(self, delta: Delta, choice: Choice) -> list[PartEvent]:
        parts = self.stream.push(delta, choice)
        return [] if self.body.is_probe else parts

    def _events(self, event: PartEvent) -> list[Event]:
        """What is told of one event of a part's."""
        if event.kind == "begin":
            self.items.append(Item(event.part, self.body, self.model))
        item = self.items[event.part.index]
        if event.kind == "begin":
            told = item.begin()
        elif event.kind == "more":
            told = item.more(event.text, event.tokens)
        else:
            told = item.end()
        for each in told:
            each["output_index"] = event.part.index
            if "item" not in each:
                each["item_id"] = item.id
        return told

    def _end_empty(self) -> list[Event]:
        """An answer without anything is an empty text."""
        if self.items:
            return []
        part = Part("text", 0, is_whole=True)
        events = self._events(PartEvent("begin", part))
        return events + self._events(PartEvent("end", part))

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event["sequence_number"] = self.num_events
            self.num_events += 1
        return events

    def _response(self, choice: Choice | None) -> dict[str, Any]:
        """The object around the items; without a choice, as it is at the beginning."""
        body, params = self.body, self.prompt.params
        is_cut = choice is not None and choice.finish_reason == "length" and not body.is_probe
        status = "in_progress" if choice is None else "incomplete" if is_cut else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self.model.name,
            "previous_response_id": body.previous_response_id,
            "instructions": body.instructions,
            "output": [item.value for item in self.items] if choice else [],
            "error": None,
            "tools": [tool for tool in body.tools if body.toolbox.has(tool)],
            "tool_choice": body.tool_choice or "auto",
            "truncation": body.truncation or "disabled",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": {"format": body.text_format},
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "top_logprobs": body.top_logprobs or 0,
            "temperature": params.temperature,
            "reasoning": {"effort": body.effort or None, "summary": None},
            "usage": self._usage(choice) if choice else None,
            "max_output_tokens": body.max_new_tokens,
            "max_tool_calls": None,
            "store": self.is_kept,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }

    def _usage(self, choice: Choice) -> dict[str, Any]:
        inputs, outputs = choice.prompt_tokens, choice.completion_tokens
        return {
            "input_tokens": inputs,
            "input_tokens_details": {
                "cached_tokens": choice.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": outputs,
            "output_tokens_details": {"reasoning_tokens": self.stream.thought_tokens},
            "total_tokens": inputs + outputs,
        }
