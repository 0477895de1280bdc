"""One browser for a file, and one server whose model says what each test wants."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.chat_page.browsing import CHROMIUM, FLAGS, running
from tests.conftest import ScriptedRunner, chat_model, ready, serve, wait_for


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    runner = ScriptedRunner(tokenizer)
    with serve(lambda _: chat_model(runner, tokenizer, 2048), chat_page=True) as address:
        yield ready(address), runner


@pytest.fixture
def url(shared) -> Iterator[str]:
    """The file's server, on which nothing of an earlier test goes on."""
    address, runner = shared
    runner.start_over()
    yield address
    runner.free()
    wait_for(lambda: running(address) == 0)


@pytest.fixture
def runner(request: pytest.FixtureRequest, tokenizer) -> ScriptedRunner:
    """That of `url` for a test that uses it; another for a test with a server of its own."""
    if "url" in request.fixturenames:
        return request.getfixturevalue("shared")[1]
    return ScriptedRunner(tokenizer)


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The source of axe-core, which npm fetches into pytest's cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which brings axe-core, is not installed")
    folder = pytestconfig.cache.mkdir("axe-core")
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4.14.1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm cannot fetch axe-core: {done.stderr[-300:]}")
    return source.read_text(encoding="utf-8")
