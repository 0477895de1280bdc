"""/v1/responses: what each field and item means, and answers that OpenAI's SDK understands."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

import api
from engine import SamplingParams
from serving.kept import KeptAnswers
from serving.responses_tools import InputDecoder
from serving.thought_code import encode_thought
from tests.conftest import ScriptedRunner, chat_model, ready, serve, wait_for
from tests.tool_caller import ToolCaller, thinking_tokenizer, tool_tokenizer

PATH = "/v1/responses"
ASK = {"model": "test", "input": "hi"}
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "description": "How", "parameters": CITY}


@pytest.fixture(scope="module")
def runner() -> ScriptedRunner:
    return ScriptedRunner(thinking_tokenizer(), "<think>hm, so</think>hello")


@pytest.fixture(scope="module")
def url(runner: ScriptedRunner) -> Iterator[str]:
    with serve(lambda _: chat_model(runner, runner.tokenizer, 4096)) as url:
        yield ready(url)


def post(url: str, body: dict[str, Any], path: str = PATH, **headers: str) -> httpx.Response:
    content = json.dumps(body)  # httpx would refuse half a surrogate pair
    return httpx.post(url + path, content=content, headers=headers)


def last_prompt(runner: ScriptedRunner) -> str:
    return runner.tokenizer.decode(runner.prompts[-1])


def asked(url: str, runner: ScriptedRunner, **fields: Any) -> tuple[str, SamplingParams, str]:
    """The prompt that a body becomes, how it is sampled, and which fields were left out."""
    response = post(url, ASK | fields)
    assert response.status_code == 200, response.text
    assert Response.model_validate(response.json()).status == "completed"
    return last_prompt(runner), runner.samplings[-1], response.headers.get("x-ignored-fields", "")


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content, **more}


def thought(text: str | None, **more: Any) -> dict[str, Any]:
    content = {} if text is None else {"content": [{"type": "reasoning_text", "text": text}]}
    return {"type": "reasoning", "id": "rs_1", "summary": [], **content, **more}


def call(name: str = "weather", arguments: str = '{"city": "Rome"}', **more: Any) -> dict[str, Any]:
    fields = {"name": name, "arguments": arguments, "call_id": "a", "id": "fc_1"}
    return {"type": "function_call", "status": "completed", **fields, **more}


def output(value: Any, kind: str = "function_call_output") -> dict[str, Any]:
    return {"type": kind, "call_id": "a", "output": value}


def part(text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": kind, "text": text}


def turn(role: str, text: str) -> str:
    return f"<|{role}|>{text}<|end|>"


def written(name: str, arguments: dict[str, Any]) -> str:
    """A call as the template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


# ---- What each field and item means

PLAIN = "<|user|>hi<|end|><|assistant|>"
ROME = written("weather", {"city": "Rome"})
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA"}
HONOURED = [
    ({"instructions": "be brief"}, turn("system", "be brief") + PLAIN),
    ({"reasoning": {"effort": "low"}}, "(low)" + PLAIN),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "(no)" + PLAIN),
    ({"input": [message("user", "hi")]}, PLAIN),
    ({"input": [{"role": "user", "content": [part("hi")]}]}, PLAIN),
    (
        {"instructions": "a", "input": [message("developer", "b"), message("user", "hi")]},
        turn("system", "a\n\nb") + PLAIN,
    ),
    (
        {
            "input": [
                message("user", "hi"),
                message("assistant", [part("so", "output_text")], id="msg_1", status="completed"),
                message("user", "well?"),
            ]
        },
        PLAIN + "so<|end|>" + turn("user", "well?") + "<|assistant|>",
    ),
    (
        {"input": [message("user", "hi"), thought("hm"), call(), output("sunny")]},
        "[hm]" + PLAIN + ROME + "<|end|>" + turn("user", "<tool_response>sunny</tool_response>"),
    ),
    (
        {
            "input": [
                message("user", "hi"),
                thought(None, encrypted_content=encode_thought("hm")),
                message("assistant", "so"),
                call(),
                call(call_id="b", namespace="n", name="zone", arguments=""),
                output("sunny"),
            ]
        },
        "[hm]" + PLAIN + "so\n" + ROME + "\n" + written("n.zone", {}) + "<|end|>",
    ),
    (
        {
            "input": [
                message("user", "hi"),
                {"type": "custom_tool_call", "name": "patch", "input": "a", "call_id": "a"},
                output([part("done")], "custom_tool_call_output"),
            ]
        },
        PLAIN + written("patch", {"input": "a"}) + "<|end|>",
    ),
    (
        {
            "input": [
                message("user", "hi"),
                {"type": "local_shell_call", "action": {"command": ["ls"]}, "call_id": "a"},
                output("x", "local_shell_call_output"),
            ]
        },
        PLAIN + written("local_shell", {"command": ["ls"]}) + "<|end|>",
    ),
    (
        {"input": [message("user", "hi"), {"type": "configuration_update",
                                           "reasoning": {"effort": "high"}}]},
        "(high)" + PLAIN,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "prompt"), HONOURED)
