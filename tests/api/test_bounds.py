"""The bounds that docs/operating.md states: what it says of each, and what is at its edge."""

import asyncio
import copy
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial, reduce
from itertools import pairwise
from unittest.mock import patch

import httpx
import pytest

import api
from engine import InvalidInput, Prompt, QueueFull, SamplingParams
from engine.child_process import ChildProcess
from engine.guided import bounded_compiler, guide
from engine.prompt import template_renderer
from engine.prompt.tokenizer import ChatTokenizer
from engine.tools import grammar
from serving import (
    body_limits,
    connection,
    connection_limits,
    fields,
    log_queue,
    openai_shared,
    request_parser,
    tool_fields,
)
from serving.openai_shared import with_few_logprobs
from serving.tool_fields import check_arguments
from tests.api.test_security import answered, peer, told
from tests.conftest import ROOT, TEMPLATE, chat_model, ready, serve, wait_for

STATED = {
    "headers, and what stands between them and the body": (
        f"{request_parser.MAX_HEADER_BYTES // 2**10} KiB"
    ),
    "headers, or trailers, in number": f"{request_parser.MAX_HEADERS}",
    "sizes and extensions of a body's chunks, and its trailers": (
        f"{request_parser.MAX_HEADER_BYTES // 2**10} KiB"
    ),
    "time in which bodies are read of more than 64 chunks, a body at a time": "a quarter",
    "time to send the headers": f"{connection.HEADER_TIMEOUT:g} seconds",
    "an idle connection": f"{connection.KEEP_ALIVE} seconds",
    "time in which a client takes nothing of an answer": f"{connection.SEND_TIMEOUT:g} seconds",
    "connections without a whole request": (
        f"{connection_limits.MAX_CONNECTIONS:,}, or half of what a small `ulimit -n` leaves"
    ),
    "bodies of all requests that are here, without the first 64 KiB of each": (
        f"{body_limits.MAX_BYTES_IN_ALL // 2**20} MiB"
    ),
    "refusals for want of room, for bodies or in the queue": (
        f"{body_limits.MAX_REFUSALS_PER_S} a second"
    ),
    "time in which bodies of more than 64 KiB are parsed, a body at a time": "a quarter",
    "lists, objects and fields in a body": f"{body_limits.MAX_CONTAINERS:,}",
    "items in a body, such as token ids": f"{body_limits.MAX_ITEMS:,}",
    "a body": f"{api.MAX_BODY // 2**20} MiB",
    "time to send the body": f"{api.BODY_TIMEOUT:g} seconds",
    "turns of a history, or messages": f"{fields.MAX_TURNS:,}",
    "`tool_calls` of all messages": f"{tool_fields.MAX_CALLS_IN_ALL:,}",
    "logprobs, of all tokens of a request": f"{openai_shared.MAX_LOGPROBS:,}",
    "depth of a JSON schema, a call's arguments, `chat_template_kwargs`": (f"{fields.MAX_DEPTH}"),
    "a JSON schema": f"{guide.MAX_SCHEMA_CHARS:,} characters",
    "tools of a request": (
        f"{tool_fields.MAX_TOOLS}, with schemas of {grammar.MAX_SCHEMAS_CHARS:,} characters"
        " together"
    ),
    "CPU time to compile a schema": f"{bounded_compiler.COMPILE_TIMEOUT:g} seconds",
    "memory to compile a schema": f"{bounded_compiler.COMPILE_MEMORY // 2**20} MiB",
    "CPU time to render messages by a chat template": (
        f"{template_renderer.RENDER_TIMEOUT:g} seconds"
    ),
    "memory to render messages by a chat template": (
        f"{template_renderer.RENDER_MEMORY // 2**20} MiB"
    ),
    "lines of the log that wait to be written": f"{log_queue.MAX_LINES:,}",
    "a step of the model": f"{api.STEP_TIMEOUT:g} seconds",
}


