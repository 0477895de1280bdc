"""The chat page, in a real browser: what a person sees, and what the page may not do."""

import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from conftest import ROOT, chat_model, ready, serve, wait_for
from playwright.sync_api import Browser, Page, expect, sync_playwright

import api
from engine.model import ChatModel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

expect.set_options(timeout=15_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def url(runner, tokenizer) -> Iterator[str]:
    with serve(lambda _: chat_model(runner, tokenizer, 2048), chat_page=True) as address:
        yield ready(address)


@contextmanager
def opened(browser: Browser, url: str, locale: str = "en-US") -> Iterator[Page]:
    """The page as a new person sees it, once it can be written in."""
    with browser.new_context(locale=locale) as context:
        page = context.new_page()
        page.goto(url)
        expect(page.get_by_test_id("textbox").first).to_be_visible()
        yield page


def ask(page: Page, text: str) -> None:
    page.get_by_test_id("textbox").first.fill(text)
    page.get_by_test_id("textbox").first.press("Enter")


def answers(page: Page):
    return page.get_by_test_id("bot")


def saved(page: Page) -> str | None:
    """The browser's conversations, as it keeps them."""
    return page.evaluate("localStorage.getItem('chat-api')")


def running(url: str) -> int:
    return httpx.get(f"{url}/health").json()["running"]


def text_of(runner, index: int) -> str:
    return runner.tokenizer.decode(runner.prompts[index])


# ---- What a person does


@in_browser
def test_an_answer_is_seen_while_it_comes(browser, url, runner, monkeypatch):
    monkeypatch.setattr(api, "UPDATE_INTERVAL", 0)
    runner.say = "one two three"
    runner.hold()
    with opened(browser, f"{url}/chat/") as page:
        expect(page.get_by_text("chat-api · test")).to_be_visible()
        ask(page, "count")
        runner.permits.release(3)
        expect(answers(page)).to_have_text("one")
        runner.free()
        expect(answers(page)).to_have_text("one two three")
        wait_for(lambda: not running(url))
        expect(page.get_by_placeholder("Write a message")).to_be_visible()


@in_browser
def test_the_second_turn_knows_the_first_and_a_reload_keeps_both(browser, url, runner):
    with opened(browser, f"{url}/chat/") as page:
        kept = saved(page)
        ask(page, "first question")
        expect(answers(page)).to_have_text("hello")
        wait_for(lambda: saved(page) != kept)
        kept = saved(page)
        ask(page, "second question")
        expect(answers(page)).to_have_count(2)
        wait_for(lambda: saved(page) != kept)
        assert text_of(runner, 1) == (
            "<|user|>first question<|end|><|assistant|>hello<|end|>"
            "<|user|>second question<|end|><|assistant|>"
        )
        page.reload()
        expect(answers(page)).to_have_count(2)
        ask(page, "third question")
        expect(answers(page)).to_have_count(3)
        assert text_of(runner, 2).startswith(text_of(runner, 1) + "hello")


@in_browser
def test_stop_frees_the_engine_and_the_conversation_goes_on(browser, url, runner):
    runner.say, runner.pause = "word " * 300, 0.02
    with opened(browser, f"{url}/chat/") as page:
        ask(page, "go on for long")
        expect(answers(page)).to_contain_text("word word")
        assert running(url) == 1
        page.locator(".stop-button").click()
        wait_for(lambda: running(url) == 0, 2)
        runner.say = "short"
        ask(page, "again")
        expect(answers(page).last).to_have_text("short")
        assert "go on for long<|end|><|assistant|>word word" in text_of(runner, 1)


@in_browser
def test_a_closed_tab_frees_the_engine(browser, url, runner):
    runner.say, runner.pause = "word " * 300, 0.02
    with opened(browser, f"{url}/chat/") as page:
        ask(page, "go on for long")
        wait_for(lambda: running(url) == 1)
        page.close()
        wait_for(lambda: running(url) == 0, 2)


@in_browser
def test_four_people_are_served_at_once(browser, url, runner):
    runner.say, runner.pause = "word " * 300, 0.02
    with opened(browser, f"{url}/chat/") as first:
        people = [first, *(first.context.new_page() for _ in range(3))]
        for page in people[1:]:
            page.goto(f"{url}/chat/")
        for page in people:
            ask(page, "talk")
        for page in people:
            expect(answers(page)).to_contain_text("word word")
        assert running(url) == 4


@in_browser
def test_settings_begin_with_the_model_s_and_are_used_zero_included(browser, url, runner):
    with opened(browser, f"{url}/chat/") as page:
        page.get_by_text("Settings").click()
        expect(page.get_by_label("Max new tokens")).to_have_value("1024")
        ask(page, "as it is")
        expect(answers(page)).to_have_count(1)
        page.get_by_label("System prompt").fill("be brief")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Top-k").fill("")
        page.get_by_label("Seed").fill("0")
        ask(page, "as I like it")
        expect(answers(page)).to_have_count(2)
    plain, chosen = runner.samplings
    assert (plain.temperature, plain.seed) == (0.8, None)
    assert (chosen.temperature, chosen.seed, chosen.top_k) == (0, 0, 50)
    assert text_of(runner, 1).startswith("<|system|>be brief<|end|><|user|>as it is")


@in_browser
@pytest.mark.parametrize(
    ("locale", "words"), [("en-US", ["New chat", "Settings"]), ("zh-CN", ["新对话", "设置"])]
)
def test_the_page_speaks_the_browser_s_language(browser, url, locale, words):
    with opened(browser, f"{url}/chat/", locale) as page:
        for word in words:
            expect(page.get_by_text(word, exact=True)).to_be_visible()


@in_browser
def test_what_is_asked_on_the_page_is_logged_where_that_is_wanted(
    browser, runner, tokenizer, caplog
):
    caplog.set_level(logging.INFO)
    load = lambda _: chat_model(runner, tokenizer, 2048)  # noqa: E731
    with (
        serve(load, chat_page=True, log_prompts=True) as url,
        opened(browser, f"{ready(url)}/chat/") as page,
    ):
        ask(page, "a secret")
        expect(answers(page)).to_have_text("hello")
    (line,) = (r.getMessage() for r in caplog.records if "a secret" in r.getMessage())
    assert re.match(r"request_id=[0-9a-f]{32} asked=\{'prompt': 'a secret'", line)


@in_browser
def test_what_does_not_fit_is_dropped_and_said(browser, url, runner):
    runner.say = "much " * 120
    with opened(browser, f"{url}/chat/") as page:
        for turn in range(3):
            ask(page, f"question {turn}")
            expect(answers(page)).to_have_count(turn + 1)
            expect(page.get_by_role("button", name="Retry")).to_be_visible()
        expect(page.get_by_text("The oldest turns no longer fit")).to_be_visible()
    assert "question 0" not in text_of(runner, 2)


# ---- What goes wrong


@in_browser
def test_what_is_wrong_is_said_in_the_conversation(browser, runner, tokenizer):
    loaded = threading.Event()

    def load(_: api.Settings) -> ChatModel:
        loaded.wait(20)
        return chat_model(runner, tokenizer)

    with serve(load, chat_page=True) as url, opened(browser, f"{url}/chat/") as page:
        ask(page, "too early")
        expect(page.get_by_text("the model is still loading")).to_be_visible()
        loaded.set()
        expect(page.get_by_text("chat-api · test")).to_be_visible()
        page.get_by_text("Settings").click()
        expect(page.get_by_label("Top-k")).to_have_value("50")
        ask(page, "x" * 600)
        expect(page.get_by_text("the prompt has 6")).to_be_visible()
        page.get_by_label("Temperature").fill("3")
        ask(page, "too hot")
        expect(page.get_by_text("temperature must be less than")).to_be_visible()
        page.get_by_label("Temperature").fill("1")
        runner.failure = RuntimeError("a secret")
        ask(page, "break")
        expect(page.get_by_text("the model failed", exact=False)).to_be_visible()
        expect(page.get_by_text("a secret")).to_have_count(0)
        runner.failure = None
        ask(page, "good")
        expect(page.get_by_text("hello")).to_be_visible()
        assert text_of(runner, -1) == "<|user|>good<|end|><|assistant|>"
        told = httpx.get(f"{url}/metrics").text
    for outcome in ("context_length_exceeded", "step_failed"):
        assert re.search(rf'requests_total{{.*outcome="{outcome}",route="/chat"}} 1', told), told


@in_browser
def test_a_blank_message_is_not_sent_and_a_broken_one_is_refused(browser, url, runner):
    with opened(browser, f"{url}/chat/") as page:
        with page.expect_response("**/queue/join*") as refused:
            ask(page, "  ")
        assert refused.value.status == 422
        page.evaluate(
            """() => {
                const box = document.querySelector('textarea');
                const proto = HTMLTextAreaElement.prototype;
                Object.getOwnPropertyDescriptor(proto, 'value').set.call(box, 'a\\ud800b');
                box.dispatchEvent(new Event('input', {bubbles: true}));
            }"""
        )
        page.get_by_test_id("textbox").first.press("Enter")
        expect(page.get_by_text("unpaired surrogate")).to_be_visible()
        ask(page, "hi")
        expect(answers(page)).to_have_text("hello")
    assert len(runner.prompts) == 1


# ---- What is shown

RICH = r"""<think>hm</think> a <div>box</div> and <s>this</s> <script>document.title = "x"</script>

Inline $a<b$, \(x^2\), and

$$\int_0^1 x\,dx = \frac12$$

```python
print("<b>" + "&lt;")
```

![pixel](OTHER/pixel.png)
"""


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """Another host, and what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever).start()
    try:
        yield f"http://localhost:{other.server_port}", asked
    finally:
        other.shutdown()
        other.server_close()


@in_browser
def test_text_code_and_formulas_are_shown_and_no_other_host_is_asked(browser, url, runner):
    with listener() as (other, asked), browser.new_context() as context:
        runner.say = RICH.replace("OTHER", other)
        requests, failed = [], []
        context.on("request", lambda request: requests.append(request.url))
        context.on("requestfailed", lambda request: failed.append(request.url))
        page = context.new_page()
        page.goto(f"{url}/chat/")
        ask(page, "<b>bold</b><script>document.title = 'x'</script><img src=x onerror=alert(1)>")
        expect(page.get_by_role("button", name="Retry")).to_be_visible()
        bubble = answers(page).first
        expect(bubble).to_contain_text(
            "<think>hm</think> a <div>box</div> and <s>this</s> <script>"
        )
        expect(bubble.locator(".katex")).to_have_count(3)
        expect(bubble.locator("code.language-python .token").first).to_be_visible()
        expect(bubble.locator("pre")).to_contain_text('print("<b>" + "&lt;")')
        assert page.title() == "chat-api"
        ask(page, "more")
        expect(answers(page)).to_have_count(2)
        wait_for(lambda: len(runner.prompts) == 2)
    assert runner.say.strip() in text_of(runner, 1)
    assert not asked
    elsewhere = {address for address in requests if not re.match(rf"{url}/|data:|blob:", address)}
    assert elsewhere <= {f"{other}/pixel.png"}
    assert elsewhere <= set(failed)


def test_tags_are_readable_and_come_back_as_they_were():
    text = "<s> `<s>` $a<b$ a<b 1 < 2 ```\n<s>\n``` <!-- </x>"
    shown = api.escape_tags(text)
    assert shown == "&#60;s> `<s>` $a<b$ a&#60;b 1 < 2 ```\n<s>\n``` &#60;!-- &#60;/x>"
    parts = [{"type": "text", "text": shown}]
    history = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    assert [turn["content"] for turn in api.messages_from_gradio(history)] == [text, text]


def test_what_only_looks_like_formulas_is_not_searched_to_the_end_each_time():
    """That would take the square of a text's length, on the event loop: a formula has an end."""
    long = "x" * 2000
    assert api.escape_tags(rf"\({long}<s>\)") == rf"\({long}&#60;s>\)"
    assert api.escape_tags(r"\( \[ $$<s>" * 10_000 + "<s>").endswith("&#60;s>")


# ---- What is closed

CLOSED = [
    "config", "info", "gradio_api/info", "gradio_api/openapi.json", "gradio_api/startup-events",
    "gradio_api/file=/etc/passwd", f"gradio_api/file={ROOT}/api.py", "gradio_api/file=api.py",
    "gradio_api/file/etc/passwd", "file=/etc/passwd", "gradio_api/proxy=http://127.0.0.1/",
    "gradio_api/upload", "gradio_api/component_server", "gradio_api/user", "gradio_api/token",
    "gradio_api/app_id", "gradio_api/login_check", "gradio_api/runs", "gradio_api/vibe-code",
    "gradio_api/stream/a/b/c/playlist.m3u8", "gradio_api/call/answer", "gradio_api/queue/status",
    "gradio_api/custom_component/a/client/component/index.js", "monitoring", "monitoring/summary",
    "svelte/x.js", "logout", "docs", "openapi.json", "manifest.json", "pwa_icon",
    "gradio_api/run/answer", "gradio_api/deep_link", "gradio_api/upload_progress", "robots.txt",
]  # fmt: skip
INSIDE = ["gradio_api/run/predict", "gradio_api/queue/join", "gradio_api/queue/data?session_hash=a"]
TRAVERSALS = ["assets/../../../routes.py", "static/%2e%2e/%2e%2e/index.html", "assets//etc/passwd"]


def test_gradio_s_other_routes_are_closed_and_no_file_is_read(url):
    for path in [*CLOSED, *TRAVERSALS]:
        for method in ("GET", "POST"):
            # Written out, as httpx would tidy the path.
            answer = raw(url, f"{method} /chat/{path} HTTP/1.1")
            assert re.match(r"HTTP/1.1 40[345] ", answer), (method, path, answer[:200])
            assert "root:" not in answer
            assert "import " not in answer


def raw(url: str, line: str) -> str:
    """What the server answers to this request line."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{line}\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode(errors="replace")


def test_another_site_cannot_read_and_the_docs_name_only_our_routes(url):
    page = httpx.get(f"{url}/chat/", headers={"Origin": "https://elsewhere.example"})
    assert page.status_code == 200
    assert not [name for name in page.headers if name.startswith("access-control")]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-accel-buffering"] == "no", "or nginx keeps an answer until its end"
    assert not [
        path
        for path in httpx.get(f"{url}/openapi.json").json()["paths"]
        if path.startswith("/chat")
    ]


@in_browser
def test_a_key_is_asked_for_and_every_route_behind_it_refuses(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, api_key="key-1, schlüssel", chat_page=True) as url:
        ready(url)
        for path in INSIDE:
            assert httpx.get(f"{url}/chat/{path}").status_code in (401, 404, 405), path
            assert httpx.post(f"{url}/chat/{path}", json={}).status_code in (401, 404, 405), path
        front = httpx.get(f"{url}/chat/").text
        assert '"auth_required":true' in front
        assert "temperature" not in front
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(f"{url}/chat/")
            expect(page.get_by_text("the password is the server's key")).to_be_visible()
            page.get_by_label("username").fill("anyone")
            page.get_by_label("password").fill("key")
            page.get_by_role("button", name="Login").click()
            expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
            page.get_by_label("username").fill("anyone")
            page.get_by_label("password").fill("schlüssel")
            page.get_by_role("button", name="Login").click()
            expect(page.get_by_text("New chat")).to_be_visible()
            ask(page, "hi")
            expect(answers(page)).to_have_text("hello")


# ---- Where it stands


def test_a_browser_is_sent_to_the_page(url):
    sent = httpx.get(url)
    assert (sent.status_code, sent.headers["location"]) == (307, "chat/")
    assert httpx.get(f"{url}/chat", follow_redirects=True).status_code == 200


def test_without_the_page_a_browser_is_sent_to_the_docs(runner, tokenizer):
    with serve(lambda _: chat_model(runner, tokenizer), chat_page=False) as url:
        assert "swagger" in httpx.get(url, follow_redirects=True).text
        assert httpx.get(f"{url}/chat/").status_code == 404
    assert api.read_settings(["--no-chat-page"]).chat_page is False


def test_without_gradio_only_the_page_is_missing(monkeypatch, runner, tokenizer, caplog):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with serve(lambda _: chat_model(runner, tokenizer), chat_page=True) as url:
        assert httpx.get(f"{url}/chat/").status_code == 404
        assert httpx.post(ready(url), json={"prompt": "hi"}).json()["response"] == "hello"
    assert "there is no chat page" in caplog.text


@contextmanager
def proxy(target: str, prefix: str) -> Iterator[str]:
    """A reverse proxy that takes the prefix off, as nginx does; nothing else passes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                return self.send_error(404)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            address = target + self.path.removeprefix(prefix)
            headers = {**self.headers, "Accept-Encoding": "identity"}
            with httpx.stream(self.command, address, headers=headers, content=body) as answer:
                self.send_response(answer.status_code)
                for name in ("content-type", "location", "set-cookie"):
                    if name in answer.headers:
                        self.send_header(name, answer.headers[name])
                self.end_headers()
                for piece in answer.iter_raw():
                    self.wfile.write(piece)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()


@in_browser
def test_the_page_works_behind_a_prefix(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with (
        serve(load, chat_page=True, root_path="/model/a") as url,
        proxy(ready(url), "/model/a") as outside,
        opened(browser, f"{outside}/") as page,
    ):
        assert page.url == f"{outside}/chat/"
        ask(page, "hi")
        expect(answers(page)).to_have_text("hello")
        assert httpx.post(f"{outside}/", json={"prompt": "hi"}).json()["response"] == "hello"
        assert "/model/a/openapi.json" in httpx.get(f"{outside}/docs").text


@in_browser
def test_an_open_page_does_not_hold_up_the_exit(browser, runner, tokenizer):
    """`serve` fails by itself if the server does not end."""
    with browser.new_context() as context:
        page = context.new_page()
        with serve(lambda _: chat_model(runner, tokenizer), chat_page=True) as url:
            page.goto(f"{ready(url)}/chat/")
            ask(page, "hi")
            expect(answers(page)).to_have_text("hello")


def test_building_the_page_asks_no_other_host():
    code = """
import socket
def refuse(*a): raise SystemExit(f"{a} was asked for")
socket.getaddrinfo = socket.socket.connect = refuse
import threading, api
api.build_app(api.Settings())
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon: thread.join()
import sys; print("gradio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr + done.stdout
    assert "was asked for" not in done.stderr
