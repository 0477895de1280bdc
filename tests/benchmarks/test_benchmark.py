"""The benchmark's sums are right, and it runs: its figures are in docs/benchmarks.md."""

import os
import re
import subprocess
import sys

import benchmark
import dialects
import pytest
from benchmark import Reply

from engine.checkpoint import load_model
from engine.checkpoint.named_adapter import read_named_adapter, updates_of
from tests.conftest import ROOT


def test_figures_are_computed_from_replies():
    replies = [Reply([1.0, 1.5, 2.0], 3), Reply([2.0, 2.1, 2.2], 3)]
    assert benchmark.figures((4.0, replies)) == pytest.approx(
        {"tokens/s": 1.5, "first p50": 1, "first p99": 2, "later p50": 0.1, "later p99": 0.5}
    )


def test_benchmark_draws_adapters_of_its_model(tmp_path):
    model = ROOT / "tests" / "fixtures" / "llama"
    flags = benchmark.draw_adapters(str(model), 2, tmp_path, rank=3)
    assert flags == ["--adapter", f"a0={tmp_path / 'a0'}", "--adapter", f"a1={tmp_path / 'a1'}"]
    loaded, _ = load_model(model, device_map="cpu")
    updates = updates_of(read_named_adapter(tmp_path / "a1"), loaded)
    assert len(updates) == 7 * loaded.config.num_hidden_layers


def run(*arguments: str, script: str = "benchmarks/benchmark.py") -> str:
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_benchmark_measures_a_server(server):
    out = run("--url", server, "--clients", "1", "4", "--repeats", "2")
    assert re.search(r"^\| given \| 4 \| [\d.]+ \| \d+\.\d{3} s \|", out, re.MULTILINE)


@pytest.mark.release
def test_benchmark_draws_a_plot(server, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "plot.svg"
    run("--url", server, "--clients", "1", "4", "--repeats", "2", "--plot", str(drawn))
    assert "<svg" in drawn.read_text(encoding="utf-8")


def test_benchmark_rush_counts_served_and_lost(server, runner):
    runner.pause = 0.01
    out = run("--url", server, "--rush", "40", "--tokens", "8")
    assert "40 served; 0 lost" in out
    assert "/health meanwhile" in out


@pytest.mark.slow
def test_host_py_measures_steps_beside_a_pretended_card():
    arguments = ["--step", "20", "--clients", "1", "3", "--tokens", "20"]
    out = run(*arguments, script="benchmarks/host.py")
    steps = [float(step) for step in re.findall(r"^\| [13] \| [\d.]+ \| ([\d.]+) ms", out, re.M)]
    assert len(steps) == 2
    assert min(steps) >= 20


@pytest.mark.slow
def test_dialects_py_compares_every_api():
    out = run("--tokens", "40", "--repeats", "1", script="benchmarks/dialects.py")
    assert re.findall(r"^\| `([\w/]+)` \| \d+ µs", out, re.M) == [*dialects.BODIES]


@pytest.mark.slow
def test_cuda_tests_pass_on_stand_ins():
    """So much is sure without a card, that the tests themselves are sound."""
    command = [sys.executable, "-m", "pytest", "tests/gpu"]
    environment = os.environ | {"CHAT_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_card_py_runs_without_a_card():
    command = [sys.executable, "benchmarks/gpu/card.py", "--device", "cpu", "--clients", "1", "3"]
    command += ["--only", "steps", "mla", "bits"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^\| 3 \| 256 \| [\d.]+ ms \|", done.stdout, re.MULTILINE)
    assert "TFLOP/s" in done.stdout
    assert re.search(r"^\| DeepSeek-V2-Lite on 24 GB \| 8 \| in 8 bits", done.stdout, re.MULTILINE)
    assert re.search(r"^\| a chunk of 512 \| [\d.]+ ms \|", done.stdout, re.MULTILINE)
