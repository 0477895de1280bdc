"""An answer is parted into content and calls, however its text is cut into pieces."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from engine.tools.format import COMMON, ToolFormat
from engine.tools.parser import CallPart, ToolCallParser
from engine.tools.xml_calls import TaggedArguments

LLAMA = ToolFormat('{"name": "', '", "parameters": ', "}")
TOKENS = ToolFormat("<|calls|>", "<|args|>", "", "<|calls|>")
ONE = '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "b.c-d_e", "arguments": {}}\n</tool_call>'


def parse(
    form: ToolFormat, text: str, size: int, tools: Iterable[Any] = (), is_json: bool = False
) -> tuple[str, list[list[str]], bool]:
    """The content, the calls, and whether they are whole, of a text in pieces of a size."""
    parser = ToolCallParser(form, tools=tools, is_json=is_json)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    content = ""
    calls: list[list[str]] = []
    for n in range(len(pieces) + 1):
        last = n == len(pieces)
        said, parts = parser.push("" if last else pieces[n], last)
        content += said
        for part in parts:
            if part.name is not None:
                calls.append([part.name, ""])
            assert part.index == len(calls) - 1
            calls[-1][1] += part.arguments
    return content, calls, parser.has_calls


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (COMMON, "hello", "hello", []),
        (COMMON, " hello \n", " hello \n", []),
        (COMMON, "", "", []),
        (COMMON, ONE, "", [["a", '{"x": 1}']]),
        (COMMON, "so:\n\n" + ONE, "so:", [["a", '{"x": 1}']]),
        (COMMON, "\n" + TWO, "", [["a", '{"x": 1}'], ["b.c-d_e", "{}"]]),
        (COMMON, "a < b, <tool", "a < b, <tool", []),
        (COMMON, "a <tool_cal l>", "a <tool_cal l>", []),
        (
            COMMON,
            ONE.replace("1", r'"}{\"\\\"</tool_call>\n"'),
            "",
            [["a", r'{"x": "}{\"\\\"</tool_call>\n"}']],
        ),
        (COMMON, ONE.replace("1", '[{"y": [[], {}]}]'), "", [["a", '{"x": [{"y": [[], {}]}]}']]),
        (LLAMA, '{"name": "a", "parameters": {"x": "\\\\"}}', "", [["a", '{"x": "\\\\"}']]),
        (LLAMA, 'x {"name": "a", "parameters": {}}', 'x {"name": "a", "parameters": {}}', []),
        (
            TOKENS,
            'x <|calls|>a<|args|>{"x": "<|calls|>b<|args|>{}"}<|calls|>b<|args|>{}',
            "x",
            [["a", '{"x": "<|calls|>b<|args|>{}"}'], ["b", "{}"]],
        ),
    ],
)
def test_content_and_calls(form, text, content, calls, size):
    assert parse(form, text, size) == (content, calls, bool(calls))


TAGS = ToolFormat(
    "<tool_call>\n<function=",
    ">\n",
    "</function>\n</tool_call>",
    "</function>\n</tool_call>\n<tool_call>\n<function=",
    arguments=TaggedArguments("<parameter=", ">\n", "\n</parameter>\n"),
)
COLOUR = {"enum": ["red", "7"]}
TYPED = {
    "$defs": {"Colour": COLOUR},
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "number"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "counted": {"type": ["string", "integer"]},
        "colour": {"$ref": "#/$defs/Colour"},
        "any": {},
        "list": {"type": "array", "items": {"$ref": "#/$defs/Colour"}},
    },
}
VALUES = [
    ("text", '"7"\n</param>', '"7"\n</param>'),
    ("text", "", ""),
    ("text", "null", "null"),
    ("number", "7.5", 7.5),
    ("number", "7", 7),
    ("maybe", "null", None),
    ("maybe", "7", "7"),
    ("maybe", '"null"', '"null"'),
    ("counted", "7", 7),
    ("counted", "7.5", "7.5"),
    ("colour", "7", "7"),
    ("any", "true", True),
    ("any", "True", "True"),
    ("any", '{"a": [1]}', {"a": [1]}),
    ("list", '["red"]', ["red"]),
    ("unnamed", "7", 7),
]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(("name", "written", "value"), VALUES)
def test_values_between_tags(name, written, value, size):
    """Their type is the schema's: a text that looks like a number stays a text."""
    tools = [{"function": {"name": "a", "parameters": TYPED}}]
    told = f"<parameter={name}>\n{written}\n</parameter>\n"
    text = f"so: <tool_call>\n<function=a>\n{told}<parameter=b>\nx\n</parameter>\n{TAGS.tail}"
    content, [[called, arguments]], whole = parse(TAGS, text, size, tools)
    assert (content, called, whole) == ("so:", "a", True)
    assert json.loads(arguments) == {name: value, "b": "x"}


