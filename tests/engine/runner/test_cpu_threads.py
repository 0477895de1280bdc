"""As many threads compute as there are cores that other programs leave."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from engine.runner import cpu_threads as threads
from engine.runner.cpu_threads import FreeCores, cores_left


@pytest.mark.parametrize(
    ("cores", "used", "left"),
    [
        (2, 0.0, 2),
        (2, 0.3, 2),  # a client on the same machine
        (2, 0.9, 1),  # a core that another program shares with ours
        (2, 1.3, 1),
        (2, 2.0, 1),
        (8, 1.0, 7),
        (8, 3.0, 5),
        (1, 0.0, 1),
        (2, -0.2, 2),  # the clocks do not agree
    ],
)
def test_cores_that_others_use_are_left_to_them(cores, used, left):
    assert cores_left(cores, used) == left


def look(cores):
    """The number of threads after a look at the machine."""
    time.sleep(threads.INTERVAL)  # what the measurement lasts
    cores.settle()
    return torch.get_num_threads()


def test_threads_become_fewer_beside_busy_programs(monkeypatch):
    monkeypatch.setattr(threads, "MAX_THREADS", 2)
    busy = [sys.executable, "-c", "while True: pass"]
    with ThreadPoolExecutor(1) as thread:  # of whose threads nothing is left behind
        number = torch.get_num_threads()
        cores = thread.submit(FreeCores).result()
        programs = [subprocess.Popen(busy) for _ in range(2 * psutil.cpu_count())]
        try:
            assert any(thread.submit(look, cores).result() == 1 for _ in range(20))
        finally:
            for program in programs:
                program.kill()
                program.wait()
            torch.set_num_threads(number)


@pytest.mark.skipif(not hasattr(psutil.Process, "cpu_affinity"), reason="the system does not say")
@pytest.mark.parametrize("numbers", [[0], [0, 4096], [4095, 4096]])
def test_numbers_of_cores_may_be_others_than_those_that_are_listed(monkeypatch, numbers):
    """As in a container, which lists its own cores from 0 on, or with cores switched off."""
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: numbers)
    monkeypatch.setattr(threads, "MAX_THREADS", 2)
    number = torch.get_num_threads()
    try:
        assert look(FreeCores()) in (1, 2)
    finally:
        torch.set_num_threads(number)
