"""The list of conversations, which this browser keeps, in one tab and in several."""

import json
from pathlib import Path

from playwright.sync_api import expect

from tests.chat_page.browsing import (
    act,
    answers,
    ask,
    begin_answer,
    bodies,
    expect_answered,
    in_browser,
    listed,
    opened,
    running,
    text_of,
)
from tests.conftest import wait_for


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


@in_browser
def test_conversation_deleted_while_it_is_answered_stays_deleted(browser, url, runner):
    runner.say = "one two"
    runner.hold()
    with opened(browser, url) as page:
        begin_answer(page, runner)
        page.on("dialog", lambda dialog: dialog.accept())
        act(page, "count", "Delete")
        runner.free()  # a model ends its step before it sees that nobody listens
        wait_for(lambda: running(url) == 0)
        page.reload()
        expect(page.get_by_text("What would you like to know?")).to_be_visible()
        expect(listed(page)).to_have_count(0)


@in_browser
def test_open_menu_and_a_name_half_typed_outlive_what_an_answer_saves(browser, url, runner):
    runner.say = "one two three four"
    runner.hold()
    with opened(browser, url) as page:
        page.clock.install()
        begin_answer(page, runner)
        item = page.locator("#list li")
        item.hover()
        item.locator("summary").click()
        page.evaluate("window.menu = document.querySelector('#list .menu')")
        page.clock.fast_forward(3100)  # an answer is saved every three seconds
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
        one.clock.install()
        begin_answer(one, runner)
        other = one.context.new_page()
        other.goto(f"{url}/chat/")
        other.get_by_label("Search").focus()
        one.clock.fast_forward(3100)
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
