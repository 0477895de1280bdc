"""Over a real socket: the classic call, its refusals, its stream, and clients that leave."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import pytest

import api
from engine.model import ChatModel
from tests.conftest import chat_model, ready, serve, wait_for


def post(url: str, body: object = None, **options) -> httpx.Response:
    if body is not None:
        options["json"] = body
    return httpx.post(url, **options)


def refusal(response: httpx.Response, status: int = 400) -> dict:
    """The error, once its whole shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "status", "time"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["status"] == status
    assert not re.search(r"Traceback|pydantic|<class|Error\(|NoneType", body["error"]["message"])
    return body["error"]


def events(lines) -> list:
    return [
        line[6:] if line == "data: [DONE]" else json.loads(line[6:])
        for line in lines
        if line.startswith("data: ")
    ]


# ---- The classic call


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france(demo_folder):
    """The README's call, on the real model, over a real socket."""
    body = {"prompt": "What is the capital of France?", "history": []}
    with serve(api.load_served, model=str(demo_folder)) as url:
        answer = post(ready(url), body).json()
    assert "Paris" in answer["response"]
    assert answer["history"] == [[body["prompt"], answer["response"]]]
    assert answer["finish_reason"] == "stop"


def test_an_answer_has_what_callers_have_always_read(server):
    answer = post(server, {"prompt": "hi", "history": [["a", "b"]]}).json()
    assert answer["response"] == "hello"
    assert answer["history"] == [["a", "b"], ["hi", "hello"]]
    assert answer["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer["time"])
    assert answer["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 6
    assert "dropped_turns" not in answer


def test_history_in_both_shapes_reaches_the_model_alike(server, runner):
    roles = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answer = post(server, {"prompt": "hi", "history": roles}).json()
    assert answer["history"][:2] == roles
    assert answer["history"][3] == {"role": "assistant", "content": "hello"}
    post(server, {"prompt": "hi", "history": [["a", "b"]]})
    assert runner.prompts[0] == runner.prompts[1]


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/x-www-form-urlencoded", "text/plain"]
)
def test_json_needs_no_content_type(server, content_type):
    headers = {"content-type": content_type} if content_type else {}
    response = post(server, content=b'{"prompt": "hi"}', headers=headers)
    assert response.json()["response"] == "hello"


def test_sampling_fields_reach_the_engine(server, runner):
    fields = {"temperature": 0, "top_k": 0, "top_p": 0.5, "repetition_penalty": 1.2, "seed": 3}
    post(server, {"prompt": "x", "max_length": 5, "stop": ["z"], **fields})
    sampling = runner.samplings[0]
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.max_new_tokens, sampling.stop) == (5, ("z",))


def test_cut_off_answer_is_marked(server):
    answer = post(server, {"prompt": "x", "max_length": 3}).json()
    assert (answer["response"], answer["finish_reason"]) == ("hel", "length")


def test_a_stop_string_is_cut_out(server):
    answer = post(server, {"prompt": "x", "stop": "ll"}).json()
    assert (answer["response"], answer["finish_reason"]) == ("he", "stop")


def test_truncate_says_how_many_turns_it_dropped(server):
    body = {"prompt": "x", "history": [["q" * 200, "a" * 200]] * 3, "max_length": 50}
    error = refusal(post(server, body))
    assert error["code"] == "context_length_exceeded"
    assert "truncate" in error["message"]
    answer = post(server, {**body, "truncate": True}).json()
    assert answer["dropped_turns"] == 2
    assert len(answer["history"]) == 4


def test_chinese_comes_back_as_it_went(server, runner):
    runner.say = "你好，世界"
    response = post(server, {"prompt": "你好"})
    assert "你好，世界".encode() in response.content
    assert response.json()["history"] == [["你好", "你好，世界"]]


