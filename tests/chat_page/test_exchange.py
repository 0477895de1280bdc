"""Conversations written to files and read again: Markdown and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.chat_page.browsing import (
    act,
    answers,
    ask,
    bodies,
    expect_answered,
    in_browser,
    listed,
    opened,
    text_of,
)


def bring(page: Page, name: str, text: str) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files([{"name": name, "mimeType": "text/plain", "buffer": text.encode()}])


def exported(page: Page, title: str, how: str) -> str:
    with page.expect_download() as saved:
        act(page, title, how)
    return Path(saved.value.path()).read_text(encoding="utf-8")


SAID = "one\n\n## user\n\ntwo\n\n\\## assistant"


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("how", ["Markdown", "JSON"])
def test_export_is_read_again(browser, url, runner, how):
    runner.say = SAID
    with opened(browser, url) as page:
        ask(page, "ask")
        expect_answered(page)
        runner.say = "other"
        answers(page).get_by_text("Regenerate").click()
        expect(bodies(page)).to_have_text("other")
        page.get_by_label("Earlier version").click()
        expect(bodies(page)).to_contain_text("two")
        text = exported(page, "ask", f"Export as {how}")
        page.on("dialog", lambda dialog: dialog.accept())
        act(page, "ask", "Delete")
        expect(listed(page)).to_have_count(0)
        bring(page, f"ask.{how}", text)
        expect(listed(page)).to_have_text(["ask"])
        expect(page.locator(".bubble")).to_have_text("ask")
        expect(answers(page)).to_have_count(1)
        expect(page.locator(".versions")).to_have_count(int(how == "JSON"))
        ask(page, "more")
        expect_answered(page, 2)
    told = f"<|user|>ask<|end|><|assistant|>{SAID}<|end|><|user|>more"
    assert text_of(runner, 2).startswith(told)


@in_browser
def test_all_are_exported_and_imported(browser, url):
    with opened(browser, url) as page:
        for question in ("about apples", "about pears"):
            page.get_by_role("button", name="New chat").click()
            ask(page, question)
            expect_answered(page)
        with page.expect_download() as saved:
            page.get_by_role("button", name="Export all").click()
        text = Path(saved.value.path()).read_text(encoding="utf-8")
    with opened(browser, url) as page:
        bring(page, "all.json", text)
        expect(listed(page)).to_have_count(2)
        # What is there already is kept beside what comes.
        bring(page, "all.json", text)
        expect(listed(page)).to_have_count(4)


OPENAI = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "snow"},
    {"role": "assistant", "content": "It *snows*."},
]


@in_browser
@pytest.mark.parametrize("wrapped", [False, True])
def test_other_programs_conversations_are_read(browser, url, wrapped):
    value: Any = {"messages": OPENAI} if wrapped else OPENAI
    with opened(browser, url) as page:
        bring(page, "x.json", json.dumps(value))
        expect(listed(page)).to_have_text("weather?")
        calls = bodies(page).locator(".call summary")
        expect(calls).to_have_text(["Tool call weather", "Tool result"])
        calls.first.click()
        expect(bodies(page).locator(".call pre").first).to_have_text('{\n  "city": "Oslo"\n}')
        expect(bodies(page).locator("em")).to_have_text("snows")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    "text",
    [
        "no conversation",
        "{",
        "{}",
        "[]",
        '{"messages": []}',
        '{"messages": [{"role": "pirate", "content": "arr"}]}',
        '{"messages": [{"role": "user", "content": "x", "versions": {"at": 0, "tails": []}}]}',
        '{"messages": [null]}',
    ],
)
def test_what_is_no_conversation_is_refused(browser, url, text):
    with opened(browser, url) as page:
        bring(page, "x.json", text)
        expect(page.locator("#notice")).to_contain_text("x.json is no conversation")
        expect(listed(page)).to_have_count(0)
