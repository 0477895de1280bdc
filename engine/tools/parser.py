"""An answer parted into what it says and the tools that it calls, as its text comes."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from engine.tools.arguments import ArgumentsParser
from engine.tools.format import ToolFormat


@dataclass(frozen=True)
class CallPart:
    """A piece of the call with this index; the first one has its name."""

    index: int
    name: str | None
    arguments: str  # the next characters of its JSON


class ToolCallParser:
    """Parts an answer that a format's grammar holds to it, and so to its calls once one begins.

    `shown` gives the format's texts as the answer has them, in which special tokens may be named.
    White space between what is said and the first call belongs to neither. Of an answer that is
    cut off within a call, what is there of its name is left out. Some formats need the schemas of
    the `tools` to tell texts from JSON. Where an answer that is no call `is_json`, calls can only
    begin it: what looks like one in the midst of JSON is a text in there.
    """

    def __init__(
        self,
        form: ToolFormat,
        shown: Callable[[str], str] = str,
        tools: Iterable[Any] = (),
        *,
        is_json: bool = False,
    ):
        self.num_calls = 0  # those that have begun
        self._held = ""
        self._state = "start"
        self._form, self._shown = form, shown
        functions = (tool["function"] for tool in tools)
        self._schemas = {function["name"]: function["parameters"] for function in functions}
        self._arguments: ArgumentsParser | None = None
        self._trigger = shown(form.trigger)
        self._calls_anywhere = bool(self._trigger) and not is_json
        self._beginning = self._trigger or form.head[0]
        # A name goes up to what follows it, or as far as it can.
        behind = re.escape(shown(form.middle)) or r"(?=[^\w.-])"
        name = rf"([\w.-]+?){behind}"
        between = form.between or form.tail + form.head
        self._first = re.compile(re.escape(shown(form.head)) + name, re.ASCII)
        self._next = re.compile(re.escape(shown(between)) + name, re.ASCII)

    @property
    def has_calls(self) -> bool:
        """Whether there are calls, and all of them are whole."""
        return self.num_calls > 0 and self._state != "arguments"

    def push(self, text: str, last: bool = False) -> tuple[str, list[CallPart]]:
        """The next text, or the last; returns what is sure: content, and a part of each call.

        One of each, as there are clients that read no more.
        """
        self._held += text
        content = ""
        if self._state in ("start", "said"):
            content = self._say(last)
        parts: list[CallPart] = []
        while self._state == "arguments" or self._begin(parts):
            arguments = self._take_arguments()
            if parts and parts[-1].index == self.num_calls - 1:
                parts[-1] = replace(parts[-1], arguments=arguments)
            elif arguments:
                parts.append(CallPart(self.num_calls - 1, None, arguments))
            if self._state == "arguments":  # they go on
                break
        return content, parts

    def _say(self, last: bool) -> str:
        """The content that is sure, up to where a call begins."""
        if not self._held or (not last and self._may_begin_call()):
            return ""
        at = self._start_of_call()
        if at is None:
            self._state = "said"
            return self._take(len(self._held) if last else self._num_sure())
        content = self._take(at).rstrip()
        self._state = "called"
        return content

    def _may_begin_call(self) -> bool:
        """Whether it is not known yet if the answer begins with a call, where only it may."""
        begins = self._beginning.startswith(self._held) and self._held != self._beginning
        return self._state == "start" and not self._calls_anywhere and begins

    def _start_of_call(self) -> int | None:
        if self._calls_anywhere:
            at = self._held.find(self._trigger)
            return at if at >= 0 else None
        starts = self._state == "start" and self._held.startswith(self._beginning)
        return 0 if starts else None

    def _num_sure(self) -> int:
        """How many characters are content, whatever follows."""
        held, trigger = self._held, self._trigger
        if not self._calls_anywhere:
            return len(held)
        sizes = range(min(len(held), len(trigger)), 0, -1)
        begun = next((size for size in sizes if held.endswith(trigger[:size])), 0)
        return len(held[: len(held) - begun].rstrip())

    def _begin(self, parts: list[CallPart]) -> bool:
        """Note the name of the next call; False if it is not there, or not whole."""
        if self._state != "called":
            return False
        begun = (self._next if self.num_calls else self._first).match(self._held)
        if begun is None:
            return False
        parts.append(CallPart(self.num_calls, begun[1], ""))
        schema = self._schemas.get(begun[1], {})
        self._arguments = self._form.arguments.parser(schema, self._shown)
        self._take(begun.end())
        self.num_calls += 1
        self._state = "arguments"
        return True

    def _take_arguments(self) -> str:
        """The next characters of the arguments' JSON."""
        assert self._arguments
        taken, said, whole = self._arguments.take(self._held)
        self._take(taken)
        if whole:
            self._state = "called"
        return said

    def _take(self, count: int) -> str:
        taken = self._held[:count]
        self._held = self._held[count:]
        return taken