def test_field_reaches_the_prompt(url, runner, fields, prompt):
    told, _, ignored = asked(url, runner, **fields)
    assert told.startswith(prompt)
    assert not ignored


SAMPLED = [
    ({"temperature": 0.5}, "temperature", 0.5),
    ({"top_p": 0.5}, "top_p", 0.5),
    ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
    ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
    ({"max_output_tokens": 50}, "max_new_tokens", 50),
    ({"seed": 1, "min_p": 0.5}, "min_p", 0.5),
    ({"top_logprobs": 2}, "logprobs", 2),
    ({"include": ["message.output_text.logprobs"]}, "logprobs", 0),
]


@pytest.mark.parametrize(("fields", "name", "value"), SAMPLED)
def test_field_reaches_the_sampling(url, runner, fields, name, value):
    _, params, ignored = asked(url, runner, **fields)
    assert getattr(params, name) == value
    assert not ignored


def test_length_is_cut_to_what_is_left(url, runner):
    _, params, _ = asked(url, runner, max_output_tokens=128_000)
    assert params.max_new_tokens == 4096 - len(runner.prompts[-1])


INERT = [
    {"metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s"},
    {"service_tier": "auto", "client_metadata": {"a": "b"}, "prompt_cache_retention": "24h"},
    {"access_programs": {}, "image": {}, "user": "u", "max_tool_calls": 3},
    {"store": False, "background": False, "prompt_cache_options": {}},
    {"stream_options": {"include_obfuscation": False}},
    {"text": {"verbosity": "medium", "format": {"type": "text"}}},
    {"include": ["reasoning.encrypted_content"]},
    {"reasoning": None, "conversation": None, "truncation": "disabled"},
    {"input": [message("user", "hi", id="msg_1", status="completed", phase="final")]},
]


@pytest.mark.parametrize("fields", INERT)
def test_inert_field_changes_nothing(url, runner, fields):
    assert asked(url, runner, **fields)[::2] == (PLAIN, "")


REPORTED = [
    ({"novel": 1}, "novel"),
    ({"context_management": [{}]}, "context_management"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"include": ["file_search_call.results"]}, "include.file_search_call.results"),
    ({"stream_options": {"novel": 1}}, "stream_options.novel"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"input": [message("user", "hi"), {"type": "web_search_call", "id": "w"}]}, "input"),
    ({"input": [message("user", "hi", novel=1)]}, "input.novel"),
    (
        {"input": [message("user", "hi"), thought(None, encrypted_content="gAAAAA")]},
        "input.encrypted_content",
    ),
]


@pytest.mark.parametrize(("fields", "name"), REPORTED)
def test_reported_field_is_named(url, runner, fields, name):
    assert asked(url, runner, **fields)[::2] == (PLAIN, name)
    strict = post(url, ASK | fields, Prefer="respond-async, handling=strict")
    assert strict.status_code == 400
    assert name in strict.json()["error"]["message"]


def test_image_in_a_result_leaves_a_line(url, runner):
    items = [message("user", "hi"), call(), output([IMAGE, part("b")])]
    told, _, ignored = asked(url, runner, input=items)
    assert "<tool_response>[image: this model reads text only]\nb</tool_response>" in told
    assert ignored == "input.output"


