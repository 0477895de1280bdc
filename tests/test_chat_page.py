"""The chat page, in a real browser: what a person sees, and what the page may not do."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import api
import chat_page
from chat_page import markdown, renderer
from engine import ChatModel
from tests.conftest import PATIENCE, ROOT, chat_model, ready, serve, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

expect.set_options(timeout=1000 * PATIENCE)


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
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """The page as a new person sees it; fails if a script of the page's fails."""
    options = {"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options}
    with browser.new_context(**options) as context:
        context.set_default_timeout(1000 * PATIENCE)
        page, failures = context.new_page(), []
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(url if url.endswith("/") else f"{url}/chat/")
        expect(
            page.get_by_label("Write a message").or_(page.get_by_label("输入消息"))
        ).to_be_focused()
        yield page
        assert not failures


def ask(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article.answer")


def bodies(page: Page) -> Locator:
    return page.locator("article.answer .body")


def expect_answered(page: Page, count: int = 1) -> None:
    """So many answers are there, and the last one is complete."""
    expect(answers(page)).to_have_count(count)
    expect(page.locator("article.last footer").get_by_text("Regenerate")).to_be_visible()


def trouble(page: Page) -> Locator:
    return page.locator("#trouble")


def listed(page: Page) -> Locator:
    return page.locator("#list .title")


def running(url: str) -> int:
    return httpx.get(f"{url}/health").json()["running"]


def text_of(runner, index: int) -> str:
    return runner.tokenizer.decode(runner.prompts[index])


# ---- What a person does


@in_browser
def test_empty_page_names_the_model_and_asks_an_example(browser, url, runner):
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_have_text("test")
        page.get_by_role("button", name="Give me three tips").click()
        expect(bodies(page)).to_have_text("hello")
        expect(page.locator("#empty")).to_be_hidden()
    assert "<|user|>Give me three tips" in text_of(runner, 0)


@in_browser
def test_demo_model_is_introduced_and_asked_in_english(browser, runner, tokenizer):
    def load(_: object) -> ChatModel:
        return replace(chat_model(runner, tokenizer), name="demo")

    with serve(load, chat_page=True) as url, opened(browser, ready(url), locale="zh-CN") as page:
        expect(page.locator("#demo")).to_contain_text("不会中文")
        expect(page.get_by_role("button", name="Give me three tips")).to_be_visible()


@in_browser
def test_other_models_are_asked_in_the_language_of_the_page(browser, url):
    with opened(browser, url, locale="zh-CN") as page:
        expect(page.locator("#model")).to_have_text("test")
        expect(page.locator("#demo")).to_be_hidden()
        expect(page.get_by_role("button", name="水的化学式")).to_be_visible()


@in_browser
def test_answer_is_seen_while_it_comes(browser, url, runner):
    runner.say = "one two three"
    runner.hold()
    with opened(browser, url) as page:
        ask(page, "count")
        runner.permits.release(3)
        expect(bodies(page)).to_have_text("one")
        runner.free()
        expect(bodies(page)).to_have_text("one two three")
        expect(page.get_by_text(re.compile(r"^14 tokens · [\d.]+ tokens/s$"))).to_be_visible()


@in_browser
def test_finished_blocks_are_rendered_once_while_the_answer_goes_on(browser, url, runner):
    runner.say = "*first*\n\n```python\nif x:\n\n    y\n```\n\nlast *word* of\n\n1. a\n\n2. b"
    runner.hold()
    rendered = []
    with opened(browser, url) as page:
        page.on("request", lambda r: "/render" in r.url and rendered.append(r.post_data_json))
        ask(page, "blocks")
        runner.permits.release(len("*first*\n\n```"))
        expect(bodies(page).locator("em")).to_have_text("first")
        runner.permits.release(len("python\nif x:\n\n    y\n```\n\nlast *word*"))
        expect(bodies(page).locator("pre .k")).to_have_text("if")
        expect(bodies(page).locator(".tail")).to_contain_text("last *wor")
        runner.free()
        expect(bodies(page).locator("li")).to_have_text(["a", "b"])
    # Nothing twice, and the last ones together if they came together.
    assert "".join(piece["text"] for piece in rendered) == runner.say
    assert len(rendered) in (3, 4, 5)


@in_browser
def test_second_turn_knows_the_first_and_a_reload_keeps_both(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "first question")
        expect_answered(page)
        ask(page, "second question")
        expect_answered(page, 2)
        assert text_of(runner, 1) == (
            "<|user|>first question<|end|><|assistant|>hello<|end|>"
            "<|user|>second question<|end|><|assistant|>"
        )
        page.reload()
        expect(bodies(page)).to_have_text(["hello", "hello"])
        ask(page, "third question")
        expect_answered(page, 3)
        assert text_of(runner, 2).startswith(text_of(runner, 1) + "hello")


@in_browser
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_frees_the_engine_and_the_conversation_goes_on(browser, url, runner, how):
    runner.say, runner.pause = "word " * 300, 0.02
    with opened(browser, url) as page:
        ask(page, "go on for long")
        expect(bodies(page)).to_contain_text("word word")
        assert running(url) == 1
        if how == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        wait_for(lambda: running(url) == 0)
        assert len(runner.steps) < 1500
        expect(answers(page).get_by_text("Stopped.")).to_be_visible()
        runner.say = "short"
        ask(page, "again")
        expect(bodies(page).last).to_have_text("short")
        assert "go on for long<|end|><|assistant|>word word" in text_of(runner, 1)


@in_browser
def test_closed_tab_frees_the_engine_and_what_came_is_kept(browser, url, runner):
    runner.say, runner.pause = "word " * 300, 0.02
    with opened(browser, url) as page:
        ask(page, "go on for long")
        expect(bodies(page)).to_contain_text("word word")
        page.close()
        wait_for(lambda: running(url) == 0)
        assert len(runner.steps) < 1500
        page = browser.contexts[0].new_page()
        page.goto(f"{url}/chat/")
        expect(bodies(page)).to_contain_text("word word")
        expect(answers(page).get_by_text("The connection broke")).to_be_visible()


@in_browser
def test_answer_that_was_saved_while_it_came_is_marked(browser, url, runner):
    """The browser may be killed, and then the page cannot save the end."""
    with opened(browser, url) as page:
        ask(page, "hi")
        expect_answered(page)
        page.evaluate(
            """() => {
                const key = Object.keys(localStorage).find((key) => key.includes(':conversation:'));
                const saved = JSON.parse(localStorage[key]);
                delete saved.messages[1].finish;
                localStorage[key] = JSON.stringify(saved);
            }"""
        )
        page.reload()
        expect(answers(page).get_by_text("The connection broke")).to_be_visible()
        runner.say = " again"
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("hello again")


@in_browser
def test_answer_goes_on_while_another_conversation_is_open(browser, url, runner):
    runner.say = "one two three"
    runner.hold()
    with opened(browser, url) as page:
        ask(page, "count")
        runner.permits.release(3)
        expect(bodies(page)).to_have_text("one")
        page.get_by_role("button", name="New chat").click()
        expect(answers(page)).to_have_count(0)
        runner.free()
        wait_for(lambda: running(url) == 0)
        listed(page).click()
        expect(bodies(page)).to_have_text("one two three")


@in_browser
def test_edit_and_regenerate_ask_again_from_there(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "first")
        expect_answered(page)
        ask(page, "second")
        expect_answered(page, 2)
        runner.say = "another"
        answers(page).last.get_by_text("Regenerate").click()
        expect(bodies(page)).to_have_text(["hello", "another"])
        assert text_of(runner, 2) == text_of(runner, 1)
        page.locator("article.question").first.hover()
        page.locator("article.question").first.get_by_text("Edit").click()
        page.locator(".editor textarea").fill("changed")
        page.locator(".editor textarea").press("Enter")
        expect(bodies(page)).to_have_text(["another"])
        assert text_of(runner, 3) == "<|user|>changed<|end|><|assistant|>"


@in_browser
def test_cut_answer_says_so_and_can_be_continued(browser, url, runner):
    runner.say = "one two three"
    with opened(browser, url) as page:
        set_field(page, "Max new tokens", "7")
        ask(page, "count")
        expect(answers(page).get_by_text("The answer reached its greatest length.")).to_be_visible()
        expect(bodies(page)).to_have_text("one two")
        page.reload()
        runner.say = " three"
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("one two three")
        expect(bodies(page).locator("p")).to_have_count(1)
        expect(answers(page).get_by_text("greatest length")).to_have_count(0)
    assert text_of(runner, 1) == "<|user|>count<|end|><|assistant|>one two"


@in_browser
def test_model_that_cannot_go_on_is_asked_to(browser, runner, tokenizer):
    tokenizer = deepcopy(tokenizer)
    turns = "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}{% else %}"
    tokenizer.chat_template = f"{turns}{{{{ m['content'] }}}}<|end|>{{% endif %}}{{% endfor %}}"
    runner.say = "one two three"
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, chat_page=True) as url, opened(browser, ready(url)) as page:
        set_field(page, "Max new tokens", "7")
        ask(page, "count")
        expect(bodies(page)).to_have_text("one two")
        runner.say = " three"
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("one two three")
    assert text_of(runner, 1) == "count<|end|>one two<|end|>Continue<|end|>"


@in_browser
def test_thought_that_the_server_parts_is_folded_and_goes_on(browser, runner, tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['reasoning_content'] %}"
        "<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    whole = "<think>hm</think>the answer"
    runner.say = whole
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, chat_page=True) as url, opened(browser, ready(url)) as page:
        for index, cut in enumerate([len("<think>h"), len("m</think>the")]):
            set_field(page, "Max new tokens", str(cut))
            if index == 0:
                ask(page, "think")
            else:
                answers(page).get_by_text("Continue").click()
            expect(answers(page).get_by_text("greatest length")).to_be_visible()
            runner.say = runner.say[cut:]
        expect(page.locator(".thought")).to_have_text("hm")
        expect(bodies(page)).to_have_text("the")
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("the answer")
        expect(page.locator(".thought")).to_be_hidden()
        page.get_by_text("Thinking").click()
        expect(page.locator(".thought")).to_have_text("hm")
    asked = "<|user|>think<|end|><|assistant|>"
    assert [text_of(runner, index) for index in range(3)] == [
        asked,
        f"{asked}<think>h",
        f"{asked}<think>hm</think>the",
    ]