# ---- What is refused


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (
            ["ab"],
            'history must be a list of ["question", "answer"] pairs or of {"role": ...,'
            ' "content": ...} objects',
        ),
        ([["a"]], 'history[0] must be a ["question", "answer"] pair'),
    ],
)
def test_a_history_of_another_shape_is_told_the_right_ones(server, history, message):
    assert refusal(post(server, {"prompt": "x", "history": history}))["message"] == message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt": "x", "history": "ab"}, "history"),
        ({"prompt": "x", "history": ["ab"]}, "history"),
        ({"prompt": "x", "history": [["a"]]}, "history"),
        ({"prompt": "x", "history": [["a", None]]}, "history"),
        ({"prompt": "x", "history": [{"role": "robot", "content": "c"}]}, "history"),
        ({"prompt": "x", "history": [{"role": "user"}]}, "history"),
        ({"prompt": "x", "history": [["a", "b"], {"role": "user", "content": "c"}]}, "history"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": 2.01}, "temperature"),
        ({"prompt": "x", "temperature": "0.5"}, "temperature"),
        ({"prompt": "x", "temperature": True}, "temperature"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "top_p": -0.1}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "top_k": 1.5}, "top_k"),
        ({"prompt": "x", "top_k": 10**30}, "top_k"),
        ({"prompt": "x", "min_p": 1.5}, "min_p"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "max_length": 0}, "max_length"),
        ({"prompt": "x", "max_length": -5}, "max_length"),
        ({"prompt": "x", "max_length": "5"}, "max_length"),
        ({"prompt": "x", "max_length": 1_000_000}, "max_length"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "x", "max_tokens": 1_000_000}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 5, "max_length": 6}, "max_length"),
        ({"prompt": "x", "seed": -2}, "seed"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": 3}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "stream": 1}, "stream"),
        ({"prompt": "x", "n": 2}, "n"),
        ({"prompt": "x", "tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "y" * 600}, "prompt"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(server, runner, body, param):
    error = refusal(post(server, body))
    assert error["param"] == param
    assert param in error["message"] or "prompt" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not runner.steps, "nothing was computed for it"
    assert post(server, {"prompt": "still there?"}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b'"x"', "JSON object"),
        (b"null", "JSON object"),
        (b"5", "JSON object"),
        (b"prompt=hello", "not valid JSON"),
        (b'{"prompt": "x"', "not valid JSON"),
        (b"{'prompt': 'x'}", "not valid JSON"),
        (b'{"prompt": "x",}', "not valid JSON"),
        ('{"prompt": "你好"}'.encode("gbk"), "UTF-8"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature must be"),
        (b'{"prompt": "x", "temperature": Infinity}', "temperature must be"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature must be"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "x", "max_length": ' + b"9" * 5000 + b"}", ""),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_bad_body_is_a_400_that_says_what_would_be_right(server, content, words, content_type):
    response = post(server, content=content, headers={"content-type": content_type})
    assert words in refusal(response)["message"]
    assert post(server, {"prompt": "still there?"}).status_code == 200


def test_utf8_with_a_byte_order_mark_is_read(server):
    assert post(server, content=b'\xef\xbb\xbf{"prompt": "hi"}').status_code == 200


def test_a_body_too_large_is_413_declared_and_chunked(server):
    big = b'{"prompt": "' + b"x" * api.MAX_BODY + b'"}'
    assert "8 MiB" in refusal(post(server, content=big), 413)["message"]
    chunks = (big[i : i + 2**20] for i in range(0, len(big), 2**20))
    assert "8 MiB" in refusal(post(server, content=chunks), 413)["message"]
    assert post(server, {"prompt": "x"}).status_code == 200


def test_unknown_places_and_methods_are_refused_in_the_same_shape(server):
    assert refusal(httpx.get(f"{server}/nowhere"), 404)["code"] == "not_found"
    refused = httpx.put(server)
    assert refusal(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["allow"] == "GET, HEAD, POST"


# ---- Streaming


def test_a_stream_is_deltas_then_the_answer_then_done(server):
    with httpx.stream("POST", server, json={"prompt": "hi", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        *deltas, answer, done = events(response.iter_lines())
    assert [delta["delta"] for delta in deltas] == list("hello")
    whole = post(server, {"prompt": "hi"}).json()
    assert {**answer, "time": ""} == {**whole, "time": ""}
    assert done == "[DONE]"


def test_deltas_come_as_they_are_made(server, runner):
    """Each is read before the model may take its next step."""
    runner.hold()
    runner.permits.release()
    with httpx.stream("POST", server, json={"prompt": "hi", "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        for letter in "hello":
            assert json.loads(next(lines)[6:]) == {"delta": letter}
            runner.permits.release()


def test_events_are_ascii(server, runner):
    """Line readers split at U+2028 and U+0085, and so would break an event in two."""
    runner.say = "a\u2028b\u0085你"
    with httpx.stream("POST", server, json={"prompt": "x", "stream": True}) as response:
        raw = b"".join(response.iter_bytes())
    assert raw.isascii()
    assert events(raw.decode().splitlines())[-2]["response"] == runner.say


def test_a_refusal_before_the_first_event_keeps_its_status(server):
    refusal(post(server, {"prompt": "x" * 600, "stream": True}))


def test_an_error_after_the_first_event_is_an_event_and_no_done(server, runner):
    runner.hold()
    runner.permits.release()
    with httpx.stream("POST", server, json={"prompt": "hi", "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        runner.failure = RuntimeError("a fault")
        runner.free()
        *_, last = events(lines)
    assert response.status_code == 200
    assert last["error"]["code"] == "step_failed"
    assert last["status"] == 500


def test_a_failed_step_is_a_500_in_our_shape(server, runner):
    runner.failure = RuntimeError("a secret path /root/x")
    error = refusal(post(server, {"prompt": "x"}), 500)
    assert "secret" not in error["message"]
    runner.failure = None
    assert post(server, {"prompt": "x"}).status_code == 200


# ---- Clients that leave, and a server that never waits


def idle(url: str) -> bool:
    health = httpx.get(f"{url}/health").json()
    return health["running"] == health["waiting"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_forgotten(server, runner, stream):
    runner.say, runner.pause = "x" * 400, 0.02
    body = json.dumps({"prompt": "hi", "stream": stream}).encode()
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", int(server.rpartition(":")[2]))) as client:
        client.sendall(head + body)
        wait_for(lambda: len(runner.steps) > 2)
    wait_for(lambda: idle(server))
    assert len(runner.steps) < 300


def test_health_answers_while_the_model_computes(server, runner):
    runner.hold()
    answers = []
    client = threading.Thread(target=lambda: answers.append(post(server, {"prompt": "x"})))
    client.start()
    wait_for(lambda: not idle(server))
    for _ in range(10):
        assert httpx.get(f"{server}/health").status_code == 200
    assert not runner.steps
    runner.free()
    client.join(30)
    assert answers[0].json()["response"] == "hello"


@pytest.mark.slow
def test_four_hundred_at_once_are_served_or_told_to_come_back(runner, tokenizer):
    """None is lost, and /health answers all the while."""
    runner.pause = 0.005

    async def crowd(url: str) -> tuple[list[httpx.Response], list[float]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            asks = [client.post("/", json={"prompt": f"{i}"}) for i in range(400)]
            jobs = asyncio.gather(*asks)
            waits = []
            while not jobs.done():
                started = time.perf_counter()
                await client.get("/health")
                waits.append(time.perf_counter() - started)
                await asyncio.sleep(0.02)
            return await jobs, waits

    with serve(lambda settings: chat_model(runner, tokenizer, max_waiting=60)) as url:
        responses, _ = asyncio.run(crowd(ready(url)))
    served = [r for r in responses if r.status_code == 200]
    refused = [r for r in responses if r.status_code == 429]
    assert len(served) >= 50
    assert len(served) + len(refused) == 400
    assert all(r.json()["response"] == "hello" for r in served)
    assert all(int(r.headers["retry-after"]) >= 1 for r in refused)


def test_health_tells_of_loading_and_the_routes_say_to_come_back(runner, tokenizer):
    finish = threading.Event()

    def load(settings: api.Settings) -> ChatModel:
        finish.wait(20)
        return chat_model(runner, tokenizer)

    with serve(load) as url:
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        response = post(url, {"prompt": "x"})
        refusal(response, 503)
        assert int(response.headers["retry-after"]) > 0
        finish.set()
        assert post(ready(url), {"prompt": "x"}).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_tells_of_a_dead_engine(server, runner):
    runner.failure = SystemExit("the end")
    refusal(post(server, {"prompt": "x"}), 503)
    health = httpx.get(f"{server}/health")
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    refusal(post(server, {"prompt": "x"}), 503)


def test_a_monitor_may_ask_with_head(server):
    for path in ("/", "/health"):
        answer = httpx.head(server + path)
        assert answer.status_code == httpx.get(server + path).status_code < 400
        assert not answer.content


def test_a_browser_gets_a_page(server):
    page = httpx.get(server, follow_redirects=True)
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]


def test_the_docs_describe_the_call(server):
    schema = httpx.get(f"{server}/openapi.json").json()
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"prompt", "history", "max_length", "temperature", "stream"} <= set(fields)


def test_the_docs_need_no_other_host(server):
    page = httpx.get(f"{server}/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(source.endswith(".js") for source in sources)
    for source in sources:
        assert source.startswith("/")
        assert httpx.get(f"{server}{source}").status_code == 200


def test_every_answer_says_its_encoding(server):
    """Windows PowerShell takes JSON for Latin-1 where it is not told."""
    for response in (
        post(server, {"prompt": "x"}),
        post(server, {}),
        httpx.get(f"{server}/health"),
    ):
        assert response.headers["content-type"] == "application/json; charset=utf-8"
