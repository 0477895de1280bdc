"""A container's limits, by the files that Linux shows of them."""

from math import inf
from pathlib import Path

import pytest
import torch

from engine.container import cpu_quota, free_memory
from engine.runner import cache_budget as budget
from engine.runner.cache_budget import CHILDREN, cache_budget

V1 = "4:memory:/pod/one\n2:cpu,cpuacct:/pod/one\n"
V1_CPU, V1_MEMORY = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, inf),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, inf),
        # The least of those on the way counts.
        (
            {
                "proc/self/cgroup": "0::/pod/one",
                "sys/fs/cgroup/pod/cpu.max": "50000 100000",
                "sys/fs/cgroup/pod/one/cpu.max": "400000 100000",
            },
            0.5,
        ),
        # The machine's path, of which a container sees the end alone.
        ({"proc/self/cgroup": "0::/docker/a1", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/../..", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        (
            {
                "proc/self/cgroup": V1,
                f"{V1_CPU}/pod/one/cpu.cfs_quota_us": "100000",
                f"{V1_CPU}/pod/one/cpu.cfs_period_us": "100000",
                f"{V1_CPU}/cpu.cfs_quota_us": "-1",
            },
            1,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, inf),
    ],
)
def test_quota_of_cores(tmp_path, files, cores):
    assert cpu_quota(put(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, inf),
        (
            {
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/memory.max": "1000",
                "sys/fs/cgroup/memory.current": "700",
                "sys/fs/cgroup/memory.stat": "anon 300\ninactive_file 100\nactive_file 50",
            },
            450,
        ),
        (
            {
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/memory.max": "max",
                "sys/fs/cgroup/memory.current": "700",
            },
            inf,
        ),
        (
            {
                "proc/self/cgroup": V1,
                f"{V1_MEMORY}/pod/one/memory.limit_in_bytes": "1000",
                f"{V1_MEMORY}/pod/one/memory.usage_in_bytes": "1200",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                f"{V1_MEMORY}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1_MEMORY}/memory.usage_in_bytes": "712",
                f"{V1_MEMORY}/pod/memory.limit_in_bytes": "5000",
                f"{V1_MEMORY}/pod/memory.usage_in_bytes": "1000",
                f"{V1_MEMORY}/pod/memory.stat": "cache 1\ntotal_inactive_file 500",
            },
            4500,
        ),
    ],
)
def test_memory_that_is_left(tmp_path, files, free):
    assert free_memory(put(tmp_path, files)) == free


def test_budget_of_the_cache_is_of_what_the_container_has_left(monkeypatch, caplog):
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "free_memory", lambda: 2**30)
    assert cache_budget("auto", cpu) == (2**30 - CHILDREN) // 2
    assert cache_budget("0.5", cpu) == 2**29
    assert not caplog.records
    assert cache_budget("2GiB", cpu) == 2**31
    assert "--cache-memory 2GiB is more than the 1.0 GiB that are free" in caplog.text
    monkeypatch.setattr(budget, "free_memory", lambda: 2**20)
    assert cache_budget("auto", cpu) == 0