@in_browser
@pytest.mark.parametrize("opening", ["<think>", ""])
def test_thinking_is_folded_and_not_sent_back(browser, url, runner, opening):
    runner.say = f"{opening}\nhm, **hm**\n\nso\n</think>\n\nthe *answer*"
    with opened(browser, url) as page:
        ask(page, "think")
        expect_answered(page)
        expect(bodies(page)).to_have_text("the answer")
        expect(page.locator(".thought")).to_be_hidden()
        page.get_by_text("Thinking").click()
        expect(page.locator(".thought")).to_have_text("hm, **hm**\n\nso")
        expect(page.locator(".thought")).to_be_visible()
        ask(page, "more")
        expect_answered(page, 2)
    assert "<|assistant|>the *answer*<|end|>" in text_of(runner, 1)
    assert "hm" not in text_of(runner, 1)


def set_field(page: Page, label: str, value: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.locator("#settings").get_by_label(label).fill(value)
    page.get_by_role("button", name="Close").click()


@in_browser
def test_settings_show_the_defaults_are_used_zero_included_and_reset(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "as it is")
        expect_answered(page)
        before = page.locator("article.answer").bounding_box()
        page.get_by_role("button", name="Settings").click()
        assert page.locator("article.answer").bounding_box() == before
        expect(page.get_by_label("Top-k")).to_have_attribute("placeholder", "50")
        page.get_by_label("System prompt").fill("be brief")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Seed").fill("0")
        page.keyboard.press("Escape")
        page.reload()
        ask(page, "as I like it")
        expect_answered(page, 2)
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Temperature")).to_have_value("0")
        page.get_by_role("button", name="Reset").click()
        expect(page.get_by_label("Temperature")).to_have_value("")
        expect(page.get_by_label("System prompt")).to_have_value("")
        page.get_by_role("button", name="Close").click()
        ask(page, "as it was")
        expect_answered(page, 3)
    plain, chosen, reset = runner.samplings
    assert (plain.temperature, plain.seed) == (0.8, None)
    assert (chosen.temperature, chosen.seed, chosen.top_k) == (0, 0, 50)
    assert (reset.temperature, reset.seed) == (0.8, None)
    assert text_of(runner, 1).startswith("<|system|>be brief<|end|><|user|>as it is")


@in_browser
def test_adapter_is_chosen_and_kept(browser, runner, tokenizer):
    adapters = []

    def load(_: object) -> ChatModel:
        model = chat_model(runner, tokenizer, 2048)
        submit = model.engine.stream_all
        model.engine.stream_all = lambda prompts, *rest, **more: (
            adapters.append(prompts[0].adapter) or submit(prompts, *rest, **more)
        )
        return replace(model, adapters={"law": model.tokenizer, "poet": model.tokenizer})

    with serve(load, chat_page=True) as url, opened(browser, ready(url)) as page:
        ask(page, "first")
        expect_answered(page)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Model or adapter").select_option("poet")
        expect(page.locator("#model")).to_have_text("poet")
        page.get_by_role("button", name="Close").click()
        page.reload()
        expect(page.locator("#model")).to_have_text("poet")
        ask(page, "second")
        expect_answered(page, 2)
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Reset").click()
        expect(page.locator("#model")).to_have_text("test")
    assert adapters == [0, 2]


@in_browser
def test_one_model_alone_is_no_choice(browser, url):
    with opened(browser, url) as page:
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Temperature")).to_be_visible()
        expect(page.get_by_label("Model or adapter")).to_be_hidden()


# ---- Conversations


@in_browser
def test_conversations_are_renamed_searched_exported_and_deleted(browser, url, runner):
    with opened(browser, url) as page:
        for question in ("about apples", "about pears"):
            page.get_by_role("button", name="New chat").click()
            ask(page, question)
            expect_answered(page)
        expect(listed(page)).to_have_text(["about pears", "about apples"])
        act(page, "about apples", "Rename")
        page.get_by_label("Rename").fill("红苹果")
        page.keyboard.press("Enter")
        expect(listed(page)).to_have_text(["红苹果", "about pears"])
        page.get_by_label("Search").fill("APPLES")
        expect(listed(page)).to_have_text(["红苹果"])
        page.get_by_label("Search").fill("")
        with page.expect_download() as saved:
            act(page, "红苹果", "Export as Markdown")
        text = Path(saved.value.path()).read_text(encoding="utf-8")
        assert text == "# 红苹果\n\n## user\n\nabout apples\n\n## assistant\n\nhello\n"
        with page.expect_download() as saved:
            act(page, "红苹果", "Export as JSON")
        assert saved.value.suggested_filename == "红苹果.json"
        exported = json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))
        assert [turn["content"] for turn in exported["messages"]] == ["about apples", "hello"]
        page.on("dialog", lambda dialog: dialog.accept())
        act(page, "about pears", "Delete")
        expect(listed(page)).to_have_text(["红苹果"])
        expect(answers(page)).to_have_count(0)
        page.reload()
        expect(listed(page)).to_have_text(["红苹果"])


