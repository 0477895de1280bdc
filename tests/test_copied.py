"""Readers copy api.py alone to a rented machine: it needs no other file of ours."""

import os
import shutil
import subprocess
import sys

import httpx
import pytest
from benchmark import free_port
from conftest import ROOT, byte_tokenizer, tiny_llama, wait_for


@pytest.fixture
def alone(tmp_path):
    """A folder with api.py and requirements.txt, and a checkpoint elsewhere."""
    folder, checkpoint = tmp_path / "alone", tmp_path / "disk" / "tiny"
    folder.mkdir()
    for name in ("api.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    tiny_llama().save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    return folder, checkpoint


def test_api_py_alone_serves_a_folder(alone):
    folder, checkpoint = alone
    port, log = free_port(), folder.parent / "log"
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "api.py",
                "--model",
                checkpoint,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            cwd=folder,
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
        answer = httpx.post(url, json={"prompt": "hi", "max_length": 4, "seed": 1}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["history"] == [["hi", answer.json()["response"]]]
        assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
    finally:
        process.terminate()
        process.wait(30)
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {"api.py", "requirements.txt"}, "it wrote nothing beside itself"
