"""Versions of an answer and of a question, and walking between them."""

from playwright.sync_api import Page, expect

from tests.chat_page.browsing import (
    answers,
    ask,
    bodies,
    edit,
    expect_answered,
    in_browser,
    opened,
    text_of,
    trouble,
)


def step(page: Page, name: str, place: str = "article.last") -> None:
    page.locator(place).get_by_role("button", name=name).click()


@in_browser
def test_answers_are_kept_beside_each_other(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "hi")
        expect_answered(page)
        expect(page.locator(".versions")).to_have_count(0)
        for say in ("second", "third"):
            runner.say = say
            answers(page).get_by_text("Regenerate").click()
            expect(bodies(page)).to_have_text(say)
        expect(page.get_by_text("3/3")).to_be_visible()
        step(page, "Earlier version")
        expect(bodies(page)).to_have_text("second")
        step(page, "Earlier version")
        expect(bodies(page)).to_have_text("hello")
        expect(page.get_by_label("Earlier version")).to_be_disabled()
        expect(page.get_by_label("Later version")).to_be_focused()
        page.reload()
        expect(bodies(page)).to_have_text("hello")
        runner.say = "more"
        ask(page, "go on")
        expect(bodies(page)).to_have_text(["hello", "more"])
        # What followed a version comes back with it.
        step(page, "Later version", "article.answer >> nth=0")
        expect(bodies(page)).to_have_text("second")
        step(page, "Earlier version")
        expect(bodies(page)).to_have_text(["hello", "more"])
    assert "<|assistant|>hello<|end|><|user|>go on" in text_of(runner, 3)


@in_browser
def test_question_keeps_what_followed_it(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "first")
        expect_answered(page)
        ask(page, "second")
        expect_answered(page, 2)
        runner.say = "another"
        edit(page.locator("article.question").first, "changed")
        expect(bodies(page)).to_have_text("another")
        expect(page.locator("article.question").get_by_text("2/2")).to_be_visible()
        step(page, "Earlier version", "article.question")
        expect(bodies(page)).to_have_text(["hello", "hello"])
        expect(page.locator(".bubble")).to_have_text(["first", "second"])
        page.reload()
        step(page, "Later version", "article.question >> nth=0")
        expect(page.locator(".bubble")).to_have_text("changed")
        expect(bodies(page)).to_have_text("another")


@in_browser
def test_version_in_vain_shows_what_was_shown(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "hi")
        expect_answered(page)
        runner.say = "second"
        answers(page).get_by_text("Regenerate").click()
        expect(bodies(page)).to_have_text("second")
        step(page, "Earlier version")
        runner.failure = RuntimeError("a secret")
        answers(page).get_by_text("Regenerate").click()
        expect(trouble(page)).to_contain_text("the model failed")
        expect(bodies(page)).to_have_text("hello")
        expect(page.get_by_text("1/2")).to_be_visible()


@in_browser
def test_running_answer_holds_its_versions(browser, url, runner):
    with opened(browser, url) as page:
        ask(page, "hi")
        expect_answered(page)
        runner.hold()
        runner.say = "one two"
        answers(page).get_by_text("Regenerate").click()
        runner.permits.release(3)
        expect(bodies(page)).to_have_text("one")
        edit_button = page.locator("article.question").get_by_text("Edit")
        expect(edit_button).to_have_count(0)
        # A tab that is closed before anything came keeps the version that was there.
        page.reload()
        expect(page.get_by_text("2/2")).to_be_visible()
        step(page, "Earlier version")
        expect(bodies(page)).to_have_text("hello")
