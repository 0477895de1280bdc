"""benchmarks/simulate.py computes what docs/scaling.md shows."""

import re
import sys
from collections.abc import Callable

import pytest
import simulate

from tests.conftest import ROOT

Simulated = Callable[..., list[list[float]]]


def table(text: str) -> list[list[float]]:
    """The numbers of the table of users."""
    lines = text[text.index("| users |") :].split("\n\n")[0].strip().splitlines()[2:]
    return [[float(n.replace(",", "")) for n in re.findall(r"[\d.,]+", line)] for line in lines]


@pytest.fixture
def simulated(monkeypatch, capsys) -> Simulated:
    """Runs the program with these flags; returns its table."""

    def run(*flags: str) -> list[list[float]]:
        monkeypatch.setattr(sys, "argv", ["simulate.py", *flags])
        simulate.main()
        return table(capsys.readouterr().out)

    return run


@pytest.mark.slow
def test_table_of_scaling_md_is_what_the_program_prints(simulated):
    shown = table((ROOT / "docs/scaling.md").read_text(encoding="utf-8"))
    assert len(shown) == 3
    # Another numpy may draw other numbers.
    for row, other in zip(shown, simulated(), strict=True):
        assert row == pytest.approx(other, rel=0.1)


@pytest.mark.slow
def test_few_users_see_a_nearly_idle_replica(simulated, monkeypatch):
    """20 users of 100 tokens at 50 a second, who think for 38 seconds: each is served 2 of 40."""
    monkeypatch.setattr(simulate, "SECONDS", 300)
    given = ["--rates", "1:50", "8:400", "--read", "0", "--think", "38", "--answer", "100"]
    ((users, replicas, share, first, speed, busy),) = simulated(*given, "--users", "20")
    assert (users, replicas, share) == (20, 1, 20)
    assert first == pytest.approx(0.04, abs=0.01)  # a step that runs, and one's own
    assert speed == pytest.approx(50, rel=0.02)
    assert busy == pytest.approx(1, abs=0.5)


@pytest.mark.slow
def test_more_replicas_are_needed_where_more_is_asked(simulated, monkeypatch):
    # Less exact than the program, which is asked here for no more than an order.
    monkeypatch.setattr(simulate, "SECONDS", 300)

    def replicas(*flags: str) -> float:
        return simulated("--users", "1000", *flags)[0][1]

    assert replicas("--think", "60") < replicas() < replicas("--speed", "10")
