"""What a stranger may try on the socket, and what a user may try with a prompt."""

import asyncio
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPResponse

import httpx
import numpy as np
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from transformers import GenerationConfig

import api
from engine import InvalidInput
from engine.guided.guide import GuideCompiler
from engine.prompt.tokenizer import ChatTokenizer
from serving.connection import KEEP_ALIVE, Connection
from tests.conftest import ScriptedRunner, chat_model, ready, serve, wait_for
from tests.engine.prompt.test_families import FIXTURES, MARKERS, small, text_of

HEAD_OF_16 = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n"
KEY = "Authorization: Bearer sesame\r\n"
BODY = b'{"prompt": "hi"}'
CHUNKED = b"10\r\n" + BODY + b"\r\n0\r\n\r\n"


def peer(url: str, seconds: float = 10) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=seconds)


def told(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    pieces = []
    with suppress(ConnectionResetError):  # it did so before it had read all
        pieces += iter(lambda: connection.recv(65536), b"")
    return b"".join(pieces)


def answered(connection: socket.socket) -> tuple[int, bytes]:
    """The status and the body of one answer, which come apart or at once."""
    with HTTPResponse(connection) as answer:
        answer.begin()
        return answer.status, answer.read()


def raw(url: str, request: bytes, seconds: float = 10) -> bytes:
    """Whatever the server says to these bytes until it hangs up."""
    with peer(url, seconds) as connection:
        connection.sendall(request)
        return told(connection)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def asked(url: str, line: str, headers: str = "", body: bytes = b"") -> bytes:
    head = f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"
    return raw(url, head.encode() + body)


# ---- The key


@pytest.fixture(scope="module", params=["", "/model", "/health", "/chat"])
def locked(request, tokenizer):
    """A server with a key, plain and behind proxies' prefixes, two of them ill chosen."""
    runner = ScriptedRunner(tokenizer)
    load = lambda settings: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, api_key="sesame", root_path=request.param) as url:
        ready(url)
        assert status(asked(url, "GET /metrics", KEY)) == 200
        yield url


TARGETS = [
    "/metrics", "//metrics", "/metrics/", "//health", "/health;x", "/health/", "/HEALTH",
    "/health/../metrics", "/health%2f..%2fmetrics", "/%2e%2e/metrics", "/health%00", "/health%0a",
    "/metrics?/health", "/metrics#/health", "/metrics;/health", "/health/metrics", "/healthmetrics",
    "/health/health", "/model/metrics", "/model/health", "/chat/", "/chat/../metrics",
    "/chat/%2e%2e/metrics", "/chat/gradio_api/queue/join", "http://x/metrics", "http://health/docs",
    "http://x/chat/../metrics", "*", "health", "x/metrics", "http://x", "\\\\metrics",
]  # fmt: skip
METHODS = ["HEAD", "OPTIONS", "TRACE", "CONNECT", "PUT", "DELETE", "PATCH", "POST", "BREW", "get"]


def test_no_spelling_of_a_path_and_no_method_goes_round_the_key(locked):
    for target in TARGETS:
        answer = asked(locked, f"GET {target}")
        assert status(answer) in (400, 401), (target, answer[:300])
        assert b"chat_requests" not in answer
    for method in METHODS:
        for target in ("/", "/metrics", "/v1/models", "/chat/"):
            answer = asked(locked, f"{method} {target}", "Content-Length: 0\r\n")
            assert status(answer) in (400, 401), (method, target, answer[:300])
    for prefix in ("X-Forwarded-Prefix", "X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Path"):
        assert status(asked(locked, "GET /metrics", f"{prefix}: /health\r\n")) == 401


@pytest.mark.parametrize(
    "header",
    [
        "Bearer", "Bearer ", "", "sesame", "Basic sesame", "Bearer sesam", "Bearer sesame2",
        "Bearer SESAME", "Bearer wrong\r\nAuthorization: Bearer sesame", "Bearer s\u00e9same",
        "Bearer " + "x" * 60_000, "Bearer sesame, sesame", "Bearer,sesame", "Token sesame",
    ],
)  # fmt: skip
def test_only_the_key_itself_is_a_key(locked, header):
    assert status(asked(locked, "GET /metrics", f"Authorization: {header}\r\n")) == 401


