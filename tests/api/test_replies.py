"""What an answer looks like on its way out: thoughts, fingerprints, and OpenAI's exact shapes."""

from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine import Thoughts
from serving.inner_request import InnerRequest
from serving.openai_shared import fingerprint
from serving.reasoning import ReasoningParser
from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model, ready, serve

HELLO = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
MARKERS = ("<think>", "</think>")

# ---- Thoughts are parted from what is said

ANSWERS = [
    # answer, opened by the prompt, thought, said
    ("<think>\nhm, so\n</think>\n\nhello", False, "hm, so", "hello"),
    ("\n<think>hm</think>hello", False, "hm", "hello"),
    ("<think>\n\n</think>\n\nhello", False, "", "hello"),
    ("<think>never ends\n", False, "never ends", ""),
    ("\nhm </ think\n</think>\nhello", True, "hm </ think", "hello"),
    ("hello", False, "", "hello"),
    ("  hello ", False, "", "  hello "),
    ("a < b", False, "", "a < b"),
    ("<thin ice", False, "", "<thin ice"),
    ("<thi", False, "", "<thi"),
    ("say <think> aloud </think>", False, "", "say <think> aloud </think>"),
    ("<think>a</think>b</think> c", False, "a", "b</think> c"),
    ("<think>a b\n\n  c</think>d", False, "a b\n\n  c", "d"),
    ("", True, "", ""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("answer", "inside", "thought", "said"), ANSWERS)
def test_a_thought_is_parted_wherever_the_pieces_end(answer, inside, thought, said, size):
    parser = ReasoningParser(MARKERS, inside)
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    parts = [*map(parser.push, pieces), parser.flush()]
    assert "".join(part.reasoning for part in parts) == thought
    assert "".join(part.content for part in parts) == said


@pytest.mark.parametrize(
    ("text", "begun"),
    [
        ("", False),
        ("hello", False),
        ("<think>a", True),
        ("<think>a</think>b", False),
        ("<think>a</think>b<think>c", True),
        ("<think>a</think><think>b</think>c", False),
        ("a</think>", False),
    ],
)
def test_answer_goes_on_in_the_thought_that_is_open(text, begun):
    """Of several in what the answer continues, the last counts."""
    model = SimpleNamespace(thoughts=lambda _: Thoughts(*MARKERS, begun=False))
    turns = [*HELLO, {"role": "assistant", "content": text}]
    request = InnerRequest(messages=turns, sampling={}, continues=True)
    assert request._thoughts(model, None).begun is begun
    other = InnerRequest(messages=turns, sampling={})
    assert other._thoughts(model, None).begun is False


def test_a_thought_is_told_as_it_comes():
    parser = ReasoningParser(MARKERS, True)
    assert [parser.push(word).reasoning for word in ("I ", "think ", "so")] == [
        "I",
        " think",
        " so",
    ]


OPENED = "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}{# </think> #}"
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
ASKED = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}{# </think> #}"


@pytest.fixture
def thinking(request):
    """A live server whose model thinks aloud; the prompt opens the thought, or the answer does."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS + OPENED if request.param else ASKED
    runner = ScriptedRunner(tokenizer)
    runner.say = "hm, so\n</think>\n\nhello" if request.param else "<think>hm, so</think>hello"
    with (
        serve(lambda settings: chat_model(runner, tokenizer)) as url,
        openai.OpenAI(base_url=f"{ready(url)}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client, runner


either = pytest.mark.parametrize("thinking", [True, False], indirect=True)


@either
def test_thoughts_are_no_content(thinking):
    client, _ = thinking
    message = client.chat.completions.create(model="test", messages=HELLO).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, so", "hello")


@either
def test_thoughts_are_streamed_beside_the_content(thinking):
    client, _ = thinking
    stream = client.chat.completions.create(model="test", messages=HELLO, stream=True, n=2)
    thoughts, texts = ["", ""], ["", ""]
    for chunk in stream:
        (choice,) = chunk.choices
        thoughts[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
        texts[choice.index] += choice.delta.content or ""
    assert (thoughts, texts) == (["hm, so"] * 2, ["hello"] * 2)


@pytest.mark.parametrize("thinking", [True], indirect=True)
def test_json_comes_after_the_thought(thinking):
    client, _ = thinking
    answer = client.chat.completions.create(
        model="test", messages=HELLO, response_format={"type": "json_object"}, max_tokens=40
    )
    message = answer.choices[0].message
    assert message.reasoning_content == "hm, so"
    assert message.content.startswith("{")


@either
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("stop", "said"), [("so", "hello"), ("</think>", "hello"), ("ll", "he")])
def test_stop_strings_are_looked_for_in_what_is_said(thinking, stop, said, stream):
    client, _ = thinking
    asked = client.chat.completions.create(
        model="test", messages=HELLO, stop=[stop], stream=stream, n=2
    )
    contents, thoughts = ["", ""], ["", ""]
    for part in asked if stream else [asked]:
        for choice in part.choices:
            message = choice.delta if stream else choice.message
            contents[choice.index] += message.content or ""
            thoughts[choice.index] += getattr(message, "reasoning_content", None) or ""
    assert contents == [said] * 2
    assert thoughts == ["hm, so"] * 2


@pytest.mark.parametrize("thinking", [False], indirect=True)
def test_a_continued_thought_goes_on(thinking):
    client, runner = thinking
    runner.say = "so</think>hello"
    past = [*HELLO, {"role": "assistant", "content": "<think>hm, ", "prefix": True}]
    message = client.chat.completions.create(model="test", messages=past).choices[0].message
    assert (message.reasoning_content, message.content) == ("so", "hello")


# ---- Going on from the last message


@pytest.mark.parametrize(
    ("mark", "fields"),
    [
        ({}, {"continue_final_message": True}),
        ({}, {"continue_final_message": True, "add_generation_prompt": False}),
        ({"prefix": True}, {}),
    ],
)
def test_an_answer_goes_on_from_the_last_message(server, runner, mark, fields):
    messages = [*HELLO, {"role": "assistant", "content": "I say "} | mark]
    response = httpx.post(server + CHAT, json={"messages": messages} | fields)
    assert response.json()["choices"][0]["message"]["content"] == "hello"
    asked = runner.tokenizer.decode(runner.prompts[-1])
    assert asked == "<|user|>hi<|end|><|assistant|>I say "


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (HELLO, {"continue_final_message": True}, "messages"),
        ([{"role": "user", "content": "x", "prefix": True}], {}, "messages"),
        ([{"role": "assistant", "content": "x", "prefix": True}, *HELLO], {}, "messages"),
        (HELLO, {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            [{"role": "assistant", "content": "x"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(server, messages, fields, param):
    response = httpx.post(server + CHAT, json={"messages": messages} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


# ---- Messages


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "assistant", "content": None}, "content must be a text"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content must be a text"),
        ({"role": "user"}, "content is missing"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "function is missing"),
        ({"role": "function", "name": "f", "content": "x"}, 'must be "tool"'),
        ({"role": "user", "tool_call_id": "1", "content": "x"}, "a tool_call_id"),
        ({"role": "critic", "content": "x"}, "'system', 'user', 'assistant' or 'tool'"),
        ({"role": "user", "content": "x", "images": ["x"]}, "'images'"),
    ],
)
def test_a_bad_message_is_refused_clearly(server, message, word):
    response = httpx.post(server + CHAT, json={"messages": [message]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages"
    assert word in error["message"]


def test_a_message_of_ours_can_be_sent_back(server):
    """As clients do, with every field that it came with."""
    message = httpx.post(server + CHAT, json={"messages": HELLO}).json()["choices"][0]["message"]
    sent = {**message, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    response = httpx.post(server + CHAT, json={"messages": [*HELLO, sent, *HELLO]})
    assert response.status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_stream_options_need_a_stream(server, path):
    body = {"stream_options": {"include_usage": True}}
    body |= {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    error = httpx.post(server + path, json=body).json()["error"]
    assert error["param"] == "stream_options"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_an_overflow_says_what_clients_look_for(server, path):
    body = {"messages": [{"role": "user", "content": "x" * 600}]}
    for text in ("x" * 600, "x" * 100_000):
        body = {"prompt": text}
        if path == CHAT:
            body = {"messages": [{"role": "user", "content": text}]}
        error = httpx.post(server + path, json=body).json()["error"]
        assert error["message"].startswith("This model's maximum context length is 512 tokens. ")
        assert error["code"] == "context_length_exceeded"


def test_tokens_from_the_cache_are_counted(server):
    body = {"messages": [{"role": "user", "content": "the same text " * 9}]}
    usages = [httpx.post(server + CHAT, json=body).json()["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0
    assert cached[1] > 100


def test_a_fingerprint_stays_the_same(server):
    answers = [httpx.post(server + CHAT, json={"messages": HELLO}).json() for _ in range(2)]
    assert len({answer["system_fingerprint"] for answer in answers}) == 1
    assert len({answer["id"] for answer in answers}) == 2


def test_a_fingerprint_is_of_how_a_model_computes_and_not_of_what_a_start_measured(make, runner):
    facts = {"model": "demo", "weights": "bfloat16 (a step of 1 token here: 35 ms)"}
    facts |= {"devices": "cuda:0 (9.1 GiB left)", "context": "8,192 tokens"}
    model = make(runner)

    def fingerprint_with(**changes: str) -> str:
        return fingerprint(replace(model, facts=facts | changes))

    same = fingerprint_with()
    assert same == fingerprint_with(weights="bfloat16 (a step of 1 token here: 36 ms)")
    assert same == fingerprint_with(devices="cuda:0 (8.7 GiB left)")
    assert same != fingerprint_with(weights="float16 (a step of 1 token here: 35 ms)")
    assert same != fingerprint_with(devices="cpu")


# ---- OpenAI's own models take what we send, field by field


def unknown_fields(value: object, where: str = "") -> list[str]:
    """The fields of a response that OpenAI's models do not have."""
    if isinstance(value, list):
        return [name for item in value for name in unknown_fields(item, where)]
    extra = getattr(value, "model_extra", None) or {}
    found = [f"{where}.{name}" for name in extra]
    for name in getattr(type(value), "model_fields", {}):
        found += unknown_fields(getattr(value, name), f"{where}.{name}")
    return found


def lines_of(url: str, path: str, body: dict) -> list[str]:
    text = httpx.post(url + path, json=body | {"stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return lines


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": True, "top_logprobs": 3}, {"n": 2, "max_tokens": 2}]
)
def test_chat_answers_have_openais_shape(server, fields):
    body = {"messages": HELLO} | fields
    text = httpx.post(server + CHAT, json=body).text
    whole = ChatCompletion.model_validate_json(text, strict=True)
    assert unknown_fields(whole) == []
    required = {"id", "choices", "created", "model", "object", "usage", "system_fingerprint"}
    assert whole.model_fields_set == required
    assert whole.choices[0].message.model_fields_set == {"role", "content", "refusal"}
    for line in lines_of(server, CHAT, body | {"stream_options": {"include_usage": True}}):
        chunk = ChatCompletionChunk.model_validate_json(line, strict=True)
        assert unknown_fields(chunk) == []
        assert chunk.model_fields_set == required


@pytest.mark.parametrize("fields", [{}, {"logprobs": 3}, {"n": 2, "echo": True}])
def test_completions_have_openais_shape(server, fields):
    body = {"prompt": "x"} | fields
    whole = Completion.model_validate_json(
        httpx.post(f"{server}/v1/completions", json=body).text, strict=True
    )
    assert unknown_fields(whole) == []
    for line in lines_of(server, "/v1/completions", body):
        # OpenAI sends null until the end as well, which its models do not say.
        ended = line.replace('"finish_reason": null', '"finish_reason": "stop"')
        assert unknown_fields(Completion.model_validate_json(ended, strict=True)) == []


def test_a_model_has_openais_shape(server):
    (card,) = httpx.get(f"{server}/v1/models").json()["data"]
    assert unknown_fields(Model.model_validate(card, strict=True)) == [
        ".max_model_len",
        ".context_length",
        ".version",
    ]


# ---- Counting tokens, in vLLM's shape


def test_a_text_is_tokenized_and_back(server):
    told = httpx.post(f"{server}/tokenize", json={"prompt": "a<|end|>你"}).json()
    assert told["count"] == len(told["tokens"]) == 5
    assert told["max_model_len"] == 512
    assert told["token_strs"] is None
    back = httpx.post(f"{server}/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": "a<|end|>你"}


def test_messages_are_tokenized_as_they_are_asked(server, runner):
    httpx.post(server + CHAT, json={"messages": HELLO})
    body = {"model": "test", "messages": HELLO, "return_token_strs": True}
    told = httpx.post(f"{server}/tokenize", json=body).json()
    assert told["tokens"] == runner.prompts[-1]
    assert told["token_strs"] == ["<|user|>", "h", "i", "<|end|>", "<|assistant|>"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x" * 2**21}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 2**21}]}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "temperature": 1}, 400, "temperature"),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}, 400, None),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, 400, "add_special_tokens"),
        (
            "/tokenize",
            {"messages": HELLO, "chat_template_kwargs": {"a": 1}},
            400,
            "chat_template_kwargs",
        ),
        ("/detokenize", {"tokens": [260]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * (2**18 + 1)}, 400, "tokens"),
    ],
)
def test_bad_request_to_count_is_refused(server, path, body, status, param):
    response = httpx.post(server + path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == (param or "continue_final_message")


def test_counting_tokens_needs_the_key(runner, tokenizer):
    with serve(lambda settings: chat_model(runner, tokenizer), api_key="secret") as url:
        ready(url)
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            assert httpx.post(url + path, json=body).status_code == 401
            headers = {"Authorization": "Bearer secret"}
            assert httpx.post(url + path, json=body, headers=headers).status_code == 200


def test_prediction_changes_no_answer(server):
    """Where there is no speculation it is of no use, and its counts say so."""
    asked = {"messages": [{"role": "user", "content": "hi"}], "seed": 1}
    call = f"{server}/v1/chat/completions"
    plain = httpx.post(call, json=asked).json()
    prediction = {"type": "content", "content": [{"type": "text", "text": "hello"}]}
    told = httpx.post(call, json=asked | {"prediction": prediction}).json()
    assert told["choices"] == plain["choices"]
    counts = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert told["usage"]["completion_tokens_details"] == counts
    for wrong in ({"type": "content"}, {"type": "x", "content": "y"}, "x", {"content": 5}):
        answer = httpx.post(call, json=asked | {"prediction": wrong})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("prediction")
    metrics = httpx.get(f"{server}/metrics").text
    assert "# TYPE chat_spec_decode_num_draft_tokens_total counter" in metrics
