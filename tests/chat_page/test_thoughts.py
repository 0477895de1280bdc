"""A model's thoughts: folded, and not sent back."""

import re
from copy import deepcopy

import pytest
from playwright.sync_api import expect

from tests.chat_page.browsing import (
    answers,
    ask,
    bodies,
    expect_answered,
    in_browser,
    opened,
    set_field,
    text_of,
)
from tests.conftest import chat_model, ready, serve


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
            expect(answers(page).get_by_text("maximum length")).to_be_visible()
            runner.say = runner.say[cut:]
        expect(page.locator(".thought")).to_have_text("hm")
        expect(bodies(page)).to_have_text("the")
        answers(page).get_by_text("Continue").click()
        expect(bodies(page)).to_have_text("the answer")
        expect(page.locator(".thought")).to_be_hidden()
        page.locator(".thinking summary").click()
        expect(page.locator(".thought")).to_have_text("hm")
    asked = "<|user|>think<|end|><|assistant|>"
    assert [text_of(runner, index) for index in range(3)] == [
        asked,
        f"{asked}<think>h",
        f"{asked}<think>hm</think>the",
    ]


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("opening", ["<think>", ""])
def test_thinking_is_folded_and_not_sent_back(browser, url, runner, opening):
    runner.say = f"{opening}\nhm, **hm**\n\nso\n</think>\n\nthe *answer*"
    with opened(browser, url) as page:
        ask(page, "think")
        expect_answered(page)
        expect(bodies(page)).to_have_text("the answer")
        expect(page.locator(".thought")).to_be_hidden()
        page.locator(".thinking summary").click()
        expect(page.locator(".thought")).to_have_text("hm, **hm**\n\nso")
        expect(page.locator(".thought")).to_be_visible()
        ask(page, "more")
        expect_answered(page, 2)
    assert "<|assistant|>the *answer*<|end|>" in text_of(runner, 1)
    assert "hm" not in text_of(runner, 1)


# What is thought and what is said, of answers that speak of the marks themselves.
SPLIT = [
    ("<think>hm</think>so", "hm", "so"),
    ("hm\n</think>\n\nso", "hm", "so"),
    ("hm</think>\n\nso", "hm", "so"),
    ("The `</think>` mark ends a thought.", "", None),
    ("It writes </think> at its end.", "", None),
    ("He wrote “</think>”\nand so on.", "", None),
    ("```\n<think>\nhm\n</think>\n```\n\nLike that.", "", None),
    ("`<think>hm</think>`\nis how.", "", None),
    ('<think>What is "</think>"?</think>A mark.', 'What is "</think>"?', "A mark."),
    ("<think>It asks of `</think>`.\n</think>\n\nA mark.", "It asks of `</think>`.", "A mark."),
    ("<think>It asks of `</think>", "It asks of `</think>", ""),
    ("<think>\n\n</think>\n\nso", "", "so"),
    ("so", "", None),
]


@in_browser
def test_mark_that_is_only_mentioned_folds_nothing(browser, url):
    split = "async (text) => (await import('/chat/blocks.js')).splitThought(text)"
    with opened(browser, url) as page:
        for content, thought, text in SPLIT:
            expected = {"thought": thought, "text": content if text is None else text}
            assert page.evaluate(split, content) == expected, content


@in_browser
def test_thought_is_folded_with_its_seconds(browser, url, runner):
    runner.say, runner.pause = "<think>hm hm</think>so", 0.05
    with opened(browser, url) as page:
        ask(page, "think")
        expect_answered(page)
        summary = page.locator(".thinking summary")
        expect(summary).to_have_text(
            re.compile(r"^Thought for [1-9]\d*\.\d s$|^Thought for 0\.[1-9] s$")
        )
        words = summary.inner_text()
        page.reload()
        expect(summary).to_have_text(words)


@in_browser
def test_tool_calls_are_shown_as_such(browser, url, runner):
    runner.say = (
        'I look.\n<tool_call>\n{"name": "find", "arguments": {"q": "a"}}\n</tool_call>\n'
        "<tool_call>\n<function=run>\n</function>\n</tool_call>\n*Then* `<tool_call>` is:\n"
        "```\n<tool_call>\n</tool_call>\n```"
    )
    with opened(browser, url) as page:
        ask(page, "call")
        expect_answered(page)
        calls = bodies(page).locator(".call summary")
        expect(calls).to_have_text(["Tool call find", "Tool call run"])
        expect(bodies(page).locator("em")).to_have_text("Then")
        expect(bodies(page).locator(".code pre")).to_have_text("<tool_call>\n</tool_call>\n")
        page.reload()
        expect(calls).to_have_count(2)
