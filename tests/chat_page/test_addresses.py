"""Each conversation's address: back and forward work, and a reload keeps what is shown."""

from playwright.sync_api import expect

from tests.chat_page.browsing import act, answers, ask, expect_answered, in_browser, listed, opened

EMPTY = "What would you like to know?"


@in_browser
def test_history_walks_between_conversations(browser, url):
    with opened(browser, url) as page:
        for question in ("about apples", "about pears"):
            page.get_by_role("button", name="New chat").click()
            ask(page, question)
            expect_answered(page)
        pears = page.url
        listed(page).filter(has_text="apples").click()
        expect(page.locator(".bubble")).to_have_text("about apples")
        apples = page.url
        assert apples != pears
        page.go_back()
        expect(page.locator(".bubble")).to_have_text("about pears")
        assert page.url == pears
        assert page.title() == "about pears · chat-api"
        page.go_forward()
        expect(page.locator(".bubble")).to_have_text("about apples")
        page.go_back()
        page.reload()
        expect(page.locator(".bubble")).to_have_text("about pears")
        # By itself the page shows the newest.
        page.goto("about:blank")
        page.goto(f"{url}/chat/")
        expect(page.locator(".bubble")).to_have_text("about pears")
        assert page.url == pears


@in_browser
def test_new_conversation_stays_new(browser, url):
    with opened(browser, url) as page:
        ask(page, "hi")
        expect_answered(page)
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_text(EMPTY)).to_be_visible()
        page.reload()
        expect(page.get_by_text(EMPTY)).to_be_visible()
        expect(page.locator("#notice")).to_be_hidden()
        page.go_back()
        expect(answers(page)).to_have_count(1)


@in_browser
def test_address_of_no_conversation_says_so(browser, url):
    missing = "That conversation is not in this browser."
    with opened(browser, url) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        ask(page, "hi")
        expect_answered(page)
        gone = page.url
        act(page, "hi", "Delete")
        expect(page.get_by_text(EMPTY)).to_be_visible()
        assert page.url.endswith("#new")
        page.goto(gone)
        expect(page.get_by_text(missing)).to_be_visible()
        page.reload()
        expect(page.get_by_text(missing)).to_be_visible()
        ask(page, "again")
        expect_answered(page)
        expect(page.get_by_text(missing)).to_be_hidden()
        page.reload()
        expect(answers(page)).to_have_count(1)