def test_argument_that_comes_twice_counts_once():
    twice = "<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n"
    _, [[_, arguments]], _ = parse(TAGS, f"{TAGS.head}f{TAGS.middle}{twice}{TAGS.tail}", 1)
    assert arguments == '{"a": 1}'


def test_texts_between_tags_come_as_they_are_written():
    parser = ToolCallParser(TAGS, tools=[{"function": {"name": "a", "parameters": TYPED}}])
    parser.push("<tool_call>\n<function=a>\n<parameter=text>\n")
    assert parser.push("one") == ("", [CallPart(0, None, "one")])
    assert parser.push("\n<") == ("", [])
    assert parser.push("/b>") == ("", [CallPart(0, None, "\\n</b>")])


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("x " + ONE[:20], "x", []),
        ("x " + ONE[: ONE.index('{"x')], "x", [["a", ""]]),
        (ONE[: ONE.index("1")], "", [["a", '{"x": ']]),
        (TWO[: TWO.index("b.c")], "", [["a", '{"x": 1}']]),
    ],
)
def test_answer_that_is_cut_within_a_call(text, content, calls, size):
    said, found, whole = parse(COMMON, text, size)
    assert (said, found) == (content, calls)
    assert whole == (text.startswith(ONE))


def test_nothing_is_held_back_for_longer_than_needed():
    parser = ToolCallParser(COMMON)
    assert parser.push("hello") == ("hello", [])
    assert parser.push(" ") == ("", [])
    assert parser.push("you <") == (" you", [])
    assert parser.push("3") == (" <3", [])
    parser.push('<tool_call>\n{"name": "a", "arguments"')
    assert parser.push(": ") == ("", [CallPart(0, "a", "")])
    assert parser.push('{"x') == ("", [CallPart(0, None, '{"x')])
    assert parser.push('": 1}}\n</') == ("", [CallPart(0, None, '": 1}')])
    assert parser.push("tool_call>", True) == ("", [])


def test_one_part_of_a_call_comes_at_once():
    parser = ToolCallParser(COMMON)
    begun, rest = TWO.split("}}", 1)
    assert parser.push(begun) == ("", [CallPart(0, "a", '{"x": 1')])
    assert parser.push("}}" + rest) == ("", [CallPart(0, None, "}"), CallPart(1, "b.c-d_e", "{}")])


def test_special_tokens_are_told_from_text_that_spells_them():
    parser = ToolCallParser(TOKENS, lambda text: text.replace("<|", "secret(").replace("|>", ")"))
    content, parts = parser.push("<|calls|>a<|args|>{} secret(calls)b secret(args){}", True)
    assert content == "<|calls|>a<|args|>{}"
    assert [part.name for part in parts] == []
    content, parts = parser.push("", True)
    parser = ToolCallParser(TOKENS, lambda text: text.replace("<|", "secret(").replace("|>", ")"))
    assert parser.push("secret(calls)bsecret(args){}", True)[1][0].name == "b"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form", [COMMON, TOKENS])
@pytest.mark.parametrize(
    "text", ["%s", '{"a": "%s"}', '{"%s": 1}', '["%s"', '"%s and %s"', "<", "<tool"]
)
def test_json_answer_stays_json(form, text, size):
    """What it holds may look like the calls that could have begun it."""
    text = text.replace("%s", form.head.replace('"', ""))
    begins = text.startswith(form.trigger)
    said = parse(form, text, size, is_json=True)
    assert said == (("" if begins else text), [], False)
    calls = form.spell([{"function": {"name": "a", "arguments": {}}}])
    assert parse(form, calls, size, is_json=True) == ("", [["a", "{}"]], True)
