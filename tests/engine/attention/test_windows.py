"""Windows, soft caps and sinks: a batch says what transformers says of each prompt alone."""

import asyncio
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Starcoder2Config,
)

from engine.runner.create import create_runner
from engine.runner.runner import Runner
from engine.runner.self_check import start_runner
from engine.runner.summary import attention_summary
from engine.scheduling.engine import Engine
from tests.conftest import greedy
from tests.engine.scheduling.test_batching import Told, tokens
from tests.engine.stand_ins import as_on_a_card

TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "phi3": lambda window: Phi3Config(**TINY, sliding_window=window),
    "mistral": lambda window: MistralConfig(**TINY, sliding_window=window),
    "starcoder2": lambda window: Starcoder2Config(**TINY, sliding_window=window),
    "qwen2": lambda window: Qwen2Config(
        **TINY, sliding_window=window, use_sliding_window=True, max_window_layers=1
    ),
    "gemma2": lambda window: Gemma2Config(**TINY, **MIXED, head_dim=8, sliding_window=window),
    "gemma3": lambda window: Gemma3TextConfig(**TINY, **MIXED, head_dim=8, sliding_window=window),
    "gpt_oss": lambda window: GptOssConfig(
        **TINY, **MIXED, **EXPERTS, head_dim=8, sliding_window=window
    ),
}


def prompts() -> list[list[int]]:
    """Longer than any window here, and some that begin alike."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(5, 260, (n,), generator=generator).tolist() for n in (100, 61, 17)]
    return [*made, [*made[0][:70], 9, 8, 7]]


def model_of(kind: str, window: int) -> Any:
    """A tiny model, always the same."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](window)).eval()


@cache
def alone(kind: str, window: int) -> list[list[int]]:
    """What `generate` says to each prompt by itself."""
    model = model_of(kind, window)
    return [greedy(model, prompt, 12) for prompt in prompts()]


async def answers(engine: Engine, texts: list[list[int]]) -> list[list[int]]:
    return await asyncio.gather(*(tokens(engine, text, 12) for text in texts))


def check(runner: Runner, wanted: list[list[int]], chunk: int) -> None:
    """All together, again from the prefix cache, and one by itself."""
    engine = Engine(runner, None, set(), prefill_chunk=chunk)
    try:
        assert asyncio.run(answers(engine, prompts())) == wanted
        assert asyncio.run(answers(engine, prompts())) == wanted
        assert asyncio.run(answers(engine, prompts()[:1])) == wanted[:1]
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("window", [5, 40])
@pytest.mark.parametrize("kind", CONFIGS)
def test_batch_with_windows_says_what_generate_says(monkeypatch, kind, window):
    monkeypatch.setattr("engine.scheduling.output.Detokenizer", Told)
    runner = create_runner(model_of(kind, window), "4MiB")
    for backend, chunk in (("sliced", 7), ("copied", 64)):
        runner.backend = backend
        check(runner, alone(kind, window), chunk)


@pytest.mark.parametrize("window", [5, 40])
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_batch_with_windows_in_place_says_what_generate_says(monkeypatch, kind, window):
    """FlashAttention takes the window, also in a CUDA graph."""
    as_on_a_card(monkeypatch)
    monkeypatch.setattr("engine.scheduling.output.Detokenizer", Told)
    runner = create_runner(model_of(kind, window), "4MiB")
    assert runner.backend == "in place"
    runner.capture_graphs(4, 200)
    assert [graph.size for graph in runner.graphs] == [1, 2, 4]
    check(runner, alone(kind, window), 24)


def test_windows_of_the_layers_are_read_from_the_mask():
    """None is passed to attention where a window is not shorter than the context."""
    runner = start_runner(model_of("gemma3", 40), "4MiB")
    assert [layer.scoring.window for layer in runner.pool.layers] == [40, None, 40, None]
    assert attention_summary(runner).endswith("; 2 of 4 layers see 40 tokens")
    runner = start_runner(model_of("mistral", 256), "4MiB")
    assert [layer.scoring.window for layer in runner.pool.layers] == [None] * 4


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_flash_attention_is_not_used_for_soft_caps_and_sinks(kind):
    assert create_runner(model_of(kind, 40), "4MiB").fallback_reason == (
        "FlashAttention does not do soft caps or sinks"
    )


def test_window_that_is_ignored_changes_the_answers(monkeypatch):
    """The comparisons above would fail without it, where the check at the start does not."""
    monkeypatch.setattr("engine.scheduling.output.Detokenizer", Told)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.checkpoint.attention_probe.window_of", lambda mask, context: None)
        runner = start_runner(model_of("mistral", 40), "4MiB")
    engine = Engine(runner, None, set())
    assert asyncio.run(answers(engine, prompts())) != alone("mistral", 40)
    engine.close()