def act(page: Page, title: str, action: str) -> None:
    """Choose an action of a conversation's menu."""
    item = page.locator("#list li").filter(has_text=title)
    item.hover()
    item.locator("summary").click()
    item.get_by_text(action, exact=True).click()


@in_browser
def test_conversation_deleted_while_it_is_answered_stays_deleted(browser, url, runner):
    runner.say = "one two"
    runner.hold()
    with opened(browser, url) as page:
        ask(page, "count")
        runner.permits.release(3)
        expect(bodies(page)).to_have_text("one")
        page.on("dialog", lambda dialog: dialog.accept())
        act(page, "count", "Delete")
        wait_for(lambda: running(url) == 0)
        runner.free()
        page.reload()
        expect(page.get_by_text("What would you like to know?")).to_be_visible()
        expect(listed(page)).to_have_count(0)


@in_browser
def test_open_menu_and_a_name_half_typed_outlive_what_an_answer_saves(browser, url, runner):
    runner.say = "one two three four"
    runner.hold()
    with opened(browser, url) as page:
        ask(page, "count")
        runner.permits.release(3)
        expect(bodies(page)).to_have_text("one")
        item = page.locator("#list li")
        item.hover()
        item.locator("summary").click()
        page.evaluate("window.menu = document.querySelector('#list .menu')")
        page.wait_for_timeout(3100)  # an answer is saved every three seconds
        runner.permits.release(5)
        expect(bodies(page)).to_contain_text("two")
        assert page.evaluate("menu.isConnected && menu.open")
        item.get_by_text("Rename", exact=True).click()
        page.get_by_label("Rename").fill("half")
        runner.free()
        expect_answered(page)
        expect(page.get_by_label("Rename")).to_have_value("half")
        page.keyboard.press("Enter")
        expect(listed(page)).to_have_text(["half"])


