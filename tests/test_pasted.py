"""A newcomer pastes a README's commands in order, into a bare shell with nothing cached.

And after them the example of a tool, which stands in docs/tools.md.

`pytest -m release tests/test_pasted.py -s` prints the seconds of each.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_for

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What takes a rented machine, a mirror in China or gigabytes.
ELSEWHERE = (
    "scp -P PORT ",
    "ssh -p PORT ",
    "ssh -CN ",
    "tmux ",
    "python -m venv --system-site-packages ",
    "pip install -i ",
    "python model_download.py ",
    "python api.py --model ",
    "CHAT_API_KEY=choose-one python api.py --model ",
)
SERVER = "pip install -r requirements.txt && python api.py"
# Of this machine, and not a newcomer's: where its certificates and its package index are.
OURS = re.compile("PIP_(?!CACHE_DIR).*|SSL_CERT_FILE|REQUESTS_CA_BUNDLE")


def commands(text: str) -> Iterator[str]:
    """The lines of the bash blocks, continued ones joined, and the Python blocks as one each."""
    for language, code in BLOCK.findall(text):
        if language == "python":
            # Named outside its block.
            yield "pip install openai"
            yield f"python - <<'END'\n{code}END"
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if command := re.sub(r"\s+# .*", "", line).strip():
                yield command


class Shell:
    """A bash that runs one command after another, as in a terminal."""

    def __init__(self, folder: Path, home: Path):
        bare = {"HOME": str(home), "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin"}
        bare |= {name: value for name, value in os.environ.items() if OURS.fullmatch(name)}
        self.log = home / "log"
        with open(self.log, "w") as log:
            self.bash = subprocess.Popen(
                ["bash"],
                cwd=folder,
                env=bare,
                text=True,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def paste(self, command: str) -> str:
        """What a command says; fails if it fails."""
        begun = len(self.said())
        self.bash.stdin.write(f'{command}\necho "<<$?>>"\n')
        self.bash.stdin.flush()
        wait_for(lambda: re.search(r"<<\d+>>", self.said()[begun:]), seconds=1500)
        said = self.said()[begun:]
        assert "<<0>>" in said, f"{command}\n{said[-3000:]}"
        return said

    def serve(self, command: str) -> None:
        """Start what goes on until it is stopped, and wait until it is ready."""
        begun = len(self.said())
        self.bash.stdin.write(f"({command}) & SERVER=$!\n")
        self.bash.stdin.flush()

        def is_ready() -> bool:
            said = self.said()[begun:]
            assert "ERROR" not in said, said[-3000:]
            assert "api.py: " not in said, said[-3000:]
            return "INFO ready: " in said

        wait_for(is_ready, seconds=1500)

    def close(self) -> None:
        self.bash.stdin.write("pkill -P $SERVER; kill $SERVER\nexit\n")
        self.bash.stdin.close()
        self.bash.wait(60)


@pytest.fixture
def shell(tmp_path) -> Iterator[Shell]:
    """In a folder with what git has, and a home with nothing in it."""
    folder, home = tmp_path / "chat-api", tmp_path / "home"
    home.mkdir()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.splitlines():
        if name.startswith('"'):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shell = Shell(folder, home)
    yield shell
    shell.close()


@pytest.mark.release
@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_commands_of_readme_work_when_pasted_in_order(shell, name, capsys):
    said = {}
    pages = ROOT / name, ROOT / "docs" / "tools.md"
    for command in commands("".join(page.read_text(encoding="utf-8") for page in pages)):
        if command.startswith(ELSEWHERE):
            continue
        begun = time.monotonic()
        if command == SERVER:
            shell.serve(command)
        else:
            said[command] = shell.paste(command)
        with capsys.disabled():
            print(f"{time.monotonic() - begun:7.1f} s  {command.splitlines()[0][:90]}", flush=True)
    answers = "".join(said.values())
    assert "22 degrees in Paris" in answers
    assert '"response":"The capital of France is Paris."' in answers
    assert answers.count("The capital of France is Paris.") >= 3
