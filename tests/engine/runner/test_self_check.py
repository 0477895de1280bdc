"""What is served was checked against the model's own forward pass."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from engine.attention.groups import ChunkAttention
from engine.errors import StartError
from engine.runner.runner import Runner
from engine.runner.self_check import probes, reference_logits, self_check, start_runner
from engine.runner.summary import attention_summary
from tests.conftest import tiny_llama
from tests.engine.stand_ins import as_on_a_card, flash_attention


def start(model) -> Runner:
    return start_runner(model, "1MiB")


def test_llama_passes_the_self_check():
    assert start(tiny_llama()).rows > 1000


def test_model_with_attention_of_its_own_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(StartError, match=r"Bloom|attention"):
        start(model.eval())


def tiny_mistral() -> MistralForCausalLM:
    """With a window that the check at the start feels."""
    config = MistralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        sliding_window=4,
    )
    return MistralForCausalLM(config).eval()


def test_model_with_a_window_passes_the_self_check():
    assert start(tiny_mistral()).difference < 1e-5


def test_wrong_window_fails_the_self_check(monkeypatch):
    monkeypatch.setattr("engine.checkpoint.attention_probe.window_of", lambda mask, context: 5)
    with pytest.raises(StartError, match="does not batch"):
        start(tiny_mistral())


def test_wrong_attention_fails_the_self_check(monkeypatch):
    """As one would whose attention read a neighbour's row."""
    right = ChunkAttention.attend
    monkeypatch.setattr(ChunkAttention, "attend", lambda *given: right(*given) * 1.01)
    with pytest.raises(StartError, match="does not batch"):
        start(tiny_llama())


def test_card_uses_flash_attention_and_graphs(monkeypatch):
    as_on_a_card(monkeypatch)
    runner = start(tiny_llama())
    assert {r.size for r in runner.graphs} == {1, 2, 4, 8, 16, 32, 64}
    assert attention_summary(runner).endswith(
        "in place, CUDA graphs for 1, 2, 4, 8, 16, 32, 64 sequences"
    )


def test_wrong_flash_attention_is_not_used(monkeypatch, caplog):
    """As one would that aligns a chunk's first token with the span's first row."""
    as_on_a_card(monkeypatch, lambda *given, **named: [1.01 * flash_attention(*given, **named)[0]])
    runner = start(tiny_llama())
    assert runner.backend == "sliced"
    assert not runner.graphs
    assert runner.difference < 1e-5
    assert "does not batch" in caplog.text
    assert "over the rows in place (this model does not batch" in attention_summary(runner)


def test_model_that_cannot_be_captured_runs_without_graphs(monkeypatch, caplog):
    def refuse(compute, device, memory):
        raise RuntimeError("operation not permitted when stream is capturing")

    as_on_a_card(monkeypatch, capturing=refuse)
    runner = start(tiny_llama())
    assert runner.backend == "in place"
    assert not runner.graphs
    assert "not permitted when stream is capturing" in caplog.text
    assert attention_summary(runner).endswith("CUDA graphs for no sequences")


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_logits_that_are_no_numbers_fail_each_step_of_the_self_check(monkeypatch, broken):
    model = tiny_llama()
    alone = [reference_logits(model, ids) for ids in probes(model)]
    runner = start(model)
    forward, steps = runner.forward, []

    def spoilt(work):
        logits = forward(work).clone()
        if len(steps) == broken:
            logits[broken % 2] = torch.nan
        steps.append(work)
        return logits

    monkeypatch.setattr(runner, "forward", spoilt)
    with pytest.raises(StartError, match="NaN"):
        self_check(runner, alone)
    assert len(steps) > broken
