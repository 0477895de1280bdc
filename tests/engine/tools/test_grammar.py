"""A grammar allows a text, or calls with valid arguments; and the parser finds both in it."""

import json
import random

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidInput
from engine.guided.guide import Guide, GuideCompiler, spell_schema
from engine.prompt.tokenizer import ChatTokenizer
from engine.scheduling.detokenizer import Detokenizer
from engine.tools.format import COMMON, ToolFormat
from engine.tools.grammar import Thoughts, ToolChoice, ToolGrammar, check_size, explained
from engine.tools.json_calls import JSON_ARGUMENTS
from engine.tools.parser import ToolCallParser
from engine.tools.xml_calls import TaggedArguments
from tests.conftest import byte_tokenizer

SPECIAL = ["<|end|>", "<|user|>", "<|calls|>", "<|args|>", "<|/calls|>", "[TOOL_CALLS]"]
FORMATS = {
    "common": COMMON,
    "only at the beginning": ToolFormat('{"name": "', '", "parameters": ', "}"),
    "special tokens": ToolFormat(
        "<|calls|>f.", ":0<|args|>", "<|/calls|>", "<|/calls|>\n<|calls|>f."
    ),
    "a list after a special token": ToolFormat(
        '[TOOL_CALLS] [{"name": "', '", "arguments": ', "}]", '}, {"name": "'
    ),
    "without a tail": ToolFormat("[TOOL_CALLS]", "<|args|>", "", "[TOOL_CALLS]"),
    "one call": ToolFormat("<function=", ">", "</function>"),
    "tags": ToolFormat(
        "<tool_call>\n<function=",
        ">\n",
        "</function>\n</tool_call>",
        "</function>\n</tool_call>\n<tool_call>\n<function=",
        arguments=TaggedArguments("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    "tags of special tokens": ToolFormat(
        "<|calls|>",
        "\n",
        "<|/calls|>",
        "<|/calls|>\n<|calls|>",
        arguments=TaggedArguments("<|args|>", "=", "[TOOL_CALLS]"),
    ),
    "other letters": ToolFormat('<工具🙂>"', '"：', "</工具>", '</工具><工具🙂>"'),
}
THOUGHTS = {
    "none": None,
    "may come": Thoughts("<think>", "</think>", begun=False),
    "have begun": Thoughts("<think>", "</think>", begun=True),
}
TEXT = ChatTokenizer(byte_tokenizer(SPECIAL))
COMPILER = GuideCompiler(TEXT.plain, TEXT.special.values(), {256})


def function(name: str, schema: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [function("get", NOTHING), function("get_more", NOTHING)]


def guide(
    form: ToolFormat,
    tools: list = TOOLS,
    choice: ToolChoice | None = None,
    thoughts: Thoughts | None = None,
) -> Guide:
    grammar = ToolGrammar(form, TEXT.special)
    choice = choice or ToolChoice()
    return COMPILER.compile_grammar(grammar.write(tools, choice, thoughts), grammar.special_ids)


def ids_of(text: str) -> list[int]:
    """The tokens of a text in which special tokens count."""
    return TEXT.encode_text(text, begin=False)


def allows(guide: Guide, text: str, special: bool = True) -> bool:
    """Whether a text may be an answer's beginning."""
    guide = guide.copy()
    for token in ids_of(text) if special else TEXT.plain.encode(text).ids:
        if not guide.token_mask()[token]:
            return False
        guide.matcher.consume_token(token)
    return True


def may_end(guide: Guide, text: str) -> bool:
    guide = guide.copy()
    for token in ids_of(text):
        assert guide.token_mask()[token], text
        guide.matcher.consume_token(token)
    return bool(guide.token_mask()[256])


def walk(guide: Guide, begin: str, chance: random.Random, tail: str = "") -> list[int]:
    """An answer that begins so and goes on at random to an end; empty if it is too long.

    What ends a text is tried now and then, which no chance would spell.
    """
    guide, said = guide.copy(), []
    for token in ids_of(begin):
        assert guide.token_mask()[token], begin
        guide.matcher.consume_token(token)
        said.append(token)
    while len(said) < 1000:
        allowed = guide.token_mask()
        if allowed[256] and chance.random() < 0.5:
            return said
        token = chance.choice([int(i) for i in allowed.nonzero()[0] if i != 256] or [256])
        if token == 256:
            return said
        likely = tail and chance.random() < 0.3 and allows(guide, tail)
        for one in ids_of(tail) if likely else [token]:
            guide.matcher.consume_token(one)
            said.append(one)
    return []


def parse(
    form: ToolFormat, ids: list[int], tools: list = TOOLS
) -> tuple[str, list[list[str]], bool]:
    """What is said and called, by the path that the server's answers take."""
    parser = ToolCallParser(form, TEXT.shown, tools)
    special_ids = ToolGrammar(form, TEXT.special).special_ids
    detokenizer = Detokenizer(TEXT.plain, shown_special_ids=special_ids)
    content, calls = "", []
    for text in [*map(detokenizer.push, ids), detokenizer.flush()]:
        said, parts = parser.push(text)
        content += said
        for part in parts:
            if part.name is not None:
                calls.append([part.name, ""])
            calls[-1][1] += part.arguments
    said, parts = parser.push("", True)
    assert not parts
    return content + said, calls, parser.has_calls


# ---- Schemas at random

# Whatever might be taken for the format's own.
WORDS = st.lists(
    st.sampled_from(
        ["a", '"', "\\", "{", "}", "[", "\n", "é", "上", "🙂", *SPECIAL, "<tool_call>"]
    ),
    max_size=3,
).map("".join)
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string", "maxLength": 4}),
    st.integers(-20, 20).map(lambda n: {"type": "integer", "minimum": n, "maximum": n + 12}),
    st.lists(WORDS | st.integers(-(2**53), 2**53) | st.none(), min_size=1, max_size=3).map(
        lambda e: {"enum": e}
    ),
    WORDS.map(lambda word: {"const": word}),
)


def objects(values: st.SearchStrategy) -> st.SearchStrategy:
    def with_required(properties: dict) -> st.SearchStrategy:
        return st.lists(st.sampled_from(sorted(properties) or [""]), unique=True).map(
            lambda names: {
                "type": "object",
                "properties": properties,
                "required": [name for name in names if name in properties],
                "additionalProperties": False,
            }
        )

    return st.dictionaries(WORDS, values, max_size=3).flatmap(with_required)


SCHEMAS = objects(
    st.recursive(
        LEAVES,
        lambda values: st.one_of(
            objects(values),
            values.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
            st.lists(values, min_size=1, max_size=2).map(lambda several: {"anyOf": several}),
        ),
        max_leaves=5,
    )
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(sorted(THOUGHTS)),
    st.dictionaries(st.sampled_from(["a", "ab", "a.b-c_d"]), SCHEMAS, min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_what_the_parser_finds_is_what_the_grammar_allowed(name, thought, schemas, free, seed):
    form, thoughts = FORMATS[name], THOUGHTS[thought]
    if form.arguments is not JSON_ARGUMENTS:  # where a name is written as it is
        assume(
            all(n and not set(n) & {*"\n><=[|"} for s in schemas.values() for n in s["properties"])
        )
    tools = [function(tool, schema) for tool, schema in schemas.items()]
    held = guide(form, tools, ToolChoice(required=not free), thoughts)
    chance = random.Random(seed)
    lead = chance.choice(["", "so ", "<", "{x}\n"]) if free and form.trigger else ""
    opening = {"none": "", "may come": "<think>{</think>", "have begun": "{</think>"}[thought]
    tail = getattr(form.arguments, "tail", "")
    ids = walk(held, opening + lead + form.head, chance, tail)
    assume(ids)
    content, calls, whole = parse(form, ids[len(ids_of(opening)) :], tools)
    assert content == lead.rstrip()
    assert whole
    for tool, arguments in calls:
        jsonschema.validate(json.loads(arguments), schemas[tool])
    spelled = [
        {"function": {"name": tool, "arguments": json.loads(arguments)}}
        for tool, arguments in calls
    ]
    written = TEXT.backend.decode(ids, skip_special_tokens=False)
    # JSON has more than one way for a character and for 0, and between tags a text may look like a
    # number.
    is_unique = "\\" not in written and "-0" not in written
    if is_unique and form.arguments is JSON_ARGUMENTS:
        assert written == opening + lead + form.spell(spelled)


# ---- What may be said


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("thought", THOUGHTS)
def test_text_without_a_call_may_be_any(name, thought):
    opening = {"none": "", "may come": "<think> {a} </think>\n", "have begun": "a</think>"}
    held = guide(FORMATS[name], thoughts=THOUGHTS[thought])
    for text in ("", "hello", "你好 🙂\n\n{", "a < b [1] <tool>", "a </think>"):
        assert may_end(held, opening[thought] + text)
    assert not allows(held, opening[thought] + "a<|user|>")


@pytest.mark.parametrize("name", FORMATS)
def test_call_that_has_begun_must_be_one(name):
    held = guide(FORMATS[name])
    assert allows(held, FORMATS[name].head + "get")
    assert not allows(held, FORMATS[name].head + "steal")
    assert not allows(held, FORMATS[name].head + "get" + FORMATS[name].middle + "[")
    assert not allows(held, FORMATS[name].head + "get" + FORMATS[name].middle + '{"x"')


def test_text_may_spell_the_special_tokens_of_a_call():
    held = guide(FORMATS["special tokens"])
    text = "<|calls|>f.steal<|end|>"
    assert allows(held, text, special=False)
    assert not allows(held, text)
    said = TEXT.plain.encode("<|calls|>f.get:0<|args|>{}<|/calls|>").ids
    content, calls, whole = parse(FORMATS["special tokens"], said)
    assert (content, calls, whole) == ("<|calls|>f.get:0<|args|>{}<|/calls|>", [], False)


@pytest.mark.parametrize("name", FORMATS)
def test_call_that_is_required_comes_at_once(name):
    held = guide(FORMATS[name], choice=ToolChoice(required=True))
    assert not allows(held, "x")
    assert not held.token_mask()[256]
    assert allows(held, FORMATS[name].head)


def test_call_that_is_required_may_come_after_a_thought():
    required = ToolChoice(required=True)
    held = guide(COMMON, choice=required, thoughts=THOUGHTS["may come"])
    assert allows(held, "<think>so <tool_call> what</think>\n\n" + COMMON.head)
    assert allows(held, COMMON.head)
    assert not allows(held, "so")
    held = guide(COMMON, choice=required, thoughts=THOUGHTS["have begun"])
    assert allows(held, "so <tool_call>what</think>" + COMMON.head)
    assert not allows(held, "so</think>what")


def test_no_call_begins_in_a_thought():
    for opening in ("<think>", "\n <think>"):
        held = guide(COMMON, thoughts=THOUGHTS["may come"])
        assert allows(held, opening + "a <tool_call> b</think> c <tool_call>\n")
        assert not allows(held, opening + "a</think> <tool_call> b")
    assert not allows(guide(COMMON, thoughts=THOUGHTS["may come"]), "no <think> <tool_call> b")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_further_calls_may_come_where_they_are_allowed(name, parallel):
    form = FORMATS[name]
    held = guide(form, choice=ToolChoice(parallel=parallel))
    call = {"function": {"name": "get", "arguments": {}}}
    assert may_end(held, form.spell([call]))
    assert allows(held, form.spell([call, call])) == bool(parallel and form.between)


def test_function_may_be_called_as_a_special_token_is():
    text = ChatTokenizer(byte_tokenizer(["<|end|>", "reserved_0"]))
    compiler = GuideCompiler(text.plain, text.special.values(), {256})
    grammar = ToolGrammar(COMMON, text.special)
    written = grammar.write([function("reserved_0", NOTHING)], ToolChoice())
    held = compiler.compile_grammar(written, grammar.special_ids)
    for token in text.plain.encode(COMMON.head + "reserved_0" + COMMON.middle + "{}").ids:
        assert held.token_mask()[token]
        held.matcher.consume_token(token)


def test_tail_that_ends_the_answer_is_left_out():
    form = ToolFormat("<|calls|>", "<|args|>", "<|/calls|><|end|>more").ending_with(["<|end|>"])
    assert may_end(guide(form), "<|calls|>get<|args|>{}<|/calls|>")


INTEGER = {"a": {"type": "integer"}}


@pytest.mark.parametrize("schema", [
    {"properties": INTEGER},
    {"properties": INTEGER, "required": ["a"]},
    {"properties": {}},
])  # fmt: skip
def test_function_gets_no_arguments_that_it_does_not_name(schema):
    held = guide(COMMON, [function("get", {"type": "object"} | schema)])
    begin = COMMON.head + "get" + COMMON.middle
    assert allows(held, begin + "{")
    assert not allows(held, begin + '{"b')


@pytest.mark.parametrize("schema", [
    {},
    {"properties": INTEGER, "additionalProperties": True},
    {"properties": INTEGER, "required": ["b"]},
    {"properties": INTEGER, "patternProperties": {"^b$": {}}},
    {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": {}}}}, "properties": INTEGER},
    {"properties": INTEGER, "anyOf": [{"properties": {"b": {}}}, {"required": ["a"]}]},
])  # fmt: skip
def test_function_gets_other_arguments_where_its_schema_speaks_of_them(schema):
    held = guide(COMMON, [function("get", {"type": "object"} | schema)])
    begin = COMMON.head + "get" + COMMON.middle
    lead = '{"a": 1, ' if "properties" in schema else "{"
    assert allows(held, begin + lead + '"b')


def test_keywords_that_no_grammar_checks_are_let_pass():
    schema = {
        "type": "object",
        "properties": {"x": {"type": "array", "uniqueItems": True}, "y": {"format": "nosuch"}},
        "not": {"required": ["z"]},
        "x-guidance": {"lenient": False},
    }
    guide(COMMON, [function("get", schema)])


# ---- Refusals


def test_schema_that_does_not_compile_is_named():
    tools = [*TOOLS, function("bad", {"type": "object", "properties": {"x": {"type": "bogus"}}})]
    with pytest.raises(InvalidInput) as refused:
        guide(COMMON, tools)
    told = explained(refused.value, tools)
    assert "the parameters of bad: " in str(told)
    assert "bogus" in str(told)
    assert told.argument == "tools"


def test_other_errors_are_told_as_they_are():
    error = InvalidInput("the JSON schema takes more than 2 seconds", "tools")
    assert explained(error, TOOLS) is error


def test_schemas_at_their_bound():
    frame = len(json.dumps({"const": ""}))
    longest = {"const": "x" * (2**15 - frame)}
    check_size([function("a", longest), function("b", longest)])
    with pytest.raises(InvalidInput, match="longer than 65,536 characters together"):
        check_size([function("a", longest), function("b", {"const": longest["const"] + "x"})])


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 1, 10**4000])
def test_integers_that_would_be_rounded_are_refused(number):
    parameters = {"type": "object", "properties": {"n": {"enum": [number]}}}
    check_size([{"function": {"name": "f", "parameters": parameters}}])  # of a tool they are let be
    wanted = "at properties.n, must have no integers beyond 9,007,199,254,740,992"
    with pytest.raises(InvalidInput, match=wanted):
        spell_schema(parameters)
