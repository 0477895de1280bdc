"""Other programs' packages that tests try, each set in a folder of its own in pytest's cache."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALL_S = 600


def node_packages(config: pytest.Config, name: str, packages: Sequence[str]) -> Path:
    """A folder with packages of npm's, in its node_modules; skips the test without npm."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm, which bring the clients, are not installed")
    folder = config.cache.mkdir(f"{name}-{digest(' '.join(packages))}")
    if not (folder / "installed").exists():
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
        install([command], folder)
    return folder


def python_with(config: pytest.Config, requirements: Path) -> Path:
    """An interpreter that has these requirements, and nothing else."""
    folder = config.cache.mkdir(f"{requirements.stem}-{digest(requirements.read_text())}")
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        environment = [sys.executable, "-m", "venv", str(folder)]
        packages = [str(python), "-m", "pip", "install", "-q", "-r", str(requirements)]
        install([environment, packages], folder)
    return python


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def install(commands: list[list[str]], folder: Path) -> None:
    """Run the commands and mark the folder as whole; skips the test if one of them fails."""
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        if done.returncode:
            pytest.skip(f"the clients cannot be fetched: {done.stderr[-300:]}")
    (folder / "installed").touch()
