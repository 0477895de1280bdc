"""The format in which a chat template writes calls, learnt from what it makes of some."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from engine.errors import InvalidInput
from engine.tools.arguments import Arguments, spell_json
from engine.tools.format import COMMON, HEAD, ToolFormat
from engine.tools.json_calls import JSON_ARGUMENTS
from engine.tools.xml_calls import TaggedArguments

log = logging.getLogger("chat")

# What is looked for in a rendered conversation; nothing that a template says by itself.
NAME, SAID, RESULT, HELP = "qzaname", "qzatext", "qzaresult", "qzahelp"
_CALL_ID = "qza123456"
_AS_JSON = {"qzakey": "qzavalue"}
_JSON_CALL = re.compile(NAME + r'(.*?)\{"qzakey": ?"qzavalue"\}', re.DOTALL)
_BETWEEN_TAGS = {"qzakey": "qzavalue", "qzbkey": "qzbvalue"}
# Some tags tell of what type a value is: then this one is written otherwise.
_A_NUMBER = {"qzakey": 7}
_TAGGED_CALL = re.compile(
    NAME + r"([^<]*)(<.*?)qzakey(.*?)qzavalue(.*?)\2qzbkey\3qzbvalue\4", re.DOTALL
)
# Some templates repeat a call's id behind its arguments, where no model writes any.
_WRITTEN_ID = f', "id": "{_CALL_ID}"'
_QUESTION = {"role": "user", "content": "?"}
_SYSTEM = {"role": "system", "content": SAID}
# Not the tool that is called, whose name is to be found in the call alone.
_TOOL = {
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


class _WrittenCall(NamedTuple):
    """Where a call's name begins and its arguments end in a text, and how both are written."""

    start: int
    end: int
    middle: str
    arguments: Arguments


def _json_call(found: re.Match[str]) -> _WrittenCall:
    return _WrittenCall(found.start(), found.end(), found[1], JSON_ARGUMENTS)


def _tagged_call(found: re.Match[str]) -> _WrittenCall:
    arguments = TaggedArguments(found[2], found[3], found[4])
    return _WrittenCall(found.start(), found.end(), found[1], arguments)


class _Style(NamedTuple):
    """One way of writing arguments: some to show, and how to find a call with them."""

    arguments: dict[str, str]
    pattern: re.Pattern[str]
    read: Callable[[re.Match[str]], _WrittenCall]

    def calls_in(self, text: str | None) -> list[_WrittenCall]:
        return [self.read(found) for found in self.pattern.finditer(text or "")]


_STYLES = (
    _Style(_AS_JSON, _JSON_CALL, _json_call),
    _Style(_BETWEEN_TAGS, _TAGGED_CALL, _tagged_call),
)


def learn_format(render: Render) -> ToolFormat:
    """The format in which a chat template writes calls; COMMON if it has none, or an unknown one.

    Arguments are shown to it as an object, and as text only where it refuses that: a template
    that takes both may well write an object in a way of its own.
    """
    common = replace(COMMON, takes_system=_rendered(render, [_SYSTEM, _QUESTION]) is not None)
    for as_text in (False, True):
        one = _rendered(render, [_QUESTION, _turn_of_calls(_AS_JSON, 1, as_text)])
        if one is None:
            continue
        found = (_format_of(render, style, as_text) for style in _STYLES)
        known = next((form for form in found if form), None)
        if known:
            return replace(known, takes_system=common.takes_system)
        if NAME in one:
            log.warning(
                "the chat template writes calls of tools in a way that is not known here; the"
                " model is told of a common one, in which it may call them worse"
            )
        return common
    return common


def _turn_of_calls(arguments: dict[str, Any], count: int, as_text: bool) -> dict[str, Any]:
    shown = spell_json(arguments) if as_text else arguments
    function = {"name": NAME, "arguments": shown}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call] * count}


def _rendered(render: Render, messages: list[dict[str, Any]]) -> str | None:
    try:
        return render(messages, tools=[_TOOL])
    except InvalidInput:
        return None


def _format_of(render: Render, style: _Style, as_text: bool) -> ToolFormat | None:
    """The format, by rendered turns with calls; None if it is none that can be used."""
    turn, turns = (_turn_of_calls(style.arguments, count, as_text) for count in (1, 2))
    one = _rendered(render, [_QUESTION, turn]) or ""
    plain = _rendered(render, [_QUESTION, {"role": "assistant", "content": SAID}])
    result = {"role": "tool", "tool_call_id": _CALL_ID, "name": NAME, "content": RESULT}
    after = _rendered(render, [_QUESTION, turn, result]) or ""
    calls = style.calls_in(one)
    if not calls or plain is None or SAID not in plain or RESULT not in after:
        return None
    call = calls[0]
    before, _, behind = plain.partition(SAID)
    begun = one[: call.start]
    head = _from_tag(begun, _num_common(before, begun))
    rest = one[call.end :]
    same = _num_common(behind[::-1], rest[::-1])
    found = ToolFormat(
        head.lstrip(),
        call.middle,
        _to_tag(rest, len(rest) - same).replace(_WRITTEN_ID, ""),
        _between_of(style, _rendered(render, [_QUESTION, turns]), call),
        lists_tools=HELP in one,
        arguments_as_text=as_text,
        arguments=call.arguments,
    )
    texts = found.head + found.middle + found.tail + (found.between or "")
    can_be_used = HEAD.match(found.head) and _CALL_ID not in texts
    return found if can_be_used and _is_the_same_for_numbers(render, found) else None


def _is_the_same_for_numbers(render: Render, form: ToolFormat) -> bool:
    """Whether a template writes a number as this format does."""
    if form.arguments is JSON_ARGUMENTS:
        return True
    # Where arguments end, something has to tell that none follows.
    turn = _turn_of_calls(_A_NUMBER, 1, form.arguments_as_text)
    text = _rendered(render, [_QUESTION, turn]) or ""
    return bool(form.tail) and form.arguments.spell(_A_NUMBER) in text


def _between_of(style: _Style, two: str | None, call: _WrittenCall) -> str | None:
    """What stands between two calls; None if there cannot be two, or they are not alike."""
    calls = style.calls_in(two)
    if two is None or len(calls) != 2 or calls[1].middle != call.middle:
        return None
    return two[calls[0].end : calls[1].start].replace(_WRITTEN_ID, "") or None


def _num_common(one: str, other: str) -> int:
    """With how many of the same characters two texts begin."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _from_tag(text: str, at: int) -> str:
    """A text from a place on, or from where the tag begins in which that place is."""
    opened = text.rfind("<", 0, at)
    return text[opened if opened > text.rfind(">", 0, at) else at :]


def _to_tag(text: str, at: int) -> str:
    """A text up to a place, or up to where the tag ends in which that place is."""
    if text.rfind("<", 0, at) > text.rfind(">", 0, at):
        at = text.find(">", at) + 1
    return text[:at]
