"""/v1/messages: what each field and block means, and answers that Anthropic's SDK understands."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent

from engine import SamplingParams
from serving.thought_code import MAX_BYTES, ThoughtDecoder, encode_thought
from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model, ready, serve, wait_for
from tests.tool_caller import ToolCaller, thinking_tokenizer, tool_tokenizer

PATH = "/v1/messages"
ASK = {"model": "test", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {
    "name": "weather",
    "description": "How it is",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
EVENT = pydantic.TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def runner() -> ScriptedRunner:
    return ScriptedRunner(thinking_tokenizer(), "<think>hm, so</think>hello")


@pytest.fixture(scope="module")
def url(runner: ScriptedRunner) -> Iterator[str]:
    with serve(lambda _: chat_model(runner, runner.tokenizer, 2048), api_key="k") as url:
        yield ready(url)


def post(url: str, body: dict[str, Any], path: str = PATH, **headers: str) -> httpx.Response:
    return httpx.post(url + path, json=body, headers={"x-api-key": "k", **headers})


def last_prompt(runner: ScriptedRunner) -> str:
    return runner.tokenizer.decode(runner.prompts[-1])


def asked(url: str, runner: ScriptedRunner, **fields: Any) -> tuple[str, SamplingParams, str]:
    """The prompt that a body becomes, how it is sampled, and which fields were left out."""
    response = post(url, ASK | fields)
    assert response.status_code == 200, response.text
    return last_prompt(runner), runner.samplings[-1], response.headers.get("x-ignored-fields", "")


def turns(*contents: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]}


def text(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


CALL = {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", "content": content, **more}


# ---- What each field means

PLAIN = "<|user|>hi<|end|><|assistant|>"
HONOURED = [
    ({"system": "be brief"}, "<|system|>be brief<|end|>" + PLAIN),
    ({"system": [text("be"), text("brief")]}, "<|system|>be\n\nbrief<|end|>" + PLAIN),
    ({"thinking": {"type": "disabled"}}, "(no)" + PLAIN),
    ({"thinking": {"type": "enabled"}}, PLAIN),
    ({"output_config": {"effort": "high"}}, "(high)" + PLAIN),
    ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "(low)" + PLAIN),
    (turns([text("hi")]), PLAIN),
    (
        turns("hi", "hello", "well?"),
        "<|user|>hi<|end|><|assistant|>hello<|end|><|user|>well?<|end|><|assistant|>",
    ),
    (turns("hi", "hel"), "<|user|>hi<|end|><|assistant|>hel"),
    (
        turns("hi", [{"type": "thinking", "thinking": "hm", "signature": "of another"}], "so"),
        "[hm]<|user|>hi<|end|><|assistant|><|end|><|user|>so<|end|><|assistant|>",
    ),
    (
        turns("hi", [{"type": "thinking", "thinking": "", "signature": encode_thought("h")}], "so"),
        "[h]<|user|>hi<|end|><|assistant|><|end|><|user|>so<|end|><|assistant|>",
    ),
    (
        {"messages": [*ASK["messages"], {"role": "system", "content": "now"}]},
        "<|user|>hi<|end|><|system|>now<|end|><|assistant|>",
    ),
    (
        turns([{"type": "document", "title": "T", "source": {"type": "text", "data": "d"}}]),
        "<|user|>T\n\nd<|end|><|assistant|>",
    ),
    (
        turns([{"type": "search_result", "title": "T", "source": "u", "content": [text("d")]}]),
        "<|user|>T\n\nu\n\nd<|end|><|assistant|>",
    ),
    (
        {"system": "x-anthropic-billing-header: cc_version=1; cch=2;\nbe brief"},
        "<|system|>be brief",
    ),
    ({"system": [text("x-anthropic-billing-header: a"), text("b")]}, "<|system|>b<|end|>"),
]


@pytest.mark.parametrize(("fields", "prompt"), HONOURED)
def test_field_reaches_the_prompt(url, runner, fields, prompt):
    told, _, ignored = asked(url, runner, **fields)
    assert told.startswith(prompt)
    assert not ignored


CALLED = (
    '<|user|>hi<|end|><|assistant|><tool_call>\n{"name": "weather", "arguments":'
    ' {"city": "Rome"}}\n</tool_call><|end|>'
)
RESULTS = [
    ([result("sunny")], "<tool_response>sunny</tool_response>", ""),
    ([result([text("sun"), text("ny")])], "<tool_response>sun\n\nny</tool_response>", ""),
    ([result("no", is_error=True)], "<tool_response>Error: no</tool_response>", ""),
    ([result("error: no", is_error=True)], "<tool_response>error: no</tool_response>", ""),
    ([result(None)], "<tool_response></tool_response>", ""),
    (
        [result([{"type": "image", "source": {"type": "base64", "data": "a"}}])],
        "<tool_response>[image: this model reads text only]</tool_response>",
        "messages.content.content",
    ),
    (
        [result("sunny"), text("go on")],
        "<tool_response>sunny</tool_response><|end|><|user|>go on",
        "",
    ),
]


@pytest.mark.parametrize(("blocks", "prompt", "left_out"), RESULTS)
def test_result_becomes_a_turn(url, runner, blocks, prompt, left_out):
    told, _, ignored = asked(url, runner, **turns("hi", [CALL], blocks))
    assert told == f"{CALLED}<|user|>{prompt}<|end|><|assistant|>"
    assert ignored == left_out


SAMPLED = [
    ({"temperature": 0.5}, "temperature", 0.5),
    ({"top_p": 0.5}, "top_p", 0.5),
    ({"top_k": 7}, "top_k", 7),
    ({"stop_sequences": ["END"]}, "stop", ("END",)),
    ({"seed": 3, "min_p": 0.1}, "min_p", 0.1),
    ({"max_tokens": 128_000}, "max_new_tokens", 2048 - len(PLAIN) + 3 * 7),
    ({"max_tokens": 5}, "max_new_tokens", 5),
]


@pytest.mark.parametrize(("fields", "name", "value"), SAMPLED)
def test_field_reaches_the_sampling(url, runner, fields, name, value):
    _, params, ignored = asked(url, runner, **fields)
    if name == "max_new_tokens" and value > 20:
        value = 2048 - len(runner.prompts[-1])  # it is cut to what is left
    assert getattr(params, name) == value
    assert not ignored


INERT = [
    {"metadata": {"user_id": "u"}},
    {"service_tier": "auto"},
    {"cache_control": {"type": "ephemeral"}},
    {"inference_geo": "eu"},
    {"speed": "standard"},
    {"diagnostics": {}},
    {"betas": ["a"]},
    {"billing_policy": "x"},
    {"user_profile_id": "x"},
    {"workspace_id": "x"},
    {"thinking": {"type": "adaptive", "display": "updates"}},
    {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    {"mcp_servers": [], "container": None, "fallbacks": []},
    turns([text("hi", cache_control={"type": "ephemeral"})]),
    {"temprature": None},
]


@pytest.mark.parametrize("fields", INERT)
def test_inert_field_changes_nothing(url, runner, fields):
    assert asked(url, runner, **fields)[::2] == (PLAIN, "")


REPORTED = [
    ({"safeguards": [{"type": "dangerous_tool_use"}]}, "safeguards"),
    ({"something_new": 1}, "something_new"),
    ({"speed": "fast"}, "speed"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "adaptive", "novel": 1}}, "thinking.novel"),
    ({"output_config": {"task_budget": {"total": 1}}}, "output_config.task_budget"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses"}]}}, "context_management.edits"),
    (turns([text("hi", citations=[{}])]), "messages.content.citations"),
    (turns([text("hi", novel=[{}])]), "messages.content.novel"),
    (turns([text("hi"), {"type": "server_tool_use", "id": "x"}]), "messages.content"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
]


@pytest.mark.parametrize(("fields", "name"), REPORTED)
def test_reported_field_is_named(url, runner, fields, name):
    assert asked(url, runner, **fields)[::2] == (PLAIN, name)
    strict = post(url, ASK | fields, Prefer="handling=strict")
    assert strict.status_code == 400
    assert name in strict.json()["error"]["message"]


IMAGE = {"type": "image", "source": {"type": "base64", "data": "a"}}
REFUSED = [
    ({"temprature": 1}, "did you mean 'temperature'"),
    ({"mirostat": 2}, "mirostat"),
    ({"max_tokens": None}, "max_tokens is missing"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported; declare"),
    ({"container": "x"}, "container"),
    ({"fallbacks": ["x"]}, "fallbacks"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages must have one of the user"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role must be user"),
    (turns([IMAGE]), "messages[0].content[0] cannot be read: this model reads text only"),
    (turns([{"type": "novel"}]), "messages[0].content[0] is of type 'novel'"),
    (turns([{"type": "text"}]), "messages[0].content[0].text is missing"),
    (turns([text("\ud800")]), "messages[0].content[0].text must not contain an unpaired"),
    (turns("hi", [CALL], [result("x", is_eror=True)]), "did you mean 'is_error'"),
    (turns("hi", "a", [result("x")]), "names a call that no message before it makes"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type must be"),
    ({"tools": [TOOL, TOOL]}, "tools[1] has the name of another tool"),
    ({"tools": [{"name": "a b"}]}, "tools[0].name must have"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type is any, but there are no tools"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, "is 'x', which is not"),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ({f"novel_{n}_{'x' * n}": 1 for n in range(65)}, "more than 64 unknown fields"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_refusal_names_field_and_remedy(url, fields, words):
    body = json.dumps(ASK | fields)
    headers = {"x-api-key": "k"}
    response = httpx.post(url + PATH, content=body, headers=headers)
    assert response.status_code == 400
    error = ErrorResponse.model_validate(response.json())
    assert error.error.type == "invalid_request_error"
    assert words in error.error.message


# ---- Answers


def stream_of(url: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, each checked by the SDK's types."""
    text = post(url, body | {"stream": True}).text
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            events.append(EVENT.validate_python(event))
    return events


