"""benchmarks/model_types.py notices wrong answers, and docs/models.md has what it prints."""

import os
import re
import signal

import model_types
import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conftest import ROOT


@pytest.mark.slow
def test_model_that_runs_is_compared():
    assert model_types.tried("llama", 5) == "runs"
    assert model_types.tried("gemma2", 40) == "runs, a window, soft caps"


def test_refused_model_is_told_by_its_reason():
    assert re.match(r"refused: \w+ is not supported: .*position_ids", model_types.tried("bloom", 5))


@pytest.mark.parametrize(
    ("bound", "said"), [(40, "WRONG logits"), (5, "refused: .*does not batch")]
)
def test_ignored_window_is_noticed(monkeypatch, bound, said):
    """By the comparison, where the server's own check at the start is too short for it."""
    monkeypatch.setattr("engine.checkpoint.attention_probe.window_of", lambda mask, context: None)
    assert re.match(said, model_types.tried("mistral", bound))


def test_model_that_fails_is_a_fault_and_ends_no_other(monkeypatch):
    def fail(*_):
        raise OSError("no such model")

    monkeypatch.setattr(model_types, "compare", fail)
    assert model_types.tried("llama", 5).startswith("FAULT: OSError: no such model")


def test_process_that_takes_too_long_or_dies_is_a_fault(monkeypatch):
    monkeypatch.setattr(model_types, "tried", lambda kind, bound: os._exit(1))
    assert model_types.in_a_child("llama", 5, 60) == "FAULT: the process died"
    monkeypatch.setattr(model_types, "tried", lambda kind, bound: signal.pause())
    assert model_types.in_a_child("llama", 5, 0.1) == "FAULT: took too long"


def test_page_counts_its_own_tables():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    version, total, runs, refused = re.search(
        r"transformers (\S+) has (\d+) types .*?: (\d+) run and (\d+) are refused", page, re.S
    ).groups()
    runs_table, refused_table = page.split("| runs |")[1].split("| refused, because |")
    refused_table = refused_table.split("| neither |")[0]
    assert len(re.findall(r"^\| `", runs_table, re.M)) == int(runs)
    assert len(re.findall(r"`[\w-]+`[,| ]", refused_table)) == int(refused)
    if transformers.__version__ == version:
        assert len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == int(total)
