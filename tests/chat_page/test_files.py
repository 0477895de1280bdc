"""Text files that go with a question, and how full the context is."""

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.chat_page.browsing import (
    ask,
    bodies,
    edit,
    expect_answered,
    in_browser,
    opened,
    running,
    text_of,
)
from tests.conftest import chat_model, ready, serve


def file(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def attach(page: Page, *files: dict[str, Any]) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach text files").click()
    chooser.value.set_files([*files])


# As a person drops or pastes a file.
BRING = """([type, name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name));
    const box = document.getElementById("message");
    const given = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
    box.dispatchEvent(new (type === "paste" ? ClipboardEvent : DragEvent)(type, given));
}"""


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("how", ["chosen", "paste", "drop"])
def test_file_goes_before_its_question(browser, url, runner, how):
    text = "def f():\n    return '```'\n"
    with opened(browser, url) as page:
        if how == "chosen":
            attach(page, file("a.py", text.encode()))
        else:
            page.evaluate(BRING, [how, "a.py", text])
        expect(page.locator("#files li")).to_contain_text(f"{len(text)} tokens")
        ask(page, "what is it?")
        expect_answered(page)
        expect(page.locator("#files li")).to_have_count(0)
        page.locator(".file summary").click()
        expect(page.locator(".file pre")).to_have_text(text)
        expect(page.locator(".bubble")).to_have_text("what is it?")
        page.reload()
        edit(page.locator("article.question"), "what now?")
        expect(page.get_by_text("2/2")).to_be_visible()
        expect_answered(page)
    for index, question in enumerate(["what is it?", "what now?"]):
        asked = f"a.py:\n````\n{text}````\n\n{question}"
        assert text_of(runner, index) == f"<|user|>{asked}<|end|><|assistant|>"


@in_browser
def test_file_alone_is_a_question(browser, url, runner):
    with opened(browser, url) as page:
        attach(page, file("a.txt", b"one"), file("b.txt", "二".encode("utf-16")))
        expect(page.locator("#files li")).to_have_count(2)
        page.get_by_role("button", name="Remove a.txt").click()
        page.get_by_role("button", name="Send").click()
        expect(bodies(page)).to_have_text("hello")
        assert page.title() == "b.txt · chat-api"
    assert text_of(runner, 0) == "<|user|>b.txt:\n```\n二\n```<|end|><|assistant|>"


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00", "x.bin is not a text file."),
        (b"x" * 2049, "x.bin has 2049 tokens; the model's context holds 2048."),
        (b"x" * (2**22 + 1), "x.bin is larger than a million characters."),
        (b"x" * (2**20 + 1), "x.bin is larger than a million characters."),
    ],
)
def test_file_that_cannot_go_is_refused(browser, url, content, words):
    with opened(browser, url) as page:
        attach(page, file("x.bin", content))
        expect(page.locator("#notice")).to_have_text(words)
        expect(page.locator("#files li")).to_have_count(0)


@in_browser
def test_older_encodings_are_the_reader_s(browser, url):
    chinese, western = ("zh-CN", "gb18030", "你好，世界"), ("en-US", "cp1252", "naïve café")
    for locale, encoding, text in (chinese, western):
        with opened(browser, url, locale=locale) as page:
            content = [*text.encode(encoding)]
            found = page.evaluate(
                "async (bytes) => (await import('/chat/files.js')).readText("
                "new File([new Uint8Array(bytes)], 'x'))",
                content,
            )
            assert found == {"text": text}


@in_browser
def test_fullness_follows_answers_and_drafts(browser, url, runner):
    with opened(browser, url) as page:
        expect(page.locator("#fullness")).to_be_hidden()
        ask(page, "hi")
        expect_answered(page)
        # Three marks of the template, two letters, and the answer with its end.
        expect(page.locator("#filled")).to_have_text("11 of 2,048 tokens")
        page.locator("#message").fill("x" * 600)
        expect(page.locator("#filled")).to_have_text("614 of 2,048 tokens")
        page.locator("#message").fill("x" * 3000)
        expect(page.locator("#filled")).to_have_text("3,014 of 2,048 tokens")
        expect(page.locator("#fullness")).to_have_class("over")
        page.locator("#message").fill("")
        expect(page.locator("#filled")).to_have_text("11 of 2,048 tokens")
        expect(page.get_by_label("How full the context is")).to_have_js_property("value", 11)
        page.reload()
        expect(page.locator("#filled")).to_have_text("11 of 2,048 tokens")


@in_browser
def test_stopped_answer_keeps_its_speed(browser, url, runner):
    runner.say, runner.pause = "word " * 300, 0.02
    with opened(browser, url) as page:
        ask(page, "go on for long")
        expect(bodies(page)).to_contain_text("word word")
        page.keyboard.press("Escape")
        speed = page.get_by_text(re.compile(r"^\d+ tokens · [\d.]+ tokens/s$"))
        expect(speed).to_be_visible()
        assert running(url) <= 1
        page.reload()
        expect(speed).to_be_visible()


@in_browser
def test_files_are_counted_with_a_key(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, api_key="sesame", chat_page=True) as url, opened(browser, ready(url)) as page:
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#model")).to_have_text("test")
        attach(page, file("a.txt", b"four"))
        expect(page.locator("#files li")).to_contain_text("4 tokens")
