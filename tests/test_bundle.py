"""The server in one file: an empty folder with it and a model is enough."""

import subprocess
import sys
from pathlib import Path

import httpx
from benchmark import free_port

import bundle
from tests.conftest import byte_tokenizer, ready, tiny_llama, wait_for


def answers(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health"))
    except httpx.TransportError:
        return False


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