def test_docs_state_the_bounds_as_they_are():
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    section = text.partition("## Bounds")[2].partition("## Metrics")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \| .+? \|$", section, re.MULTILINE))
    assert {name: rows.get(name) for name in STATED} == STATED


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_body_at_its_bound(server, more, status):
    body = b'{"prompt": "x"}'
    body += b" " * (api.MAX_BODY + more - len(body))
    assert httpx.post(server, content=body).status_code == status


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_body_without_a_length_at_its_bound(server, more, status):
    body = b'{"prompt": "x"}'
    body += b" " * (api.MAX_BODY + more - len(body))
    pieces = (body[at : at + 2**20] for at in range(0, len(body), 2**20))
    assert httpx.post(server, content=pieces).status_code == status


FREE = body_limits.FREE_BYTES


def head(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size


def padded(size: int) -> bytes:
    return b'{"prompt": "x"}'.ljust(size)


@pytest.mark.parametrize("says_its_length", [True, False])
def test_bodies_in_all_at_their_bound(server, monkeypatch, says_its_length):
    """One that is still sent leaves room for another of exactly so many bytes, and none more."""
    monkeypatch.setattr(body_limits, "MAX_BYTES_IN_ALL", 4 * FREE)

    def ask(size: int) -> httpx.Response:
        body = padded(size)
        return httpx.post(server, content=body if says_its_length else iter([body]))

    with peer(server) as slow:
        slow.sendall(head(3 * FREE))  # of which two count, and none has come yet
        wait_for(lambda: ask(3 * FREE + 1).status_code == 429)
        refused = ask(3 * FREE + 1)
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "queue_full"
        assert ask(3 * FREE).status_code == 200
        with peer(server) as another:
            another.sendall(head(3 * FREE))
            wait_for(lambda: ask(FREE + 1).status_code == 429)
            assert ask(FREE).status_code == 200  # a small one always has room
    wait_for(lambda: ask(5 * FREE).status_code == 200)
    assert ask(5 * FREE + 1).status_code == 429


def test_body_counts_until_it_is_answered(server, runner, monkeypatch):
    monkeypatch.setattr(body_limits, "MAX_BYTES_IN_ALL", FREE)
    runner.hold()
    with peer(server) as asking:
        asking.sendall(head(2 * FREE) + padded(2 * FREE))
        wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 1)
        assert httpx.post(server, content=padded(FREE + 1)).status_code == 429
        runner.free()
        assert asking.recv(65536).startswith(b"HTTP/1.1 200")
    wait_for(lambda: httpx.post(server, content=padded(2 * FREE)).status_code == 200)


def test_refusals_at_their_bound(monkeypatch):
    """Each waits for its turn, but not if that is too far off."""
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(round(seconds))

    async def refuse(count: int) -> None:
        every = body_limits.BodyBudget()
        for _ in range(count):
            with every.reserve() as held, pytest.raises(QueueFull):
                await held.grow_to(body_limits.MAX_BYTES_IN_ALL + FREE + 1)

    monkeypatch.setattr(body_limits, "MAX_REFUSALS_PER_S", 0.1)
    monkeypatch.setattr(body_limits, "RETRY_S", 25)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(refuse(5))
    assert slept == [0, 10, 20]


def test_large_bodies_are_parsed_in_turns_and_leave_time_to_others():
    assert body_limits.IDLE_PER_PARSE == 3
    begun, took = [], 0.02

    async def parse(every: body_limits.BodyBudget, num_bytes: int) -> None:
        async with every.exclusive_parse(num_bytes):
            begun.append((time.monotonic(), num_bytes))
            time.sleep(took)  # noqa: ASYNC251 - as parsing does

    async def everybody() -> None:
        every = body_limits.BodyBudget()
        await asyncio.gather(*(parse(every, size) for size in [FREE + 1] * 3 + [FREE]))

    asyncio.run(everybody())
    assert [size for _, size in begun].index(FREE) == 1  # it waits for no turn
    large = [at for at, size in begun if size > FREE]
    assert all(later - at >= 4 * took for at, later in pairwise(large))


def test_body_that_leaves_its_turn_lets_the_next_one_parse():
    async def everybody() -> list[str]:
        every, done = body_limits.BodyBudget(), []

        async def parse(name: str) -> None:
            async with every.exclusive_parse(FREE + 1):
                done.append(name)
                await asyncio.sleep(0)

        first, second, third = (asyncio.create_task(parse(name)) for name in "abc")
        await first
        second.cancel()
        await third
        return done

    assert asyncio.run(everybody()) == ["a", "c"]


