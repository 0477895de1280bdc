"""What clients keep of an answer, or add for others, is taken back: it asks for nothing."""

import json

import httpx
import pytest

USER = {"role": "user", "content": "hi"}
CACHED = {"cache_control": {"type": "ephemeral"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "content": "ok"}


def call(**more: object) -> dict[str, object]:
    """A turn of the assistant's that calls a tool, and its result."""
    whole = {"id": "abc123def", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [whole | more]}


def said(**more: object) -> dict[str, object]:
    return {"messages": [USER, {"role": "assistant", "content": "x"} | more, USER]}


BODIES = {
    "cache_control of a message": {"messages": [USER | CACHED]},
    "cache_control of a tool": {"messages": [USER], "tools": [TOOL | CACHED]},
    "cache_control of a function": {
        "messages": [USER],
        "tools": [TOOL | {"function": TOOL["function"] | CACHED}],
    },
    "no type of a call": {"messages": [USER, call(type=None), RESULT]},
    "an empty type of a call": {"messages": [USER, call(type=""), RESULT]},
    "extra_content of a call": {"messages": [USER, call(extra_content={"google": {}}), RESULT]},
    "provider_specific_fields": said(provider_specific_fields={"refusal": None}),
    "refusal": said(refusal=""),
    "reasoning_details": said(reasoning_details=[{"type": "reasoning.text", "text": "hm"}]),
    "id": said(id="msg_1"),
    "images": {"messages": [USER | {"images": []}]},
    "nulls": said(tool_calls=None, name=None, audio=None, whatever=None),
    "verbosity": {"messages": [USER], "verbosity": "medium"},
    "a list of one type": {
        "messages": [USER],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": ["object"]}}}
        ],
    },
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_asks_for_nothing_is_taken(server, body):
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "body", [said(refusal="no"), {"messages": [USER | {"images": ["a"]}]}, said(whatever=1)]
)
def test_what_asks_for_something_is_named(server, body):
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "which is not supported here" in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", ["low", "high"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/"])
def test_verbosity_is_left_out_and_told(server, path, value):
    body = ({"messages": [USER]} if "chat" in path else {"prompt": "hi"}) | {"verbosity": value}
    answer = httpx.post(server + path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Ignored-Fields"] == "verbosity"
    refused = httpx.post(server + path, json=body, headers={"Prefer": "handling=strict"})
    assert refused.status_code == 400
    assert "verbosity is not supported" in refused.text


WHOLE = json.dumps({"text": 'a "b" \\ é', "list": [1, {"c": None}], "d": -1.5e3})


@pytest.mark.slow
@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_call_that_was_cut_off_is_taken_back(server, length):
    function = {"name": "f", "arguments": WHOLE[:length]}
    body = {"messages": [USER, call(function=function), RESULT]}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("arguments", ["no", "[1, 2", "{a: 1", WHOLE + "}", "1", '"a"', "{]"])
def test_call_that_is_no_json_is_refused(server, arguments):
    function = {"name": "f", "arguments": arguments}
    body = {"messages": [USER, call(function=function), RESULT]}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "arguments must be a JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("whole", [True, False])
def test_usage_comes_with_each_chunk(server, path, whole):
    options = {"continuous_usage_stats": True, "include_usage": whole}
    asks = {"messages": [USER]} if "chat" in path else {"prompt": "hi"}
    body = asks | {"stream": True, "stream_options": options, "n": 2}
    lines = httpx.post(server + path, json=body).text.splitlines()
    events = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
    seen = [0, 0]
    for event in events:
        usage = event["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] > 0
        for choice in event["choices"]:
            assert usage["completion_tokens"] >= seen[choice["index"]]
            seen[choice["index"]] = usage["completion_tokens"]
    assert (events[-1]["choices"] == []) == whole
    assert seen[0] == seen[1] > 1
