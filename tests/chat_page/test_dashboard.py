"""The dashboard, in a real browser, and the stream of events that feeds it."""

import asyncio
import json
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from benchmark import free_port
from playwright.sync_api import Browser, expect

from chat_page import dashboard
from chat_page.dashboard import MAX_SAMPLES, Watch
from engine import ChatModel
from serving.live import LiveRequests, percentiles
from serving.parts import Choice
from tests.chat_page.browsing import CONTRAST, in_browser
from tests.conftest import (
    PATIENCE,
    ScriptedRunner,
    byte_tokenizer,
    chat_model,
    ready,
    serve,
    wait_for,
)
from tests.server_process import server_process


# Each test counts what it asked for itself, so it has a server for itself.
@pytest.fixture
def runner(tokenizer) -> ScriptedRunner:
    return ScriptedRunner(tokenizer)


@pytest.fixture
def url(runner, tokenizer, monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(dashboard, "PERIOD", 0.1)
    with serve(lambda _: chat_model(runner, tokenizer, 2048), chat_page=True) as address:
        yield ready(address)


def events(url: str, count: int, **options: Any) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{url}/dashboard/events", **options) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line[6:]))
            if len(told) == count:
                break
    return told


def ask(url: str, text: str = "hi") -> dict[str, Any]:
    return httpx.post(url, json={"prompt": text}).json()


# ---- What it counts


def test_samples_equal_usage(url):
    usages = [ask(url)["usage"] for _ in range(3)]
    sample = events(url, 2)[1]["samples"][0]
    for name in ("prompt_tokens", "completion_tokens"):
        assert sample[name] == sum(usage[name] for usage in usages)
    assert (sample["status"], sample["requests"]) == ("ready", [])
    assert 0 < sample["first_token"]["p50"] <= sample["first_token"]["p99"]
    assert 0 <= sample["cache_tokens_kept"] <= sample["cache_tokens_used"] <= sample["cache_tokens"]
    assert (sample["state_slots"], sample["state_slots_used"]) == (0, 0)


def test_running_request_is_told(url, runner):
    runner.say = "one two three"
    runner.hold()
    runner.permits.release(4)  # as the headers come with the first text
    try:
        with httpx.stream("POST", url, json={"prompt": "secret", "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            wait_for(lambda: events(url, 2)[1]["samples"][0]["completion_tokens"] >= 1)
            sample = events(url, 2)[1]["samples"][0]
    finally:
        runner.permits.release(1000)
    (request,) = sample["requests"]
    assert request["route"] == "/"
    assert request["completion_tokens"] == sample["completion_tokens"]
    assert "secret" not in json.dumps(sample)


def test_counts_go_on_from_running_to_ended():
    live = LiveRequests()
    choice = Choice(0, prompt_tokens=5, completion_tokens=2, cached_tokens=1)
    request = SimpleNamespace(id="a", route="/", arrived=0.0, choices=[choice])
    live.begin(request)
    before = live.sample()
    live.end(request, {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 1})
    after = live.sample()
    for name, count in (("prompt_tokens", 5), ("completion_tokens", 2), ("cached_tokens", 1)):
        assert before[name] == after[name] == count
    assert (len(before["requests"]), after["requests"]) == (1, [])


@pytest.mark.parametrize(
    ("seconds", "p50", "p99"), [([1], 1, 1), ([3, 1, 2], 2, 3), ([*range(1, 101)], 50, 99)]
)
def test_percentiles(seconds, p50, p99):
    assert percentiles([*seconds, None]) == {"p50": p50, "p99": p99}
    assert percentiles([None]) is None


# ---- What it costs


def test_nothing_is_sampled_while_nobody_looks(monkeypatch):
    monkeypatch.setattr(dashboard, "PERIOD", 0.001)
    taken = []

    def observe() -> dict[str, Any]:
        taken.append(1)
        return {"status": "ready", "requests": []}

    async def look(watch: Watch, count: int) -> None:
        stream = watch.events()
        for _ in range(count):
            await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0.05)

    async def main() -> None:
        watch = Watch(observe, dict)
        await look(watch, 3)
        before = len(taken)
        await asyncio.sleep(0.1)
        assert len(taken) == before
        # Who comes later sees what was, and several see the same samples.
        await asyncio.gather(look(watch, 400), look(watch, 400))
        assert len(taken) < before + 450
        stream = watch.events()
        told = json.loads((await anext(stream)).removeprefix("data: "))
        await stream.aclose()
        assert told["first"] is True
        assert len(told["samples"]) == MAX_SAMPLES

    asyncio.run(main())


def load_that_runs(_: object) -> ChatModel:
    return chat_model(ScriptedRunner(byte_tokenizer(), "hello", 512), byte_tokenizer(), 512)


@pytest.mark.slow
def test_stream_ends_with_the_server():
    """An open dashboard does not hold up the exit."""
    port = free_port()
    with server_process(load_that_runs, "--port", str(port), "--drain-timeout", "600") as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url))
        with httpx.stream("GET", f"{url}/dashboard/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert '"draining"' in [line for line in lines if line][-1]
        assert process.wait(PATIENCE) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_watchers_are_bounded(url, monkeypatch):
    monkeypatch.setattr(dashboard, "MAX_WATCHERS", 1)
    with httpx.stream("GET", f"{url}/dashboard/events") as stream:
        lines = stream.iter_lines()  # closed with its generator, so kept
        next(lines)
        refused = httpx.get(f"{url}/dashboard/events")
    assert refused.status_code == 429
    assert "try again" in refused.json()["error"]["message"]


# ---- Who may look


def test_key_guards_the_figures_but_not_the_files(runner, tokenizer):
    with serve(
        lambda _: chat_model(runner, tokenizer), api_key="sesame", chat_page=True
    ) as address:
        url = ready(address)
        for path in dashboard.FILES:
            page = httpx.get(url + path)
            assert page.status_code == 200
            assert "default-src 'none'" in page.headers["content-security-policy"]
        assert httpx.get(f"{url}/dashboard").status_code == 307
        assert httpx.get(f"{url}/dashboard/events").status_code == 401
        key = {"Authorization": "Bearer sesame"}
        assert events(url, 2, headers=key)[1]["facts"]["name"] == "test"


def test_without_the_page_there_is_none(runner, tokenizer):
    with serve(lambda _: chat_model(runner, tokenizer), chat_page=False) as address:
        assert httpx.get(f"{ready(address)}/dashboard/").status_code == 404


# ---- What a person sees


@in_browser
def test_figures_in_the_browser(browser: Browser, url, runner):
    ask(url)
    runner.hold()
    runner.permits.release(2)
    with browser.new_context(locale="en-US") as context:
        page = context.new_page()
        failures: list[object] = []
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(f"{url}/dashboard/")
        expect(page.locator("#model")).to_have_text("test")
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#none")).to_be_visible()
        with httpx.stream("POST", url, json={"prompt": "hi", "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            expect(page.locator("#requests tr")).to_have_count(1)
            expect(page.locator("#batch")).to_contain_text("running 1")
            runner.permits.release(1000)
            assert [*lines]
        expect(page.locator("#requests tr")).to_have_count(0)
        expect(page.locator("#firstToken")).to_contain_text("median")
        expect(page.locator("#cache polyline")).to_have_count(2)
        page.get_by_role("button", name="中文").click()
        expect(page.locator("#state")).to_have_text("就绪")
        assert not failures


@in_browser
def test_key_is_asked_for(browser: Browser, runner, tokenizer):
    with (
        serve(lambda _: chat_model(runner, tokenizer), api_key="sesame", chat_page=True) as address,
        browser.new_context(locale="en-US") as context,
    ):
        page = context.new_page()
        page.goto(f"{ready(address)}/dashboard/")
        page.get_by_label("The server's key").fill("sesame")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#ask")).to_be_hidden()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dashboard_is_for_everybody(browser: Browser, url, axe, scheme):
    """On a phone too, with enough contrast, and by axe's rules."""
    with browser.new_context(
        color_scheme=scheme, viewport={"width": 390, "height": 780}
    ) as context:
        page = context.new_page()
        page.goto(f"{url}/dashboard/")
        ask(url)
        expect(page.locator("#firstToken")).to_contain_text("median")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(CONTRAST)[0][0] >= 4.5
        page.evaluate(axe)
        found = page.evaluate("axe.run()")["violations"]
        assert not [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]
