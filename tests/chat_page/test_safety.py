"""What a model, or who wrote a title, cannot do to the page."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from playwright.sync_api import expect

from chat_page import markdown
from tests.chat_page.browsing import (
    answers,
    ask,
    bodies,
    expect_answered,
    in_browser,
    listed,
    opened,
    text_of,
)
from tests.conftest import ROOT

HIT = "fetch('OTHER/hit');document.title='hit';window.hit=1"


# Ways to make a browser run HIT or ask OTHER, in HTML and in Markdown.
VECTORS = json.loads((ROOT / "tests" / "chat_page" / "xss.json").read_text(encoding="utf-8"))


class Elements(HTMLParser):
    """Fails at the first element or attribute that is not plain text's."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in markdown.TEXT_TAGS | markdown.MATH_TAGS, tag
        for name, value in attributes:
            known = markdown.ATTRIBUTES.get(tag, set()) | {"rel"}
            assert name in known, (tag, name)
            if name == "href":
                assert re.match(r"https?:|mailto:|[^:]*([/?#]|$)", value or "", re.IGNORECASE), (
                    value
                )

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def test_corpus_is_large_and_varied():
    assert len(set(VECTORS)) == len(VECTORS) >= 200


@pytest.mark.slow
def test_renderer_gives_only_text_s_elements_and_safe_links(url):
    with httpx.Client(base_url=url) as client:
        for vector in VECTORS:
            text = vector.replace("HIT", HIT)
            html = client.post("/chat/render", json={"text": text}).json()["html"]
            parser = Elements()
            parser.feed(html)
            parser.close()


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """Another host, and what it was asked for."""
    asked: list[str] = []

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
def test_nothing_of_an_answer_or_a_title_runs_or_loads(browser, url, runner):
    with listener() as (other, asked), opened(browser, url) as page:
        elsewhere, said = [], []
        page.on("request", lambda r: r.url.startswith((url, "blob:")) or elsewhere.append(r.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        vectors = [vector.replace("HIT", HIT).replace("OTHER", other) for vector in VECTORS]
        # As saved conversations: each vector is a title, a question and an answer.
        page.evaluate(
            """(vectors) => vectors.forEach((text, i) => {
                const messages = ['user', 'assistant'].map((role) => ({role, content: text}));
                const stamps = {created: i, updated: i, skipped: 0};
                const value = JSON.stringify({id: `x${i}`, title: text, ...stamps, messages});
                localStorage.setItem(`chat-api:/chat/:conversation:x${i}`, value);
            })""",
            vectors[:-1],
        )
        runner.say = vectors[-1]
        page.reload()
        expect(listed(page)).to_have_count(len(vectors) - 1)
        # All in one conversation, so that all are rendered and shown at once.
        page.evaluate(
            """(vectors) => {
                const messages = vectors.flatMap((content) => [
                    {role: 'user', content: 'x'}, {role: 'assistant', content},
                ]);
                const stamps = {created: 1e15, updated: 1e15, skipped: 0};
                const value = JSON.stringify({id: 'all', title: 'all', ...stamps, messages});
                localStorage.setItem('chat-api:/chat/:conversation:all', value);
            }""",
            vectors,
        )
        page.goto(f"{url}/chat/#all")
        page.reload()
        expect(answers(page)).to_have_count(len(vectors))
        expect(page.locator(".body > .plain:not(.tail)")).to_have_count(0)
        assert page.title() == "all · chat-api"
        assert page.evaluate("window.hit") is None
        assert page.locator("body > :not(nav, main, aside, #scrim)").count() == 0
        assert page.locator(".body :is(img, script, iframe, style, form, input)").count() == 0
        assert not elsewhere
        assert not said
    assert not asked


@in_browser
def test_markup_in_an_answer_is_shown_as_text_and_sent_back_as_it_was(browser, url, runner):
    runner.say = "a <div>box</div> & <script>document.title = 'x'</script>\n\n$a<b$ `<s>`"
    with opened(browser, url) as page:
        ask(page, "<b>bold</b>")
        expect_answered(page)
        expect(page.locator(".bubble")).to_have_text("<b>bold</b>")
        expect(bodies(page)).to_contain_text(
            "a <div>box</div> & <script>document.title = 'x'</script>"
        )
        expect(bodies(page).locator("math")).to_have_count(1)
        expect(bodies(page).locator("code")).to_have_text("<s>")
        ask(page, "more")
        expect_answered(page, 2)
    assert runner.say in text_of(runner, 1)
