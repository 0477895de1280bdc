"""Adapters over HTTP: each is a model of the same server, chosen by `model`."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.settings import read_settings
from tests.conftest import ScriptedRunner, chat_model, ready, serve, wait_for

NAMES = ("poet", "coder")
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
GENERATING = {
    "/": {"prompt": "hi"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
}


class RecordingRunner(ScriptedRunner):
    """Notes the adapter of each prompt."""

    def forward(self, work):
        for span, _ in work:
            if len(span.tokens) == span.num_prompt and span not in self.seen:
                self.seen.append(span)
        return super().forward(work)


@pytest.fixture
def runner(tokenizer) -> RecordingRunner:
    found = RecordingRunner(tokenizer)
    found.seen = []
    return found


def with_adapters(runner, tokenizer):
    model = chat_model(runner, tokenizer)
    return replace(model, adapters=dict.fromkeys(NAMES, model.tokenizer))


@pytest.fixture
def server(runner, tokenizer) -> Iterator[str]:
    with serve(lambda settings: with_adapters(runner, tokenizer), chat_page=True) as url:
        yield ready(url)


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
def test_model_chooses_the_adapter(server, runner, path, stream):
    for name in ("coder", None, "test", "poet"):
        body = GENERATING[path] | {"model": name, "stream": stream}
        answer = httpx.post(f"{server}{path}", json=body)
        assert answer.status_code == 200
        if path != "/" and not stream:
            assert answer.json()["model"] == (name or "test")
    assert [span.adapter for span in runner.seen] == [2, 0, 0, 1]


def test_each_of_several_answers_has_the_adapter(server, runner):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    client.completions.create(model="poet", prompt=["a", "b"], n=2)
    assert [span.adapter for span in runner.seen] == [1, 1, 1, 1]


def test_answer_ends_at_the_adapters_own_end(runner, tokenizer):
    """At another's it goes on, and so it does where the request ignores ends."""
    own = {"poet": frozenset(tokenizer.encode("l"))}
    model = replace(with_adapters(runner, tokenizer), adapter_ends=own)
    with serve(lambda settings: model) as url:
        ready(url)
        for name, ignoring, text in (
            ("poet", False, "he"),
            ("coder", False, "hello"),
            ("test", False, "hello"),
            ("poet", True, "hello"),
        ):
            body = {"prompt": "hi", "model": name, "max_tokens": 5, "ignore_eos": ignoring}
            (choice,) = httpx.post(f"{url}/v1/completions", json=body).json()["choices"]
            assert choice["text"] == text, name
            assert choice["finish_reason"] == ("stop" if text == "he" else "length")


def test_rows_of_another_adapter_are_not_reused(server, runner):
    """The same prompt is computed again for each, and found again by the same one."""
    prompt = "a prompt that is long enough to be worth keeping"
    for name in ("test", "poet", "coder", "poet", "test"):
        httpx.post(server, json={"prompt": prompt, "model": name})
    counts = [span.num_reused for span in runner.seen]
    assert counts[:3] == [0, 0, 0]
    assert min(counts[3:]) > 30


def test_adapters_are_listed_with_their_parent(server):
    listed = httpx.get(f"{server}/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in listed] == [
        ("test", None),
        ("poet", "test"),
        ("coder", "test"),
    ]
    assert httpx.get(f"{server}/v1/models/coder").json() == listed[2]


def test_unknown_model_is_told_all_there_are(server):
    answer = httpx.post(f"{server}/v1/chat/completions", json=CHAT | {"model": "novelist"})
    assert answer.status_code == 404
    assert "'novelist' here; this server has 'test', 'poet', 'coder'" in answer.text


def test_chat_page_is_told_of_the_adapters(server):
    assert httpx.get(f"{server}/chat/config").json()["models"] == ["test", "poet", "coder"]


def test_metrics_and_log_know_the_adapter(server, caplog):
    caplog.set_level(logging.INFO)
    for name, key in (("poet", "abc-1"), ("test", "abc-2")):
        body = {"prompt": "hi", "model": name}
        httpx.post(server, json=body, headers={"X-Request-ID": key})
    wait_for(lambda: "abc-1" in caplog.text and "abc-2" in caplog.text)
    lines = {record.request_id: record for record in caplog.records if "abc" in record.getMessage()}
    assert "outcome=served adapter=poet finish_reason" in lines["abc-1"].getMessage()
    assert "adapter" not in lines["abc-2"].getMessage()
    families = text_string_to_metric_families(httpx.get(f"{server}/metrics").text)
    (counted,) = [f for f in families if f.name == "chat_adapter_requests"]
    totals = [(s.labels, s.value) for s in counted.samples if s.name.endswith("_total")]
    assert totals == [({"adapter": "poet", "outcome": "served"}, 1)]


# ---- Settings


def test_adapters_are_given_one_by_one_or_together(monkeypatch):
    one_by_one = ["--adapter", "a=x/y z", "--adapter=b=y"]
    assert read_settings(one_by_one).adapter == ("a=x/y z", "b=y")
    assert read_settings(["--adapter", "a=x,b=y"]).adapter == ("a=x", "b=y")
    monkeypatch.setenv("CHAT_ADAPTER", "c=1, d=2")
    assert read_settings([]).adapter == ("c=1", "d=2")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("output/checkpoint-699", "--adapter: must be NAME=FOLDER, such as poet=output"),
        ("a b=x", "--adapter: must be NAME=FOLDER"),
        ("a=", "--adapter: must be NAME=FOLDER"),
        ("a=x,a=y", r"--adapter: must not have two adapters of one name \(a\)"),
    ],
)
def test_bad_adapter_is_one_sentence(given, words):
    with pytest.raises(SystemExit, match=words):
        read_settings(["--adapter", given])
