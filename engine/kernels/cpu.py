"""Our kernels for CPUs, compiled where they run; cpp/ says what each computes.

They need a C++ compiler that knows GCC's vectors and OpenMP, once. What it makes is kept in the
user's cache folder, if there is one, under a name that changes with the source, the compiler and
the CPU's instructions.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
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
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
# Clang's OpenMP is not the one that torch brings along.
_COMPILERS = ("g++", "c++")
# Seconds for the compiler, which needs five.
COMPILE_TIMEOUT_S = 120.0


log = logging.getLogger("chat")


class _Unavailable(Exception):
    """Why there are no kernels here."""


class Linear(ctypes.Structure):
    """As the C++ has it; so are the others."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "offset", "order")),
        *(
            (name, ctypes.c_int64)
            for name in ("in_features", "out_features", "panels", "block", "kind", "half")
        ),
    ]


class Update(ctypes.Structure):
    """An adapter's addition to one product, as the kernels have it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("down", "up")),
        *((name, ctypes.c_int64) for name in ("rank", "first", "out")),
    ]


class Updates(ctypes.Structure):
    """Those of all adapters to one layer's product, as the kernels have it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("parts", "begins")),
        *((name, ctypes.c_int64) for name in ("in_features", "ranks")),
    ]


class Layer(ctypes.Structure):
    """A decoder layer, as the kernels have it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "head_norm")),
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *(
            (name, ctypes.c_int64)
            for name in ("width", "inner", "queries", "kv_heads", "head_width", "window")
        ),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "head_eps", "scale")),
        ("updates", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """A model whose layers are all such, with its last norm and its head."""

    _fields_ = [
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "width")),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("head", Linear),
    ]


class Cache(ctypes.Structure):
    """A layer's keys and values."""

    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("rows", ctypes.c_int64)]


class StepInputs(ctypes.Structure):
    """What a step's layers share, as the kernels have it."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "positions", "cos", "sin", "scratch")),
        ("threads", ctypes.c_int64),
        ("adapters", ctypes.c_void_p),
    ]


class DeltaLayer(ctypes.Structure):
    """A layer of the gated delta rule, as the kernels have it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("taps", "rates", "dt_bias", "norm")),
        *((name, ctypes.c_int64) for name in ("key_heads", "heads", "key_width", "value_width")),
        ("eps", ctypes.c_float),
    ]


