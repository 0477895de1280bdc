"""What measuring found at an earlier start, kept by all that it depends on.

In the user's cache folder, beside the kernels: a file for each machine, model and version of this
program, under a name that is made of them.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from engine.kernels.cpu import cache_folder, outcome, why_untrusted, writable

# Seconds or the like, by what was measured, in order; names are texts afterwards.
Measured = Mapping[Any, Any]

# The rooms whose code is measured, or measures.
_ROOMS = "kernels", "attention", "layers", "runner"


def kept(what: str, of: Any, measure: Callable[[], Measured], anew: bool = False) -> Measured:
    """What `measure` found when it was last asked for this, or what it finds now.

    `of` is all that the result depends on besides the machine and this program, by its repr. The
    result is kept if it is not empty; with `anew`, it is always measured.
    """
    folder = cache_folder()
    made_of = repr((what, of, _machine(), torch.get_num_threads())).encode()
    name = f"measured-{hashlib.sha256(made_of).hexdigest()[:16]}.json"
    if folder and not anew and (found := _read(folder / name)):
        return found
    found = measure()
    if found and writable(folder) and folder and not why_untrusted(folder / name):
        _write(folder / name, found)
    return found


def _machine() -> tuple[str, ...]:
    """The processor, what computes on it, and this program."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    by = getattr(outcome(), "_name", "no kernels"), torch.__version__
    return (
        *processor,
        str(os.cpu_count()),
        torch.backends.cpu.get_cpu_capability(),
        *by,
        _source(),
    )


@cache
def _source() -> str:
    """A hash of the modules that matter; also where the server is one file."""
    found = hashlib.sha256()
    for room in _ROOMS:
        modules = [file for file in files(f"engine.{room}").iterdir() if file.name.endswith(".py")]
        for file in sorted(modules, key=lambda file: file.name):
            found.update(file.read_bytes())
    return found.hexdigest()


def _read(file: Path) -> Measured | None:
    """What a file has, if it is ours and whole."""
    try:
        if why_untrusted(file):
            return None
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, found: Measured) -> None:
    """All of it at once, or nothing: two starts may write."""
    # A full disk is no reason not to start.
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent) as place:
        part = Path(place, file.name)
        part.write_text(json.dumps(found))
        part.chmod(0o600)
        part.replace(file)
