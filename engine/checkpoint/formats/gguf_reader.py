"""Reads a GGUF file (github.com/ggml-org/ggml, docs/gguf.md): metadata, and tensors where they lie.

The package gguf reads such files too, but walks every token of a vocabulary in numpy, which takes
seconds; of a kind of block that is not ours it is asked for the weights.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import StartError

# By their numbers in a file; those of strings and arrays are 8 and 9.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
# Blocks: by their number in a file the name, the weights in one, and its bytes.
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its blocks, uint8 [..., rows, bytes of a row]."""

    name: str
    kind: str
    shape: tuple[int, ...]  # as torch has it, the columns last
    data: np.ndarray[Any, Any]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's metadata and its tensors by name, mapped and not read; of all its parts, if it is
    the first of several.

    Raises StartError for a file that is damaged, or another part than the first.
    """
    fields, tensors = _read_file(path)
    count = int(fields.get("split.count") or 1)
    if count > 1:
        match = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", path.name)
        if not match or int(match[2]) != count:
            raise StartError(
                f"{path} is one of {count} parts; give --model the first of them, by its own name"
                f" (…-00001-of-{count:05}.gguf)"
            )
        for number in range(2, count + 1):
            part = path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf")
            if not part.is_file():
                raise StartError(f"{part} is not there; fetch all {count} parts of the file")
            tensors |= _read_file(part)[1]
    return fields, tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Cursor(mapped).file()
    except (struct.error, UnicodeDecodeError, IndexError, OverflowError, MemoryError) as error:
        raise StartError(
            f"{path} is no whole GGUF file ({error}); delete it and run the download again"
        ) from error


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        size = self.number("Q")
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise IndexError("it ends within a string")
        return self.data[start : self.at].decode("utf-8", errors="surrogateescape")

    def strings(self, count: int) -> list[str]:
        """As `string` does, for the hundred thousands of a vocabulary."""
        data, at, found = self.data, self.at, []
        size_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + size_at(data, at)[0]
            found.append(data[start:at].decode("utf-8", errors="surrogateescape"))
        self.at = at
        if at > len(data):
            raise IndexError("it ends within a string")
        return found

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(self._code(kind))
        kind, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise IndexError(f"an array of {count} values")
        if kind == STRING:
            return self.strings(count)
        if kind == ARRAY:
            return [self.value(kind) for _ in range(count)]
        numbers = struct.unpack_from(f"<{count}{self._code(kind)}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{self._code(kind)}")
        return [*numbers]

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise IndexError(f"a value of the type {kind}")
        return _SCALARS[kind]

    def file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        magic, version = self.data[:4], struct.unpack_from("<I", self.data, 4)[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise IndexError(f"it begins with {magic!r}, version {version}")
        self.at = 8
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        fields = {}
        for _ in range(num_fields):
            key, kind = self.string(), self.number("I")
            fields[key] = self.value(kind)
        places = [self._place() for _ in range(num_tensors)]
        align = int(fields.get("general.alignment", 32))
        start = -(-self.at // align) * align
        return fields, {place[0]: self._tensor(start, *place) for place in places}

    def _place(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, kind, and where it begins."""
        name = self.string()
        shape = tuple(self.number("Q") for _ in range(self.number("I")))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def _tensor(
        self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> Tensor:
        called, weights, size = BLOCKS.get(kind) or _other_blocks(kind)
        *rows, columns = shape
        if columns % weights:
            raise IndexError(f"{name} has rows of {columns} weights in blocks of {weights}")
        wide = (*rows, columns // weights * size)
        at, total = start + offset, int(np.prod(wide, dtype=np.int64))
        if at + total > len(self.data):
            raise IndexError(f"it ends before {name} does")
        data = np.frombuffer(self.data, np.uint8, total, at).reshape(wide)
        return Tensor(name, called, shape, data)


def _other_blocks(kind: int) -> tuple[str, int, int]:
    """The same of a kind that the package gguf knows."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        named = GGMLQuantizationType(kind)
    except ValueError as unknown:
        raise IndexError(f"tensors of the kind {kind}") from unknown
    return (named.name, *GGML_QUANT_SIZES[named])