def test_a_second_request_on_a_connection_needs_the_key_too(locked):
    first = f"GET /metrics HTTP/1.1\r\nHost: x\r\n{KEY}\r\n"
    health = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", raw(locked, (first + health + last).encode()))
    assert statuses == [b"200", b"200", b"401"]


UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize("target", ["/", "/v1/chat/completions", "/metrics", "/chat/"])
def test_a_websocket_is_not_opened(locked, target):
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\n{UPGRADE}\r\n"
    # The connection is kept for the next request, so nothing is read but this answer.
    with peer(locked) as connection:
        connection.sendall(head.encode())
        assert answered(connection)[0] in (401, 403)


def test_a_websocket_that_a_library_brings_stays_shut():
    """There is none today, so the key's guard is asked directly."""
    sent = []

    async def app(*_: object) -> None:
        pytest.fail("it was let through")

    async def send(message: dict) -> None:
        sent.append(message["type"])

    guard = api.RequestIDMiddleware(app, 0)
    scope = {"type": "websocket", "path": "/chat/", "headers": [], "root_path": ""}
    asyncio.run(guard(scope, None, send))
    assert sent == ["websocket.close"]


def test_keys_are_compared_in_a_time_that_tells_nothing(monkeypatch):
    """Every key is compared, whichever is the right one, and by hmac."""
    compared = []
    compare = api.hmac.compare_digest
    monkeypatch.setattr(
        api.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b)
    )
    guard = api.APIKeyMiddleware(None, ("a", "b", "c"), True, lambda *_: None)
    assert guard._key_of({"type": "http", "headers": [(b"authorization", b"Bearer a")]}) == "a"
    assert compared == [b"a", b"b", b"c"]


# ---- Requests that lie


@pytest.mark.parametrize(
    ("headers", "body", "wanted"),
    [
        ("Content-Length: 16", BODY, 200),
        ("Content-Length: 10", BODY, 400),
        ("Content-Length: -1", BODY, 400),
        ("Content-Length: +16", BODY, 400),
        ("Content-Length: abc", BODY, 400),
        ("Content-Length: " + "9" * 5000, BODY, 400),
        ("Content-Length: 99999999999999", BODY, 413),
        ("Content-Length: 16\r\nContent-Length: 17", BODY, 400),
        ("Content-Length: 16\r\nTransfer-Encoding: chunked", CHUNKED, 400),
        ("Transfer-Encoding: chunked", CHUNKED, 200),
        ("Transfer-Encoding: chunked", b"zz\r\n" + BODY, 400),
        ("Content-Encoding: gzip\r\nContent-Length: 16", b"\x1f\x8b" + b"\0" * 14, 415),
        ("Content-Encoding: br\r\nContent-Length: 16", BODY, 415),
        ("Content-Encoding: identity\r\nContent-Length: 16", BODY, 200),
        ("Expect: 100-continue\r\nContent-Length: 99999999", b"", 413),
    ],
)  # fmt: skip
def test_a_body_is_what_its_headers_say(server, headers, body, wanted):
    answer = asked(server, "POST /", headers + "\r\n", body)
    assert status(answer) == wanted, answer[:300]
    assert b"Traceback" not in answer
    assert httpx.post(server, json={"prompt": "hi"}).status_code == 200


def test_what_is_sent_cannot_split_an_answer_or_a_line_of_the_log(server, caplog):
    caplog.set_level(logging.INFO)
    evil = "%0d%0aSet-Cookie:%20a=b%0d%0a%0d%0aforged"
    for target in (f"/x{evil}", f"/health{evil}/", f"/v1/models/x{evil}", f"/health?{evil}"):
        head = asked(server, f"GET {target}").partition(b"\r\n\r\n")[0]
        assert b"set-cookie" not in head.lower()
    for forged in ("a\x0bb", "a\x85b", "a b", "x" * 129, "é", "a%0ab", "${jndi:x}"):
        head = asked(server, "GET /health", f"X-Request-ID: {forged}\r\n").partition(b"\r\n\r\n")[0]
        assert not head or status(head) == 400 or re.search(rb"x-request-id: [0-9a-f]{32}", head)
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_strangers_cannot_make_the_metrics_grow(server):
    def series() -> int:
        families = text_string_to_metric_families(httpx.get(f"{server}/metrics").text)
        return sum(len(family.samples) for family in families)

    def ask(number: int) -> None:
        headers = {"X-Request-ID": f"id-{number}"}
        httpx.get(f"{server}/nowhere/{number}", headers=headers)
        httpx.post(f"{server}/v1/completions", json={"model": f"m{number}"}, headers=headers)
        httpx.request(f"M{number}"[:2], f"{server}/", headers=headers)

    ask(0)
    before = series()
    for number in range(1, 20):
        ask(number)
    assert series() == before


