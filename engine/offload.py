"""The folder for layers that a device map leaves on disk; it goes with the model."""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

_PREFIX = "chat-api-offload-"


def offload_folder() -> Path:
    """A new folder, named for this process. Those of processes that were killed are removed."""
    for place in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = re.match(rf"{_PREFIX}(\d+)-", place.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            remove(place)
    made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    atexit.register(remove, made)
    return made


def remove(place: Path | None) -> None:
    """Remove such a folder, if there is one; nothing is said where that is not possible."""
    if place:
        shutil.rmtree(place, ignore_errors=True)
