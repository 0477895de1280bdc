"""What was freed is the system's again."""

import platform

import psutil
import pytest

from engine.layers.freed_memory import return_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_between_pieces_that_stay_is_returned():
    pieces = [bytearray(50_000) for _ in range(2000)]
    del [*pieces][::10]
    kept = pieces[::10]
    pieces.clear()
    process = psutil.Process()
    before = process.memory_info().rss
    return_freed_memory()
    assert before - process.memory_info().rss > 50 * 2**20
    assert len(kept) == 200
