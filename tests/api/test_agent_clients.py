"""Coding agents edit a file by way of this server; SDKs call a tool in both of their dialects.

They are other programs' packages, of certain versions, which npm and pip fetch into pytest's cache.
"""

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
from tests.client_packages import node_packages, python_with
from tests.conftest import PATIENCE, ROOT, ScriptedRunner, chat_model, ready, serve
from tests.tool_caller import ToolCaller, thinking_tokenizer, tool_tokenizer

pytestmark = pytest.mark.release
NUM_SLOTS = 400_000
PATCH = """*** Begin Patch
*** Update File: greet.py
@@
-print("helo")
+print("hello")
*** End Patch
"""
# What is run of each agent behind the settings that are pasted.
AGENTS = {
    "codex": 'exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "mend it"',
    "claude": '-p "mend it" --allowedTools Read,Edit',
    "opencode": 'run "mend it"',
}
AGENT_PACKAGES = (
    "@openai/codex@0.171.0",
    "@anthropic-ai/claude-code@2.1.332",
    "opencode-ai@1.18.33",
)
NODE_PACKAGES = (
    "openai@6.49.0",
    "@anthropic-ai/sdk@1.14.0",
    "ai@6.0.326",
    "@ai-sdk/openai@3.0.141",
    "@ai-sdk/anthropic@3.0.140",
    "zod@4.6.7",
)


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
        steps = self.edits(prompt)
        done = prompt.count("<tool_response>")
        if done >= len(steps):
            return "It is mended."
        name, arguments = steps[done]
        spelled = json.dumps(arguments)
        return f'<tool_call>\n{{"name": "{name}", "arguments": {spelled}}}\n</tool_call>'

    def edits(self, prompt: str) -> list[tuple[str, dict[str, str]]]:
        if '"name": "apply_patch"' in prompt:
            return [("exec_command", {"cmd": "cat greet.py"}), ("apply_patch", {"input": PATCH})]
        if '"name": "Edit"' in prompt:
            edit = {"file_path": self.file, "old_string": "helo", "new_string": "hello"}
            return [("Read", {"file_path": self.file}), ("Edit", edit)]
        if '"name": "edit"' in prompt:
            edit = {"filePath": self.file, "oldString": "helo", "newString": "hello"}
            return [("read", {"filePath": self.file}), ("edit", edit)]
        return []  # a side request, such as for a title


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
    ("agent", "package"),
    [
        ("codex", ""),
        ("claude", ""),
        ("opencode", "@ai-sdk/openai-compatible"),  # as it is pasted
        ("opencode", "@ai-sdk/openai"),
        ("opencode", "@ai-sdk/anthropic"),
    ],
)
def test_agent_edits_a_file_with_pasted_settings(url, folder, pytestconfig, agent, package):
    agents = node_packages(pytestconfig, "coding-agents", AGENT_PACKAGES)
    command = [sys.executable, str(ROOT / "request.py"), "--print-client", agent, "--url", url]
    settings = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = settings.replace("@ai-sdk/openai-compatible", package)
    path = f"{agents / 'node_modules' / '.bin'}:{os.environ['PATH']}"
    told = subprocess.run(
        ["bash", "-ec", f"{settings.rstrip()} {AGENTS[agent]}"],
        cwd=folder,
        env={"HOME": str(folder.parent), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "It is mended." in told.stdout, told.stdout + told.stderr
    assert (folder / "greet.py").read_text() == 'print("hello")\n'


@pytest.fixture(scope="module", params=["plain", "thinking"])
def caller_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a model that calls tools, and of one that thinks before."""
    if request.param == "plain":
        caller = ToolCaller(tool_tokenizer())
    else:
        begin = "<think>hm</think><tool_call>"
        caller = ToolCaller(thinking_tokenizer(), begin, say="<think>so</think>done")
    caller.rows, caller.ids = NUM_SLOTS, torch.zeros(NUM_SLOTS, dtype=torch.long)
    with serve(lambda _: chat_model(caller, caller.tokenizer, 65_536)) as url:
        yield ready(url)


def test_clients_in_python(caller_url, pytestconfig):
    python = python_with(pytestconfig, ROOT / "tests" / "requirements-agents.txt")
    script = ROOT / "tests" / "agent_clients.py"
    # litellm would wait for a list of prices.
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [python, script, caller_url]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_clients_in_javascript(caller_url, pytestconfig):
    folder = node_packages(pytestconfig, "agent-clients", NODE_PACKAGES)
    # A module looks for others beside itself.
    script = shutil.copy(ROOT / "tests" / "agent_clients.mjs", folder)
    command = ["node", script, caller_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
