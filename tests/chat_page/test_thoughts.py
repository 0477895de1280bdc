"""A model's thoughts: folded, and not sent back."""

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
