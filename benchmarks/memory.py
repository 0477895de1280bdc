"""How much memory of a machine a model needs on a CPU: while it is loaded, and afterwards.

    python benchmarks/memory.py                                 the demo model, in each width
    python benchmarks/memory.py --model FOLDER --quantize 8bit  another, in 8 bits only

Each load is a process of its own, whose memory is looked at every few milliseconds. Its own memory
is what the system cannot take back. Files that are mapped, as a checkpoint is while it is read, are
told apart: of those the system drops what others need, and reads it again. Needs Linux.
"""

import argparse
import select
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_download import find_model  # noqa: E402

MIB = 2**20
LOAD = """
import os, sys
sys.path.insert(0, sys.argv[1])
from engine import load
import engine.loading  # which imports torch
print("begin", flush=True)
model = load(sys.argv[2], quantize=sys.argv[3], dtype=sys.argv[4], device_map="cpu",
             cache_memory="64MiB")
print(model.facts["weights"].partition(" (")[0], flush=True)
sys.stdin.read()
os._exit(0)
"""


class Memory(NamedTuple):
    """A process's memory in bytes: its own, and of files that are mapped."""

    own: int
    files: int

    @classmethod
    def of(cls, process: psutil.Process) -> "Memory":
        """What it has now."""
        told = process.memory_info()
        return cls(told.rss - told.shared, told.shared)


def measure(folder: Path, quantize: str, dtype: str) -> str:
    """A row of the table: before, at most and after, in MiB."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(ROOT), str(folder), quantize, dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin
    assert child.stdout
    process = psutil.Process(child.pid)
    child.stdout.readline()
    before = Memory.of(process)
    peak = before.own
    while not select.select([child.stdout], [], [], 0.002)[0]:
        peak = max(peak, Memory.of(process).own)
    weights = child.stdout.readline().strip() or "could not be loaded"
    after = Memory.of(process)
    child.stdin.close()
    child.wait()
    figures = (before.own, peak, after.own, after.files)
    cells = [f"`{quantize}`", weights, *(f"{figure / MIB:,.0f}" for figure in figures)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table, in MiB."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="a model's folder or name")
    parser.add_argument("--quantize", nargs="+", default=["none", "8bit", "4bit"])
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    folder = find_model(args.model)
    print("| `--quantize` | weights | before | at most | afterwards | mapped files |")
    print("| --- | --- | --- | --- | --- | --- |")
    for quantize in args.quantize:
        print(measure(folder, quantize, args.dtype), flush=True)


if __name__ == "__main__":
    main()