@in_browser
def test_other_tab_follows_an_answer_and_leaves_the_focus_where_it_is(browser, url, runner):
    runner.say = "one two three four"
    runner.hold()
    with opened(browser, url) as one:
        ask(one, "count")
        runner.permits.release(3)
        expect(bodies(one)).to_have_text("one")
        other = one.context.new_page()
        other.goto(f"{url}/chat/")
        other.get_by_label("Search").focus()
        one.wait_for_timeout(3100)
        runner.permits.release(5)
        expect(answers(other).get_by_text("Being answered in another tab.")).to_be_visible()
        expect(other.get_by_text("Continue")).to_have_count(0)
        expect(other.get_by_label("Search")).to_be_focused()
        runner.free()
        expect(bodies(other)).to_have_text("one two three four")
        expect(other.get_by_text("Being answered in another tab.")).to_have_count(0)


@in_browser
def test_two_tabs_lose_nothing(browser, url, runner):
    with opened(browser, url) as one:
        other = one.context.new_page()
        other.goto(f"{url}/chat/")
        ask(one, "from one")
        ask(other, "from the other")
        expect_answered(one)
        expect_answered(other)
        expect(listed(one)).to_have_count(2)
        expect(listed(other)).to_have_count(2)
        # What one tab does to the conversation that both show is seen in the other.
        listed(other).filter(has_text="from one").click()
        ask(one, "one again")
        expect_answered(one, 2)
        expect_answered(other, 2)
        # If both go on with it at the same moment, both answers are kept, in two conversations.
        runner.hold()
        ask(one, "left")
        expect(answers(one)).to_have_count(3)
        ask(other, "right")
        runner.free()
        wait_for(lambda: running(url) == 0)
        expect(listed(one)).to_have_count(3)
    sent = [text_of(runner, i) for i in range(len(runner.prompts))]
    assert any("left" in text for text in sent)
    assert any("right" in text for text in sent)


