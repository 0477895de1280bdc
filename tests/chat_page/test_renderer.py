"""Markdown, code and formulas as HTML, by a process of their own."""

import asyncio
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from chat_page import markdown, renderer
from tests.chat_page.browsing import RICH
from tests.conftest import ROOT


def rendered(url: str, text: str) -> str:
    return httpx.post(f"{url}/chat/render", json={"text": text}).json()["html"]


def test_markdown_code_and_formulas_are_rendered(url):
    html = rendered(url, RICH.removeprefix("<think>hm</think>"))
    assert "<h2>Sorting</h2>" in html
    assert '<pre data-language="python"><code><span class="c1">' in html
    assert html.count("<math ") == 2
    assert '<th data-align="right">' in html
    assert 'target="_blank" rel="noopener noreferrer nofollow"' in html
    assert "style" not in html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**注意：**这里", "<strong>注意：</strong>这里"),
        ("他说**“你好”**了", "他说<strong>“你好”</strong>了"),
        ("这是*斜体*。", "这是<em>斜体</em>。"),
        ("2 * 3 * 4 = 二十四", "2 * 3 * 4 = 二十四"),
        ("`甲*乙`和*丙*", "<code>甲*乙</code>和<em>丙</em>"),
        ("**note:**this", "**note:**this"),  # as CommonMark has it
    ],
)
def test_emphasis_needs_no_space_beside_chinese(text, html):
    assert markdown.render(text).strip() == f"<p>{html}</p>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("costs $5 and $6", "costs $5 and $6"),
        ("$\\frac{$", "<code>\\frac{</code>"),
        ("![a cat](https://example.com/cat.png)", ">a cat</a>"),
        ("one\ntwo", "one<br>"),
        ("```nosuchlanguage\n<x>\n```", "<code>&lt;x&gt;"),
        ("", ""),
    ],
)
def test_what_is_not_markdown_stays_text(url, text, shown):
    assert shown in rendered(url, text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("see https://example.com/a_(b)). ok", "https://example.com/a_(b)"),
        ("访问https://example.com查看", "https://example.com"),
        ("链接：https://example.com/x。后面", "https://example.com/x"),
        ("(https://a.example/?q=1&r=2_3_4#x, and", "https://a.example/?q=1&amp;r=2_3_4#x"),
        ("**https://a.example**", "https://a.example"),
        ("`https://a.example`", None),
        ("http:// and a.example and javascript://x", None),
    ],
)
def test_bare_addresses_are_links(text, address):
    found = re.findall('href="([^"]*)"', markdown.render(text))
    assert found == ([address] if address else [])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"text": "%s"}' % (b"x" * 2**16), 413),
        (b'{"text": 1}', 400),
        (b"{}", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"text": "\\ud800"}', 400),
        (b"", 400),
    ],
)
def test_renderer_refuses_what_is_no_text_of_its_size(url, body, status):
    answer = httpx.post(f"{url}/chat/render", content=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_text_that_takes_too_long_is_refused_and_the_next_one_rendered(url, monkeypatch):
    rendered(url, "warm")
    with monkeypatch.context() as patched:
        patched.setattr(renderer, "RENDER_TIMEOUT", 0.2)
        slow = httpx.post(f"{url}/chat/render", json={"text": "\\( a\n" * 8000})
    assert slow.status_code == 422
    assert "too long" in slow.json()["error"]["message"]
    assert rendered(url, "*next*") == "<p><em>next</em></p>\n"


def test_renderer_that_died_is_started_again():
    async def die_between() -> list[str]:
        process = renderer.Renderer()
        first = await process.render("*a*")
        process.process.process.kill()
        process.process.process.wait()
        second = await process.render("*b*")
        await asyncio.to_thread(process.close)
        return [first, second]

    # In a thread, as playwright keeps an event loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(asyncio.run, die_between()).result()
    assert shown == ["<p><em>a</em></p>\n", "<p><em>b</em></p>\n"]


def test_importing_the_page_loads_none_of_the_renderer_s_libraries():
    code = "import sys, chat_page; print(*{'nh3', 'pygments', 'markdown_it'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_page_and_renderer_work_from_a_zip_archive(tmp_path):
    archive = tmp_path / "chat.pyz"
    with zipfile.ZipFile(archive, "w") as packed:
        for folder in ("chat_page", "engine"):
            for file in (ROOT / folder).rglob("*"):
                if file.is_file():
                    packed.write(file, file.relative_to(ROOT))
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from fastapi import FastAPI
from fastapi.testclient import TestClient
import chat_page
assert sys.argv[1] in chat_page.__file__
app = FastAPI()
chat_page.mount(app, lambda: {"model": "x"}, dict, dict)
with TestClient(app) as client:
    assert "<!doctype html>" in client.get("/chat/").text
    print(client.post("/chat/render", json={"text": "*hi*"}).json()["html"])
"""
    command = [sys.executable, "-c", code, str(archive)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "<p><em>hi</em></p>\n\n", done.stderr
