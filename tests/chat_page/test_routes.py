"""Where the page stands, what is closed, and how it is served behind a proxy."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from playwright.sync_api import expect

import api
import chat_page
from engine import ChatModel
from tests.chat_page.browsing import ask, bodies, in_browser, opened
from tests.conftest import ROOT, chat_model, ready, serve

PATHS = [path.removeprefix("/chat/") for path in chat_page.FILES]


def test_browser_is_sent_to_the_page(url):
    sent = httpx.get(url)
    assert (sent.status_code, sent.headers["location"]) == (307, "chat/")
    assert httpx.get(f"{url}/chat", follow_redirects=True).status_code == 200


@pytest.mark.slow
def test_files_have_a_strict_policy_and_are_sent_once(url):
    for path in PATHS:
        elsewhere = httpx.get(f"{url}/chat/{path}", headers={"Origin": "https://elsewhere.example"})
        assert elsewhere.status_code == 403
        page = httpx.get(f"{url}/chat/{path}")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not [name for name in page.headers if name.startswith("access-control")]
        again = {"If-None-Match": page.headers["etag"]}
        assert httpx.get(f"{url}/chat/{path}", headers=again).status_code == 304
        assert httpx.head(f"{url}/chat/{path}").status_code == 200
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert not [path for path in paths if path.startswith("/chat")]


def test_page_is_small():
    """A subject that grows out of its file gets one of its own."""
    sizes = [(ROOT / "chat_page" / name).stat().st_size for name, _ in chat_page.FILES.values()]
    assert max(sizes) <= 32_000
    assert sum(sizes) <= 100_000


# What the document itself asks for; the script asks for the rest when it runs.
OF_THE_DOCUMENT = """() => {
    const all = ["navigation", "resource"].flatMap((type) => performance.getEntriesByType(type));
    return all.filter((entry) => entry.initiatorType !== "fetch").map((entry) => entry.name);
}"""


@in_browser
def test_first_paint_takes_few_requests_and_none_elsewhere(browser, url):
    with browser.new_context() as context:
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.goto(f"{url}/chat/")
        expect(page.locator("#model")).to_have_text("test")
        assert {address.removeprefix(url) for address in asked} <= {
            *chat_page.FILES, "/chat/config", "/health",
        }  # fmt: skip
        early = page.evaluate(OF_THE_DOCUMENT)
    # No script waits until another is read that names it.
    scripts = {f"{url}/chat/{name}" for name in chat_page.SCRIPTS}
    assert scripts <= set(early)
    assert len(early) <= len(scripts) + 3
    html = (ROOT / "chat_page" / "index.html").read_text(encoding="utf-8")
    assert all(f'"{name}"' in html for name in chat_page.SCRIPTS)


def test_key_guards_all_but_the_files(runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, api_key="sesame", chat_page=True) as url:
        ready(url)
        for path in PATHS:
            assert httpx.get(f"{url}/chat/{path}").status_code == 200
            assert httpx.post(f"{url}/chat/{path}").status_code == 401
        assert httpx.get(f"{url}/chat").status_code == 307
        for path in ("config", "render", "x", "__init__.py", "../metrics", "%2e%2e/metrics"):
            assert httpx.get(f"{url}/chat/{path}").status_code == 401, path
        assert httpx.post(f"{url}/chat/render", json={"text": "x"}).status_code == 401
        key = {"Authorization": "Bearer sesame"}
        config = httpx.get(f"{url}/chat/config", headers=key).json()
        assert (config["model"], config["defaults"]["top_k"]) == ("test", 50)
        assert config["defaults"]["max_new_tokens"] is None  # a chat's answer has the whole context


def test_no_file_is_read_but_the_page_s_own(url):
    for path in (
        "__init__.py",
        "markdown.py",
        "../api.py",
        "%2e%2e/api.py",
        "/etc/passwd",
        "..%2fapi.py",
        "assets/" + 256 * "x",  # longer than a file's name may be
        "gradio_api/cancel",
    ):
        answer = raw(url, f"GET /chat/{path} HTTP/1.1")
        assert re.match(r"HTTP/1.1 404 ", answer), (path, answer[:200])


def raw(url: str, line: str) -> str:
    """What the server answers to this request line, which httpx would tidy."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{line}\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode(errors="replace")


def test_without_the_page_a_browser_is_sent_to_the_docs(runner, tokenizer):
    with serve(lambda _: chat_model(runner, tokenizer), chat_page=False) as url:
        assert "swagger" in httpx.get(url, follow_redirects=True).text
        for path in ("", "chat.js", "config"):
            assert httpx.get(f"{url}/chat/{path}").status_code == 404
        assert httpx.post(f"{url}/chat/render", json={"text": "x"}).status_code == 404
    assert api.read_settings(["--no-chat-page"]).chat_page is False


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
                for name in ("content-type", "location", "content-security-policy"):
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


@pytest.mark.slow
@in_browser
def test_page_works_behind_a_prefix(browser, runner, tokenizer):
    runner.say = "*hello*"
    load: Callable[..., ChatModel] = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with (
        serve(load, chat_page=True, root_path="/model/a") as url,
        proxy(ready(url), "/model/a") as outside,
        opened(browser, f"{outside}/") as page,
    ):
        assert page.url == f"{outside}/chat/"
        ask(page, "hi")
        expect(bodies(page).locator("em")).to_have_text("hello")
        page.goto(f"{outside}/chat")
        expect(bodies(page).locator("em")).to_have_text("hello")
        assert page.url.startswith(f"{outside}/chat/#")
        assert httpx.post(f"{outside}/", json={"prompt": "hi"}).json()["response"] == "*hello*"


@in_browser
def test_open_page_does_not_hold_up_the_exit(browser, runner, tokenizer):
    """`serve` fails by itself if the server does not end."""
    with browser.new_context() as context:
        page = context.new_page()
        with serve(lambda _: chat_model(runner, tokenizer), chat_page=True) as url:
            page.goto(f"{ready(url)}/chat/")
            ask(page, "hi")
            expect(bodies(page)).to_have_text("hello")