@in_browser
def test_full_storage_is_said_and_the_answer_still_comes(browser, url):
    fill = """() => {
        let size = 4 * 2 ** 20;
        for (let i = 0; size > 1; i += 1) {
            try { localStorage.setItem(`fill${i}`, "x".repeat(size)); } catch { size /= 2; }
        }
    }"""
    with opened(browser, url) as page:
        page.evaluate(fill)
        ask(page, "hi")
        expect(bodies(page)).to_have_text("hello")
        expect(page.get_by_text("This browser's storage is full")).to_be_visible()
        page.evaluate("for (const key of Object.keys(localStorage)) localStorage.removeItem(key)")
        ask(page, "again")
        expect_answered(page, 2)
        expect(page.get_by_text("This browser's storage is full")).to_be_hidden()
        expect(listed(page)).to_have_count(1)


# ---- What goes wrong


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
        expect(trouble(page)).to_contain_text("There is no connection to the server.")
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
        ask(page, "count")
        runner.permits.release(3)
        expect(bodies(page)).to_have_text("one")
        line.cut()
        expect(answers(page).get_by_text("The connection broke")).to_be_visible()
        expect(bodies(page)).to_have_text("one")
        line.mend()
        runner.free()
        runner.say = " and more"
        expect(trouble(page)).to_be_empty()
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("one and more")


