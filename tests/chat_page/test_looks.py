"""What the page looks like: in both languages, light and dark, on a phone, to everybody."""

import re

import pytest
from playwright.sync_api import Page, expect

import chat_page
from tests.chat_page.browsing import (
    CONTRAST,
    RICH,
    ask,
    bodies,
    expect_answered,
    in_browser,
    listed,
    opened,
    text_of,
    trouble,
)
from tests.conftest import ROOT


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
    names = ("index.html", *chat_page.SCRIPTS)
    files = {name: (ROOT / "chat_page" / name).read_text(encoding="utf-8") for name in names}
    scripts = "".join(files[name] for name in chat_page.SCRIPTS)
    used = set(re.findall(r'\b(?:say|button|words)\("(\w+)"', scripts))
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


@pytest.mark.slow
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
        page.locator(".thinking summary").click()
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
        page.locator("#message").fill("show all")
        page.get_by_role("button", name="Send").click()
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


@in_browser
def test_phone_s_enter_is_a_new_line(browser, url, runner):
    phone = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    with opened(browser, url, **phone) as page:
        page.locator("#message").fill("one")
        page.locator("#message").press("Enter")
        page.locator("#message").press_sequentially("two")
        expect(page.locator("#message")).to_have_value("one\ntwo")
        page.get_by_role("button", name="Send").click()
        expect(bodies(page)).to_have_text("hello")
    assert text_of(runner, 0) == "<|user|>one\ntwo<|end|><|assistant|>"
