"""Codex and Claude Code edit a file by way of this server; where they are installed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.sequence import KVSpan, Sequence
from tests.conftest import PATIENCE, ROOT, ScriptedRunner, chat_model, ready, serve
from tests.tool_caller import tool_tokenizer

pytestmark = pytest.mark.slow
NUM_SLOTS = 400_000
PATCH = """*** Begin Patch
*** Update File: greet.py
@@
-print("helo")
+print("hello")
*** End Patch
"""


class Editor(ScriptedRunner):
    """Reads greet.py, mends it, and says so; each by a call of the tools that it finds."""

    def __init__(self, file: Path):
        super().__init__(tool_tokenizer(), rows=NUM_SLOTS)
        self.file = str(file)

    def forward(self, work: list[tuple[KVSpan, int]]) -> torch.Tensor:
        logits = super().forward(work)
        for row, (seq, _) in zip(logits, work, strict=True):
            if isinstance(seq, Sequence):
                prompt = self.tokenizer.decode(seq.tokens[: seq.num_prompt])
                said = self.tokenizer.encode(self.next_step(prompt), add_special_tokens=False)
                row[:] = -50.0
                row[[*said, 256][min(seq.num_completion, len(said))]] = 50.0
        return logits

    def next_step(self, prompt: str) -> str:
        edit = {"file_path": self.file, "old_string": "helo", "new_string": "hello"}
        steps = [("Read", {"file_path": self.file}), ("Edit", edit)]
        if '"name": "apply_patch"' in prompt:
            steps = [("exec_command", {"cmd": "cat greet.py"}), ("apply_patch", {"input": PATCH})]
        done = prompt.count("<tool_response>")
        if done >= len(steps):
            return "It is mended."
        name, arguments = steps[done]
        spelled = json.dumps(arguments)
        return f'<tool_call>\n{{"name": "{name}", "arguments": {spelled}}}\n</tool_call>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    (work / "greet.py").write_text('print("helo")\n')
    return work


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    runner = Editor(folder / "greet.py")
    with serve(lambda _: chat_model(runner, runner.tokenizer, 65_536)) as url:
        yield ready(url)


@pytest.mark.parametrize(
    ("client", "arguments"),
    [
        (
            "codex",
            'exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "mend it"',
        ),
        ("claude", '-p "mend it" --allowedTools Read,Edit'),
    ],
)
def test_agent_edits_a_file_with_pasted_settings(url, folder, client, arguments):
    if not shutil.which(client):
        pytest.skip(f"{client} is not installed")
    command = [sys.executable, str(ROOT / "request.py"), "--print-client", client, "--url", url]
    settings = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    home = {"HOME": str(folder.parent), "PATH": os.environ["PATH"]}
    told = subprocess.run(
        ["bash", "-ec", f"{settings.rstrip()} {arguments}"],
        cwd=folder,
        env=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "It is mended." in told.stdout, told.stdout + told.stderr
    assert (folder / "greet.py").read_text() == 'print("hello")\n'