def test_answer_is_thought_and_text(url):
    body = ASK | {"max_tokens": 100}
    whole = Message.model_validate(post(url, body).json())
    assert [(block.type, getattr(block, block.type)) for block in whole.content] == [
        ("thinking", "hm, so"),
        ("text", "hello"),
    ]
    # AI SDK refuses a text whose citations are null.
    assert whole.content[1].model_fields_set == {"type", "text"}
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    assert whole.usage.output_tokens_details.thinking_tokens == len("<think>hm, so</think>")
    events = stream_of(url, body)
    assert [event.type for event in events if event.type != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(d.thinking for d in deltas if d.type == "thinking_delta") == "hm, so"
    assert "".join(d.text for d in deltas if d.type == "text_delta") == "hello"
    assert sum(delta.type == "signature_delta" for delta in deltas) == 1
    usage = events[-2].usage
    assert usage.output_tokens == whole.usage.output_tokens
    assert usage.output_tokens_details == whole.usage.output_tokens_details


@pytest.mark.parametrize("stream", [False, True])
def test_omitted_thought_comes_back_by_its_signature(url, runner, stream):
    body = ASK | {"max_tokens": 100, "thinking": {"type": "adaptive", "display": "omitted"}}
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        if stream:
            with client.messages.stream(**body) as events:
                thought, _ = events.get_final_message().content
        else:
            thought, _ = client.messages.create(**body).content
    assert thought.thinking == ""
    told, _, _ = asked(url, runner, **turns("hi", [thought.model_dump()], "so"))
    assert told.startswith("[hm, so]")


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_budget_ends_a_thought_to_the_token(url, budget):
    thinking = {"type": "enabled", "budget_tokens": budget}
    answer = post(url, ASK | {"max_tokens": 40, "thinking": thinking})
    assert "x-ignored-fields" not in answer.headers
    thoughts = [b["thinking"] for b in answer.json()["content"] if b["type"] == "thinking"]
    assert "".join(thoughts) == "hm,"[:budget]
    used = answer.json()["usage"]["output_tokens_details"]["thinking_tokens"]
    assert used == len("<think></think>") + budget


def test_thoughts_taken_back_are_bounded():
    """A few bytes may be deflated from very many."""
    decoder = ThoughtDecoder()
    assert decoder.decode(encode_thought("x" * MAX_BYTES)) == "x" * MAX_BYTES
    assert decoder.decode(encode_thought("x")) is None
    assert ThoughtDecoder().decode(encode_thought("x" * (MAX_BYTES + 1))) is None
    assert ThoughtDecoder().decode("t1.!!") is None
    assert ThoughtDecoder().decode("EqQBCgIYAhIkN") is None  # another server's


@pytest.mark.parametrize(
    ("fields", "reason", "string"),
    [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"max_tokens": 100, "stop_sequences": ["lo", "zz"]}, "stop_sequence", "lo"),
    ],
)
def test_reason_of_the_end(url, fields, reason, string):
    whole = Message.model_validate(post(url, ASK | fields).json())
    assert (whole.stop_reason, whole.stop_sequence) == (reason, string)
    end = stream_of(url, ASK | fields)[-2].delta
    assert (end.stop_reason, end.stop_sequence) == (reason, string)


