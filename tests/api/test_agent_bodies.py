"""Whole bodies of /v1/messages and /v1/responses, drawn at random and read without a model.

A conversation means the same in both dialects; fields keep to their class whatever stands beside
them; and a body that is damaged anywhere is refused in words, by the name of a field.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine import InvalidInput
from serving.inner_request import InnerRequest
from serving.lenient import LenientRequest
from serving.messages import MessagesRequest
from serving.request_model import BodyContext, validation_error
from serving.responses import ResponsesRequest
from serving.unknown_fields import IgnoredFields
from tests.api import test_messages, test_responses

Body = dict[str, Any]
TEXTS = st.text(min_size=1, max_size=12)
NAMES = ("weather", "time.now")
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(TEXTS, st.integers(0, 9), max_size=2)),
    max_size=2,
)
# Of the user, and of the assistant: a thought, a text, calls, and what each call brought.
ASKED = st.tuples(st.just("user"), TEXTS)
ANSWERED = st.tuples(
    st.just("assistant"), st.just("") | TEXTS, st.just("") | TEXTS, CALLS, st.lists(TEXTS)
).filter(lambda turn: any(turn[1:4]))
# Neighbouring items of an answer are one turn, so that a question stands between two answers.
CONVERSATIONS = st.lists(st.tuples(ASKED, ANSWERED), max_size=3).map(
    lambda rounds: [*[turn for both in rounds for turn in both], ("user", "hi")]
)


def numbered(conversation: list[Any]) -> Iterator[Any]:
    """The turns, each call with an id and its result."""
    count = 0
    for kind, *said in conversation:
        if kind == "user":
            yield kind, said[0]
            continue
        thought, text, calls, results = said
        made = []
        for n, (name, arguments) in enumerate(calls):
            made.append((f"call_{count}", name, arguments, results[n] if results[n:] else "ok"))
            count += 1
        yield kind, thought, text, made


def as_turns(conversation: list[Any]) -> Iterator[Body]:
    """In the engine's shape."""
    for kind, *said in numbered(conversation):
        if kind == "user":
            yield {"role": "user", "content": said[0]}
            continue
        thought, text, calls = said
        turn: Body = {"role": "assistant", "content": text}
        if thought:
            turn["reasoning_content"] = thought
        if calls:
            turn["tool_calls"] = [
                {"id": call, "type": "function", "function": {"name": name, "arguments": given}}
                for call, name, given, _ in calls
            ]
        yield turn
        for call, _, _, result in calls:
            yield {"role": "tool", "tool_call_id": call, "content": result}


def as_messages(conversation: list[Any]) -> Iterator[Body]:
    for kind, *said in numbered(conversation):
        if kind == "user":
            yield {"role": "user", "content": [{"type": "text", "text": said[0]}]}
            continue
        thought, text, calls = said
        blocks: list[Body] = [{"type": "thinking", "thinking": thought, "signature": "s"}]
        blocks = blocks if thought else []
        blocks += [{"type": "text", "text": text}] if text else []
        blocks += [
            {"type": "tool_use", "id": call, "name": name, "input": given}
            for call, name, given, _ in calls
        ]
        yield {"role": "assistant", "content": blocks}
        results = [
            {"type": "tool_result", "tool_use_id": call, "content": result}
            for call, _, _, result in calls
        ]
        if results:
            yield {"role": "user", "content": results}


def as_items(conversation: list[Any]) -> Iterator[Body]:
    for kind, *said in numbered(conversation):
        if kind == "user":
            yield {"role": "user", "content": [{"type": "input_text", "text": said[0]}]}
            continue
        thought, text, calls = said
        if thought:
            content = [{"type": "reasoning_text", "text": thought}]
            yield {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}
        if text:
            part = {"type": "output_text", "text": text, "annotations": []}
            yield {"type": "message", "role": "assistant", "id": "msg_1", "content": [part]}
        for call, name, arguments, _ in calls:
            spelled = json.dumps(arguments)
            yield {"type": "function_call", "call_id": call, "name": name, "arguments": spelled}
        for call, _, _, result in calls:
            yield {"type": "function_call_output", "call_id": call, "output": result}


def read(
    schema: type[LenientRequest], body: Body, *, strict: bool = False
) -> tuple[InnerRequest, set[str]]:
    """What a body means, and which of its fields were left out."""
    ignored = IgnoredFields(strict=strict)
    request = schema.model_validate(copy.deepcopy(body), context=BodyContext(ignored))
    return request.inner(), set(ignored.names)


