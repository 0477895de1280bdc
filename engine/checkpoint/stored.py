"""A checkpoint as a dict of name to `Stored`: a tensor that is read when it is asked for.

Adapters and formats of few bits are functions from such a dict to another, before transformers
renames, splits or stacks anything; it takes the dict in place of a folder.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.blame import damaged, not_loaded
from engine.checkpoint.files import weight_files

# Weights by the names of the checkpoint's own layout.
Weights = Mapping[str, "Stored"]


class Stored:
    """A tensor that is read, or computed, each time it is asked for; transformers takes it for a
    slice of a safetensors file."""

    def __init__(self, shape: Any, dtype: torch.dtype, read: Callable[[], torch.Tensor]):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Stored":
        """One that is in memory, or mapped there."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


# As safetensors names them.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors or .bin file, by name. Nothing in it is executed."""
    if file.suffix != ".safetensors":
        # Files of before torch 1.6 are no archives, and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        with damaged(file):
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        return {name: Stored.of(tensor) for name, tensor in tensors.items()}
    with damaged(file):
        opened: Any = safe_open(file, "pt")
    return {name: _slice_of(opened, name) for name in opened.keys()}  # noqa: SIM118


def _slice_of(opened: Any, name: str) -> Stored:
    part = opened.get_slice(name)
    # A type that this torch has no name for is read as what torch makes of it.
    dtype = _DTYPES.get(part.get_dtype()) or opened.get_tensor(name).dtype
    return Stored(part.get_shape(), dtype, lambda: opened.get_tensor(name))


def stored_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, by their names in it. Raises StartError where there are none."""
    files = weight_files(folder)
    if not files:
        raise not_loaded(folder, "no model.safetensors and no pytorch_model.bin are there")
    return {name: x for file in files for name, x in stored_in(file).items()}
