"""What the page's tests share: how a person uses it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.conftest import PATIENCE, ScriptedRunner

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

expect.set_options(timeout=1000 * PATIENCE)


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


def begin_answer(page: Page, runner: ScriptedRunner) -> None:
    """Ask while the runner is held, and see the answer come as far as "one"."""
    ask(page, "count")
    runner.permits.release(3)
    expect(bodies(page)).to_have_text("one")


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


def set_field(page: Page, label: str, value: str) -> None:
    page.get_by_role("button", name="Settings").click()
    page.locator("#settings").get_by_label(label).fill(value)
    page.get_by_role("button", name="Close").click()


def edit(question: Locator, text: str) -> None:
    question.hover()
    question.get_by_text("Edit").click()
    question.locator(".editor textarea").fill(text)
    question.locator(".editor textarea").press("Enter")


def act(page: Page, title: str, action: str) -> None:
    """Choose an action of a conversation's menu."""
    item = page.locator("#list li").filter(has_text=title)
    item.hover()
    item.locator("summary").click()
    item.get_by_text(action, exact=True).click()


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Save").click()


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
