"""benchmarks/simulate.py computes what docs/scaling.md shows."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


def table(text: str) -> list[list[float]]:
    """The numbers of the table of users."""
    lines = text[text.index("| users |") :].split("\n\n")[0].strip().splitlines()[2:]
    return [[float(n.replace(",", "")) for n in re.findall(r"[\d.,]+", line)] for line in lines]


def simulated(*arguments: str) -> list[list[float]]:
    command = [sys.executable, "benchmarks/simulate.py", *arguments]
    return table(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


def test_the_table_in_the_text_is_the_programs():
    shown = table((ROOT / "docs/scaling.md").read_text(encoding="utf-8"))
    assert len(shown) == 3
    # Another numpy may draw other numbers.
    for row, other in zip(shown, simulated(), strict=True):
        assert row == pytest.approx(other, rel=0.1)


def test_few_users_see_an_idle_replica_and_keep_it_as_busy_as_they_must():
    """20 users of 100 tokens at 50 a second, who think for 38 seconds: each is served 2 of 40."""
    given = ["--rates", "1:50", "64:3200", "--read", "0", "--think", "38", "--answer", "100"]
    ((users, replicas, share, first, speed, busy),) = simulated(*given, "--users", "20")
    assert (users, replicas, share) == (20, 1, 20)
    assert first == pytest.approx(0.04, abs=0.01)  # a step that runs, and one's own
    assert speed == pytest.approx(50, rel=0.02)
    assert busy == pytest.approx(1, abs=0.5)


def test_more_is_needed_where_more_is_asked():
    def replicas(*arguments: str) -> float:
        return simulated("--users", "1000", *arguments)[0][1]

    assert replicas("--think", "60") < replicas() < replicas("--speed", "10")
