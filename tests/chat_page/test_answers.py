"""Questions and their answers: asked, seen while they come, stopped, changed and gone on with."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from engine import ChatModel
from tests.chat_page.browsing import (
    answers,
    ask,
    begin_answer,
    bodies,
    expect_answered,
    in_browser,
    listed,
    opened,
    running,
    set_field,
    text_of,
)
from tests.conftest import chat_model, ready, serve, wait_for


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
        begin_answer(page, runner)
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
        expect(answers(page).get_by_text("Connection lost")).to_be_visible()


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
        expect(answers(page).get_by_text("Connection lost")).to_be_visible()
        runner.say = " again"
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("hello again")


@in_browser
def test_answer_goes_on_while_another_conversation_is_open(browser, url, runner):
    runner.say = "one two three"
    runner.hold()
    with opened(browser, url) as page:
        begin_answer(page, runner)
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
        expect(answers(page).get_by_text("The answer reached the maximum length.")).to_be_visible()
        expect(bodies(page)).to_have_text("one two")
        page.reload()
        runner.say = " three"
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("one two three")
        expect(bodies(page).locator("p")).to_have_count(1)
        expect(answers(page).get_by_text("maximum length")).to_have_count(0)
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
