"""The server in one file: an empty folder with it and a model is enough."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from benchmark import free_port

import bundle
from tests.conftest import ROOT, byte_tokenizer, ready, tiny_llama, wait_for

# What the server does not need.
APART = {"benchmarks", "bundle", "client_settings", "deploy", "request", "tests"}


def answers(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health"))
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_an_empty_folder_with_the_bundle_and_a_model_serves(tmp_path: Path):
    archive = tmp_path / "chat-api.pyz"
    bundle.write(archive)
    tiny_llama().save_pretrained(tmp_path / "models" / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "models" / "tiny")
    port = str(free_port())
    # -P: nothing is found because it lies in the working directory.
    command = [sys.executable, "-P", archive.name, "--model", "tiny", "--port", port]
    with subprocess.Popen([*command, "--no-chat-page"], cwd=tmp_path) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(url))
            answer = httpx.post(ready(url), json={"prompt": "hi", "max_length": 3})
            assert answer.json()["usage"]["completion_tokens"] == 3
        finally:
            process.kill()


def test_what_is_copied_is_all_the_program():
    """By the bundle, by README's scp line, and into a container."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - APART
    files = {path.stem for path in ROOT.glob("*.py")} - APART
    assert {"engine", "hubs", "serving", "api"} <= folders | files
    assert {part.removesuffix(".py") for part in bundle.PARTS} == folders | files
    for page in ("README.md", "README.zh.md"):
        (line,) = re.findall(r"^scp -P PORT (.+?) root@", (ROOT / page).read_text("utf-8"), re.M)
        assert folders <= set(line.split()), page
    for page in ("docs/recipes.md", "docs/recipes.zh.md"):
        copied = re.findall(r"^COPY (\w+) \1$", (ROOT / page).read_text("utf-8"), re.M)
        assert set(copied) == folders, page


def test_part_that_is_gone_is_not_passed_over(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bundle, "PARTS", ("api.py", "gone.py"))
    with pytest.raises(FileNotFoundError, match=r"gone\.py"):
        bundle.write(tmp_path / "chat-api.pyz")
    assert not list(tmp_path.iterdir())
