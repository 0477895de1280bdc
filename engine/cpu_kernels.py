"""Our kernels for CPUs, compiled where they run; cpu_kernels.cpp says what each computes.

They need a C++ compiler that knows GCC's vectors and OpenMP, once. What it makes is kept in the
user's cache folder, if there is one, under a name that changes with the source, the compiler and
the CPU's instructions.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

# By what torch's own kernels were chosen for. The processors that torch calls by neither name have
# no vectors as wide; of those, ARM's need no flag.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
COMPILERS = ("c++", "g++", "clang++")


class Unavailable(Exception):
    """Why there are no kernels here."""


class Linear(ctypes.Structure):
    """As cpu_kernels.cpp has it; so are the others."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *(
            (name, ctypes.c_int64)
            for name in ("in_features", "out_features", "panels", "block", "kind")
        ),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "head_norm")),
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *(
            (name, ctypes.c_int64)
            for name in ("width", "inner", "queries", "kv_heads", "head_width", "window")
        ),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "head_eps", "scale")),
    ]


class StepInputs(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "positions", "cos", "sin", "scratch")),
        ("threads", ctypes.c_int64),
    ]


@cache
def kernels() -> Any:
    """The kernels, as a library. Raises Unavailable where they cannot be compiled or loaded."""
    try:
        with tempfile.TemporaryDirectory() as spare:
            kept = cache_folder()
            library = ctypes.CDLL(str(compiled(kept if can_write(kept) else Path(spare))))
    except OSError as error:
        raise Unavailable(str(error)) from error
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    library.linear.argtypes = [pointer, number, pointer, pointer, ctypes.c_int]
    library.rms_norm.argtypes = [pointer, real, number, number, pointer, pointer]
    library.scratch_floats.argtypes = [pointer]
    library.scratch_floats.restype = number
    library.decoder_layer.argtypes = [*[pointer] * 4, number, pointer, pointer]
    for function in (library.linear, library.rms_norm, library.decoder_layer):
        function.restype = None
    return library


def why_missing() -> str | None:
    """Why there are no kernels here; None if there are."""
    try:
        kernels()
    except Unavailable as error:
        return str(error)
    return None


def compiler() -> list[str]:
    """The C++ compiler, as `CXX` names it, or found. Raises Unavailable where there is none."""
    found = next(filter(None, map(shutil.which, COMPILERS)), "")
    words = shlex.split(os.environ.get("CXX") or found)
    if not words:
        raise Unavailable("there is no C++ compiler; install one, as by `apt install g++`")
    return words


def flags() -> list[str]:
    """What the compiler is told. Raises Unavailable for a CPU whose vectors are too narrow."""
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions not in FLAGS and platform.machine() not in ("aarch64", "arm64"):
        raise Unavailable(f"there are none for this CPU's instructions ({instructions})")
    general = ["-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-fopenmp"]
    return general + FLAGS.get(instructions, [])


def compiled(folder: Path) -> Path:
    """The file of the library in a folder, compiled unless it has been before."""
    compile_, told = compiler(), flags()
    source = files("engine").joinpath("cpu_kernels.cpp").read_bytes()
    made_of = repr((source, told, run([*compile_, "--version"]))).encode()
    library = folder / f"cpu_kernels-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            text, part, whole = (Path(place, f"cpu_kernels.{end}") for end in ("cpp", "o", "so"))
            text.write_bytes(source)
            run([*compile_, *told, "-c", str(text), "-o", str(part)])
            # Not linked with OpenMP: torch has loaded its own, and two would fight for the cores.
            run([*compile_, "-shared", str(part), "-o", str(whole)])
            whole.replace(library)
    return library


def cache_folder() -> Path:
    """As the XDG Base Directory Specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chat-api"


def can_write(folder: Path) -> bool:
    """Whether there is such a folder, or can be, to keep something in."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK | os.X_OK)


def run(arguments: list[str]) -> str:
    """What a program prints. Raises Unavailable if it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x.strip()] or [f"exit {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{Path(arguments[0]).name}: {line}")
    return done.stdout
