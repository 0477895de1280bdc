"""How many threads compute on a CPU: as many as there are cores that other programs leave.

OpenMP's threads wait for each other hundreds of times in a step, and keep their cores busy with
it. One whose core another program has keeps all of them waiting for as long as that one computes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from engine.container import cpu_quota

# Seconds over which the use of the cores is measured.
INTERVAL = 0.5
# The part of a core that others may use before it is left to them.
_IGNORED_SHARE = 0.6
# Before any thread sets it for those that begin later; no more than a container's quota is for, as
# threads that have used it up stop all others in the middle of an operation.
MAX_THREADS = min(torch.get_num_threads(), max(1, int(min(cpu_quota(), 2**16) + 0.1)))


class FreeCores:
    """Sets how many threads the operations of the calling thread have."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._when = time.monotonic()
        _, self._used = self._used_by_others()
        if torch.get_num_threads() > MAX_THREADS:
            torch.set_num_threads(MAX_THREADS)

    def settle(self) -> None:
        """Look at what others have used since the last look, if that is long enough ago."""
        now = time.monotonic()
        seconds = now - self._when
        if seconds < INTERVAL:
            return
        number, used = self._used_by_others()
        torch.set_num_threads(min(MAX_THREADS, cores_left(number, (used - self._used) / seconds)))
        self._when, self._used = now, used

    def _used_by_others(self) -> tuple[int, float]:
        """How many cores this process may use, and the seconds of them that others have used.

        The seconds are since some time; what counts is their difference.
        """
        cores = psutil.cpu_times(percpu=True)
        if hasattr(self._process, "cpu_affinity"):
            numbers = self._process.cpu_affinity()
            # A container may list its own cores alone, while the numbers are the machine's.
            if max(numbers) < len(cores):
                cores = [cores[number] for number in numbers]
        idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in cores)
        own = self._process.cpu_times()
        return len(cores), len(cores) * time.monotonic() - idle - own.user - own.system


def cores_left(cores: int, used: float) -> int:
    """How many of the cores are left, where others use as many as `used`; at least one."""
    return max(1, cores - int(used + 1 - _IGNORED_SHARE))


@contextmanager
def cores_settled_behind() -> Iterator[None]:
    """What follows a block computes on the cores that others have left meanwhile."""
    cores = FreeCores()
    yield
    cores.settle()
