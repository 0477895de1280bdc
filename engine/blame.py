"""Whose fault an error is: that of a file, or of a library's code for a model, or ours.

What the libraries raise for a damaged file can be of almost every kind, so no list of kinds tells
it from a mistake of our own. Where it was raised does: a call of a library that reads a file is the
only thing that stands in a `damaged` block.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import StartError

_LIBRARIES = {
    "accelerate", "bitsandbytes", "huggingface_hub", "safetensors", "sentencepiece", "tokenizers",
    "transformers",
}  # fmt: skip
# By what torch's own allocator for the CPU begins, whose error is a plain RuntimeError.
_CPU_MEMORY = ("DefaultCPUAllocator", "[enforce fail at alloc_cpu")
REMEDY = (
    "if a file is damaged, delete it and run the download again, as with"
    " `python model_download.py NAME`"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, on a card or here."""
    import torch  # takes seconds, so not where only the type of a message is wanted

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_MEMORY)


def owner_of(frames: TracebackType | None) -> str:
    """In whose code an error was raised: engine, or a library's name; empty if in nobody's.

    Frames of torch and of Python itself are neither's: the nearest before them counts.
    """
    owner = ""
    while frames:
        name = frames.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if name == "engine" or name in _LIBRARIES:
            owner = name
        frames = frames.tb_next
    return owner


def first_line(error: BaseException) -> str:
    """What an error says, for a sentence: without the colours and line breaks of a terminal."""
    said = re.sub(r"\x1b\[\d*m|[\x00-\x09\x0b-\x1f]", "", str(error)).strip()
    return said.partition("\n")[0].rstrip(". :") or "it gives no reason"


def not_loaded(file: Path | str, reason: str) -> StartError:
    """The error for a file that cannot be read as what it should be."""
    return StartError(f"the model could not be loaded from {file} ({reason}); {REMEDY}")


@contextmanager
def damaged(file: Path | str) -> Iterator[None]:
    """Turn what one call raises that reads a file, or a folder, into a StartError that names it.

    A lack of memory stays what it is, and so does an error of our own code that the call calls.
    """
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        # The first frame is this one's, the second that of the block, which makes the call.
        frames = error.__traceback__ and error.__traceback__.tb_next
        if is_out_of_memory(error) or owner_of(frames and frames.tb_next) == "engine":
            raise
        raise not_loaded(file, first_line(error)) from error


def read_text(file: Path) -> str:
    """A file's text, in whichever Unicode encoding an editor saved it, without its mark."""
    with damaged(file):
        data = file.read_bytes()
        return data.decode(json.detect_encoding(data))


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file says. Raises StartError that names it where it is no object in JSON."""
    text = read_text(file)
    with damaged(file):
        held = json.loads(text)
    if not isinstance(held, dict):
        raise not_loaded(file, "it is no object in JSON")
    return held