@in_browser
def test_key_is_asked_for_and_kept_for_the_session(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with (
        serve(load, api_key="key-1, 钥匙", chat_page=True) as url,
        opened(browser, ready(url)) as page,
    ):
        enter_key(page, "wrong")
        expect(trouble(page)).to_contain_text("The server does not know this key.")
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


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use").click()


@in_browser
def test_key_that_expires_is_asked_for_beside_the_question(browser, runner, tokenizer):
    load = lambda _: chat_model(runner, tokenizer)  # noqa: E731
    with serve(load, api_key="sesame", chat_page=True) as url, opened(browser, ready(url)) as page:
        ask(page, "hi")
        enter_key(page, "sesame")
        expect(bodies(page)).to_have_text("hello")


# ---- What it looks like

SOURCES = ("index.html", "chat.js", "texts.js")


@in_browser
def test_page_speaks_chinese_to_who_reads_it_and_can_be_switched(browser, url):
    with opened(browser, url, locale="zh-CN") as page:
        for words in ("新对话", "想聊点什么？"):
            expect(page.get_by_text(words, exact=True)).to_be_visible()
        expect(page.get_by_placeholder("输入消息")).to_be_focused()
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        page.get_by_role("button", name="English").click()
        expect(page.get_by_text("New chat")).to_be_visible()
        page.reload()
        expect(page.get_by_text("New chat")).to_be_visible()


def test_every_text_is_there_in_both_languages():
    files = {name: (ROOT / "chat_page" / name).read_text(encoding="utf-8") for name in SOURCES}
    used = set(re.findall(r'\b(?:say|button|words)\("(\w+)"', files["chat.js"]))
    used |= set(re.findall(r'data-(?:text|label)="(\w+)"', files["index.html"]))
    texts = re.findall(
        r'^    (\w+): \[\s*"([^"]+)",\s*"([^"]+)",?\s*\],', files["texts.js"], re.MULTILINE
    )
    assert used <= {name for name, _, _ in texts}
    assert len(texts) > 60
    # Technical names such as top-p are the same in both.
    assert {name for name, english, chinese in texts if english == chinese} == {"top_p"}


@in_browser
def test_input_method_s_enter_does_not_send(browser, url, runner):
    with opened(browser, url, locale="zh-CN") as page:
        page.locator("#message").fill("ni hao")
        for options in ("{isComposing: true}", "{keyCode: 229}"):
            page.evaluate(
                f"""document.getElementById('message').dispatchEvent(new KeyboardEvent('keydown',
                Object.assign({{key: 'Enter', bubbles: true, cancelable: true}}, {options})))"""
            )
        page.locator("#message").press("Shift+Enter")
        expect(page.locator("#message")).to_have_value("ni hao\n")
        page.locator("#message").fill("你好")
        page.locator("#message").press("Enter")
        expect(bodies(page)).to_have_text("hello")
    assert runner.prompts == [runner.tokenizer.encode("<|user|>你好<|end|><|assistant|>")]


RICH = r"""<think>hm</think>## Sorting

A *word* with `code`, [a link](https://example.com), ~~no~~, and $O(n \log n)$.

$$\int_0^1 \frac{x}{2}\,dx$$

```python
# Comments are read too.
@decorator
def merge(left: list[int], /) -> str:
    return f"{left!r}" + 'text' if None else len(left) * 12.5e3 + 1_000_000_000_000_000_000_000_000
```

```diff
- old
+ new
```

| a rather wide column | another one | and a third | and a fourth one | and a fifth column |
|--:|:-:|---|---|---|
| 1 | 2 | 3 | 4 | a_long_word_that_does_not_break_at_all |

> said

1. one
2. two
"""
# The ratio of WCAG 2, of every element that holds visible text, against what lies behind it.
CONTRAST = """() => {
    const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
    const luminance = (rgb) => {
        const [r, g, b] = rgb.slice(0, 3).map((value) => {
            const part = value / 255;
            return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const rgba = channels(getComputedStyle(node).backgroundColor);
            if (rgba.length === 3 || rgba[3] === 1) return rgba;
        }
        return [255, 255, 255];
    };
    const ratios = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text; (text = texts.nextNode());) {
        const node = text.parentElement;
        if (!text.data.trim() || !node.checkVisibility()) continue;
        const pair = [luminance(channels(getComputedStyle(node).color)), luminance(behind(node))];
        pair.sort((a, b) => b - a);
        ratios.push([(pair[0] + 0.05) / (pair[1] + 0.05), text.data]);
    }
    return ratios.sort((a, b) => a[0] - b[0]);
}"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser, url, runner, scheme):
    runner.say = RICH
    with opened(browser, url, color_scheme=scheme) as page:
        ask(page, "show all")
        expect_answered(page)
        expect(bodies(page).locator("pre .nf")).to_have_text("merge")
        runner.failure = RuntimeError("x")
        ask(page, "fail")
        expect(trouble(page)).to_contain_text("failed")
        page.get_by_text("Thinking").click()
        page.get_by_role("button", name="Settings").click()
        ratios = page.evaluate(CONTRAST)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len(ratios) > 80
    assert ratios[0][0] >= 4.5, ratios[:5]
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@in_browser
def test_page_fits_a_phone(browser, url, runner):
    runner.say = RICH
    phone = {"width": 390, "height": 780}
    overflow = "['html', '#scroll'].some((e) => document.querySelector(e).scrollWidth > innerWidth)"
    with opened(browser, url, viewport=phone, has_touch=True) as page:
        expect(page.locator("#sidebar")).to_be_hidden()
        assert not page.evaluate(overflow)
        ask(page, "show all")
        expect_answered(page)
        expect(bodies(page).locator("table")).to_be_visible()
        assert not page.evaluate(overflow)
        for wide in (".table", "pre"):
            assert bodies(page).locator(wide).first.evaluate("e => e.scrollWidth > e.clientWidth")
        page.get_by_role("button", name="Conversations").click()
        expect(listed(page)).to_be_visible()
        listed(page).click()
        expect(page.locator("#sidebar")).to_be_hidden()
        page.get_by_role("button", name="Settings").click()
        expect(page.get_by_label("Seed")).to_be_in_viewport()
        assert not page.evaluate(overflow)
        page.get_by_role("button", name="Close").click()
        # Turned, and turned back.
        page.set_viewport_size({"width": 900, "height": 390})
        expect(listed(page)).to_be_visible()
        page.set_viewport_size(phone)
        expect(listed(page)).to_be_hidden()


@in_browser
def test_copy_gives_the_source_also_without_the_clipboard_s_api(browser, url, runner):
    """A page that comes over plain HTTP from another machine has no navigator.clipboard."""
    runner.say = "*hi*\n\n```python\nx = 1\n```"
    with opened(browser, url) as page:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        ask(page, "code")
        expect_answered(page)
        for place, text in ((".code .head", "x = 1\n"), ("article.last footer", runner.say)):
            page.locator(place).get_by_text("Copy").click()
            expect(page.locator(place).get_by_text("Copied")).to_be_visible()
            page.locator("#message").fill("")
            page.locator("#message").press("Control+v")
            expect(page.locator("#message")).to_have_value(text)


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The source of axe-core, which npm fetches into pytest's cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which brings axe-core, is not installed")
    folder = pytestconfig.cache.mkdir("axe-core")
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4.14.1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm cannot fetch axe-core: {done.stderr[-300:]}")
    return source.read_text(encoding="utf-8")


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_state(browser, url, runner, axe, scheme):
    runner.say = RICH

    def check(page: Page, state: str) -> None:
        found = page.evaluate("axe.run()")["violations"]
        shown = [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found]
        assert not shown, state

    # Colours that are just fading in have too little contrast.
    still = {"color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, url, **still) as page:
        page.evaluate(axe)
        check(page, "empty")
        ask(page, "show all")
        expect_answered(page)
        expect(bodies(page).locator("table")).to_be_visible()
        check(page, "an answer")
        page.locator("#list summary").click()
        check(page, "a menu")
        page.keyboard.press("Tab")
        runner.failure = RuntimeError("x")
        ask(page, "fail")
        expect(trouble(page)).to_contain_text("failed")
        check(page, "trouble")
        page.get_by_role("button", name="Settings").click()
        check(page, "settings")


# ---- What is shown is safe

HIT = "fetch('OTHER/hit');document.title='hit';window.hit=1"
# Ways to make a browser run HIT or ask OTHER, in HTML and in Markdown.
VECTORS = json.loads((ROOT / "tests" / "xss.json").read_text(encoding="utf-8"))


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


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**注意：**这里", "<strong>注意：</strong>这里"),
        ("他说**“你好”**了", "他说<strong>“你好”</strong>了"),
        ("这是*斜体*。", "这是<em>斜体</em>。"),
        ("2 * 3 * 4 = 二十四", "2 * 3 * 4 = 二十四"),
        ("`甲*乙`和*丙*", "<code>甲*乙</code>和<em>丙</em>"),
        ("**note:**this", "**note:**this"),  # as CommonMark has it
    ],
)
def test_emphasis_needs_no_space_beside_chinese(text, html):
    assert markdown.render(text).strip() == f"<p>{html}</p>"


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


# ---- The renderer


def rendered(url: str, text: str) -> str:
    return httpx.post(f"{url}/chat/render", json={"text": text}).json()["html"]


def test_markdown_code_and_formulas_are_rendered(url):
    html = rendered(url, RICH.removeprefix("<think>hm</think>"))
    assert "<h2>Sorting</h2>" in html
    assert '<pre data-language="python"><code><span class="c1">' in html
    assert html.count("<math ") == 2
    assert '<th data-align="right">' in html
    assert 'target="_blank" rel="noopener noreferrer nofollow"' in html
    assert "style" not in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("costs $5 and $6", "costs $5 and $6"),
        ("$\\frac{$", "<code>\\frac{</code>"),
        ("![a cat](https://example.com/cat.png)", ">a cat</a>"),
        ("one\ntwo", "one<br>"),
        ("```nosuchlanguage\n<x>\n```", "<code>&lt;x&gt;"),
        ("", ""),
    ],
)
def test_what_is_not_markdown_stays_text(url, text, shown):
    assert shown in rendered(url, text)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"text": "%s"}' % (b"x" * 2**16), 413),
        (b'{"text": 1}', 400),
        (b"{}", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"text": "\\ud800"}', 400),
        (b"", 400),
    ],
)
def test_renderer_refuses_what_is_no_text_of_its_size(url, body, status):
    answer = httpx.post(f"{url}/chat/render", content=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_text_that_takes_too_long_is_refused_and_the_next_one_rendered(url, monkeypatch):
    rendered(url, "warm")
    with monkeypatch.context() as patched:
        patched.setattr(renderer, "RENDER_TIMEOUT", 0.2)
        slow = httpx.post(f"{url}/chat/render", json={"text": "\\( a\n" * 8000})
    assert slow.status_code == 422
    assert "too long" in slow.json()["error"]["message"]
    assert rendered(url, "*next*") == "<p><em>next</em></p>\n"


def test_renderer_that_died_is_started_again():
    async def die_between() -> list[str]:
        process = renderer.Renderer()
        first = await process.render("*a*")
        process.process.process.kill()
        process.process.process.wait()
        second = await process.render("*b*")
        await asyncio.to_thread(process.close)
        return [first, second]

    # In a thread, as playwright keeps an event loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(asyncio.run, die_between()).result()
    assert shown == ["<p><em>a</em></p>\n", "<p><em>b</em></p>\n"]


def test_importing_the_page_loads_none_of_the_renderer_s_libraries():
    code = "import sys, chat_page; print(*{'nh3', 'pygments', 'markdown_it'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_page_and_renderer_work_from_a_zip_archive(tmp_path):
    archive = tmp_path / "chat.pyz"
    with zipfile.ZipFile(archive, "w") as packed:
        for folder in ("chat_page", "engine"):
            for file in (ROOT / folder).rglob("*"):
                if file.is_file():
                    packed.write(file, file.relative_to(ROOT))
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from fastapi import FastAPI
from fastapi.testclient import TestClient
import chat_page
assert sys.argv[1] in chat_page.__file__
app = FastAPI()
chat_page.mount(app, lambda: {"model": "x"}, dict, dict)
with TestClient(app) as client:
    assert "<!doctype html>" in client.get("/chat/").text
    print(client.post("/chat/render", json={"text": "*hi*"}).json()["html"])
"""
    command = [sys.executable, "-c", code, str(archive)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "<p><em>hi</em></p>\n\n", done.stderr


# ---- Where it stands, and what is closed

PATHS = [path.removeprefix("/chat/") for path in chat_page.FILES]


def test_browser_is_sent_to_the_page(url):
    sent = httpx.get(url)
    assert (sent.status_code, sent.headers["location"]) == (307, "chat/")
    assert httpx.get(f"{url}/chat", follow_redirects=True).status_code == 200


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
    sizes = [(ROOT / "chat_page" / name).stat().st_size for name, _ in chat_page.FILES.values()]
    assert sum(sizes) <= 60_000


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
    assert f"{url}/chat/chat.js" in early
    assert len(early) <= 6


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
        assert page.url == f"{outside}/chat/"
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
