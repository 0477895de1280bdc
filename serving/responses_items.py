"""Input items of the Responses API, read into the engine's turns.

https://platform.openai.com/docs/api-reference/responses
"""

import json
from typing import Any

from engine import Message
from serving.fields import MAX_PARTS
from serving.lenient import ObjectReader
from serving.message_blocks import IMAGE_PLACEHOLDER, READS_TEXT
from serving.responses_tools import Toolbox
from serving.thought_code import ThoughtDecoder
from serving.tool_fields import MAX_CALLS_IN_ALL, parse_arguments
from serving.unknown_fields import IgnoredFields

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_OTHER_PARTS = ("input_image", "input_file", "input_audio")
# Calls of tools that other servers have, and under which name each has its arguments.
_OTHER_CALLS = {
    "local_shell_call": "action",
    "shell_call": "action",
    "apply_patch_call": "operation",
    "tool_search_call": "arguments",
}
_OUTPUTS = {
    "function_call_output",
    "custom_tool_call_output",
    *(f"{c}_output" for c in _OTHER_CALLS),
}
# What a server did by itself, as it stands in the histories of other servers.
_SERVER_ITEMS = (
    "web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call",
    "computer_call", "mcp_", "program",
)  # fmt: skip
# Fields of any item that cannot change an answer.
_INERT = ("id", "status", "phase", "created_by", "agent", "caller")


class ItemReader:
    """Reads input items one after the other."""

    def __init__(self, ignored: IgnoredFields, toolbox: Toolbox):
        self.ignored, self.toolbox = ignored, toolbox
        self.turns: list[Message] = []
        self.effort = ""  # as the last item says that changes it
        self.thoughts = ThoughtDecoder()
        self._call_ids: set[str] = set()
        self._answer: Message | None = None  # the turn of the assistant's that goes on

    def add(self, value: Any, path: str) -> None:
        """Read the next item. Raises InvalidInput."""
        item = ObjectReader(value, path, self.ignored)
        kind = item.text("type", "message")
        if kind == "message":
            self._message(item)
        elif kind == "reasoning":
            self._reasoning(item)
        elif kind in ("function_call", "custom_tool_call") or kind in _OTHER_CALLS:
            self._call(kind, item)
        elif kind in _OUTPUTS or kind == "tool_search_output":
            self._output(kind, item)
        elif kind == "additional_tools":
            for at, tool in enumerate(item.items("tools", MAX_PARTS)):
                self.toolbox.add(tool, f"{path}.tools[{at}]", is_named=True)
        elif kind == "configuration_update":
            self._configuration(item)
        elif kind.startswith(_SERVER_ITEMS):
            item.report()
        else:
            raise item.error(f"is of type {kind[:64]!r}, which is not supported; leave it out")

    def _message(self, item: ObjectReader) -> None:
        role = _ROLES.get(item.text("role"))
        if role is None:
            raise item.error(f"must be one of {', '.join(_ROLES)}", "role")
        text = self._content(item, "content", is_result=False)
        item.done(*_INERT)
        if role != "assistant":
            self._add({"role": role, "content": text})
        elif self._answer is None or self._answer["content"] or "tool_calls" in self._answer:
            self._answer = self._add({"role": role, "content": text})
        else:
            self._answer["content"] = text

    def _add(self, turn: Message) -> Message:
        self.turns.append(turn)
        self._answer = None
        return turn

    def _content(self, item: ObjectReader, name: str, is_result: bool) -> str:
        """A text, or its parts; an image in a result leaves a placeholder."""
        content = item.take(name)
        if isinstance(content, str) or content is None:
            item.fields[name] = content or ""
            return item.text(name)
        if not isinstance(content, list) or len(content) > MAX_PARTS:
            raise item.error(f"must be a text, or at most {MAX_PARTS} parts", name)
        texts = []
        for at, value in enumerate(content):
            part = ObjectReader(value, f"{item.path}.{name}[{at}]", self.ignored)
            kind = part.text("type")
            if kind in _TEXT_PARTS:
                texts.append(part.text(_TEXT_PARTS[kind]))
                part.done("annotations", "logprobs", "prompt_cache_breakpoint")
            elif kind in _OTHER_PARTS and is_result:
                part.report()
                texts.append(IMAGE_PLACEHOLDER)
            elif kind in _OTHER_PARTS:
                raise part.error(READS_TEXT)
            else:
                raise part.error(f"is of type {kind[:64]!r}, which is not supported; leave it out")
        return "\n".join(texts)

    def _begun_answer(self) -> Message:
        """The assistant's turn that goes on, or a new one."""
        if self._answer is None:
            self._answer = self._add({"role": "assistant", "content": ""})
        return self._answer

    def _reasoning(self, item: ObjectReader) -> None:
        parts = []
        for at, value in enumerate(item.items("content", MAX_PARTS)):
            part = ObjectReader(value, f"{item.path}.content[{at}]", self.ignored)
            part.text("type")
            parts.append(part.text("text"))
            part.done()
        code = item.text("encrypted_content", "")
        item.done("summary", *_INERT)
        thought = "\n\n".join(parts) or self.thoughts.decode(code)
        if not thought:
            if code:  # another server's
                item.report("encrypted_content")
            return
        if self._answer is not None and set(self._answer) != {"role", "content"}:
            self._answer = None
        if self._answer is not None and self._answer["content"]:
            self._answer = None
        self._answer = self._begun_answer()
        self._answer["reasoning_content"] = thought

    def _call(self, kind: str, item: ObjectReader) -> None:
        name = kind.removesuffix("_call")
        arguments: Any
        if kind == "custom_tool_call":
            name, arguments = item.text("name"), {"input": item.text("input", "")}
        elif kind == "function_call":
            name = item.text("name")
            spelled = item.text("arguments", "")
            arguments = item.checked("arguments", spelled or "{}", str, "a text", parse_arguments)
        else:
            arguments = item.json_object(_OTHER_CALLS[kind], {})
        if namespace := item.text("namespace", ""):
            name = f"{namespace}.{name}"
        call_id = item.text("call_id", item.text("id", ""))
        item.done("parsed_arguments", "execution", *_INERT)
        self._call_ids.add(call_id)
        if len(self._call_ids) > MAX_CALLS_IN_ALL:
            raise item.error(f"is one of more than {MAX_CALLS_IN_ALL} calls; send fewer")
        function = {"name": name, "arguments": arguments}
        answer = self._begun_answer()
        calls = answer.setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def _output(self, kind: str, item: ObjectReader) -> None:
        call_id = item.text("call_id", item.text("id", ""))
        if call_id not in self._call_ids:
            raise item.error("names a call that no item before it makes", "call_id")
        if kind in ("tool_search_output", "tool_search_call_output"):
            tools = item.items("tools", MAX_PARTS)
            for at, tool in enumerate(tools):
                self.toolbox.add(tool, f"{item.path}.tools[{at}]", is_named=True)
            text = json.dumps(tools, ensure_ascii=False)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            text = self._content(item, "output", is_result=True)
        else:
            output = item.take("output", "")
            text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
            item.fields["output"] = text
            text = item.text("output")
        item.done("execution", "max_output_length", "name", "namespace", *_INERT)
        self._add({"role": "tool", "tool_call_id": call_id, "content": text})

    def _configuration(self, item: ObjectReader) -> None:
        reasoning = item.child("reasoning")
        if reasoning:
            self.effort = reasoning.text("effort", "")
            reasoning.done()
        item.done(*_INERT)
