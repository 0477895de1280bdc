"""What goes wrong, and what the page says and offers then."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest
from playwright.sync_api import expect

import api
from engine import ChatModel
from tests.chat_page.browsing import (
    answers,
    ask,
    begin_answer,
    bodies,
    enter_key,
    expect_answered,
    in_browser,
    listed,
    opened,
    set_field,
    text_of,
    trouble,
)
from tests.conftest import PATIENCE, chat_model, ready, serve, wait_for


@contextmanager
def still_loading(runner, tokenizer) -> Iterator[tuple[str, threading.Event]]:
    """A server whose model is loaded once the event is set."""
    loaded = threading.Event()

    def load(_: api.Settings) -> ChatModel:
        loaded.wait(PATIENCE)
        return chat_model(runner, tokenizer)

    with serve(load, chat_page=True) as url:
        yield url, loaded


@in_browser
def test_question_asked_while_the_model_loads_is_answered_then(browser, runner, tokenizer):
    with still_loading(runner, tokenizer) as (url, loaded), opened(browser, url) as page:
        expect(page.get_by_text("The model is loading.")).to_be_visible()
        ask(page, "too early")
        expect(page.locator("article.question")).to_contain_text("too early")
        expect(page.get_by_text("The model is loading.")).to_be_visible()
        loaded.set()
        expect(bodies(page)).to_have_text("hello")
        expect(page.get_by_text("The model is loading.")).to_have_count(0)
        expect(page.locator("#model")).to_have_text("test")


@in_browser
def test_question_that_was_left_while_the_model_loads_is_answered_later(browser, runner, tokenizer):
    with still_loading(runner, tokenizer) as (url, loaded), opened(browser, url) as page:
        ask(page, "too early")
        expect(page.get_by_text("The model is loading.")).to_be_visible()
        page.get_by_role("button", name="New chat").click()
        loaded.set()
        expect(page.locator("#model")).to_have_text("test")
        listed(page).filter(has_text="too early").click()
        expect(bodies(page)).to_have_text("hello")


@in_browser
def test_failures_are_said_in_the_language_of_the_page(browser, url, runner):
    with opened(browser, url, locale="zh-CN") as page:
        runner.failure = RuntimeError("a secret")
        page.locator("#message").fill("x")
        page.keyboard.press("Enter")
        expect(trouble(page)).to_contain_text("模型处理这个请求时出错，请重试。")
        runner.failure = None


@in_browser
def test_refusals_and_failures_are_said_in_their_place(browser, url, runner):
    with opened(browser, url) as page:
        set_field(page, "Temperature", "3")
        ask(page, "too hot")
        expect(trouble(page)).to_contain_text("temperature must be less than")
        set_field(page, "Temperature", "")
        runner.failure = RuntimeError("a secret")
        trouble(page).get_by_text("Retry").click()
        expect(trouble(page)).to_contain_text("the model failed")
        expect(page.get_by_text("a secret")).to_have_count(0)
        runner.failure = None
        trouble(page).get_by_text("Retry").click()
        expect(bodies(page)).to_have_text("hello")
        expect(trouble(page)).to_be_empty()
        assert text_of(runner, -1) == "<|user|>too hot<|end|><|assistant|>"


@in_browser
def test_regenerating_in_vain_keeps_the_old_answer(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "hi")
        expect_answered(page)
        runner.failure = RuntimeError("a secret")
        answers(page).get_by_text("Regenerate").click()
        expect(trouble(page)).to_contain_text("the model failed")
        expect(bodies(page)).to_have_text("hello")
        runner.failure, runner.say = None, "better"
        trouble(page).get_by_text("Retry").click()
        expect(bodies(page)).to_have_text("better")


@in_browser
def test_blank_message_is_not_sent_and_a_broken_one_is_refused(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "  ")
        page.evaluate("document.getElementById('message').value = 'a\\ud800b'")
        page.locator("#message").press("Enter")
        expect(trouble(page)).to_contain_text("surrogate")
        ask(page, "hi")
        expect(bodies(page)).to_have_text("hello")
    assert [text_of(runner, 0)] == ["<|user|>hi<|end|><|assistant|>"]
    assert len(runner.prompts) == 1


@pytest.mark.slow
@in_browser
def test_full_context_offers_to_leave_out_the_oldest_turns(browser, url, runner):
    runner.say = "much " * 120
    with opened(browser, url) as page:
        for turn in range(3):
            ask(page, f"question {turn}")
            expect_answered(page, turn + 1)
        ask(page, "x" * 300)
        expect(trouble(page)).to_contain_text("no longer fits into the model's context")
        runner.say = "short"
        trouble(page).get_by_role("button", name=re.compile(r"oldest turns \(\d\)")).click()
        expect(bodies(page).last).to_have_text("short")
        expect(page.get_by_text(re.compile(r"no longer sees the \d turns above"))).to_be_visible()
        assert "question 0" not in text_of(runner, -1)
        ask(page, "y" * 2100)
        expect(trouble(page)).to_contain_text("context")


@in_browser
def test_busy_server_is_asked_again_when_its_seconds_are_over(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer, max_batch=1, max_waiting=1)  # noqa: E731
    runner.hold()
    with serve(load, chat_page=True) as url, opened(browser, ready(url)) as page:
        page.clock.install()
        others = [threading.Thread(target=post, args=(url,)) for _ in range(2)]
        for other, state in zip(others, ("running", "waiting"), strict=True):
            other.start()
            wait_for(lambda state=state: httpx.get(f"{url}/health").json()[state] == 1)
        ask(page, "me too")
        expect(trouble(page)).to_contain_text(re.compile(r"busy; trying again in \d+ s"))
        seconds = int(re.search(r"\d+", trouble(page).inner_text())[0])
        runner.free()
        for other in others:
            other.join()
        page.clock.run_for(seconds * 1000)
        expect(bodies(page)).to_have_text("hello")


def post(url: str) -> None:
    httpx.post(url, json={"prompt": "hi"})


class Cable:
    """A TCP relay to the server that can be cut and mended, so that the server seems to go."""

    def __init__(self, target: str):
        self.target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self.port = 0
        self.mend()

    def mend(self) -> None:
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, args=(self.listener,))
        self.thread.start()

    def cut(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()
        for end in self.sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.target)
                self.sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cable(url: str) -> Iterator[Cable]:
    line = Cable(url)
    try:
        yield line
    finally:
        line.cut()


@in_browser
def test_server_that_goes_and_comes_back_costs_a_retry(browser, url, runner):
    with cable(url) as line, opened(browser, f"http://127.0.0.1:{line.port}") as page:
        ask(page, "first")
        expect_answered(page)
        line.cut()
        ask(page, "second")
        expect(trouble(page)).to_contain_text("Cannot reach the server.")
        expect(page.locator("#message")).to_be_enabled()
        line.mend()
        expect(trouble(page)).to_contain_text("This question has no answer yet.")
        trouble(page).get_by_text("Retry").click()
        expect_answered(page, 2)
    assert "first<|end|><|assistant|>hello<|end|><|user|>second" in text_of(runner, 1)


@in_browser
def test_stream_that_breaks_is_kept_and_marked(browser, url, runner):
    runner.say = "one two three"
    runner.hold()
    with cable(url) as line, opened(browser, f"http://127.0.0.1:{line.port}") as page:
        begin_answer(page, runner)
        line.cut()
        expect(answers(page).get_by_text("Connection lost")).to_be_visible()
        expect(bodies(page)).to_have_text("one")
        line.mend()
        runner.free()
        runner.say = " and more"
        expect(trouble(page)).to_be_empty()
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("one and more")


@pytest.mark.slow
@in_browser
def test_key_is_asked_for_and_kept_for_the_session(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with (
        serve(load, api_key="key-1, 钥匙", chat_page=True) as url,
        opened(browser, ready(url)) as page,
    ):
        enter_key(page, "wrong")
        expect(trouble(page)).to_contain_text("Invalid API key.")
        enter_key(page, "钥匙")
        expect(page.locator("#model")).to_have_text("test")
        expect(trouble(page)).to_be_empty()
        ask(page, "*hi*")
        expect(bodies(page).locator("p")).to_have_text("hello")
        page.reload()
        expect(page.locator("#model")).to_have_text("test")
        assert "钥匙" not in page.evaluate("JSON.stringify(localStorage)")
        other = page.context.new_page()
        other.goto(f"{url}/chat/")
        other.get_by_label("Remember it in this browser").check()
        enter_key(other, "key-1")
        expect(other.locator("#model")).to_have_text("test")
        third = page.context.new_page()
        third.goto(f"{url}/chat/")
        expect(third.locator("#model")).to_have_text("test")


@in_browser
def test_key_that_expires_is_asked_for_beside_the_question(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, api_key="sesame", chat_page=True) as url, opened(browser, ready(url)) as page:
        ask(page, "hi")
        enter_key(page, "sesame")
        expect(bodies(page)).to_have_text("hello")
