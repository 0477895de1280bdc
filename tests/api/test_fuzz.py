"""Bad input of every kind over a real socket: refused in one shape, never a crash."""

import json
import re
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint.formats.gguf import GGUFFile
from serving import unknown_fields
from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model, ready, serve, wait_for

ROUTES = ("/", "/v1/chat/completions", "/v1/completions")
# What an error must not tell: our language, our libraries, our files.
INSIDES = re.compile(
    r"Traceback|pydantic|starlette|fastapi|<class|[a-z]Error\b|Exception|NoneType|site-packages"
    r"|set_int_max|parsing the body|\.py\b|/tmp/|/root/|object at 0x"
)


@pytest.fixture(scope="module")
def url():
    tokenizer = byte_tokenizer()
    runner = ScriptedRunner(tokenizer)
    with serve(lambda settings: chat_model(runner, tokenizer, 2048, max_waiting=10_000)) as url:
        yield ready(url)


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url) as client:
        yield client


# ---- What the docs promise


def documented(url: str, most: int) -> int:
    """Ask every call of the OpenAPI document so many times; the answers must be in it."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.config import (
        GenerationConfig,
        ProjectConfig,
        ProjectsConfig,
        SchemathesisConfig,
    )
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    generation = GenerationConfig(max_examples=most, deterministic=True, database="none")
    project = ProjectConfig(generation=generation)
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        # Of what has no fields, no wrong ones can be made.
        modes = list(schemathesis.GenerationMode)[: 2 if operation.body else 1]
        for mode in modes:
            cases = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=most, deadline=None, database=None, derandomize=True,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=cases)
            def ask(case):
                nonlocal asked
                asked += 1
                # More is refused than a schema can say: an empty prompt, a length too much.
                case.call_and_validate(timeout=30, excluded_checks=[positive_data_acceptance])

            ask()
    return asked


@pytest.mark.release
def test_every_answer_is_a_documented_one(url):
    assert documented(url, 350) >= 2000


def test_the_docs_promise_what_we_send(client):
    """FastAPI would promise a 422 that is never sent; OpenAI's errors lack what ours have."""
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert "422" not in answers
            if path != "/health" and "307" not in answers:
                kind = "OpenAIError" if path.startswith("/v1/") else "ErrorBody"
                kind = "MessagesError" if path.startswith("/v1/messages") else kind
                shapes = [answers[status]["content"] for status in ("4XX", "5XX")]
                wanted = {"schema": {"$ref": f"#/components/schemas/{kind}"}}
                assert shapes == [{"application/json": wanted}] * 2
    for path in ROUTES:
        said = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(said) == {"application/json", "text/event-stream"}


def test_a_wrong_method_is_told_the_right_ones(client):
    for path in ("/", "/health", "/v1/models", "/v1/completions"):
        refused = client.put(path)
        assert refused.status_code == 405
        assert set(refused.headers["allow"].split(", ")) <= {"GET", "HEAD", "POST"}


# ---- Bodies that are nearly right

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
KNOBS = {
    "max_tokens": 5, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 7,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "stop": ["z"],
    "stream": False,
}  # fmt: skip
VALID = {
    "/": {"prompt": "hi", "history": [["a", "b"]], "truncate": True} | KNOBS,
    "/v1/chat/completions": {"model": "test", "messages": MESSAGES, "n": 2, "logprobs": True,
                             "top_logprobs": 2} | KNOBS,
    "/v1/completions": {"model": "test", "prompt": "hi", "n": 2, "logprobs": 1} | KNOBS,
}  # fmt: skip
NUMBERS = {*KNOBS, "n", "top_logprobs"} - {"stop", "stream"}


class Literal(str):
    """Goes into the body as it stands, as no JSON writer would write it."""


def written(value: object) -> str:
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


DEEP = Literal("[" * 10_000 + "]" * 10_000)
DEEP_OBJECT = Literal('{"a":' * 10_000 + "1" + "}" * 10_000)
# None of them is ever a right number.
NO_NUMBERS = st.sampled_from(
    [Literal("NaN"), Literal("Infinity"), Literal("-Infinity"), Literal("1e999"), DEEP, DEEP_OBJECT,
     Literal("9" * 5000), Literal("-1e-320e"), Literal("0x5"), Literal("01"), "5", "", True, [], {},
     [5], {"a": 5}, -(10**30), 10**400, -3, "\u0665"]
)  # fmt: skip
# And none of these a right text.
NO_TEXTS = st.sampled_from(
    [Literal('"\\ud800"'), Literal('"a\\udfffb"'), Literal('"\n"'), Literal('"\x00"'), DEEP,
     DEEP_OBJECT, 5, 0.5, True, {}, {"a": "b"}, [{}], [[["a"]]], "w" * 100_000]
)  # fmt: skip
ODD_TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["\u200b\u200d\ufeff", "\u202e\u2066", "\x00\x1b[31m\x7f\r\n", "e\u0301" * 50,
                     "\ufdd0" + "0\ufdd1", "<|end|>", "{{ 7 * 7 }}", "{}", "{0.__class__}", "%s"]),
)  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip


ROUND = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    ]},
    {"role": "tool", "tool_call_id": "1", "content": "x"},
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 5}},
          "required": ["a"], "additionalProperties": False}  # fmt: skip
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "messages": ROUND,
}


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of everything in a JSON value, but of itself."""
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    return [place for k, v in inner for place in ((*path, k), *places(v, (*path, k)))]


def replaced(value: object, path: tuple, new: object) -> object:
    """A copy of a JSON value with something else at a path."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