def test_body_that_waits_is_taken_when_there_is_room(server, monkeypatch):
    monkeypatch.setattr(body_limits, "MAX_BYTES_IN_ALL", FREE)
    monkeypatch.setattr(body_limits, "MAX_REFUSALS_PER_S", 0.5)
    with ThreadPoolExecutor() as pool:
        with peer(server) as slow:
            slow.sendall(head(2 * FREE))
            ask = partial(httpx.post, server, content=padded(2 * FREE), timeout=30)
            wait_for(lambda: ask().status_code == 429)
            waits = pool.submit(ask)
        assert waits.result().status_code == 200


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % api.MAX_BODY


@pytest.mark.slow
@pytest.mark.parametrize("begin", [head(api.MAX_BODY), CHUNKED], ids=["length", "chunks"])
def test_body_that_waits_is_not_read(server, monkeypatch, begin):
    """It takes no memory and nobody's time meanwhile, and is read once its answer is there."""
    monkeypatch.setattr(body_limits, "MAX_BYTES_IN_ALL", 0)
    monkeypatch.setattr(body_limits, "MAX_REFUSALS_PER_S", 0.3)
    assert httpx.post(server, content=padded(2 * FREE)).status_code == 429
    with peer(server, 0.5) as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        asking.sendall(begin)
        with pytest.raises(TimeoutError):
            asking.sendall(b" " * api.MAX_BODY)
        assert httpx.post(server, content=padded(FREE)).status_code == 200
        asking.settimeout(10)
        assert asking.recv(65536).startswith(b"HTTP/1.1 429 ")
        asking.sendall(b" " * (api.MAX_BODY // 2))


@pytest.mark.parametrize("path", ["/", "/metrics"])
@pytest.mark.parametrize(("key", "status"), [("wrong", 401), ("sesame", 429)])
def test_body_without_room_is_refused_after_its_key(
    runner, tokenizer, monkeypatch, path, key, status
):
    monkeypatch.setattr(body_limits, "MAX_BYTES_IN_ALL", 0)
    with serve(lambda settings: chat_model(runner, tokenizer), api_key="sesame") as url:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(ready(url) + path, content=padded(FREE + 1), headers=headers)
    assert answer.status_code == status
    assert answer.headers["x-request-id"]


COLON_AND_TWO = 3  # of {"prompt": [...]}: the object, its field, and the list


@pytest.mark.parametrize(("more", "known"), [(0, "token"), (1, "lists of more than 524,288")])
def test_items_of_a_body_at_their_bound(server, more, known):
    ids = [1] * (body_limits.MAX_ITEMS - COLON_AND_TWO + 1 + more)
    answer = httpx.post(f"{server}/v1/completions", json={"prompt": ids})
    assert answer.status_code == 400
    assert known in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "item", ["[]", "{}", '{"a":1}', '["a"]', '"a":[]', r'{"a\"":[{}]}', "[[[]]]"]
)
def test_containers_of_a_body_at_their_bound(item):
    each = sum(map(item.count, "[{:"))
    most = body_limits.MAX_CONTAINERS // each
    body_limits.check_items(",".join([item] * most).encode())
    with pytest.raises(InvalidInput, match="131,072 lists, objects and fields"):
        body_limits.check_items(",".join([item] * (most + 1)).encode())


@pytest.mark.parametrize(
    "text", ["[" * 600_000, ',"' * 300_000, '{":' * 200_000, "\\" * 300_000 + "," * 600_000]
)
def test_what_stands_in_a_text_is_no_item(text):
    body_limits.check_items(json.dumps({"prompt": text, "history": [["a", text]]}).encode())


def in_chunks(body: bytes) -> bytes:
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    return b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces


def test_body_in_chunks_of_a_byte(server):
    with peer(server, 60) as asking:
        asking.sendall(in_chunks(padded(3000)) + b"0\r\n\r\n")
        assert answered(asking)[0] == 200
        asking.sendall(head(15) + padded(15))  # and the connection is as good as before
        assert answered(asking)[0] == 200


def test_body_in_too_many_chunks_is_refused_with_the_reason(server):
    with peer(server, 60) as asking, suppress(ConnectionError):
        asking.sendall(in_chunks(padded(60_000)))
        assert b"send larger chunks" in told(asking)


@contextmanager
def long_turns():
    """Until its end, a body of small chunks waits for seconds after some of them."""
    turn = lambda turns, now, took: now + 3  # noqa: E731
    with patch.object(connection_limits.Turns, "next", turn):
        yield


def test_chunks_of_a_byte_leave_time_to_others(server):
    """Others are answered between them, however many there are, and whatever has the key."""
    with peer(server) as slow, long_turns():
        slow.sendall(in_chunks(padded(3000)) + b"0\r\n\r\n")
        for _ in range(3):
            assert httpx.get(f"{server}/health").status_code == 200
        slow.settimeout(0.2)
        with pytest.raises(TimeoutError):
            slow.recv(1)


def test_turns_of_chunks_are_one_at_a_time():
    assert connection_limits.PAUSE_FACTOR == 3
    turns = connection_limits.Turns()
    assert [turns.next(10.0, 1.0) for _ in range(3)] == [13.0, 17.0, 21.0]
    assert turns.next(100.0, 2.0) == 106.0


@pytest.mark.slow
@pytest.mark.parametrize("key", ["wrong", "sesame"])
def test_chunks_that_wait_are_not_read(runner, tokenizer, key):
    """What has come is kept, and no more is taken, whether anybody wants the body or not."""
    load = lambda settings: chat_model(runner, tokenizer)  # noqa: E731
    begin = in_chunks(b" ").replace(b"Host", b"Authorization: Bearer %s\r\nHost" % key.encode())
    with serve(load, api_key="sesame") as url, peer(ready(url), 0.5) as asking, long_turns():
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        with pytest.raises(TimeoutError):
            asking.sendall(begin + b"1\r\nx\r\n" * 2**21)


def test_connections_under_a_small_limit_of_files(server, monkeypatch):
    """Half of what there is beside the process's own files, less those who are answered."""
    limit = connection_limits.OTHER_FILES + 2 * 16
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    assert connection_limits.num_connectable() == 16
    with ExitStack() as stack:
        peers = [stack.enter_context(peer(server)) for _ in range(17)]
        assert httpx.get(f"{server}/health").status_code == 200
        assert told(peers[0]) == b""
        peers[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answered(peers[-1])[0] == 200


def test_connections_that_wait_at_their_bound(server, monkeypatch):
    """The oldest goes; one whose request has come whole does not count."""
    monkeypatch.setattr(connection_limits, "MAX_CONNECTIONS", 3)
    with ExitStack() as stack:
        peers = [stack.enter_context(peer(server)) for _ in range(3)]
        for each in peers:
            each.sendall(b"GET /health HTTP/1.1\r\n")
        assert httpx.get(f"{server}/health").status_code == 200
        assert told(peers[0]) == b""
        for each in peers[1:]:
            each.sendall(b"Host: x\r\n\r\n")
            assert each.recv(65536).startswith(b"HTTP/1.1 200")


def test_connection_waits_anew_after_each_answer(server, monkeypatch):
    monkeypatch.setattr(connection_limits, "MAX_CONNECTIONS", 2)
    with peer(server) as first, peer(server) as second:
        for _ in range(2):
            first.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert first.recv(65536).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{server}/health").status_code == 200
        assert told(second) == b""
        first.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200")


def test_connection_that_is_answered_does_not_wait(server, runner, monkeypatch):
    """Nor does it once it has gone, and a pipelined request waits no longer than any other."""
    runner.hold()
    others = set().union(*connection.WAITING.values())  # of other tests' servers
    waiting = lambda: len(set().union(*connection.WAITING.values()) - others)  # noqa: E731
    with peer(server) as first, peer(server) as second:
        for asking in (first, second):
            asking.sendall((head(15) + padded(15)) * 2)
        asked = lambda health: health["running"] + health["waiting"]  # noqa: E731
        wait_for(lambda: asked(httpx.get(f"{server}/health").json()) == 2)
        monkeypatch.setattr(connection_limits, "MAX_CONNECTIONS", 2)
        with peer(server) as third, peer(server) as fourth:
            wait_for(lambda: waiting() == 2)
            runner.free()
            for asking in (first, second):
                wait_for(lambda a=asking: a.recv(65536).startswith(b"HTTP/1.1 200"))
            for asking in (third, fourth):
                asking.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                told(asking)
    wait_for(lambda: waiting() == 0)


@pytest.mark.slow
@pytest.mark.parametrize("reads", [False, True])
def test_time_in_which_a_client_takes_nothing_at_its_bound(runner, tokenizer, monkeypatch, reads):
    """One that reads slowly is served to the end; of one that does not, nothing is kept."""
    monkeypatch.setattr(connection, "SEND_TIMEOUT", 0.5)
    runner.say = "x" * 3000
    model = lambda _: chat_model(runner, tokenizer, 4000)  # noqa: E731
    body = b'{"prompt":"Hi","stream":true,"logprobs":0,"max_tokens":3000,"n":8}'
    with serve(model) as url, socket.socket() as asking:
        port = int(ready(url).rpartition(":")[2])
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.settimeout(30)
        asking.connect(("127.0.0.1", port))
        lines = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        asking.sendall(lines + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert asking.recv(1000).startswith(b"HTTP/1.1 200")
        if not reads:
            wait_for(lambda: httpx.get(f"{url}/health").json()["running"] == 0)
            time.sleep(1.5)  # longer than it may
        said = b""
        with suppress(ConnectionResetError):
            while more := asking.recv(50_000):
                said = said[-100:] + more
                time.sleep(0.001)
        assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") == reads


@pytest.mark.parametrize("slow", ["its body is sent", "it is tokenized", "it is answered"])
def test_time_of_a_request_is_counted_from_its_arrival(runner, tokenizer, monkeypatch, slow):
    release = threading.Event()
    model = lambda _: chat_model(runner, tokenizer, timeout=0.5)  # noqa: E731
    with serve(model, request_timeout=0.5) as url, peer(ready(url)) as asking:
        if slow == "it is tokenized":
            encode = ChatTokenizer.encode
            wait = lambda *a, **b: release.wait(20) and encode(*a, **b)  # noqa: E731
            monkeypatch.setattr(ChatTokenizer, "encode", wait)
        if slow == "it is answered":
            runner.pause, runner.say = 0.05, "x" * 400
        asking.sendall(head(15) + (b"" if slow == "its body is sent" else padded(15)))
        code, answer = answered(asking)
        release.set()
        assert code == 504
        assert b"longer than 0.5 seconds" in answer


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 400)])
def test_history_at_its_bound(server, more, status):
    history = [["a", "b"]] * (fields.MAX_TURNS + more)
    body = {"prompt": "x", "history": history, "truncate": True, "max_length": 5}
    answer = httpx.post(server, json=body)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(("n", "status"), [(16, 200), (17, 400)])
