"""How a model writes calls of tools: in its family's way, its chat template's, or a common one.

A call is `head`, the tool's name, `middle` and the arguments as JSON; further ones follow after
`between`, and `tail` ends them.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import InvalidInput


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

    @property
    def trigger(self) -> str:
        """With what a call begins wherever it stands; empty if it can only begin an answer."""
        found = TAG.match(self.head)
        return found[0] if found else ""

    def spell(self, calls: Iterable[dict[str, Any]]) -> str:
        """Calls, with their arguments as objects, as a model writes them."""
        written = [
            call["function"]["name"] + self.middle + spell_json(call["function"]["arguments"])
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
TAG = re.compile(r"<[^<>\s]+(?:>|$)|\[[^\[\]\s{}\"]+\]")
# Beside these, a call may begin as JSON does, where it begins the answer.
HEAD = re.compile(rf'{TAG.pattern}|\[?\{{"')

# Qwen's and Hermes' way, on which many other models were trained too, or fine-tuned.
COMMON = ToolFormat(
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    '}\n</tool_call>\n<tool_call>\n{"name": "',
    native=False,
    lists_tools=False,
)


def spell_json(value: Any) -> str:
    """JSON as models are trained to write it: in one line, with a space after , and :."""
    return json.dumps(value, ensure_ascii=False)


# ---- Learning from a chat template

# What is looked for in a rendered conversation; nothing that a template says by itself.
NAME, SAID, RESULT, HELP = "qzaname", "qzatext", "qzaresult", "qzahelp"
CALL_ID = "qza123456"
ARGUMENTS = {"qzakey": "qzavalue"}
WRITTEN = re.compile(NAME + r'(.*?)\{"qzakey": ?"qzavalue"\}', re.DOTALL)
# Some templates repeat a call's id behind its arguments, where no model writes any.
WRITTEN_ID = f', "id": "{CALL_ID}"'
QUESTION = {"role": "user", "content": "?"}
SYSTEM = {"role": "system", "content": SAID}
# Not the tool that is called, whose name is to be found in the call alone.
TOOL = {
    "type": "function",
    "function": {
        "name": "another",
        "description": HELP,
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "a text"}},
            "required": ["key"],
        },
    },
}

# Renders a conversation, given tools, by a chat template. Raises InvalidInput if that refuses it.
Render = Callable[..., str]


def learn_format(render: Render) -> ToolFormat:
    """The format in which a chat template writes calls; COMMON if it has none, or not as JSON.

    Arguments are shown to it as an object, and as text only where it refuses that: a template
    that takes both may well write an object in a way of its own.
    """
    common = replace(COMMON, takes_system=rendered(render, [SYSTEM, QUESTION]) is not None)
    for as_text in (False, True):
        one = rendered(render, [QUESTION, turn_of_calls(1, as_text)])
        if one is not None:
            found = format_of(render, one, as_text)
            if found is None:
                return common
            return replace(found, takes_system=common.takes_system)
    return common


def turn_of_calls(count: int, as_text: bool) -> dict[str, Any]:
    arguments = spell_json(ARGUMENTS) if as_text else ARGUMENTS
    function = {"name": NAME, "arguments": arguments}
    call = {"id": CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call] * count}


def rendered(render: Render, messages: list[dict[str, Any]]) -> str | None:
    try:
        return render(messages, tools=[TOOL])
    except InvalidInput:
        return None


def format_of(render: Render, one: str, as_text: bool) -> ToolFormat | None:
    """The format, by a rendered turn with one call; None if it is none that can be used."""
    plain = rendered(render, [QUESTION, {"role": "assistant", "content": SAID}])
    call = WRITTEN.search(one)
    answer = [QUESTION, turn_of_calls(1, as_text)]
    result = {"role": "tool", "tool_call_id": CALL_ID, "name": NAME, "content": RESULT}
    after = rendered(render, [*answer, result]) or ""
    if call is None or plain is None or SAID not in plain or RESULT not in after:
        return None
    before, _, behind = plain.partition(SAID)
    begun = one[: call.start()]
    head = from_tag(begun, num_common(before, begun))
    rest = one[call.end() :]
    same = num_common(behind[::-1], rest[::-1])
    found = ToolFormat(
        head.lstrip(),
        call[1],
        to_tag(rest, len(rest) - same).replace(WRITTEN_ID, ""),
        between_of(rendered(render, [QUESTION, turn_of_calls(2, as_text)]), call[1]),
        lists_tools=HELP in one,
        arguments_as_text=as_text,
    )
    texts = found.head + found.middle + found.tail + (found.between or "")
    return found if HEAD.match(found.head) and CALL_ID not in texts else None


def between_of(two: str | None, middle: str) -> str | None:
    """What stands between two calls; None if there cannot be two, or they are not alike."""
    calls = list(WRITTEN.finditer(two or ""))
    if two is None or len(calls) != 2 or calls[1][1] != middle:
        return None
    return two[calls[0].end() : calls[1].start()].replace(WRITTEN_ID, "") or None


def num_common(one: str, other: str) -> int:
    """With how many of the same characters two texts begin."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def from_tag(text: str, at: int) -> str:
    """A text from a place on, or from where the tag begins in which that place is."""
    opened = text.rfind("<", 0, at)
    return text[opened if opened > text.rfind(">", 0, at) else at :]


def to_tag(text: str, at: int) -> str:
    """A text up to a place, or up to where the tag ends in which that place is."""
    if text.rfind("<", 0, at) > text.rfind(">", 0, at):
        at = text.find(">", at) + 1
    return text[:at]