@pytest.mark.slow
def test_context_that_ends_an_answer_is_named(url, runner):
    runner.say, before = "x" * 3000, runner.say
    try:
        answer = post(url, ASK | {"max_tokens": 32_000}).json()
    finally:
        runner.say = before
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert (
        answer["usage"]["input_tokens"]
        + answer["usage"]["cache_read_input_tokens"]
        + answer["usage"]["output_tokens"]
        == 2048
    )


@pytest.mark.parametrize("length", [1950, 2100, 20_000])
def test_long_prompt_is_told_in_the_words_that_clients_read(url, length):
    """Also where it leaves less than a sixteenth of the context, so that they compact at once."""
    response = post(url, ASK | {"max_tokens": 32_000, **turns("x" * length)})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("prompt is too long: ")
    assert message.endswith(" maximum")
    assert post(url, ASK | {"max_tokens": 5, **turns("x" * 1950)}).status_code == 200


def test_count_is_that_of_the_usage(url, runner):
    body = ASK | {"system": "be brief", "tools": [TOOL], "thinking": {"type": "disabled"}}
    usage = post(url, body).json()["usage"]
    for count in (body, {name: body[name] for name in body if name != "max_tokens"}):
        told = post(url, count, f"{PATH}/count_tokens").json()
        assert told == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_ids_and_keys_are_where_the_sdk_looks(url):
    answer = post(url, ASK)
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    refused = post(url, {})
    assert refused.json()["request_id"] == refused.headers["request-id"]
    locked = httpx.post(url + PATH, json=ASK, headers={"x-api-key": "wrong"})
    assert locked.status_code == 401
    assert locked.json()["error"]["type"] == "authentication_error"
    bearer = httpx.post(url + PATH, json=ASK, headers={"Authorization": "Bearer k"})
    assert bearer.status_code == 200
    nowhere = post(url, ASK, "/v1/messages/batches")
    assert nowhere.json()["error"]["type"] == "not_found_error"
    other = post(url, ASK | {"model": "claude-sonnet-5"})
    assert other.json()["error"]["type"] == "not_found_error"