REFUSED = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"mirostat": 2}, "mirostat", "mirostat"),
    ({"background": True}, "background", "wait for the answer"),
    ({"moderation": {}, "conversation": "c"}, "conversation", "send all items"),
    ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options", "prewarm"),
    ({"prompt": {"id": "p"}}, "prompt", "send input"),
    ({"input": []}, "input", "must have an item of the user"),
    ({"input": [message("user", [IMAGE])]}, "input", "reads text only"),
    ({"input": [message("user", [part("a", "novel")])]}, "input", "of type 'novel'"),
    ({"input": [{"type": "novel"}]}, "input", "input[0] is of type 'novel'"),
    ({"input": [{"type": "compaction"}]}, "input", "input[0] is of type 'compaction'"),
    ({"input": [message("user", "hi"), output("x")]}, "input", "names a call that no item"),
    ({"input": [message("user", "\ud800")]}, "input", "unpaired surrogate"),
    ({"input": [message("user", "a"), call(arguments="[")]}, "input", "input[1].arguments must be"),
    ({"tools": [WEATHER, WEATHER]}, "tools", "tools[1] has the name of another tool"),
    ({"tools": [WEATHER | {"name": "a b"}]}, "tools", "tools[0].name must have"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tool_choice": "sometimes"}, "tool_choice", "must be none, auto, required"),
    ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "names 'x'"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice", "names 'web_search'"),
    ({"text": {"format": {"type": "regex"}}}, "text", "must be text, json_object"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_refusal_names_field_and_remedy(url, fields, param, words):
    response = post(url, ASK | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_what_is_not_kept_is_told_with_its_remedy(url):
    response = post(url, ASK | {"previous_response_id": "resp_1"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "previous_response_id"
    assert error["code"] == "previous_response_not_found"
    reference = {"type": "item_reference", "id": "rs_1"}
    response = post(url, ASK | {"input": [message("user", "a"), reference]})
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["param"] == "input"
    assert error["message"].startswith("Item with id 'rs_1' not found. ")


# ---- Answers


def stream_of(url: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, each checked by the SDK's types."""
    blocks = post(url, body | {"stream": True}).text.strip().split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(EVENT.validate_python(event))
    return events


def test_answer_is_reasoning_and_message(url):
    whole = Response.model_validate(post(url, ASK).json())
    reasoning = whole.output[0]
    assert reasoning.content[0].text == "hm, so"
    assert reasoning.encrypted_content == encode_thought("hm, so")
    assert whole.output_text == "hello"
    assert whole.usage.output_tokens_details.reasoning_tokens == len("<think>hm, so</think>")
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = stream_of(url, ASK)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert [kind for kind in kinds if not kind.endswith(".delta")] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    final = events[-1].response
    assert final.output_text == "hello"
    assert [event.item for event in events if event.type.endswith("item.done")] == final.output
    assert final.usage.output_tokens_details == whole.usage.output_tokens_details


def test_logprobs_are_told(url):
    body = ASK | {"top_logprobs": 2, "temperature": 0}
    content = Response.model_validate(post(url, body).json()).output[1].content[0]
    assert "".join(each.token for each in content.logprobs) == "hello"
    assert all(len(each.top_logprobs) == 2 for each in content.logprobs)
    deltas = [event for event in stream_of(url, body) if event.type.endswith("text.delta")]
    tokens = [each.token for delta in deltas for each in getattr(delta, "logprobs", [])]
    assert "".join(tokens) == "hello"


def test_answer_cut_off_is_incomplete(url):
    body = ASK | {"max_output_tokens": 24}
    whole = Response.model_validate(post(url, body).json())
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.output_text == "hel"
    last = stream_of(url, body)[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_probe_gets_an_empty_message(url):
    body = ASK | {"input": [], "max_output_tokens": 1}
    whole = Response.model_validate(post(url, body).json())
    assert (whole.status, whole.output_text, len(whole.output)) == ("completed", "", 1)
    assert stream_of(url, body)[-1].response.output_text == ""


def test_count_is_that_of_the_usage(url):
    body = ASK | {"instructions": "be brief", "tools": [WEATHER]}
    usage = post(url, body).json()["usage"]
    told = post(url, body, f"{PATH}/input_tokens").json()
    assert told == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


def test_long_prompt_is_dropped_from_where_asked(url, runner):
    items = [message("user", "x" * 5000), message("assistant", "a"), message("user", "hi")]
    refused = post(url, ASK | {"input": items})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    told, _, _ = asked(url, runner, input=items, truncation="auto", instructions="s")
    assert told == turn("system", "s") + PLAIN


def test_failing_stream_ends_with_response_failed(runner):
    with serve(lambda _: chat_model(runner, runner.tokenizer, 2048)) as url:
        ready(url)
        steps = len(runner.steps)
        runner.pause = 0.05
        try:
            with httpx.stream("POST", url + PATH, json=ASK | {"stream": True}) as answer:
                wait_for(lambda: len(runner.steps) > steps + 3)
                runner.poison, runner.failure = runner.prompts[-1], ValueError("broken")
                text = "\n".join(answer.iter_lines())
        finally:
            runner.pause, runner.failure, runner.poison = 0.0, None, None
    name, data = text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: response.failed"
    event = EVENT.validate_python(json.loads(data.removeprefix("data: ")))
    assert event.response.status == "failed"
    assert event.response.error.code == "server_error"


# ---- Answers that are kept


@pytest.fixture(scope="module")
def locked(runner: ScriptedRunner) -> Iterator[str]:
    with serve(lambda _: chat_model(runner, runner.tokenizer, 4096), api_key="a,b") as url:
        yield ready(url)


def ask_as(url: str, key: str, **fields: Any) -> httpx.Response:
    return post(url, ASK | fields, Authorization=f"Bearer {key}")


@pytest.mark.parametrize("stream", [False, True])
def test_answer_goes_on_from_a_kept_one(locked, runner, stream):
    first = ask_as(locked, "a", stream=stream, instructions="be brief")
    if stream:
        text = first.text.split("\n\n")[-3].split("data: ")[1]
        first_answer = json.loads(text)["response"]
    else:
        first_answer = first.json()
    assert first_answer["store"] is True
    second = ask_as(locked, "a", input="well?", previous_response_id=first_answer["id"]).json()
    # The instructions are those of one request.
    before = "[hm, so]<|user|>hi<|end|><|assistant|>hello<|end|>"
    assert last_prompt(runner) == before + turn("user", "well?") + "<|assistant|>"
    ask_as(locked, "a", input="so?", previous_response_id=second["id"])
    assert last_prompt(runner).endswith(
        "<|user|>well?<|end|><|assistant|>hello<|end|><|user|>so?<|end|><|assistant|>"
    )
    other = ask_as(locked, "b", previous_response_id=second["id"])
    assert (other.status_code, other.json()["error"]["param"]) == (400, "previous_response_id")


def test_item_is_found_by_its_id(locked, runner):
    output = ask_as(locked, "a").json()["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in output]
    items = [message("user", "hi"), *references, message("user", "well?")]
    assert ask_as(locked, "a", input=items).status_code == 200
    assert last_prompt(runner).startswith("[hm, so]<|user|>hi<|end|><|assistant|>hello<|end|>")
    assert ask_as(locked, "b", input=items).status_code == 404


def test_answer_not_to_be_kept_is_not(locked, url, runner):
    answer = ask_as(locked, "a", store=False).json()
    assert answer["store"] is False
    assert ask_as(locked, "a", previous_response_id=answer["id"]).status_code == 400
    with serve(lambda _: chat_model(runner, runner.tokenizer, 4096), kept_answers=0) as off:
        answer = post(ready(off), ASK | {"store": True})
        assert answer.headers["x-ignored-fields"] == "store"
        assert answer.json()["store"] is False


def test_kept_answers_are_bounded():
    kept = KeptAnswers(most=1000, most_per_key=500)
    texts = [{"id": "i", "text": "x" * 200}]
    assert not kept.keep("a", "large", None, texts * 3, [])
    assert kept.keep("a", "1", None, texts, [])
    assert kept.keep("a", "2", "1", texts, [])
    assert len(kept.conversation("a", "2")) == 2
    assert kept.keep("a", "3", "2", texts, [])  # for which the first has to go
    assert kept.conversation("a", "3") is None
    assert kept.conversation("a", "1") is None
    for owner in "bcd":
        assert kept.keep(owner, owner, None, texts, texts[:0])
    assert kept.conversation("a", "2") is None
    assert [kept.conversation(owner, owner) for owner in "bcd"] == [texts] * 3
    assert kept.conversation("b", "c") is None


def test_dropped_answer_takes_its_items_along():
    kept = KeptAnswers(most=1000, most_per_key=500)
    for name in ("1", "2", "3"):
        assert kept.keep("a", name, None, [], [{"id": name, "text": "x" * 200}])
    assert kept.item("a", "1") is None
    assert kept.item("a", "3")["id"] == "3"
    assert kept.item("b", "3") is None
    assert kept.num_bytes_behind("a", "3", ["2", "3", "1"]) > 600
    assert kept.num_bytes_behind("b", "3", ["3"]) == 0


def test_what_a_body_refers_to_is_bounded_with_it(locked, monkeypatch):
    monkeypatch.setattr(api, "MAX_BODY", 4000)
    (_, item) = ask_as(locked, "a").json()["output"]
    reference = {"type": "item_reference", "id": item["id"]}
    items = [message("user", "hi"), *[reference] * 30]
    refused = ask_as(locked, "a", input=items)
    assert refused.status_code == 413
    assert "refers to" in refused.json()["error"]["message"]
    assert ask_as(locked, "a", input=items[:9]).status_code == 200


# ---- Tools


@pytest.fixture(scope="module")
def caller() -> ToolCaller:
    return ToolCaller(tool_tokenizer())


@pytest.fixture(scope="module")
def tools_url(caller: ToolCaller) -> Iterator[str]:
    with serve(lambda _: chat_model(caller, caller.tokenizer, 4096)) as url:
        yield ready(url)


PATCH = {"type": "custom", "name": "patch", "description": "Edits"}
INNER = {"type": "namespace", "name": "n", "description": "more", "tools": [WEATHER, PATCH]}
SEARCH = {"type": "tool_search", "execution": "client", "description": "Finds", "parameters": CITY}
KINDS = [
    (WEATHER, {"type": "function", "name": "weather"}, ("function_call", None, "weather")),
    (PATCH, {"type": "custom", "name": "patch"}, ("custom_tool_call", None, "patch")),
    (
        INNER,
        {"type": "function", "name": "weather", "namespace": "n"},
        ("function_call", "n", "weather"),
    ),
    (INNER, {"type": "custom", "name": "n.patch"}, ("custom_tool_call", "n", "patch")),
    (SEARCH, "required", ("tool_search_call", None, None)),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("tool", "choice", "called"), KINDS)
def test_each_kind_of_tool_is_called(tools_url, tool, choice, called, stream):
    body = ASK | {"tools": [tool], "tool_choice": choice, "temperature": 0}
    if stream:
        events = stream_of(tools_url, body)
        (item,) = events[-1].response.output
        deltas = [event.delta for event in events if event.type.endswith(".delta")]
        told = getattr(item, "input", None) or getattr(item, "arguments", None)
        if called[0] != "tool_search_call":
            assert "".join(deltas) == (told or "")
    else:
        (item,) = Response.model_validate(post(tools_url, body).json()).output
    spelled = item.model_dump()
    assert (item.type, spelled.get("namespace"), spelled.get("name")) == called
    if item.type == "function_call":
        jsonschema.validate(json.loads(item.arguments), CITY)


@pytest.mark.parametrize("stream", [False, True])
def test_sdk_runs_a_round_with_a_tool(tools_url, stream):
    with openai.OpenAI(base_url=f"{tools_url}/v1", api_key="x", max_retries=0) as client:

        def ask(items: Any) -> Any:
            body = {"model": "test", "input": items, "tools": [WEATHER]}
            if not stream:
                return client.responses.create(**body)
            with client.responses.stream(**body) as events:
                return events.get_final_response()

        items: list[Any] = [message("user", "hi")]
        first = ask(items)
        (made,) = first.output
        result = {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}
        answer = ask([*items, made.model_dump(exclude_none=True), result])
        assert answer.output_text == "done"
        assert answer.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens * 0.95


@pytest.mark.parametrize(("mode", "count"), [("auto", 1), ("required", 1)])
def test_only_allowed_tools_are_called(tools_url, caller, mode, count):
    allowed = {
        "type": "allowed_tools",
        "mode": mode,
        "tools": [{"type": "custom", "name": "patch"}],
    }
    body = ASK | {"tools": [WEATHER, PATCH], "tool_choice": allowed}
    items = Response.model_validate(post(tools_url, body).json()).output
    assert [item.type for item in items] == ["custom_tool_call"] * count
    assert '"name": "weather"' in last_prompt(caller)  # it is told of all


def test_call_cut_off_is_incomplete(tools_url):
    body = ASK | {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 50}
    whole = Response.model_validate(post(tools_url, body).json())
    assert whole.status == "incomplete"
    assert whole.output[-1].status == "incomplete"
    assert stream_of(tools_url, body)[-1].response.output[-1].status == "incomplete"


LATE = WEATHER | {"name": "late", "defer_loading": True}
SEARCHED = [
    message("user", "hi"),
    {"type": "tool_search_call", "call_id": "a", "execution": "client", "arguments": {}},
    {"type": "tool_search_output", "call_id": "a", "execution": "client", "tools": [LATE]},
]
ADDED = [message("user", "hi"), {"type": "additional_tools", "role": "developer", "tools": [LATE]}]


@pytest.mark.parametrize(("items", "is_there"), [("hi", False), (SEARCHED, True), (ADDED, True)])
def test_deferred_tool_waits_to_be_named(tools_url, items, is_there):
    choice = {"type": "function", "name": "late"}
    body = ASK | {"input": items, "tools": [WEATHER, LATE], "tool_choice": choice}
    assert post(tools_url, body).status_code == (200 if is_there else 400)


def test_pattern_of_a_custom_tool_holds(tools_url):
    form = {"type": "grammar", "syntax": "regex", "definition": "ab+"}
    body = ASK | {"tools": [PATCH | {"format": form}], "tool_choice": "required"}
    (item,) = Response.model_validate(post(tools_url, body).json()).output
    assert item.input.startswith("ab")
    lark = {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}
    answer = post(tools_url, ASK | {"tools": [PATCH | {"format": lark}]})
    assert answer.headers["x-ignored-fields"] == "tools.format"


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_tools_and_a_schema_go_together(tools_url, caller):
    """The answer is calls, or else JSON of the schema."""
    spec = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    body = ASK | {"tools": [WEATHER], "text": spec, "temperature": 0}
    (item,) = Response.model_validate(post(tools_url, body).json()).output
    assert item.type == "function_call"
    before, caller.begin = caller.begin, "{"
    try:
        whole = Response.model_validate(post(tools_url, body).json())
        events = stream_of(tools_url, body)
    finally:
        caller.begin = before
    jsonschema.validate(json.loads(whole.output_text), SCHEMA)
    assert json.loads(events[-1].response.output_text) == json.loads(whole.output_text)


@pytest.mark.parametrize("stream", [False, True])
def test_json_answer_may_hold_what_begins_a_call(tools_url, caller, monkeypatch, stream):
    monkeypatch.setattr(caller, "begin", '{"city":"<tool_call>')
    spec = {"format": {"type": "json_schema", "name": "n", "schema": CITY}}
    body = ASK | {"tools": [WEATHER], "text": spec, "temperature": 0}
    if stream:
        answer = stream_of(tools_url, body)[-1].response
    else:
        answer = Response.model_validate(post(tools_url, body).json())
    (item,) = answer.output
    assert item.type == "message"
    assert json.loads(answer.output_text)["city"].startswith("<tool_call>")


FORMATS = [
    ({"type": "text"}, {}),
    ({"type": "json_object"}, {}),
    ({"type": "json_schema", "name": "n", "schema": CITY}, {"description": None, "strict": False}),
    ({"type": "json_schema", "name": "n", "schema": CITY, "strict": True, "description": "d"}, {}),
]


@pytest.mark.parametrize(("given", "added"), FORMATS)
def test_answer_says_which_format_was_asked_for(tools_url, given, added):
    answer = post(tools_url, ASK | {"text": {"format": given}}).json()
    assert answer["text"]["format"] == given | added
    Response.model_validate(answer)


@given(text=st.text(), ascii_only=st.booleans(), size=st.integers(1, 7))
def test_custom_input_is_undone_wherever_the_pieces_end(text, ascii_only, size):
    spelled = json.dumps({"input": text}, ensure_ascii=ascii_only)
    decoder = InputDecoder()
    pieces = [decoder.push(spelled[at : at + size]) for at in range(0, len(spelled), size)]
    assert "".join(pieces) == decoder.text == text
