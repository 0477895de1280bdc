"""How a model writes calls of tools: in its family's way, its chat template's, or a common one.

A call is `head`, the tool's name, `middle` and the arguments, which are written as JSON or
otherwise (engine.tools.arguments); further ones follow after `between`, and `tail` ends them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from engine.tools.arguments import Arguments
from engine.tools.json_calls import JSON_ARGUMENTS


@dataclass(frozen=True)
class ToolFormat:
    """The texts around the names and the arguments of calls; without `between` there is only one.

    `native` says that the model was trained on them, `lists_tools` that its chat template tells it
    of the tools, `takes_system` that it knows a system role. Where `arguments_as_text`, the
    template takes arguments as JSON, and else as objects.
    """

    head: str
    middle: str
    tail: str
    between: str | None = None
    native: bool = True
    lists_tools: bool = True
    takes_system: bool = True
    arguments_as_text: bool = False
    arguments: Arguments = JSON_ARGUMENTS

    @property
    def trigger(self) -> str:
        """With what a call begins wherever it stands; empty if it can only begin an answer."""
        found = _TAG.match(self.head)
        return found[0] if found else ""

    def spell(self, calls: Iterable[dict[str, Any]]) -> str:
        """Calls, with their arguments as objects, as a model writes them."""
        written = [
            call["function"]["name"]
            + self.middle
            + self.arguments.spell(call["function"]["arguments"])
            for call in calls
        ]
        return self.head + (self.between or self.tail + self.head).join(written) + self.tail

    def ending_with(self, ends: Iterable[str]) -> "ToolFormat":
        """The same where these texts end an answer, so that nothing of it comes after one."""
        found = [at for at in map(self.tail.find, ends) if at >= 0]
        tail = self.tail[: min(found)] if found else self.tail
        ended = any(end in (self.between or "") for end in ends)
        return replace(self, tail=tail, between=None if ended else self.between)


# What begins a call in the midst of a text: nothing that a text has by chance.
_TAG = re.compile(r"<[^<>\s]+(?:>|$)|\[[^\[\]\s{}\"]+\]")
# Beside these, a call may begin as JSON does, where it begins the answer.
HEAD = re.compile(rf'{_TAG.pattern}|\[?\{{"')

# Qwen's and Hermes' way, on which many other models were trained too, or fine-tuned.
COMMON = ToolFormat(
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    '}\n</tool_call>\n<tool_call>\n{"name": "',
    native=False,
    lists_tools=False,
)