class DeltaStep(ctypes.Structure):
    """What a step gives such a layer, as the kernels have it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "chains")),
        *(
            (name, ctypes.c_void_p)
            for name in ("firsts", "sources", "segments", "ends", "targets", "chain_of", "scratch")
        ),
        ("threads", ctypes.c_int64),
    ]


def kernels() -> Any:
    """The kernels, as a library. Raises Unavailable where they cannot be compiled or loaded."""
    found = outcome()
    if isinstance(found, _Unavailable):
        raise found
    return found


@cache
def outcome() -> Any:
    """The library, or why there is none; none of the reasons may end a start."""
    try:
        return library()
    except _Unavailable as reason:
        return reason
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        return _Unavailable(str(error))


def library() -> Any:
    """The library, compiled unless it has been before. Raises what it meets."""
    compile_, told = compiler(), flags()
    sources = source_files()
    made_of = repr((sources, told, run([*compile_, "--version"]))).encode()
    name = f"cpu_kernels-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    folder = writable(cache_folder())
    kept = Path(cache_folder() or "/nowhere", name)
    if why := why_untrusted(kept):
        log.warning("%s is not used, and the kernels are compiled anew: %s", kept.parent, why)
        folder = None
    elif kept.exists():
        try:
            return loaded(kept)
        except (OSError, AttributeError):  # somebody broke it
            kept.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name, content in sources.items():
            Path(place, name).write_bytes(content)
        text, part, whole = (Path(place, f"cpu.{end}") for end in ("cpp", "o", "so"))
        run([*compile_, *told, "-c", str(text), "-o", str(part)])
        # Not linked with OpenMP: torch has loaded its own, and two would fight for the cores.
        run([*compile_, "-shared", str(part), "-o", str(whole)])
        whole.chmod(0o700)
        with whole.open("rb") as file:  # half a library would end every later start
            os.fsync(file.fileno())
        found = loaded(whole)
        if folder:
            whole.replace(kept)
    return found


def source_files() -> dict[str, bytes]:
    """All that cpu.cpp includes, and itself, by name; also where the server is one file."""
    found = [file for file in files("engine.kernels").joinpath("cpp").iterdir() if file.is_file()]
    return {file.name: file.read_bytes() for file in sorted(found, key=lambda file: file.name)}


def loaded(path: Path) -> Any:
    """The library in a file. Raises OSError or AttributeError if it is none, or another."""
    found = ctypes.CDLL(str(path))
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    found.linear.argtypes = [pointer, number, pointer, pointer, ctypes.c_int]
    found.rms_norm.argtypes = [pointer, real, number, number, pointer, pointer]
    found.adapt.argtypes = [pointer, pointer, number, pointer, pointer, number, pointer]
    found.adapt.argtypes += [ctypes.c_int]
    found.scratch_floats.argtypes = [pointer]
    found.scratch_floats.restype = number
    found.decoder_layer.argtypes = [*[pointer] * 4, number, pointer, pointer]
    found.decoder_step.argtypes = [*[pointer] * 5, number, pointer, pointer]
    found.gated_delta.argtypes = [pointer] * 9
    computing = found.linear, found.rms_norm, found.adapt, found.decoder_layer, found.gated_delta
    for function in (*computing, found.decoder_step):
        function.restype = None
    return found


def why_missing() -> str | None:
    """Why there are no kernels here; None if there are."""
    found = outcome()
    return str(found) if isinstance(found, _Unavailable) else None


def compiler() -> list[str]:
    """The C++ compiler, as `CXX` names it, or found. Raises Unavailable where there is none."""
    words = shlex.split(os.environ.get("CXX", ""))
    found = [path for path in map(shutil.which, _COMPILERS) if path]
    if not words + found:
        raise _Unavailable("there is no C++ compiler; install one, as by `apt install g++`")
    return words or found[:1]


def flags() -> list[str]:
    """What the compiler is told. Raises Unavailable for a CPU whose vectors are too narrow."""
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions not in _FLAGS and platform.machine() not in ("aarch64", "arm64"):
        raise _Unavailable(f"there are none for this CPU's instructions ({instructions})")
    general = ["-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-fopenmp"]
    return general + _FLAGS.get(instructions, [])


def cache_folder() -> Path | None:
    """As the XDG Base Directory Specification has it; None for a user without a home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chat-api"
    return None


def writable(folder: Path | None) -> Path | None:
    """The folder, made if need be; None if nothing can be kept in it."""
    if folder is None:
        return None
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def why_untrusted(file: Path) -> str | None:
    """Why a library that is kept could be somebody else's; None if it could not, or is not there.

    Whoever may write to a folder may put another library into it, which would run as this program.
    """
    if not hasattr(os, "geteuid"):
        return None  # on Windows the folder of a user is the user's
    for path in (file, *file.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = path.stat()
            ours = found.st_uid in (0, os.geteuid())
            if path in (file, file.parent) and not ours:
                return f"{path} belongs to another user"
            # Of a folder above, those of a group often may write to it; of one with the sticky bit,
            # as /tmp has it, only an entry's owner may change that entry.
            others = 0o022 if path in (file, file.parent) else 0o002
            if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
                return f"others may write to {path}"
    return None


def run(arguments: list[str]) -> str:
    """What a program prints. Raises Unavailable if it fails, SubprocessError if it hangs."""
    done = subprocess.run(
        arguments,
        env={name: value for name, value in os.environ.items() if not name.startswith("CHAT_")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=COMPILE_TIMEOUT_S,
    )
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x.strip()] or [f"exit {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise _Unavailable(f"{Path(arguments[0]).name}: {line}")
    return done.stdout
