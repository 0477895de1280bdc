"""What an operator relies on: keys, request ids, metrics, the log, the start."""

import json
import logging
import os
import re
import socket
import subprocess
import sys

import httpx
import pytest
from benchmark import free_port
from prometheus_client.parser import text_string_to_metric_families

import api
from engine import ChatModel
from serving import __version__
from serving.parts import Choice
from tests.conftest import ROOT, ScriptedRunner, byte_tokenizer, chat_model, ready, serve, wait_for
from tests.server_process import server_process

SECRET = {"Authorization": "Bearer sesame"}
ASK = {"prompt": "hi"}


@pytest.fixture
def locked(runner, tokenizer):
    with serve(lambda settings: chat_model(runner, tokenizer), api_key="sesame, 芝麻") as url:
        yield ready(url)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("POST", "/"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/test"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/nowhere"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/%68ealth/../metrics"),
    ],
)
def test_nothing_but_the_health_is_told_without_a_key(locked, runner, method, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
        response = httpx.request(method, locked + path, headers=headers, json=ASK)
        assert response.status_code == 401, response.text
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert ("status" in response.json()) != path.startswith("/v1/")
    assert not runner.steps
    assert httpx.get(f"{locked}/health").status_code == 200


def test_each_of_the_keys_opens(locked):
    for key in ("sesame", "芝麻"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert httpx.post(locked, json=ASK, headers=headers).json()["response"] == "hello"
    assert httpx.post(locked, json=ASK, headers={"Authorization": "bearer sesame"}).is_success


def test_a_key_is_not_shown():
    settings = api.Settings(api_key="sesame")
    assert "sesame" not in repr(settings) + str(settings)
    assert settings.keys == ("sesame",)


def test_an_id_is_kept_or_given_and_returned(server):
    assert httpx.post(server, json=ASK, headers={"X-Request-ID": "abc-1"}).headers[
        "x-request-id"
    ] == ("abc-1")
    first, second = (httpx.get(f"{server}/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    forged = httpx.post(server, json=ASK, headers={"X-Request-ID": "a b\tc" + "x" * 200})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])
    refused = httpx.post(server, json={}, headers={"X-Request-ID": "abc-2"})
    assert refused.headers["x-request-id"] == "abc-2"


def test_other_origins_may_call_only_where_they_are_named(runner, tokenizer, server):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(server, headers=ask).headers
    named = {"cors_origins": "https://a.example, https://b.example", "api_key": "sesame"}
    with serve(lambda settings: chat_model(runner, tokenizer), **named) as url:
        asked = ask | {"Access-Control-Request-Headers": "authorization"}
        allowed = httpx.options(ready(url), headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        answer = httpx.post(url, json=ASK, headers={"Origin": "https://b.example"} | SECRET)
        assert answer.headers["access-control-allow-origin"] == "https://b.example"
        shown = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-request-id", "request-id", "retry-after", "x-ignored-fields"} <= {*shown}
        stranger = {"Origin": "https://c.example"} | SECRET
        answer = httpx.post(url, json=ASK, headers=stranger)
        assert "access-control-allow-origin" not in answer.headers


# ---- Metrics and the log


def test_grafana_board_shows_what_is_measured(server):
    """Every metric that it asks for is there, and its panels stand beside each other."""
    board = json.loads((ROOT / "deploy/grafana.json").read_text(encoding="utf-8"))
    text = httpx.get(f"{server}/metrics").text
    metrics = set(re.findall(r"^# TYPE (\w+)", text, re.M))
    metrics |= {f"{name}_bucket" for name in metrics}
    asked = set(re.findall(r"chat_\w+", json.dumps(board)))
    assert asked <= metrics
    assert len(asked) > 12
    cells = [
        (x, y)
        for panel in board["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24


def samples(url: str) -> dict[str, float]:
    """Each sample by its name and the values of its labels: route, outcome, finish_reason."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        ",".join([sample.name, *(v for _, v in sorted(sample.labels.items(), reverse=True))]): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


def test_tokenizing_is_counted_and_logged(server, caplog):
    with caplog.at_level("INFO"):
        ids = httpx.post(f"{server}/tokenize", json={"prompt": "a"}).json()["tokens"]
        assert httpx.post(f"{server}/detokenize", json={"tokens": ids}).status_code == 200
        assert httpx.post(f"{server}/tokenize", json={"prompt": 1}).status_code == 400
    counts = samples(server)
    for path, outcome in (
        ("/tokenize", "served"),
        ("/detokenize", "served"),
        ("/tokenize", "invalid_value"),
    ):
        assert counts[f"chat_requests_total,{path},{outcome},none"] == 1
        assert f"route={path} outcome={outcome}" in caplog.text


def test_metrics_add_up(server, runner):
    long = {"prompt": "a prompt that is long enough to be worth keeping"}
    for body in (long, long, long | {"max_length": 2}):
        httpx.post(server, json=body)
    httpx.post(f"{server}/v1/completions", json={"prompt": "x", "n": 2})
    httpx.post(server, json={})
    httpx.get(f"{server}/nowhere")
    wait_for(lambda: samples(server)["chat_generation_tokens_total"] == 6 + 6 + 2 + 12)
    seen = samples(server)
    assert seen["chat_requests_total,/,served,stop"] == 2
    assert seen["chat_requests_total,/,served,length"] == 1
    assert seen["chat_requests_total,/v1/completions,served,stop"] == 1
    assert seen["chat_requests_total,/,invalid_value,none"] == 1
    assert seen["chat_requests_total,other,not_found,none"] == 1
    assert seen["chat_prompt_tokens_total"] == 3 * 51 + 1
    assert seen["chat_prefix_cache_hits_total"] == 2 * 50
    assert seen["chat_num_requests_running"] == seen["chat_num_requests_waiting"] == 0
    assert 0 < seen["chat_cache_tokens_used"] < seen["chat_cache_tokens"] == runner.rows
    assert seen["chat_state_slots"] == seen["chat_state_slots_used"] == 0
    for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency"):
        assert seen[f"chat_{name}_seconds_count"] == 4
    assert seen["chat_time_per_output_token_seconds_count"] == 4
    assert (
        seen["chat_time_to_first_token_seconds_sum"] <= seen["chat_e2e_request_latency_seconds_sum"]
    )


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (["stop"], "stop"),
        (["stop", "length"], "length"),
        (["tool_calls", "stop"], "tool_calls"),
        (["tool_calls", "length", "stop"], "length"),
    ],
)
def test_reason_of_several_answers_is_the_worst(reasons, told):
    choices = [Choice(n, finish_reason=reason) for n, reason in enumerate(reasons)]
    assert api.finish_reason_of(choices) == told


def test_those_who_left_and_those_that_failed_are_counted(server, runner):
    runner.say, runner.pause = "x" * 300, 0.01
    with httpx.stream("POST", server, json=ASK | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
    wait_for(lambda: samples(server).get("chat_requests_total,/,left,none") == 1)
    runner.failure = RuntimeError("broken")
    assert httpx.post(server, json=ASK).status_code == 500
    wait_for(lambda: samples(server).get("chat_requests_total,/,step_failed,none") == 1)
    assert "chat_requests_total,/,failed,none" not in samples(server)


def test_a_request_that_takes_too_long_is_one_line_and_one_count(runner, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    runner.say, runner.pause = "x" * 400, 0.01
    with serve(lambda settings: chat_model(runner, tokenizer, timeout=0.3)) as url:
        ready(url)
        headers = {"X-Request-ID": "abc-6"}
        assert httpx.post(url, json=ASK, headers=headers).status_code == 504
        seen = samples(url)
    assert seen["chat_requests_total,/,timed_out,none"] == 1
    (line,) = (r for r in caplog.records if getattr(r, "request_id", "") == "abc-6")
    assert line.outcome == "timed_out"
    assert line.completion_tokens > 0
    counted = [name for name in seen if name.startswith("chat_requests_total,")]
    assert counted == ["chat_requests_total,/,timed_out,none"]


def test_what_came_before_a_client_left_is_counted(server, runner, caplog):
    caplog.set_level(logging.INFO)
    runner.say, runner.pause = "x" * 300, 0.01
    headers = {"X-Request-ID": "abc-7"}
    with httpx.stream("POST", server, json=ASK | {"stream": True}, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
    wait_for(lambda: samples(server).get("chat_requests_total,/,left,none") == 1)
    (line,) = (r for r in caplog.records if getattr(r, "request_id", "") == "abc-7")
    assert line.outcome == "left"
    assert 1 <= line.completion_tokens < 300
    assert samples(server)["chat_generation_tokens_total"] == line.completion_tokens


@pytest.mark.parametrize("path", ["/", "/v1/completions", "/tokenize", "/chat/render"])
def test_who_leaves_while_the_body_is_sent_made_no_mistake(runner, tokenizer, caplog, path):
    caplog.set_level(logging.INFO)
    with serve(lambda settings: chat_model(runner, tokenizer), chat_page=True) as url:
        host, port = ready(url).removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
            client.sendall(head.encode() + b'{"prompt"')
        httpx.post(url, json=ASK, headers={"X-Request-ID": "abc-5"})
        wait_for(lambda: "abc-5" in caplog.text)
        counts = samples(url)
    assert "invalid_value" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    outcomes = [name for name in counts if name.startswith("chat_requests_total")]
    assert not [name for name in outcomes if "invalid_value" in name or "internal" in name]


def test_one_line_for_each_request_and_no_text_of_it(server, caplog):
    caplog.set_level(logging.INFO)
    secret = {"prompt": "my secret\nforged line"}
    httpx.post(server, json=secret, headers={"X-Request-ID": "abc-3"})
    wait_for(lambda: "abc-3" in caplog.text)
    (line,) = (r for r in caplog.records if getattr(r, "request_id", "") == "abc-3")
    assert line.getMessage().startswith(
        "request_id=abc-3 route=/ outcome=served finish_reason=stop prompt_tokens="
    )
    assert line.first_token <= line.seconds
    assert "secret" not in caplog.text
    httpx.post(server, json={"temperature": 9} | secret, headers={"X-Request-ID": "abc-4"})
    wait_for(lambda: "request_id=abc-4 route=/ outcome=invalid_value" in caplog.text)
    assert "secret" not in caplog.text


def test_prompts_are_logged_where_it_is_asked_for_in_one_line(runner, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    with serve(lambda settings: chat_model(runner, tokenizer), log_prompts=True) as url:
        httpx.post(ready(url), json={"prompt": "two\nlines \x1b[31m"})
    (line,) = (r.getMessage() for r in caplog.records if "two" in r.getMessage())
    assert "two\\nlines \\x1b[31m" in line
    assert line.isprintable()


def test_a_path_cannot_forge_a_line(server, caplog):
    caplog.set_level(logging.INFO)
    httpx.get(f"{server}/no%0aforged")
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.slow
def test_start_log_says_what_is_served_and_how_to_reach_it(demo_folder):
    port = free_port()
    with server_process(api.load_served, "--port", str(port), "--host", "0.0.0.0") as process:
        wait_for(lambda: " there is no API key" in process.said(), seconds=180)
        text = process.said()
    # Not the progress bars: where tqdm was imported early, it did not see that this is no terminal.
    log = [line for line in text.splitlines() if re.match(r"\d{4}-", line)]
    lines = [line.split(" ", 3)[3] for line in log if "INFO still loading" not in line]
    assert lines[0] == f"chat-api {__version__}: loading demo …"
    assert lines[1].startswith("loading weights (")
    assert lines[2].startswith("model: demo, LlamaForCausalLM, 134,515,008 parameters, ")
    assert re.fullmatch(r"context: 8,192 tokens; KV cache: [\d,]+ tokens", lines[3])
    assert "/v1 (OpenAI API)" in lines[4]
    assert lines[5] == f"ready: http://127.0.0.1:{port}"
    assert lines[6].startswith(f"from your laptop: ssh -CN -L {port}:127.0.0.1:{port} ")
    assert f"anyone who reaches port {port}" in lines[7]
    assert len(lines) == 8


@pytest.mark.slow
def test_start_by_uvicorn_says_the_same_and_debug_says_more(demo_folder):
    factory = ["-m", "uvicorn", "--factory", "api:build_app", "--port", str(free_port())]
    settings = {"CHAT_CHAT_PAGE": "false", "CHAT_DTYPE": "float32", "CHAT_LOG_LEVEL": "debug"}
    with subprocess.Popen(
        [sys.executable, *factory],
        cwd=ROOT,
        env=os.environ | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        text = ""
        while "INFO ready" not in text:
            line = process.stdout.readline()
            assert line, text
            text += line
        process.terminate()
    assert f"chat-api {__version__}: loading demo …" in text
    assert re.search(r"DEBUG weights: float32, \d+ MiB\n", text)
    assert "DEBUG self-check: " in text
    assert "%|" not in text  # a progress bar


@pytest.mark.parametrize(
    ("host", "address", "warned"),
    [
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "127.0.0.1", True),
        ("::1", "[::1]", False),
        ("127.0.0.1", "127.0.0.1", False),
        ("localhost", "localhost", False),
        ("192.0.2.7", "192.0.2.7", True),
    ],
)
def test_the_address_told_is_one_that_works(runner, tokenizer, caplog, host, address, warned):
    caplog.set_level(logging.INFO)
    with serve(lambda settings: chat_model(runner, tokenizer), host=host, port=7000) as url:
        ready(url)
    assert f"ready: http://{address}:7000" in caplog.text
    assert f"ssh -CN -L 7000:{address}:7000 " in caplog.text
    assert ("anyone who reaches port 7000" in caplog.text) == warned


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
def test_all_of_ipv6_is_ipv4_too():
    with api.bind_socket("::", 0) as listening:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listening.getsockname()[1])).close()


def load_scripted(settings: api.Settings) -> ChatModel:
    return chat_model(ScriptedRunner(byte_tokenizer()), byte_tokenizer())


def test_no_warning_with_a_key_and_lines_of_json():
    port = free_port()
    flags = ("--port", str(port), "--log-json", "--api-key", "sesame", "--no-chat-page")
    with server_process(load_scripted, *flags) as process:
        wait_for(lambda: "from your laptop" in process.said())
        lines = [json.loads(line) for line in process.said().splitlines() if line.startswith("{")]
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"no HTTP\r\n\r\n")
            assert b" 400 " in connection.recv(1000)
        wait_for(lambda: "Invalid HTTP request" in process.said())
        ours = process.said().splitlines()[-1]
    assert json.loads(ours)["message"] == "Invalid HTTP request received."
    messages = [line["message"] for line in lines]
    assert messages[-2] == f"ready: http://127.0.0.1:{port}"
    assert messages[0] == f"chat-api {__version__}: loading demo …"
    assert not [message for message in messages if "anyone" in message or "sesame" in message]
