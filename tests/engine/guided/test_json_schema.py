"""JSON schemas as other programs write them: what is left out, and what is said of the rest."""

import json

import pytest
from llguidance import LLMatcher

from engine import InvalidInput
from engine.guided.guide import GuideCompiler
from engine.guided.json_schema import relaxed, simplified
from engine.tools.json_calls import json_rule
from tests.conftest import byte_tokenizer

DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
ASKS_NOTHING = {
    "int64's maximum": {"type": "integer", "maximum": 2**63 - 1},
    "int64's minimum": {"type": "integer", "minimum": -(2**63)},
    "a double's range": {"type": "number", "minimum": -1.79e308, "exclusiveMaximum": 1.79e308},
    "a large default": {"type": "integer", "default": 2**64},
    "large examples": {"type": "integer", "examples": [2**63], "description": "x"},
    "a length": {"type": "string", "maxLength": 2**63 - 1},
    "bytes": {"type": "string", "format": "binary"},
    "a password": {"type": "string", "format": "password"},
    "a draft": {"$schema": "http://json-schema.org/schema#", "type": "string"},
}
NOT_HELD = {
    "Decimal": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": DECIMAL}]},
    "look-ahead": {"type": "string", "pattern": r"^(?=.*\S)[^\x00-\x1f]+$"},
    "look-behind": {"type": "string", "pattern": r"(?<!a)b"},
    "a back reference": {"type": "string", "pattern": r"^(a)\1$"},
    "a word's edge": {"type": "string", "pattern": r"\bfoo"},
    "a key's look-ahead": {"type": "object", "patternProperties": {"^(?!x)": {"type": "string"}}},
    "oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "in an array": {"type": "array", "items": {"type": "string", "pattern": "(?!a)"}},
    "in a definition": {
        "$ref": "#/$defs/x",
        "$defs": {"x": {"type": "string", "pattern": "(?!a)"}},
    },
    "a large multiple": {"type": "integer", "multipleOf": 2**60},
    "a large choice": {"enum": [2**60]},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
}


@pytest.fixture(scope="module")
def compiler() -> GuideCompiler:
    return GuideCompiler(byte_tokenizer().backend_tokenizer, [256, 257, 258, 259], [256])


def inside(schema: dict[str, object]) -> dict[str, object]:
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    return {"type": "object", "properties": {"a": schema, "b": {"type": "boolean"}}} | definitions


@pytest.mark.parametrize("schema", ASKS_NOTHING.values(), ids=ASKS_NOTHING)
def test_what_asks_for_nothing(compiler, schema):
    compiler.compile(inside(schema))


@pytest.mark.parametrize("schema", (ASKS_NOTHING | NOT_HELD).values(), ids=ASKS_NOTHING | NOT_HELD)
def test_tools_that_no_grammar_can_hold(schema):
    rule = json_rule(relaxed(inside(schema)))
    assert not LLMatcher.validate_grammar(f"%llguidance {{}}\nstart: {rule}\n")


def test_alternatives_of_tools_may_overlap():
    """That only one of them matches is what no grammar can hold."""
    alternatives = [{"type": "number"}, {"type": "integer", "minimum": 2}]
    assert relaxed({"oneOf": alternatives}) == {"anyOf": alternatives}
    both = {"oneOf": alternatives, "anyOf": [{"type": "number"}]}
    assert relaxed(both)["anyOf"] == both["anyOf"]


FAULTS = {name: schema for name, schema in NOT_HELD.items() if "large" not in name}


@pytest.mark.parametrize("schema", FAULTS.values(), ids=FAULTS)
def test_faults_name_their_place(compiler, schema):
    place = r"at (properties\.a|\$defs\.x)\b"
    with pytest.raises(InvalidInput, match=place) as refused:
        compiler.compile(inside(schema))
    assert "coerce_one_of" not in str(refused.value)
    assert refused.value.argument == "schema"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "send anyOf"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around, which is not supported"),
        ({"$ref": "#"}, "refers to itself without an end"),
        ({"$ref": "http://a.example/b"}, "nothing is fetched"),
    ],
)
def test_faults_in_words(compiler, schema, words):
    with pytest.raises(InvalidInput, match=words):
        compiler.compile(schema)


@pytest.mark.parametrize("name", ["title", "default", "format", "pattern", "$schema", "maximum"])
def test_properties_may_have_keywords_as_names(name):
    schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}
    assert simplified(schema) == schema
    assert relaxed(schema) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -5, "maximum": 2**53 - 1, "multipleOf": 3},
        {"type": "string", "pattern": r"^\\(\(\?|a)b$", "format": "date-time", "maxLength": 9},
        {"enum": ["a", 1, None, {"default": 1}]},
        {"type": "array", "items": [{"type": "string"}], "maxItems": 3},
    ],
)
def test_what_is_held_stays(schema):
    assert relaxed(schema) == schema
    assert json.dumps(simplified(schema)) == json.dumps(schema)