# ---- A client that offers HTTP/2

OFFER = (
    "POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nHost: x\r\n"
    "HTTP2-Settings: AAEAAEAAAAIAAAAB\r\n{length}\r\nUpgrade: h2c\r\n\r\n"
)


@pytest.mark.parametrize("apart", [True, False], ids=["body apart", "body at once"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with a length"])
def test_an_offer_of_http_2_is_ignored_and_the_body_is_read(server, chunked, apart):
    """As Java's HttpClient makes it with every request on a connection."""
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(BODY)}"
    head = OFFER.format(length=length).encode()
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY) if chunked else BODY
    with peer(server) as connection:
        for _ in range(2):
            connection.sendall(head if apart else head + body)
            if apart:
                time.sleep(0.05)
                connection.sendall(body)
            code, answer = answered(connection)
            assert code == 200, answer
            assert b'"hello"' in answer


@pytest.mark.parametrize("upgrade", ["h2c", "\th2c", "TLS/1.2", "websocket2", "h2c, TLS/1.0"])
def test_an_upgrade_of_any_kind_in_pieces_and_pipelined_is_ignored(server, upgrade):
    head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    one = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    with peer(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cut = one.index(b"rade:")
        connection.sendall(one[:cut])
        time.sleep(0.05)
        connection.sendall(one[cut:] + one)
        answers = b""
        while answers.count(b'"response"') < 2:
            answers += connection.recv(65536)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answers) == [b"200", b"200"]


# ---- Requests that come before the last one is answered


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "at once"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_hang_up_behind_a_pipelined_request_ends_the_first(server, runner, stream, apart, caplog):
    runner.say, runner.pause = "x" * 400, 0.02
    body = b'{"prompt": "hi", "stream": %s}' % stream.encode()
    first = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    second = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with peer(server) as connection:
        connection.sendall(first if apart else first + second)
        wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 1)
        if apart:
            connection.sendall(second)
    wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 0)
    assert len(runner.steps) < 300
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_closes_its_sending_side_is_answered(server, runner, stream, version):
    """And every request that it sent before, however long each answer takes to begin."""
    runner.say, runner.pause = "x" * 20, 0.05
    body = b'{"prompt": "hi", "stream": %s}' % stream.encode()
    head = HEAD.replace(b"1.1", version.encode())
    ask = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    count = 2 if version == "1.1" else 1
    with peer(server) as connection:
        connection.sendall(ask * count)
        connection.shutdown(socket.SHUT_WR)
        answer = told(connection)
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", answer)
    assert statuses == [b"200"] * count
    assert answer.startswith(b"HTTP/1.1 200 OK\r\ndate: ")
    assert len(re.findall(rb'"completion_tokens": ?21', answer)) == count


@pytest.mark.parametrize("after", [0, 0.5], ids=["at once", "later"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_closes_one_side_and_then_both_is_forgotten(server, runner, stream, after):
    runner.say, runner.pause = "x" * 400, 0.05
    body = b'{"prompt": "hi", "stream": %s}' % stream.encode()
    with peer(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 1)
        time.sleep(after)
        assert httpx.get(f"{server}/health").json()["running"] == 1
    wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 0)
    assert len(runner.steps) < 200


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD_OF_16, HEAD_OF_16 + b"{"])
def test_a_client_that_stops_in_the_midst_is_cut_off_at_once(server, sent):
    with peer(server, 5) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert told(connection) == b""


def test_pipelined_bytes_have_an_end(server, runner):
    runner.hold()
    with peer(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 1)
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * 65536)
            pytest.fail("all was taken")
    runner.free()


# ---- What costs too much


