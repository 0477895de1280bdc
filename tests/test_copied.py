"""Readers copy a few files to a rented machine: those that README names are all it takes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from benchmark import free_port

from tests.conftest import ROOT, byte_tokenizer, tiny_llama, wait_for


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder with what README's scp line names."""
    (names,) = re.findall(r"^scp -P PORT (.+?) root@", (ROOT / "README.md").read_text(), re.M)
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in names.removeprefix("-r ").split():
        for source in ROOT.glob(name):
            if source.is_dir():
                unread = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, folder / source.name, ignore=unread)
            else:
                shutil.copy(source, folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint that lies elsewhere."""
    folder = tmp_path / "disk" / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_copied_files_serve_a_folder(copied, checkpoint, tmp_path):
    before = {path.relative_to(copied) for path in copied.rglob("*")}
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "api.py", "--model", str(checkpoint)]
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=copied,
            # Nothing of ours is found by way of the tests' own path.
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            stdout=out,
            stderr=out,
        )

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health").json()["status"] == "ready"
        except httpx.TransportError:
            return False

    try:
        wait_for(up, seconds=180)
        answer = httpx.post(url, json={"prompt": "hi", "max_length": 4, "seed": 1})
        assert answer.status_code == 200, answer.text
        assert answer.json()["history"] == [["hi", answer.json()["response"]]]
        assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
    finally:
        process.terminate()
        process.wait(30)
    after = {path.relative_to(copied) for path in copied.rglob("*")}
    written = {path for path in after - before if "__pycache__" not in path.parts}
    assert written == set(), "it wrote nothing beside itself"
