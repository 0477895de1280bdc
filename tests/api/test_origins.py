"""Pages of other sites, names that mean this machine for a moment, and whom that must not harm."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from starlette.datastructures import Headers

import api
from serving.origins import foreign_origin, unknown_host
from tests.api.test_security import asked, raw, status
from tests.chat_page.browsing import CHROMIUM, FLAGS, answers, ask, in_browser
from tests.conftest import chat_model, ready, serve

HERE = {"host": "127.0.0.1:6006"}
PROXY = {"host": "127.0.0.1:6006", "sec-fetch-site": "same-origin"}


@pytest.mark.parametrize(
    ("headers", "method", "is_foreign"),
    [
        ({}, "POST", False),  # programs send none
        (HERE, "POST", False),
        (HERE | {"origin": "http://127.0.0.1:6006"}, "POST", False),
        ({"host": "a.example", "origin": "http://A.example:80"}, "POST", False),
        ({"host": "a.example:443", "origin": "https://a.example"}, "POST", False),
        ({"host": "[::1]:7000", "origin": "http://[::1]:7000"}, "POST", False),
        # A proxy that changes the Host, and one that says which it was.
        (PROXY | {"origin": "https://chat.example.org"}, "POST", False),
        (PROXY | {"origin": "https://chat.example.org", "sec-fetch-site": "none"}, "POST", False),
        (HERE | {"origin": "http://a.example", "x-forwarded-host": "a.example"}, "POST", False),
        # A link, or a picture, of which the other page reads nothing.
        (HERE | {"sec-fetch-site": "cross-site"}, "GET", False),
        (HERE | {"sec-fetch-site": "cross-site"}, "HEAD", False),
        (HERE | {"sec-fetch-site": "cross-site"}, "POST", True),
        (HERE | {"sec-fetch-site": "same-site"}, "POST", True),
        (HERE | {"origin": "https://evil.example"}, "POST", True),
        (HERE | {"origin": "https://evil.example"}, "GET", True),
        (HERE | {"origin": "https://evil.example"}, "OPTIONS", True),
        (HERE | {"origin": "null"}, "POST", True),
        (HERE | {"origin": ""}, "POST", True),
        (HERE | {"origin": "http://127.0.0.1:3000"}, "POST", True),
        (HERE | {"origin": "http://127.0.0.1:6006.evil.example"}, "POST", True),
        (HERE | {"origin": "http://127.0.0.1"}, "POST", True),
        (HERE | {"origin": "http://127.0.0.1:6006", "sec-fetch-site": "cross-site"}, "POST", True),
        ({"host": "", "origin": "null"}, "POST", True),
        ({"host": "", "origin": "http://"}, "POST", True),
    ],
)
def test_foreign_origins(headers, method, is_foreign):
    assert bool(foreign_origin(Headers(headers), method, ())) == is_foreign
    assert not foreign_origin(Headers(headers), method, ("*",))


@pytest.mark.parametrize("site", ["cross-site", "same-site", None])
@pytest.mark.parametrize("origin", ["https://a.example", "https://A.example:443", "null"])
def test_named_origins(origin, site):
    settings = api.Settings(cors_origins="https://a.example/, NULL,http://b.example:80")
    headers = HERE | {"origin": origin} | ({"sec-fetch-site": site} if site else {})
    assert not foreign_origin(Headers(headers), "POST", settings.origins)
    headers["origin"] += "x"
    assert foreign_origin(Headers(headers), "POST", settings.origins)


KNOWN = [
    "", "127.0.0.1", "127.0.0.1:7000", "10.0.0.7:6006", "[::1]:6006", "[fe80::1%25eth0]:6006",
    "localhost", "LOCALHOST:1", "localhost.", "a.localhost", "chat", "gpu-1:6006", "box.local",
    "chat.default.svc.cluster.local:80", "x.internal", socket.gethostname(),
]  # fmt: skip
UNKNOWN = [
    "evil.example", "evil.example:6006", "EVIL.example.", "127.0.0.1.evil.example", "local.evil.io",
    "localhost.evil.example:80", "a@evil.example", "127.0.0.1.nip.io", "127.0.0.1@evil.example",
    "evil.example:", "1.2.3.4.5",
]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "is_unknown"), [*((x, False) for x in KNOWN), *((x, True) for x in UNKNOWN)]
)
def test_unknown_hosts(host, is_unknown):
    assert bool(unknown_host(Headers({"host": host}), ())) == is_unknown


@pytest.mark.parametrize(
    "named",
    [
        {"allowed_hosts": "Chat.Example.org, b.example"},
        {"allowed_hosts": "chat.example.org:443"},
        {"cors_origins": "https://chat.example.org:8443"},
        {"allowed_hosts": "*"},
        {"cors_origins": "*"},
    ],
)
def test_named_hosts(named):
    hosts = api.Settings(**named).hosts
    assert not unknown_host(Headers({"host": "chat.example.org:80"}), hosts)
    is_any = "*" in "".join(named.values())
    assert bool(unknown_host(Headers({"host": "a.chat.example.org"}), hosts)) != is_any


BODY = b'{"prompt": "hi"}'
LENGTH = f"Content-Length: {len(BODY)}\r\n"


@pytest.fixture(params=["", "/model"])
def keyless(request, runner, tokenizer) -> Iterator[str]:
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, root_path=request.param, chat_page=True) as url:
        yield ready(url)


@pytest.mark.parametrize(
    "target",
    ["POST /", "POST /v1/chat/completions", "POST /tokenize", "POST /chat/render", "GET /metrics",
     "GET /health", "GET /chat/", "GET /chat/config", "GET /docs", "OPTIONS /", "GET /none"],
)  # fmt: skip
def test_foreign_pages_get_nothing(keyless, target):
    for header in ("Origin: https://evil.example\r\n", "Origin: null\r\n"):
        answer = asked(keyless, target, header + LENGTH, BODY)
        assert status(answer) == 403
        assert b"--cors-origins" in answer
        assert b"x-request-id" in answer
    assert status(asked(keyless, target, LENGTH, BODY)) != 403
    line = f"{target} HTTP/1.1\r\nHost: evil.example:6006\r\nConnection: close\r\n{LENGTH}\r\n"
    answer = raw(keyless, line.encode() + BODY)
    assert status(answer) == 403
    assert b"--allowed-hosts" in answer


def test_foreign_page_computes_nothing(server, runner):
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain;charset=UTF-8"}
    answer = httpx.post(server, content=BODY, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden"
    assert not runner.prompts


def test_absolute_target_names_the_host(server):
    """A name in the target counts, and not the one in the header."""
    for host, known in (("evil.example", False), ("127.0.0.1:6006", True)):
        answer = asked(server, f"GET http://{host}/health")
        assert status(answer) == (200 if known else 403)


def test_with_a_key_any_name_will_do(runner, tokenizer):
    """Whoever has the key may call by any name; a foreign page may not, even with it."""
    with serve(lambda _: chat_model(runner, tokenizer), api_key="sesame") as url:
        headers = {"Host": "chat.example.org", "Authorization": "Bearer sesame"}
        assert httpx.post(ready(url), content=BODY, headers=headers).status_code == 200
        headers["Origin"] = "https://chat.example.org"  # behind nginx, as recipes.md has it
        assert httpx.post(url, content=BODY, headers=headers).status_code == 200
        headers["Origin"] = "https://evil.example"
        assert httpx.post(url, content=BODY, headers=headers).status_code == 403


def test_named_origin_is_served_and_may_read(runner, tokenizer):
    named = {"cors_origins": "https://a.example/"}
    with serve(lambda _: chat_model(runner, tokenizer), **named) as url:
        headers = {"Origin": "https://a.example", "Sec-Fetch-Site": "cross-site"}
        answer = httpx.post(ready(url), content=BODY, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        headers["Origin"] = "https://b.example"
        assert httpx.post(url, content=BODY, headers=headers).status_code == 403


# ---- In a browser


class Site(BaseHTTPRequestHandler):
    """Another site, whose one page is empty."""

    def do_GET(self) -> None:
        page = b"<!doctype html><title>another site</title>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def another_site() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield site.server_port
        site.shutdown()


@pytest.fixture(scope="module")
def misled() -> Iterator[Browser]:
    """A browser in which two names of others mean this machine, as a DNS server may tell it."""
    rules = "--host-resolver-rules=MAP page.test 127.0.0.1,MAP evil.test 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, rules])
        yield browser
        browser.close()


SEND = """async ([url, options]) => {
    try { const answer = await fetch(url, options); return [answer.status, await answer.text()] }
    catch (error) { return [0, String(error)] }
}"""
FORM = """url => new Promise(done => {
    const form = document.createElement('form'), field = document.createElement('input')
    const frame = document.createElement('iframe')
    Object.assign(form, {method: 'POST', action: url, enctype: 'text/plain', target: 'in'})
    Object.assign(field, {name: '{"prompt":"hi","system":"', value: '"}'})
    frame.name = 'in'
    document.body.append(frame, form)
    form.append(field)
    frame.onload = () => done(true)
    form.submit()
})"""
SIMPLE = {"method": "POST", "body": '{"prompt": "hi"}'}


@in_browser
@pytest.mark.parametrize("site", ["page.test", "localhost", "127.0.0.1"])
def test_page_of_another_site_computes_nothing(misled, server, runner, site):
    """Nor does one of another port of the same machine."""
    with another_site() as port, misled.new_context() as context:
        page = context.new_page()
        page.goto(f"http://{site}:{port}/")
        page.evaluate(SEND, [server, SIMPLE | {"mode": "no-cors"}])
        assert page.evaluate(SEND, [server, SIMPLE])[0] == 0
        page.evaluate(FORM, server)
    assert not runner.prompts
    assert 'outcome="forbidden"' in httpx.get(f"{server}/metrics").text


@in_browser
def test_name_that_means_this_machine_reads_nothing(misled, server, runner):
    port = server.rpartition(":")[2]
    with misled.new_context() as context:
        page = context.new_page()
        assert page.goto(f"http://evil.test:{port}/health").status == 403
        assert page.evaluate(SEND, ["/", SIMPLE])[0] == 403
        code, text = page.evaluate(SEND, ["/metrics", {}])
        assert code == 403
        assert "chat_requests" not in text
    assert not runner.prompts


@in_browser
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_page_itself_is_answered(misled, runner, tokenizer, host):
    """By a link from another site, too."""
    load = lambda _: chat_model(runner, tokenizer, 2048)  # noqa: E731
    with serve(load, chat_page=True) as url, another_site() as site:
        address = re.sub("127.0.0.1", host, ready(url))
        with misled.new_context(locale="en-US") as context:
            page = context.new_page()
            page.goto(f"http://page.test:{site}/")
            page.evaluate("url => { location.href = url }", f"{address}/chat/")
            expect(page.get_by_label("Write a message")).to_be_focused()
            ask(page, "hi")
            expect(answers(page).first).to_contain_text("hello")


@in_browser
def test_named_page_is_answered(misled, runner, tokenizer):
    with another_site() as port:
        named = {"cors_origins": f"http://page.test:{port}"}
        with serve(lambda _: chat_model(runner, tokenizer), **named) as url:
            ready(url)
            with misled.new_context() as context:
                page = context.new_page()
                page.goto(f"http://page.test:{port}/")
                code, text = page.evaluate(SEND, [url, SIMPLE])
            assert code == 200, text
            assert "hello" in text
