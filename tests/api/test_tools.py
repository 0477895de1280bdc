"""Tools under /v1, over a socket: valid calls of a model without weights, whatever it wishes."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine import ChatModel
from serving import tool_fields
from tests.api.test_replies import lines_of, unknown_fields
from tests.conftest import TEMPLATE, byte_tokenizer, chat_model, ready, serve
from tests.tool_caller import TOOL_TEMPLATE, ToolCaller, tool_tokenizer

HELLO = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def tool(name: str, schema: object = None) -> dict[str, Any]:
    parameters = {} if schema is None else {"parameters": schema}
    return {"type": "function", "function": {"name": name, "description": "what", **parameters}}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [tool("weather", CITY), tool("zone")]
AS_TOKENS = TOOL_TEMPLATE.replace("<tool_call>\n", "<|call|>").replace("\n</tool_call>", "")
# How each begins a call, and the texts around one.
FORMATS = {
    "learnt": (TOOL_TEMPLATE, "<tool_call>"),
    "learnt, with special tokens": (AS_TOKENS, "<|call|>"),
    "common": (TEMPLATE, "<tool_call>"),
}


@pytest.fixture(scope="module", params=FORMATS)
def caller(request: pytest.FixtureRequest) -> ToolCaller:
    template, begin = FORMATS[request.param]
    tokenizer = tool_tokenizer(["<|call|>"])
    tokenizer.chat_template = template
    return ToolCaller(tokenizer, begin)


@pytest.fixture(scope="module")
def url(caller: ToolCaller) -> Iterator[str]:
    with serve(lambda _: chat_model(caller, caller.tokenizer, 4096)) as url:
        yield ready(url)


@pytest.fixture
def begin(caller: ToolCaller) -> Iterator[str]:
    """What the caller begins an answer with; it may be changed for a test."""
    before = caller.begin
    yield before
    caller.begin = before


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[Any] = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(
        model="test", messages=messages, **({"tools": TOOLS, "temperature": 0} | fields)
    )


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or []
    ]


def streamed(client: openai.OpenAI, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a streamed answer, put together as clients do."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, stream=True, **fields):
        (part,) = chunk.choices
        choice = choices.setdefault(part.index, {"content": "", "calls": [], "reason": None})
        assert choice["reason"] is None
        choice["reason"] = part.finish_reason
        choice["content"] += part.delta.content or ""
        for call in part.delta.tool_calls or []:
            if call.id:
                assert call.index == len(choice["calls"])
                choice["calls"].append([call.function.name, ""])
            else:
                assert call.function.name is None
            choice["calls"][call.index][1] += call.function.arguments
    return [choices[index] for index in sorted(choices)]


# ---- A whole round


def test_a_round_of_call_result_and_answer(client, caller):
    answer = ask(client).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert calls_of(answer.message) == [("weather", {"city": ""})]
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert len(call.id) == 9
    assert call.id.isalnum()
    caller.say = "It is sunny."
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny<|end|>"}
    final = ask(client, [*HELLO, answer.message, result]).choices[0]
    assert (final.finish_reason, final.message.content) == ("stop", "It is sunny.")
    assert final.message.tool_calls is None
    prompt = caller.tokenizer.decode(caller.prompts[-1])
    assert '{"name": "weather", "arguments": {"city": ""}}' in prompt
    assert "sunny<|end|>" in prompt
    ends = caller.prompts[-1].count(256)
    told = ask(client, [*HELLO, answer.message, result | {"content": "sunny"}])
    assert told.choices[0].message.content == "It is sunny."
    assert caller.prompts[-1].count(256) == ends


def test_a_message_of_ours_with_calls_can_be_sent_back_as_it_is(url, caller):
    body = {"messages": HELLO, "tools": TOOLS}
    message = httpx.post(url + CHAT, json=body).json()["choices"][0]["message"]
    assert message["content"] is None
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "x"}
    again = httpx.post(url + CHAT, json=body | {"messages": [*HELLO, message, result]})
    assert again.json()["choices"][0]["message"]["content"] == caller.say


def test_tools_are_told_of_in_the_prompt_and_not_with_none(client, caller):
    ask(client)
    assert '"name": "weather"' in caller.tokenizer.decode(caller.prompts[-1])
    choice = ask(client, tool_choice="none").choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert "weather" not in caller.tokenizer.decode(caller.prompts[-1])


# ---- The choice


def test_auto_may_answer_with_a_text(client, caller, begin):
    caller.begin = "no < call"
    choice = ask(client, tool_choice="auto").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "no < call")
    assert choice.message.tool_calls is None


def test_text_may_stand_before_a_call(client, caller, begin):
    caller.begin = f"so:\n\n{begin}"
    choice = ask(client).choices[0]
    assert choice.message.content == "so:"
    assert calls_of(choice.message) == [("weather", {"city": ""})]


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_whatever_the_model_would_say(client, caller, begin, stream):
    caller.begin = "no call"
    if stream:
        (choice,) = streamed(client, tool_choice="required")
        assert choice == {"content": "", "calls": [choice["calls"][0]], "reason": "tool_calls"}
        return
    choice = ask(client, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert len(calls_of(choice.message)) == 1


def test_named_function_is_called(client, caller, begin):
    named = {"type": "function", "function": {"name": "zone"}}
    for caller.begin in (begin, "no call"):
        choice = ask(client, tool_choice=named).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert calls_of(choice.message) == [("zone", {})]
    # All of them are told of, so that the prompt is the same for each.
    assert "weather" in caller.tokenizer.decode(caller.prompts[-1])


def two_calls(caller: ToolCaller) -> str:
    """An answer of two calls up to where the second has its name."""
    form = chat_format(caller)
    one = form.head + "zone" + form.middle + "{}"
    return one + (form.between or form.tail + form.head) + "weather"


def chat_format(caller: ToolCaller) -> Any:
    model = chat_model(caller, caller.tokenizer)
    model.close()
    return model.tokenizer.tools.form


def test_there_may_be_several_calls(client, caller, begin):
    caller.begin = two_calls(caller)
    choice = ask(client).choices[0]
    assert calls_of(choice.message) == [("zone", {}), ("weather", {"city": ""})]
    first, second = choice.message.tool_calls
    assert first.id != second.id
    (parts,) = streamed(client)
    assert parts["calls"] == [["zone", "{}"], ["weather", '{"city": ""}']]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parallel_calls_can_be_ruled_out(client, caller, begin, choice):
    caller.begin = two_calls(caller)
    message = ask(client, parallel_tool_calls=False, tool_choice=choice).choices[0].message
    assert calls_of(message) == [("zone", {})]


# ---- How it is told


@pytest.mark.parametrize("lead", ["", "so: "])
def test_streamed_deltas_are_the_whole_answer(client, caller, begin, lead):
    caller.begin = lead + begin
    how = {"n": 3, "temperature": 1.5, "seed": 5}
    whole = ask(client, **how).choices
    parts = streamed(client, **how)
    assert len(whole) == len(parts) == 3
    for choice, part in zip(whole, parts, strict=True):
        assert part["content"] == (choice.message.content or "")
        assert [(name, json.loads(text)) for name, text in part["calls"]] == calls_of(
            choice.message
        )
        assert part["reason"] == choice.finish_reason == "tool_calls"


def test_chunks_say_the_id_and_the_name_first(client):
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True)]
    assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", None)
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    first, *rest = calls
    assert (first.index, first.type, first.function.name) == (0, "function", "weather")
    assert len(first.id) == 9
    assert {(call.index, call.id, call.type, call.function.name) for call in rest} == {
        (0, None, None, None)
    }
    assert len(rest) > 3  # as they come
    assert chunks[-1].finish_reason == "tool_calls"
    assert chunks[-1].delta.content is None
    # What belongs to the beginning of a call is no chunk.
    assert len(chunks) == len(calls) + 2


def test_ids_of_several_answers_differ(client):
    choices = ask(client, n=4).choices
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 4


def test_logprobs_are_those_of_all_tokens(client):
    answer = ask(client, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens - 1
    assert '"weather"' in "".join(token.token for token in tokens)
    chunks = list(ask(client, logprobs=True, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks]
    assert sum(len(each.content) for each in told if each) == len(tokens)


def test_answer_that_is_cut_within_a_call_says_so(client, caller):
    whole = ask(client)
    tokens = whole.usage.completion_tokens
    choice = ask(client, max_tokens=tokens - 25).choices[0]
    assert choice.finish_reason == "length"
    (part,) = streamed(client, max_tokens=tokens - 25)
    assert part["reason"] == "length"


def test_stop_string_ends_the_text_before_a_call(client, caller, begin):
    caller.begin = f"one two {begin}"
    choice = ask(client, stop="two").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "one ")


def test_stop_string_is_not_looked_for_in_special_tokens(client):
    """They are decoded as secret names, which have letters."""
    written = '<tool_call> {"name": "weather", "arguments": {"city": ""}} </tool_call>'
    others = set("abcdefghijklmnopqrstuvwxyz0123456789") - set(written)
    choice = ask(client, stop=sorted(others)[-16:]).choices[0]
    assert choice.finish_reason == "tool_calls"


def test_call_that_a_stop_string_cuts_is_no_whole_one(client):
    choice = ask(client, stop="city").choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls[0].function.arguments == '{"'


def test_metrics_and_the_log_say_how_it_ended(client, url):
    ask(client)
    label = 'finish_reason="tool_calls",outcome="served"'
    assert label in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "required", "n": 2}])
def test_calls_have_openais_shape(url, fields):
    body = {"messages": HELLO, "tools": TOOLS} | fields
    whole = ChatCompletion.model_validate_json(httpx.post(url + CHAT, json=body).text, strict=True)
    assert whole.choices[0].message.tool_calls
    assert unknown_fields(whole) == []
    for line in lines_of(url, CHAT, body):
        assert unknown_fields(ChatCompletionChunk.model_validate_json(line, strict=True)) == []


def test_default_penalty_is_off_where_tools_are_sent(caller, client):
    ask(client)
    assert caller.samplings[-1].repetition_penalty == 1.0
    ask(client, extra_body={"repetition_penalty": 1.2})
    assert caller.samplings[-1].repetition_penalty == 1.2


def test_tools_are_counted_by_tokenize(url, caller):
    body = {"messages": HELLO, "tools": TOOLS}
    ids = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
    httpx.post(url + CHAT, json=body)
    assert ids == caller.prompts[-1]
    refused = httpx.post(f"{url}/tokenize", json={"prompt": "x", "tools": TOOLS})
    assert refused.json()["error"]["param"] == "tools"


# ---- Refusals


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    tokenizer = byte_tokenizer()
    with serve(lambda _: chat_model(ToolCaller(tokenizer), tokenizer, 4096)) as url:
        yield ready(url)


DEEP = json.loads('{"type": "object", "items":' + '{"items":' * 100 + "{}" + "}" * 101)
PART = {"type": "text", "text": "x"}
SAID = {"role": "assistant", "content": None}


def call(arguments: object, **more: object) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments, **more}
    return SAID | {"tool_calls": [{"id": "1", "type": "function", "function": function}]}


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "required without tools": ({"tool_choice": "required"}, "tool_choice", "no tools"),
    "an unknown name": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "'x'",
    ),
    "a named one without tools": (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "'x'",
    ),
    "another choice": ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "required"),
    "allowed tools": (
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "tool_choice",
        "function",
    ),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "tools"),
    "a function call": ({"function_call": {"name": "f"}}, "function_call", "tool_choice"),
    "a response format": (
        {"tools": TOOLS, "response_format": {"type": "json_object"}},
        "tools",
        "response_format",
    ),
    "ignore_eos": ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos", "tools"),
    "min_tokens": ({"tools": TOOLS, "min_tokens": 3}, "min_tokens", "tools"),
    "a continuation": (
        {
            "tools": TOOLS,
            "messages": [*HELLO, {"role": "assistant", "content": "x", "prefix": True}],
        },
        "tools",
        "go on",
    ),
    "too many": ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools", "at most 128"),
    "too long": (
        {"tools": [tool(name, CITY | {"$comment": "x" * 2**15}) for name in "ab"]},
        "tools",
        "longer than 65,536 characters",
    ),
    "the same twice": ({"tools": [tool("f"), tool("f")]}, "tools", "f is there twice"),
    "a bad name": ({"tools": [tool("a b")]}, "tools", "name"),
    "another kind": ({"tools": [{"type": "web_search"}]}, "tools", "type"),
    "no function": ({"tools": [{"type": "function"}]}, "tools", "function"),
    "an unknown field": (
        {"tools": [{"type": "function", "function": {"name": "f", "returns": {}}}]},
        "tools",
        "'returns'",
    ),
    "a schema of no object": ({"tools": [tool("f", {"type": "string"})]}, "tools", "object"),
    "no schema": ({"tools": [tool("f", [1])]}, "tools", "JSON schema"),
    "a schema that does not compile": (
        {"tools": [*TOOLS, tool("bad", {"properties": {"x": {"type": "bogus"}}})]},
        "tools",
        "the parameters of bad: ",
    ),
    "a schema that takes too much": (
        {"tools": [tool("f", {"properties": {"x": {"type": "integer", "multipleOf": 3_000_017}}})]},
        "tools",
        "takes more than 2 seconds",
    ),
    "a schema that is deep": ({"tools": [tool("f", DEEP)]}, "tools", "64 levels"),
    "half a character": ({"tools": [tool("f", {"$comment": "\ud800"})]}, "tools", "surrogate"),
    "arguments that are no object": ({"messages": [*HELLO, call("[]")]}, "messages", "JSON object"),
    "arguments that are no JSON": ({"messages": [*HELLO, call("no")]}, "messages", "JSON object"),
    "arguments that are no text": ({"messages": [*HELLO, call({})]}, "messages", "JSON object"),
    "arguments with NaN": ({"messages": [*HELLO, call('{"x": NaN}')]}, "messages", "JSON object"),
    "arguments that are deep": (
        {"messages": [*HELLO, call('{"x":' + "[" * 100 + "]" * 100 + "}")]},
        "messages",
        "64 levels",
    ),
    "arguments that are very deep": (
        {"messages": [*HELLO, call('{"x":' * 60_000 + "1" + "}" * 60_000)]},
        "messages",
        "JSON object",
    ),
    "arguments with half a character": (
        {"messages": [*HELLO, call('{"x": "\\ud800"}')]},
        "messages",
        "surrogate",
    ),
    "a call without a function": (
        {"messages": [*HELLO, SAID | {"tool_calls": [{"id": "1"}]}]},
        "messages",
        "function",
    ),
    "too many calls": (
        {"messages": [*HELLO, SAID | {"tool_calls": call("{}")["tool_calls"] * 129}]},
        "messages",
        "at most 128",
    ),
    "calls of a user": (
        {"messages": [call("{}") | {"role": "user"}]},
        "messages",
        "only the assistant",
    ),
    "a result of a user": (
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        "messages",
        "tool",
    ),
    "no content and no calls": ({"messages": [*HELLO, SAID]}, "messages", "content"),
    "a result without a content": (
        {"messages": [*HELLO, call("{}"), {"role": "tool", "tool_call_id": "1", "content": None}]},
        "messages",
        "content",
    ),
    "the old role of a result": (
        {"messages": [*HELLO, {"role": "function", "name": "f", "content": "x"}]},
        "messages",
        '"tool"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_honoured_is_refused(refusing, what):
    body, param, word = REFUSALS[what]
    answer = httpx.post(
        refusing + CHAT, content=json.dumps({"messages": HELLO, **body}), timeout=30
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert word in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "body",
    [
        {"tools": []},
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None},
        {"tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": False},
        {"tools": TOOLS, "response_format": {"type": "text"}},
        {"tools": TOOLS, "functions": [], "function_call": "none"},
        {"tools": [tool("f", {}), tool("g", {"type": "object"})], "ignore_eos": False},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": None}}]},
        {"tools": [tool("f", {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}})]},
        {"messages": [*HELLO, SAID | {"content": "x", "tool_calls": []}, *HELLO]},
        {"messages": [*HELLO, call("{}"), {"role": "tool", "content": [PART]}]},
        {"messages": [*HELLO, call(""), {"role": "tool", "content": "x"}]},
        {"messages": [*HELLO, call("{}", parsed_arguments={"a": 1}) | {"parsed": {}}, *HELLO]},
        {"tools": [tool("f", CITY) | {"strict": True}]},
    ],
)  # fmt: skip
def test_what_can_be_honoured_is_not_refused(refusing, body):
    answer = httpx.post(refusing + CHAT, json={"messages": HELLO, "max_tokens": 50, **body})
    assert answer.status_code == 200, answer.text


def test_the_other_calls_have_no_tools(refusing):
    for path in ("/", "/v1/completions"):
        for more in ({"tools": TOOLS}, {"tool_choice": "required"}):
            answer = httpx.post(refusing + path, json={"prompt": "x", **more})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in more


def test_as_many_tools_as_there_may_be(refusing):
    tools = [tool(f"f{n}", CITY) for n in range(tool_fields.MAX_TOOLS)]
    body = {"messages": HELLO, "tools": tools, "tool_choice": "required"}
    answer = httpx.post(refusing + CHAT, json=body)
    assert answer.status_code == 400  # the prompt has no room for them here
    assert "maximum context length" in answer.json()["error"]["message"]
    last = [tool(f"f{n}") for n in range(20)]
    answer = httpx.post(refusing + CHAT, json=body | {"tools": last})
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"


# ---- Beside thoughts


def thinking_model() -> ChatModel:
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE.replace(
        "<|assistant|>{% endif %}",
        "<|assistant|>{% if think %}<think>{% elif think is false %}</think>{% endif %}{% endif %}",
    )
    return chat_model(ToolCaller(tokenizer), tokenizer, 4096)


@pytest.fixture(scope="module")
def thinking() -> Iterator[tuple[openai.OpenAI, ToolCaller]]:
    model = thinking_model()
    with (
        serve(lambda _: model) as url,
        openai.OpenAI(base_url=f"{ready(url)}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, model.engine.runner


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_thought_comes_before_a_call(thinking, choice, begun):
    client, caller = thinking
    caller.begin = "hm <tool_call></think>\n<tool_call>"
    if not begun:
        caller.begin = "<think>" + caller.begin
    how = {"tool_choice": choice, "extra_body": {"chat_template_kwargs": {"think": begun}}}
    message = ask(client, **how).choices[0].message
    assert message.reasoning_content == "hm <tool_call>"
    assert message.content is None
    assert calls_of(message) == [("weather", {"city": ""})]
    chunks = [chunk.choices[0].delta for chunk in ask(client, stream=True, **how)]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in chunks]
    assert "".join(thoughts) == "hm <tool_call>"
    assert next(d.tool_calls[0].function.name for d in chunks if d.tool_calls) == "weather"


@pytest.mark.parametrize("begun", [True, False])
def test_thought_before_a_call_ends_at_its_budget(thinking, begun):
    client, caller = thinking
    opening = "" if begun else "<think>"
    # What follows is written behind the marker, which takes the place of so many characters.
    caller.begin = f"{opening}hm, and so on</think>\n<tool_call>"
    extra = {"chat_template_kwargs": {"think": begun}, "reasoning_budget": 5}
    how = {"tool_choice": "required", "extra_body": extra}
    message = ask(client, **how).choices[0].message
    assert message.reasoning_content == "hm, a"
    assert [name for name, _ in calls_of(message)] == ["weather"]


def test_an_answer_may_go_without_a_thought(thinking):
    client, caller = thinking
    caller.begin = "<tool_call>"
    message = ask(client).choices[0].message
    assert calls_of(message) == [("weather", {"city": ""})]
    caller.begin = "plain"
    message = ask(client).choices[0].message
    assert message.content == "plain"


# ---- At the start


def test_what_tools_need_is_built_at_the_start_where_the_model_knows_them():
    for template, built in ((TOOL_TEMPLATE, True), (TEMPLATE, False)):
        tokenizer = tool_tokenizer()
        tokenizer.chat_template = template
        model = chat_model(ToolCaller(tokenizer), tokenizer)
        model.warm_up()
        assert ("_compiler" in vars(model)) == built
        model.close()
