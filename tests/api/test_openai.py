"""OpenAI's dialect, as the real `openai` client and LangChain speak it, over a real socket."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import torch

import api
from engine import ChatModel
from engine.guided.guide import GuideCompiler
from engine.prompt.tokenizer import ChatTokenizer
from engine.runner.create import create_runner
from engine.sampling_params import SamplingParams
from serving import chat, parts
from serving.workers import NUM_THREADS
from tests.conftest import chat_model, ready, serve, tiny_llama, wait_for

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(runner) -> str:
    """The last prompt that the model was given, as text."""
    return runner.tokenizer.decode(runner.prompts[-1])


def test_a_chat_completion(client, runner):
    answer = client.chat.completions.create(model="test", messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "test")
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
    }
    assert answer.usage.total_tokens == 11
    assert asked(runner) == "<|user|>hi<|end|><|assistant|>"


def test_roles_and_parts_of_messages(client, runner):
    client.chat.completions.create(
        model="test",
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    )
    wanted = "<|system|>be brief<|end|><|user|>ab<|end|><|assistant|>c<|end|><|user|>d<|end|>"
    assert asked(runner) == f"{wanted}<|assistant|>"


def test_a_streamed_chat_completion(client, server):
    stream = client.chat.completions.create(
        model="test", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "hello"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(deltas) - 1) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 11


def test_the_last_text_and_its_reason_come_in_one_chunk(client):
    stream = client.chat.completions.create(model="test", messages=HELLO, stream=True, max_tokens=2)
    chunks = [(c.choices[0].delta.content, c.choices[0].finish_reason) for c in stream]
    assert chunks == [("h", None), ("e", "length")]


def test_the_stream_ends_as_clients_expect(server):
    body = {"model": "test", "messages": HELLO, "stream": True}
    response = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert "usage" not in json.loads(events[0])


def test_every_field_reaches_the_engine(client, runner):
    client.chat.completions.create(
        model="test",
        messages=HELLO,
        max_completion_tokens=7,
        temperature=0.3,
        top_p=0.4,
        stop=["zzz"],
        seed=5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logprobs=True,
        top_logprobs=3,
        extra_body={"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.2},
    )
    assert runner.samplings[-1] == SamplingParams(
        max_new_tokens=7,
        temperature=0.3,
        top_p=0.4,
        top_k=9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        stop=("zzz",),
        seed=5,
        logprobs=3,
    )


def test_without_a_length_an_answer_may_fill_the_context(client, runner):
    client.chat.completions.create(model="test", messages=HELLO)
    assert runner.samplings[-1].max_new_tokens == 512 - 5
    client.completions.create(model="test", prompt="abc")
    assert runner.samplings[-1].max_new_tokens == 512 - 3


def test_checkpoints_own_length_holds_in_a_chat_unless_one_is_asked_for(runner, tokenizer):
    def load(_: object) -> ChatModel:
        own = SamplingParams(max_new_tokens=40)
        return replace(chat_model(runner, tokenizer), defaults=own, states_length=True)

    with (
        serve(load) as url,
        openai.OpenAI(base_url=f"{ready(url)}/v1", api_key="x", max_retries=0) as client,
    ):
        for asked, expected in [({}, 40), ({"max_tokens": 50}, 50), ({"max_tokens": -1}, 507)]:
            client.chat.completions.create(model="test", messages=HELLO, **asked)
            assert runner.samplings[-1].max_new_tokens == expected


def test_a_completion_of_a_text_or_of_token_ids(client, runner):
    answer = client.completions.create(model="test", prompt="abc")
    assert (answer.object, answer.choices[0].text) == ("text_completion", "hello")
    assert answer.id.startswith("cmpl-")
    assert asked(runner) == "abc"
    client.completions.create(model="test", prompt=[97, 256])
    assert runner.prompts[-1] == [97, 256]
    client.completions.create(model="test", prompt=["one of one"])
    assert asked(runner) == "one of one"


def test_special_tokens_in_a_text_to_complete_count(client, runner):
    client.completions.create(model="test", prompt="a<|end|>")
    assert runner.prompts[-1][-1] == 256
    assert asked(runner) == "a<|end|>"


def test_a_streamed_completion(client):
    chunks = list(client.completions.create(model="test", prompt="abc", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.max_model_len) == ("test", "model", 512)
    assert client.models.retrieve("test").id == "test"


@pytest.mark.parametrize(
    ("change", "status", "param", "word"),
    [
        ({"model": "gpt-4o"}, 404, "model", "'test'"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": None}]}, 400, "messages", "must be a text"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages",
            "text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages", "parts"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "function is missing"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", "-100 to 100"),
        ({"n": 17}, 400, "n", "16"),
        ({"n": 0}, 400, "n", "1"),
        ({"temperature": 3}, 400, "temperature", "2"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty", "2"),
        ({"max_tokens": 600}, 400, "max_tokens", "512"),
        ({"max_tokens": 6, "max_completion_tokens": 7}, 400, "max_completion_tokens", "same"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "603"),
        ({"max_completion_tokens": 600}, 400, "max_completion_tokens", "512"),
        ({"max_length": 600}, 400, "max_length", "512"),
    ],
)
def test_a_refusal_has_openais_shape(server, runner, change, status, param, word):
    body = {"model": "test", "messages": HELLO} | change
    response = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert word in error["message"]
    assert not runner.steps


def test_what_asks_for_nothing_is_not_refused(client):
    nothing = {"tools": [], "logit_bias": {}, "user": "me", "metadata": {"a": "b"}, "store": False}
    client.chat.completions.create(model="test", messages=HELLO, extra_body=nothing)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("", "empty"),
        ([], "empty"),
        (["a"] * 65, "at most 64"),
        (["a", 1], "token ids"),
        ([1, 2.5], "token ids"),
        ([-1], "token ids"),
        ([99999], "the last is 259"),
        (None, "text"),
    ],
)
def test_a_prompt_that_is_none(server, runner, prompt, word):
    response = httpx.post(f"{server}/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert word in response.json()["error"]["message"]
    assert not runner.steps


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="test", messages=HELLO, temperature=9)


def test_an_error_in_a_stream_is_an_event_in_openais_shape(server, runner):
    runner.hold()
    runner.permits.release()
    body = {"model": "test", "messages": HELLO, "stream": True}
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert "hello"[0] in next(lines)
        runner.failure = RuntimeError("broken")
        runner.free()
        rest = [json.loads(line[6:]) for line in lines if line]
    assert rest[-1]["error"]["code"] == "step_failed"
    assert set(rest[-1]) == {"error"}


# ---- Several answers, and what the model thought


@pytest.fixture(scope="module")
def thinker(tokenizer):
    """A live server on a tiny model with random weights, and the same model again."""
    with serve(lambda settings: chat_model(create_runner(tiny_llama(), "4MiB"), tokenizer)) as url:
        ready(url)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client, tiny_llama()


def test_n_answers_are_as_many_requests_with_seeds_of_their_own(thinker):
    client, _ = thinker
    how = {"model": "test", "prompt": "abcdefgh", "max_tokens": 12, "temperature": 1.5}
    several = client.completions.create(**how, seed=7, n=4)
    alone = [client.completions.create(**how, seed=7 + i).choices[0].text for i in range(4)]
    assert [choice.text for choice in several.choices] == alone
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(set(alone)) == 4
    assert several.usage.prompt_tokens == 8
    assert several.usage.completion_tokens >= 12


def test_n_answers_stream_by_turns(client):
    chunks = list(client.chat.completions.create(model="test", messages=HELLO, stream=True, n=3))
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["hello"] * 3
    assert sum(bool(chunk.choices[0].finish_reason) for chunk in chunks) == 3
    assert sum(chunk.choices[0].delta.role == "assistant" for chunk in chunks) == 3


def test_the_prompt_of_n_answers_is_computed_once(client, runner):
    text = "a prompt of some length, so that it is worth keeping"
    client.completions.create(model="test", prompt=text, n=5)
    computed = sum(n for step in runner.steps for n in step)
    # Five answers of six tokens each, whose first comes with the prompt's last token.
    assert computed == len(text) + 4 + 5 * 5


def log_softmax(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_logprobs_are_the_models_own(thinker, tokenizer):
    """Whatever the knobs: a temperature or a penalty changes the pick, not what is told."""
    client, model = thinker
    answer = client.chat.completions.create(
        model="test",
        messages=HELLO,
        max_tokens=6,
        temperature=0.7,
        seed=1,
        frequency_penalty=1,
        logprobs=True,
        top_logprobs=4,
    )
    told = answer.choices[0].logprobs.content
    ids = tokenizer.encode("<|user|>hi<|end|><|assistant|>")
    assert len(told) == 6
    for item in told:
        wanted = log_softmax(model, ids)[-1]
        best = wanted.topk(4)
        assert [top.logprob for top in item.top_logprobs] == pytest.approx(
            best.values.tolist(), 1e-3
        )
        ids.append(int((wanted - item.logprob).abs().argmin()))


def test_tokens_told_join_to_the_text(client):
    told = client.chat.completions.create(model="test", messages=HELLO, logprobs=True)
    tokens = told.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == "hello"
    assert bytes(b for token in tokens for b in token.bytes) == b"hello"
    streamed = client.chat.completions.create(
        model="test", messages=HELLO, logprobs=True, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    tokens = [t for chunk in chunks if chunk.logprobs for t in chunk.logprobs.content]
    assert "".join(token.token for token in tokens) == "hello"


def test_many_tokens_are_spelled_once_and_beside_the_event_loop(server, monkeypatch, tokenizer):
    text = ChatTokenizer(tokenizer)
    assert text.spell(7) == text.spell(7)
    assert text.spell.cache_info().hits == 1
    wording, worded = threading.Event(), threading.Event()
    whole = chat.ChatCompletionReply.full_response

    def slowly(self, choices: list[parts.Choice]) -> dict[str, object]:
        wording.set()
        assert worded.wait(20)
        return whole(self, choices)

    monkeypatch.setattr(chat.ChatCompletionReply, "full_response", slowly)
    with ThreadPoolExecutor(1) as pool:
        url = f"{server}/v1/chat/completions"
        answer = pool.submit(httpx.post, url, json={"messages": HELLO})
        assert wording.wait(20)
        assert httpx.get(f"{server}/health").status_code == 200
        worded.set()
        assert answer.result().status_code == 200


def test_long_wording_leaves_the_workers_to_others(server, monkeypatch):
    """Answers with very many logprobs are worded one by one, while short ones are tokenized."""
    monkeypatch.setattr(api, "MANY_SCORED", 3)
    worded = threading.Event()
    whole = chat.ChatCompletionReply.full_response

    def slowly(self, choices: list[parts.Choice]) -> dict[str, object]:
        assert not choices[0].tokens or worded.wait(20)
        return whole(self, choices)

    monkeypatch.setattr(chat.ChatCompletionReply, "full_response", slowly)
    url = f"{server}/v1/chat/completions"
    number = NUM_THREADS + 2
    with ThreadPoolExecutor(number) as pool:
        body = {"messages": HELLO, "logprobs": True}
        answers = [pool.submit(httpx.post, url, json=body) for _ in range(number)]
        wait_for(lambda: httpx.get(f"{server}/health").json()["waiting"] == number)
        assert httpx.post(url, json={"messages": HELLO}).status_code == 200
        assert not any(answer.done() for answer in answers)
        worded.set()
        assert {answer.result().status_code for answer in answers} == {200}


CUT = "a\U0001f60a!"


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_parts_of_a_character(client, runner, stream):
    runner.say = CUT
    asked = {"model": "test", "messages": HELLO, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked, stream=stream)
    told = [part.choices[0].logprobs for part in (answer if stream else [answer])]
    tokens = [token for each in told if each for token in each.content]
    assert [bytes(token.bytes) for token in tokens] == [bytes([x]) for x in CUT.encode()]
    for token in tokens:
        likeliest = [bytes(top.bytes) for top in token.top_logprobs]
        assert len(set(likeliest)) == 3
        assert likeliest[0] == bytes(token.bytes)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_behind_parts_of_a_character(client, runner, stream):
    runner.say = CUT
    answer = client.completions.create(model="test", prompt="x", logprobs=3, stream=stream)
    choices = [part.choices[0] for part in (answer if stream else [answer])]
    assert "".join(choice.text for choice in choices) == CUT
    told = [choice.logprobs for choice in choices if choice.logprobs]
    # A token begins where the character does of which it is a part.
    wanted = [at for at, char in enumerate(CUT) for _ in char.encode()]
    assert [at for each in told for at in each.text_offset] == wanted
    names = [f"bytes:\\x{x:02x}" for x in CUT[1].encode()]
    assert [name for each in told for name in each.tokens] == ["a", *names, "!"]
    assert {len(top) for each in told for top in each.top_logprobs} == {3}


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_logprobs(client, stream):
    answer = client.completions.create(model="test", prompt="x", logprobs=2, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
    parts = [part for part in parts if part]
    assert [t for part in parts for t in part.tokens] == list("hello")
    assert [o for part in parts for o in part.text_offset] == [0, 1, 2, 3, 4]
    assert all(len(likely) == 2 for part in parts for likely in part.top_logprobs)
    assert all(p <= 0 for part in parts for p in part.token_logprobs)


def test_leaving_ends_all_the_answers(server, runner):
    runner.say, runner.pause = "x" * 400, 0.02
    body = {"messages": HELLO, "stream": True, "n": 3}
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 3)
    wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 0)
    assert len(runner.steps) < 400


# ---- LangChain


@pytest.mark.release
def test_langchain_asks_and_streams(server, runner):
    ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI
    chat = ChatOpenAI(model="test", base_url=f"{server}/v1", api_key="none", max_retries=0)
    answer = chat.invoke([("system", "be kind"), ("user", "hi")])
    assert answer.content == "hello"
    assert answer.usage_metadata["output_tokens"] == 6
    assert asked(runner) == "<|system|>be kind<|end|><|user|>hi<|end|><|assistant|>"
    assert "".join(piece.content for piece in chat.stream("hi")) == "hello"
    assert [a.content for a in chat.batch(["a", "b", "c"])] == ["hello"] * 3


# ---- JSON by a schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [7, 8]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def as_schema(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.5, "top_p": 1.0, "seed": 3}])
def test_an_answer_keeps_to_its_schema_whatever_the_model_would_say(thinker, how):
    """The model's weights are random: what it says freely is no JSON at all."""
    client, _ = thinker
    answer = client.chat.completions.create(
        model="test", messages=HELLO, response_format=as_schema(PERSON), n=2, **how
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        person = json.loads(choice.message.content)
        assert set(person) == {"name", "age"}
        assert person["age"] in (7, 8)
        assert len(person["name"]) <= 5


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["<|user|>"]},
        {"enum": ["a <|end|> b"]},
        {"type": "string", "pattern": "^\\x3c\\|end\\|\\x3e$"},
    ],
)
def test_a_schema_that_spells_a_special_token_is_answered_with_text(thinker, schema):
    client, _ = thinker
    answer = client.chat.completions.create(
        model="test", messages=HELLO, response_format=as_schema(schema)
    )
    assert answer.choices[0].finish_reason == "stop"
    said = json.loads(answer.choices[0].message.content)
    assert said in ("<|user|>", "a <|end|> b", "<|end|>")