def test_thread_is_refused_as_the_sdk_expects(url):
    error = post(url, ASK | {"thread": {"type": "create"}}).json()["error"]
    assert error["details"] == {"error_code": "thread_unsupported_request"}


# ---- Tools


@pytest.fixture(scope="module")
def caller() -> ToolCaller:
    return ToolCaller(tool_tokenizer())


@pytest.fixture(scope="module")
def tools_url(caller: ToolCaller) -> Iterator[str]:
    with serve(lambda _: chat_model(caller, caller.tokenizer, 4096), api_key="k") as url:
        yield ready(url)


@pytest.mark.parametrize("stream", [False, True])
def test_sdk_runs_a_round_with_a_tool(tools_url, stream):
    calls = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """How it is.

        Args:
            city: where
        """
        calls.append(city)
        return "sunny"

    with anthropic.Anthropic(base_url=tools_url, api_key="k", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            model="test", max_tokens=100, messages=ASK["messages"], tools=[weather], stream=stream
        )
        messages = [each.get_final_message() if stream else each for each in runner]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert messages[-1].content[0].text == "done"
    assert len(calls) == 1


OTHER = {"name": "about", "input_schema": {"type": "object", "properties": {}}}
CHOICES = [
    (None, ["about"]),
    ({"type": "auto"}, ["about"]),
    ({"type": "any"}, ["about"]),
    ({"type": "tool", "name": "weather"}, ["weather"]),
    ({"type": "any", "disable_parallel_tool_use": True}, ["about"]),
    ({"type": "none"}, []),
]