@settings(max_examples=40)
@given(conversation=CONVERSATIONS)
def test_conversation_is_the_same_in_both_dialects(conversation):
    turns = list(as_turns(conversation))
    messages = {"max_tokens": 9, "messages": [*as_messages(conversation)]}
    responses = {"input": [*as_items(conversation)]}
    for schema, body in ((MessagesRequest, messages), (ResponsesRequest, responses)):
        inner, ignored = read(schema, body)
        assert inner.messages == turns
        assert not ignored


# Each dialect's table of fields: the body they are added to, those that change nothing, those that
# are reported with their names, and those that are refused.
TABLES: Any = {MessagesRequest: test_messages, ResponsesRequest: test_responses}


def apart(rows: Iterable[Any]) -> list[Any]:
    """The rows of a table, without those whose fields an earlier one has.

    An item that updates the configuration has its fields.
    """
    kept, seen = [], set[str]()
    for row in rows:
        fields = row if isinstance(row, dict) else row[0]
        items = fields.get("input")
        updates = [x for x in items if isinstance(x, dict)] if isinstance(items, list) else []
        names = {*fields, *(name for item in updates for name in item.keys() & {"reasoning"})}
        if not seen & names:
            seen |= names
            kept.append(row)
    return kept


def subsets(rows: list[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(rows), max_size=8).map(apart)


@pytest.mark.parametrize("schema", TABLES)
@settings(max_examples=40)
@given(data=st.data())
def test_fields_keep_to_their_class_together(schema, data):
    table = TABLES[schema]
    honoured = [(fields, "") for fields, *_ in table.HONOURED + table.SAMPLED]
    reported = [(fields, name) for fields, name in table.REPORTED]
    rows = data.draw(subsets(honoured + reported))
    inert = [row for row in data.draw(subsets(table.INERT)) if apart([*rows, row])[len(rows) :]]
    body = dict(table.ASK)
    for fields, _ in rows:
        body |= fields
    names = {name for _, name in rows if name}
    inner, ignored = read(schema, body)
    assert ignored == names
    if names:
        with pytest.raises(InvalidInput, match="handling=strict"):
            read(schema, body, strict=True)
    for fields in inert:
        body |= fields
    assert read(schema, body) == (inner, ignored)
    refused, *_ = data.draw(st.sampled_from(apart_from(table.REFUSED, body, table.ASK)))
    with pytest.raises((InvalidInput, ValidationError)):
        read(schema, body | refused)


def apart_from(rows: list[Any], body: Body, first: Body) -> list[Any]:
    """Refused rows whose fields are in no other row's."""
    taken = body.keys() - first.keys()
    own = {"prompt", "mirostat", "temprature"}
    return [row for row in rows if not taken & row[0].keys() and row[0].keys() <= own]


JUNK = st.sampled_from([
    None, True, 0, -1, 1.5, 10**30, "", "x", "\ud800", "auto", [], {}, [[]], [None], ["a"],
    {"a": {}}, *({"type": kind} for kind in ("text", 5, "tool_result", "function_call")),
])  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that a body holds."""
    pairs = value.items() if isinstance(value, dict) else ()
    for name, inner in enumerate(value) if isinstance(value, list) else pairs:
        yield (*path, name)
        yield from places(inner, (*path, name))


@pytest.mark.parametrize("schema", TABLES)
@settings(max_examples=40)
@given(conversation=CONVERSATIONS, data=st.data())
def test_damage_is_refused_in_words(schema, conversation, data):
    table = TABLES[schema]
    body = dict(table.ASK)
    for fields, *_ in data.draw(subsets([*table.HONOURED, *table.SAMPLED, *table.REPORTED])):
        body |= fields
    spelled = as_messages if "messages" in body else as_items
    body["messages" if "messages" in body else "input"] = list(spelled(conversation))
    body = copy.deepcopy(body)
    *path, last = data.draw(st.sampled_from([*places(body)]))
    within: Any = body
    for name in path:
        within = within[name]
    within[last] = data.draw(JUNK)
    refusal = refusal_of(schema, body)
    if refusal is not None:
        assert str(refusal)
        assert refusal.argument is None or refusal.argument in {*body, *schema.names()}


def refusal_of(schema: type[LenientRequest], body: Body) -> InvalidInput | None:
    try:
        read(schema, body)
    except InvalidInput as error:
        return error
    except ValidationError as error:
        return validation_error(error)
    return None