@pytest.mark.slow
def test_the_most_that_one_request_may_ask_for_holds_up_nobody(tokenizer):
    """Sixteen answers, a prompt that nearly fills the context, sixteen long stop strings."""
    runner = ScriptedRunner(tokenizer, "a" * 300)
    with serve(lambda settings: chat_model(runner, tokenizer, 100_000 // 16)) as url:
        ready(url)
        stop = [f"{'a' * 250}{i:02}" for i in range(16)]
        body = {"prompt": "x" * 5000, "n": 16, "stop": stop}
        started = time.process_time()  # so that other programs' time is not counted
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        assert [c["text"] for c in answer.json()["choices"]] == ["a" * 300] * 16
        assert time.process_time() - started < 30
        for more in ({"n": 17}, {"stop": [*stop, "z"]}, {"stop": "a" * 257}, {"max_tokens": 10**9}):
            assert httpx.post(f"{url}/v1/completions", json=body | more).status_code == 400


# ---- Those who take their time


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("head", [b"", b"POST / HT", HEAD, HEAD + b"X-Long: a"])
def test_a_caller_who_does_not_say_what_is_wanted_is_cut_off(server, monkeypatch, head):
    monkeypatch.setattr("serving.connection.HEADER_TIMEOUT", 0.3)
    started = time.monotonic()
    with peer(server) as connection:
        connection.sendall(head)
        assert told(connection) == b""
    assert time.monotonic() - started > 0.2


def test_a_second_request_is_waited_for_no_longer(server, monkeypatch):
    with peer(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"ready" in answered(connection)[1]
        monkeypatch.setattr("serving.connection.HEADER_TIMEOUT", 0.3)
        connection.sendall(HEAD)
        assert told(connection) == b""


@pytest.mark.parametrize(
    ("request_", "crumb"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
)
def test_a_crumb_after_an_answer_holds_no_connection(server, monkeypatch, request_, crumb):
    """uvicorn waits for the next request with a patience that any byte ends."""
    monkeypatch.setattr("serving.connection.KEEP_ALIVE", 0.3)
    with peer(server) as connection:
        connection.sendall(request_)
        assert answered(connection)
        connection.sendall(crumb)
        assert told(connection) == b""


def test_an_idle_connection_is_kept_for_as_long_as_we_say_and_not_uvicorn(
    runner, tokenizer, monkeypatch
):
    """uvicorn's own 5 seconds are just those for which httpx reuses a connection."""
    assert KEEP_ALIVE > 60
    monkeypatch.setattr(uvicorn, "Config", partial(uvicorn.Config, timeout_keep_alive=0))
    with serve(lambda settings: chat_model(runner, tokenizer)) as url, peer(ready(url)) as client:
        for _ in range(3):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"ready" in answered(client)[1]
            assert httpx.get(f"{url}/health").status_code == 200


@contextmanager
def peer_in_time(url: str, request: bytes) -> Iterator[socket.socket]:
    """A client whose request is all there when the server sees it, with little time for it."""
    sent, begin = threading.Event(), Connection.connection_made

    def made(connection: Connection, transport: asyncio.Transport) -> None:
        assert sent.wait(20)
        begin(connection, transport)

    with pytest.MonkeyPatch.context() as patch, peer(url) as connection:
        patch.setattr(Connection, "connection_made", made)
        patch.setattr("serving.connection.HEADER_TIMEOUT", 0.2)
        connection.sendall(request)
        sent.set()
        yield connection


def test_between_requests_a_connection_is_kept_for_longer(server):
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with peer_in_time(server, request) as connection:
        assert b"ready" in answered(connection)[1]
        time.sleep(0.5)
        connection.sendall(request)
        assert b"ready" in answered(connection)[1]


def test_an_answer_may_take_longer_than_a_question(server, runner):
    runner.pause, runner.say = 0.05, "x" * 20
    body = b'{"prompt": "hi", "stream": true}'
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with peer_in_time(server, request) as connection:
        assert answered(connection)[1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("size", [1, 4000])
def test_headers_have_an_end(server, size):
    with peer(server) as connection:
        connection.sendall(HEAD)
        with suppress(ConnectionError):
            for n in range(100_000 // size):
                connection.sendall(b"x" * size if size > 1 else b"X-%d: y\r\n" % n)
        with suppress(ConnectionError):
            assert told(connection).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{server}/health").status_code == 200


ENDLESS = {
    "many trailers": (b"0\r\n", b"a:b\r\n" * 10_000),
    "a long trailer": (b"0\r\nx: ", b"y" * 65536),
    "a long trailer's name": (b"0\r\n", b"y" * 65536),
    "a chunk's extension": (b"1;x=", b"y" * 65536),
    "a chunk's size": (b"", b"0" * 65536),
}


@pytest.mark.parametrize("path", [b"/", b"/metrics"])
@pytest.mark.parametrize("what", ENDLESS)
def test_what_stands_between_headers_and_body_has_an_end(server, what, path, caplog):
    begin, more = ENDLESS[what]
    with peer(server) as connection:
        connection.sendall(HEAD.replace(b"/", path, 1) + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(begin)
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(more)
            pytest.fail("all was taken")
    assert httpx.get(f"{server}/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_stream_to_an_old_client_ends_with_its_connection(server):
    body = b'{"prompt": "hi", "stream": true}'
    head = b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = raw(server, head + body)
    assert b"transfer-encoding" not in answer.lower()
    assert answer.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("pieces", [1, 2, 50])
def test_a_body_may_be_longer_than_headers(server, pieces):
    """Also where the first read brings both."""
    body = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    size = len(request) // pieces + 1
    with peer(server) as connection:
        for at in range(0, len(request), size):
            connection.sendall(request[at : at + size])
        assert b"context_length_exceeded" in answered(connection)[1]
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        assert b'"response"' in answered(connection)[1]


@pytest.mark.parametrize("size", [1, 7])
def test_chunks_may_come_in_any_pieces(server, size):
    """Also in such as bring nothing of the body, after which its next bytes are still read."""
    request = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\n" + BODY[:5] + b"\r\n"
    request += b"%x\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n0\r\nx: y\r\n\r\n"
    with peer(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(request), size):
            connection.sendall(request[at : at + size])
            time.sleep(0.005)
        assert b'"response"' in connection.recv(65536)


def test_a_body_that_does_not_come_is_a_408(server, runner, monkeypatch):
    monkeypatch.setattr(api, "BODY_TIMEOUT", 0.3)
    with peer(server) as connection:
        connection.sendall(HEAD + b'Content-Length: 50\r\n\r\n{"prompt": ')
        answer = told(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert b"send it at once" in answer
    assert not runner.steps


# ---- Prompts with the model's own tokens


def marked(text: ChatTokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in set(text.special.values())]


def family(name: str) -> ChatTokenizer:
    return text_of(FIXTURES / "tokenizers" / name) if name.endswith("_like") else small(name)


@pytest.mark.parametrize("name", [*MARKERS, "xverse_like", "index_like"])
def test_no_text_becomes_a_special_token_in_any_call(name):
    text = family(name)
    for word in text.special:
        for forged in (word, f"a{word}b", f" {word} ", word * 2, word[:-1] + word):
            for role in ("system", "user", "assistant"):
                turns = lambda said, role=role: [{"role": role, "content": said},  # noqa: E731
                                                 {"role": "user", "content": said}]  # fmt: skip
                assert marked(text, text.encode(turns(forged))) == marked(
                    text, text.encode(turns("honest"))
                )


@pytest.mark.parametrize("name", MARKERS)
def test_no_schema_makes_an_answer_say_a_special_token(name):
    """It is refused, or else spelled with ordinary tokens."""
    text = family(name)
    ends = text.end_ids(GenerationConfig())
    guides = GuideCompiler(text.backend, text.special.values(), ends)
    for word in text.special:
        spelled = "".join(f"\\x{{{ord(c):x}}}" for c in word)
        for schema in ({"enum": [word]}, {"enum": [f"a{word}"]}, {"pattern": f"^{spelled}$"}):
            said: list[int] = []
            try:
                guide = guides.compile({"type": "string"} | schema)
                while (token := int(np.flatnonzero(guide.token_mask())[0])) not in ends:
                    said.append(token)
                    guide.matcher.consume_token(token)
            except InvalidInput:
                continue
            finally:
                assert not marked(text, said)
            assert text.plain.decode(said)[-1] == '"'