@pytest.mark.parametrize(("choice", "names"), CHOICES)
def test_choice_holds(tools_url, choice, names):
    body = ASK | {"max_tokens": 100, "temperature": 0, "tools": [TOOL, OTHER]}
    body |= {"tool_choice": choice}
    whole = Message.model_validate(post(tools_url, body).json())
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert [call.name for call in calls] == names
    assert whole.stop_reason == ("tool_use" if names else "end_turn")


def test_call_cut_off_is_left_out_of_a_whole_answer(tools_url):
    body = ASK | {"max_tokens": 70, "tools": [TOOL], "tool_choice": {"type": "any"}}
    whole = Message.model_validate(post(tools_url, body | {"max_tokens": 50}).json())
    assert (whole.content, whole.stop_reason) == ([], "max_tokens")
    events = stream_of(tools_url, body | {"max_tokens": 50})
    assert events[1].content_block.name == "weather"
    assert events[-2].delta.stop_reason == "max_tokens"


DEFERRED = TOOL | {"name": "late", "defer_loading": True}
LOADED = result([{"type": "tool_reference", "tool_name": "late"}])
CHANGE = {"tool": {"type": "tool_reference", "name": "late"}}


@pytest.mark.parametrize(
    ("conversation", "is_there"),
    [
        (turns("hi"), False),
        (turns("hi", [CALL], [LOADED]), True),
        (turns([text("hi"), {"type": "tool_addition", **CHANGE}]), True),
        (
            turns(
                [text("hi"), {"type": "tool_addition", **CHANGE}],
                "a",
                [text("b"), {"type": "tool_removal", **CHANGE}],
            ),
            False,
        ),
    ],
)
def test_deferred_tool_waits_to_be_named(tools_url, caller, conversation, is_there):
    body = ASK | conversation | {"tools": [TOOL, DEFERRED]}
    assert post(tools_url, body).status_code == 200
    assert ('"name": "late"' in last_prompt(caller)) is is_there
    named = body | {"tool_choice": {"type": "tool", "name": "late"}}
    assert post(tools_url, named).status_code == (200 if is_there else 400)


def test_schema_holds_the_answer(tools_url):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    spec = {"type": "json_schema", "schema": schema | {"additionalProperties": False}}
    for fields in ({"output_config": {"format": spec}}, {"output_format": spec}):
        answer = post(tools_url, ASK | {"max_tokens": 100, **fields}).json()
        assert list(json.loads(answer["content"][0]["text"])) == ["a"]


# ---- Where the template takes no system turn in the midst


def test_late_system_text_stays_in_its_place():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('system first') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    runner = ScriptedRunner(tokenizer)
    late = {"role": "system", "content": "now"}
    with serve(lambda _: chat_model(runner, tokenizer)) as url:
        messages = [*ASK["messages"], late, {"role": "assistant", "content": "a"}, late]
        assert post(ready(url), ASK | {"system": "s", "messages": messages}).status_code == 200
    assert tokenizer.decode(runner.prompts[-1]) == (
        "<|system|>s<|end|><|user|>hi\n\nnow<|end|><|assistant|>a<|end|><|user|>now<|end|>"
        "<|assistant|>"
    )


# ---- Streams in trouble


def test_idle_stream_is_pinged(runner, monkeypatch):
    monkeypatch.setattr("engine.scheduling.output.HEARTBEAT", 0.05)
    with serve(lambda _: chat_model(runner, runner.tokenizer, 2048)) as url:
        ready(url)
        runner.hold()
        with httpx.stream("POST", url + PATH, json=ASK | {"stream": True}) as answer:
            lines = answer.iter_lines()
            assert [next(lines), next(lines)] == ["event: ping", 'data: {"type": "ping"}']
            runner.free()
            assert "message_stop" in "\n".join(lines)


def test_failing_stream_ends_with_an_error(runner):
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
    last = text.strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error"
    error = json.loads(last[1].removeprefix("data: "))
    assert error["error"]["type"] == "api_error"