def test_a_schema_cannot_ask_for_space_without_end(tokenizer):
    asking = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    guide = GuideCompiler(ChatTokenizer(tokenizer).plain, (), {256}).compile(asking)
    brace, quote, newline = tokenizer.encode('{"\n', add_special_tokens=False)
    guide.matcher.consume_token(brace)
    assert guide.token_mask()[quote]
    assert not guide.token_mask()[newline]


def test_a_json_object_and_free_text_side_by_side(thinker):
    client, _ = thinker
    how = {"model": "test", "messages": HELLO, "max_tokens": 40, "temperature": 1.0, "seed": 1}
    bound = client.chat.completions.create(response_format={"type": "json_object"}, **how)
    assert bound.choices[0].message.content.startswith("{")
    free = client.chat.completions.create(response_format={"type": "text"}, **how)
    assert free.choices[0].message == client.chat.completions.create(**how).choices[0].message


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"type": "xml"}, "json_object"),
        ({"type": "json_schema"}, "json_schema"),
        (as_schema({"type": "nonsense"}), "nonsense"),
        (as_schema({"$ref": "file:///etc/passwd"}), "JSON schema"),
        (as_schema([1]), "dictionary"),
        (as_schema({"enum": ["\ud800"]}), "surrogate"),
        (as_schema({"minimum": 10**400}), "JSON schema"),
    ],
)
def test_a_schema_that_is_none(server, runner, asked, word):
    body = {"messages": HELLO, "response_format": asked}
    response = httpx.post(f"{server}/v1/chat/completions", content=json.dumps(body))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"
    assert word in response.json()["error"]["message"]
    assert "root:" not in response.text
    assert not runner.steps