def test_answers_to_one_request_at_their_bound(server, n, status):
    body = {"prompt": "x", "n": n}
    assert httpx.post(f"{server}/v1/completions", json=body).status_code == status


def test_schema_at_its_bound():
    frame = len(json.dumps({"const": ""}))
    longest = {"const": "x" * (guide.MAX_SCHEMA_CHARS - frame)}
    assert len(guide.spell_schema(longest)) == guide.MAX_SCHEMA_CHARS
    with pytest.raises(InvalidInput, match="longer than 65,536 characters"):
        guide.spell_schema({"const": longest["const"] + "x"})


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 400)])
def test_depth_of_a_templates_variables_at_its_bound(runner, tokenizer, more, status):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = f"{{% if deep %}}!{{% endif %}}{TEMPLATE}"
    deep = reduce(lambda inner, _: [inner], range(fields.MAX_DEPTH - 1 + more), 1)
    body = {"prompt": "x", "chat_template_kwargs": {"deep": deep}}
    with serve(lambda settings: chat_model(runner, tokenizer)) as url:
        answer = httpx.post(ready(url), json=body)
    assert answer.status_code == status
    if more:
        assert answer.json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("call", ["format", "object", "tool"])
def test_depth_of_a_schema_at_its_bound(server, call):
    def answer(more: int) -> httpx.Response:
        levels = fields.MAX_DEPTH - 2 + more  # there are two around them
        deep = reduce(lambda inner, _: {"not": inner}, range(levels), True)
        schema = {"type": "object", "properties": {"x": deep}}
        function = {"type": "function", "function": {"name": "f", "parameters": schema}}
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        asked = {
            "format": {"response_format": wanted},
            "object": {"response_format": {"type": "json_object", "schema": schema}},
            "tool": {"tools": [function]},
        }
        body = {"messages": [{"role": "user", "content": "x"}]} | asked[call]
        return httpx.post(f"{server}/v1/chat/completions", json=body)

    assert "deeper" not in answer(0).text
    assert answer(1).status_code == 400
    assert "deeper than 64 levels" in answer(1).json()["error"]["message"]


