"""What a container may use: limits of CPU and memory that the machine's own numbers do not show.

By Linux's control groups, version 2 (cpu.max, memory.max) and 1 (cpu.cfs_quota_us,
memory.limit_in_bytes), as the kernel's documents of cgroup-v1 and cgroup-v2 have them. A group's
limits hold for all below it, so each on the way up is read. Elsewhere nothing is found.
"""

from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path

# Under which version 1's controllers may lie.
_NAMES = {"cpu": ("cpu", "cpu,cpuacct", "cpuacct,cpu"), "memory": ("memory",)}


def cpu_quota(root: Path = Path("/")) -> float:
    """How many cores' time this process may use; infinity where there is no limit."""
    return min((_quota_of(folder) for folder in _groups("cpu", root)), default=inf)


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that this process and those in its group may still use; infinity without a limit.

    What the kernel can take back, files that were read, counts as free.
    """
    return min((_room_in(folder) for folder in _groups("memory", root)), default=inf)


def _quota_of(group: Path) -> float:
    quota, period = [*_words(group / "cpu.max"), "max", "max"][:2]
    if quota == "max":
        quota = _word(group / "cpu.cfs_quota_us")
        period = _word(group / "cpu.cfs_period_us")
    with suppress(ValueError, ZeroDivisionError):
        if float(quota) > 0:
            return float(quota) / float(period)
    return inf


def _room_in(group: Path) -> float:
    statistics = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
    for most, used, files in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    ):
        with suppress(ValueError):
            held = float(_word(group / used)) - sum(float(statistics.get(x, 0)) for x in files)
            return max(0.0, float(_word(group / most).replace("max", "inf")) - max(0.0, held))
    return inf


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's group and those above it, as far as they can be seen."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            tops = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            tops = [mounted / name for name in _NAMES[controller]]
        else:
            continue
        inner = Path("" if ".." in path else path.lstrip("/"))  # outside of what is seen here
        for top in tops:
            # In a container the path may be the machine's, and only the top be there.
            yield from (top / part for part in (inner, *inner.parents) if (top / part).is_dir())


def _word(file: Path) -> str:
    return next(iter(_words(file)), "")


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]


def _lines(file: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text().splitlines()
    return []