@st.composite
def asked(draw) -> tuple[str, bytes, bool]:
    """A path, a body, and whether it must be refused."""
    path = draw(st.sampled_from(ROUTES))
    body, refuse = dict(VALID[path]), True
    cases = ["number", "text", "lost", "junk", "twice", "bytes", "odd"]
    if "messages" in body:
        cases += ["tools"]
    match draw(st.sampled_from(cases)):
        case "number":
            body[draw(st.sampled_from(sorted(NUMBERS & set(body))))] = draw(NO_NUMBERS)
        case "text":
            wrong = draw(NO_TEXTS)
            if "messages" in body:
                body["messages"] = [{"role": "user", "content": wrong}]
            else:
                body["prompt"] = wrong
                body.pop("truncate", None)
        case "lost":
            del body["messages" if "messages" in body else "prompt"]
        case "junk":
            refuse = False
            for name in draw(st.lists(st.sampled_from([*sorted(body), *unknown_fields.NEUTRAL]),
                                      min_size=1, max_size=4)):  # fmt: skip
                body[name] = draw(JUNK)
        case "odd":
            refuse = False
            text = draw(ODD_TEXTS)
            if "messages" in body:
                body["messages"] = [{"role": "user", "content": text}]
            else:
                body["prompt"] = text
            body |= {"stop": draw(ODD_TEXTS), "stream": draw(st.booleans())}
        case "tools":
            refuse = False
            wrong = draw(JUNK | NO_TEXTS | NO_NUMBERS)
            body |= replaced(TOOLS, draw(st.sampled_from(places(TOOLS))), wrong)
        case "twice":
            refuse = False
            pairs = f'"temperature": {written(draw(JUNK))}, "temperature": 0'
            return path, f"{{{pairs}, {written(body)[1:]}".encode(), refuse
        case "bytes":
            good = written(body)
            bad = [b"", b" ", b"null", b"[]", f"[{good}]".encode(),
                   good[:-1].encode(), good.encode() + b"}", b"\xff" * 9,
                   b"\x00" + good.encode(), written(DEEP).encode(), written(DEEP_OBJECT).encode(),
                   b"prompt=hi", good.replace('"', "'").encode(), good.encode() * 2,
                   b"\xef\xbb\xbf" * 2 + good.encode(), b"[" * 100_000,
                   b'{"a":' * 100_000]  # fmt: skip
            return path, draw(st.sampled_from(bad) | st.binary(max_size=40)), True
    return path, written(body).encode(errors="surrogatepass"), refuse


def judge(path: str, response: httpx.Response, refuse: bool) -> None:
    said = f"{response.status_code} {response.text[:300]}"
    assert response.status_code in (400, 404, 413) if refuse else (
        response.status_code in (200, 400, 404)
    ), said  # fmt: skip
    if response.status_code == 200:
        assert '"status": 500' not in response.text, said
        assert "step_failed" not in response.text, said
        return
    body = response.json()
    assert set(body) == ({"error"} if path.startswith("/v1/") else {"error", "status", "time"}), (
        said
    )
    assert set(body["error"]) == {"message", "type", "param", "code"}, said
    assert not INSIDES.search(body["error"]["message"]), said


def fuzzed(client: httpx.Client, most: int) -> None:
    @settings(max_examples=most, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=asked())
    def ask(case):
        path, body, refuse = case
        judge(path, client.post(path, content=body), refuse)

    ask()
    # What a stop string ended is taken out of the batch after the next step.
    idle = {"status": "ready", "running": 0, "waiting": 0}
    wait_for(lambda: client.get("/health").json() == idle)
    assert client.post("/", json={"prompt": "hi"}).json()["response"] == "hello"


@pytest.mark.slow
def test_no_body_breaks_a_call(client):
    fuzzed(client, 400)


@pytest.mark.slow
def test_no_body_breaks_a_call_at_length(client):
    fuzzed(client, 5000)


def test_tools_that_the_mutations_start_from_are_right(client):
    body = VALID["/v1/chat/completions"] | TOOLS
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_what_the_mutations_start_from_is_right(client, path):
    assert client.post(path, json=VALID[path]).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_body_in_another_encoding_of_unicode_is_understood(client, encoding):
    answer = client.post("/", content=json.dumps({"prompt": "你好"}).encode(encoding)).json()
    assert answer["history"] == [["你好", "hello"]]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_a_body_in_utf_16_or_utf_32_is_refused_by_name(client, encoding):
    answer = client.post("/", content=json.dumps({"prompt": "你好"}).encode(encoding))
    assert answer.status_code == 400
    assert encoding.upper() in answer.json()["error"]["message"]
    assert "UTF-8" in answer.json()["error"]["message"]


def test_a_compressed_body_is_refused_by_the_name_of_its_encoding(client):
    headers = {"Content-Encoding": "gzip"}
    answer = client.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert error["code"] == "unsupported_encoding"
    assert "Content-Encoding" in error["message"]
    assert "gzip" in error["message"]


def test_a_word_of_a_hundred_thousand_characters_holds_up_nobody(demo_folder):
    """Whoever reads it does so on a thread of its own; the real tokenizer, a scripted answer."""
    tokenizer = GGUFFile(demo_folder / "demo.gguf").tokenizer()
    runner = ScriptedRunner(byte_tokenizer())
    with serve(lambda settings: chat_model(runner, tokenizer)) as url:
        ready(url)
        answers: list[httpx.Response] = []
        body = {"prompt": "x" * 100_000}
        client = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body)))
        client.start()
        waits = []
        while client.is_alive():
            started = time.process_time()  # so that other programs' time is not counted
            httpx.get(f"{url}/health")
            waits.append(time.process_time() - started)
        assert answers[0].json()["error"]["code"] == "context_length_exceeded"
        assert len(waits) > 1
        assert max(waits) < 2
