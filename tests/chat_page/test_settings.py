"""The settings of the page: what a person sets is what the model gets."""

from dataclasses import replace

from playwright.sync_api import expect

from engine import ChatModel
from tests.chat_page.browsing import ask, expect_answered, in_browser, opened, text_of
from tests.conftest import chat_model, ready, serve


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