def called(*arguments: str) -> dict[str, object]:
    """A conversation with calls that have these arguments."""
    calls = [
        {"id": str(n), "type": "function", "function": {"name": "f", "arguments": text}}
        for n, text in enumerate(arguments)
    ]
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}


def test_items_in_arguments_of_calls_at_their_bound():
    """They are texts in the body, where the items of JSON are counted."""
    half = '{"a": [' + "[]," * (body_limits.MAX_CONTAINERS // 2 - 4) + "[]]}"
    assert check_arguments(called(half, half)["messages"])
    with pytest.raises(InvalidInput, match=r"arguments of tool_calls hold .* 131,072") as refused:
        check_arguments(called(half, '{"a": [[], []]}', half)["messages"])
    assert refused.value.argument == "messages"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_items_in_arguments_of_calls_are_counted_before_they_are_read(server, path):
    body = called('{"a": ' + "[" * 500, '{"a": [' + "[]," * body_limits.MAX_CONTAINERS + "[]]}")
    answer = httpx.post(server + path, json=body)
    assert answer.status_code == 400
    assert "131,072" in answer.json()["error"]["message"]
    odd = {"messages": [1, {"tool_calls": 1}, {"tool_calls": [1, {"function": 1}]}]}
    assert httpx.post(server + path, json=odd).json()["error"]["param"] == "messages"


@pytest.mark.parametrize(("more", "known"), [(0, True), (1, False)])
def test_calls_of_all_messages_at_their_bound(more, known):
    turns = called("{}")["messages"] * (tool_fields.MAX_CALLS_IN_ALL + more)
    with nullcontext() if known else pytest.raises(ValueError, match="at most 4096 tool_calls"):
        check_arguments(turns)


def test_what_is_wrong_with_messages_to_count_is_told_of_them(server):
    body = {"messages": [{"role": "user", "content": "x" * 2**17}]}
    answer = httpx.post(f"{server}/tokenize", json=body)
    assert answer.json()["error"]["param"] == "messages"


def test_text_to_count_may_be_longer_than_a_prompt(server):
    text = "x" * fields.MAX_TEXT
    assert httpx.post(f"{server}/tokenize", json={"prompt": text}).json()["count"] == len(text)
    longer = httpx.post(f"{server}/tokenize", json={"prompt": text + "x"})
    assert longer.json()["error"]["code"] == "invalid_value"
    asked = httpx.post(f"{server}/v1/completions", json={"prompt": text})
    assert asked.json()["error"]["code"] == "context_length_exceeded"


def prompt_of(size: int, most: int, open_ended: bool = False, **params: int) -> Prompt:
    return Prompt([1] * size, SamplingParams(max_new_tokens=most, **params), open_ended)


def test_logprobs_of_a_request_at_their_bound():
    most = openai_shared.MAX_LOGPROBS
    exact = [prompt_of(100, most // 20 // 16, logprobs=20)]
    assert with_few_logprobs(exact, 16) == exact
    with pytest.raises(InvalidInput, match="1,048,576 logprobs") as refused:
        with_few_logprobs([prompt_of(100, most // 20 // 16 + 1, logprobs=20)], 16)
    assert refused.value.argument == "logprobs"
    scored = [prompt_of(most // 4, 0, prompt_logprobs=2)] * 2
    assert with_few_logprobs(scored, 1) == scored
    with pytest.raises(InvalidInput, match="logprobs"):
        with_few_logprobs([*scored, prompt_of(1, 0, prompt_logprobs=2)], 1)
    without = [prompt_of(2**20, 2**20)] * 3
    assert with_few_logprobs(without, 16) == without


def test_answer_of_no_stated_length_is_shortened_to_the_logprobs_there_may_be():
    both = [prompt_of(9, 2**17, open_ended=True, logprobs=20), prompt_of(9, 5, True, logprobs=20)]
    lengths = [p.params.max_new_tokens for p in with_few_logprobs(both, 4)]
    assert lengths == [openai_shared.MAX_LOGPROBS // 4 // 20 // 2, 5]


def test_logprobs_that_are_too_many_are_refused_by_the_call(runner, tokenizer):
    body = {"prompt": ["x" * 400] * 64, "n": 2, "echo": True, "logprobs": 20, "max_tokens": 16}
    with serve(lambda settings: chat_model(runner, tokenizer)) as url:
        refused = httpx.post(f"{ready(url)}/v1/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "logprobs"
        fewer = body | {"prompt": "x" * 400, "n": 1}
        assert httpx.post(f"{url}/v1/completions", json=fewer).status_code == 200


MANY = "{% set m = range(100000) %}{% for a in m %}{% for b in m %}{% endfor %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("explodes", ["{{ 'x' * size }}", MANY], ids=["memory", "time"])
def test_a_template_that_a_request_makes_explode_costs_only_that_request(
    runner, tokenizer, monkeypatch, explodes
):
    asked = ChildProcess.ask
    monkeypatch.setattr(
        ChildProcess, "ask", lambda self, it, time: asked(self, it, 1 if "size" in it[2] else time)
    )
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = f"{{% if size %}}{explodes}{{% endif %}}{TEMPLATE}"
    hello = [{"role": "user", "content": "hello"}]
    hostile = {"messages": hello, "chat_template_kwargs": {"size": 10**10}}
    with (
        serve(lambda settings: chat_model(runner, tokenizer)) as url,
        httpx.Client(base_url=ready(url)) as client,
        ThreadPoolExecutor() as pool,
    ):
        path = "/v1/chat/completions"
        ask = partial(client.post, path)
        refused = [pool.submit(ask, json=hostile) for _ in range(3)]
        assert ask(json={"messages": hello}).status_code == 200
        for answer in (each.result() for each in refused):
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "messages"
            assert "chat template takes more than" in answer.json()["error"]["message"]


LONG = "x" * 2**20


@pytest.mark.parametrize(
    "field",
    [
        *({name: LONG} for name in ("model", "history", "stop", "temperature", "tools", LONG)),
        *({name: {LONG: 1}} for name in ("logit_bias", "chat_template_kwargs", "response_format")),
        {"history": [["a", LONG, LONG]]},
        {"history": [{"role": LONG, "content": "x"}]},
    ],
    ids=str.split("model history stop temperature tools own bias kwargs format pair role"),
)
def test_an_error_repeats_little_of_what_was_sent(server, field):
    answer = httpx.post(server, json={"prompt": "x"} | field)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 2000


def test_an_error_repeats_little_of_a_choice_of_tools(server):
    tool = {"type": "function", "function": {"name": "f"}}
    chosen = {"type": "function", "function": {"name": LONG}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": chosen}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.json()["error"]["param"] == "tool_choice"
    assert len(answer.content) < 1000


def test_an_error_repeats_little_of_a_schema(server):
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "x" * 60_000}}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": wanted}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    assert answer.json()["error"]["param"] == "response_format"
    assert len(answer.content) < 1000


def test_an_error_repeats_little_of_a_path_or_header(server):
    headers = {"Content-Encoding": "x" * 50_000}
    for answer in (
        httpx.get(f"{server}/{'x' * 50_000}"),
        httpx.get(f"{server}/v1/models/{'x' * 50_000}"),
        httpx.post(server, headers=headers, content=b"x"),
    ):
        assert 400 <= answer.status_code < 500
        assert len(answer.content) < 2000


@pytest.mark.parametrize(("length", "kept"), [(128, True), (129, False)])
def test_request_id_at_its_bound(server, length, kept):
    given = "x" * length
    answer = httpx.get(f"{server}/health", headers={"X-Request-ID": given})
    assert (answer.headers["x-request-id"] == given) == kept
