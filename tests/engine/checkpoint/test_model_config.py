"""What a config.json says: what is refused, and what changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from engine.checkpoint.checkpoint import load_model
from engine.checkpoint.model_config import context_length
from engine.errors import StartError
from engine.loading import load
from tests.conftest import TINY, byte_tokenizer, greedy, tiny_llama

ENDING = TINY | {"eos_token_id": 256, "pad_token_id": 0}


def saved(config: Any, folder: Path) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def with_settings(folder: Path, **settings: object) -> Path:
    """A tiny Llama whose config.json says more."""
    tiny_llama().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "exl2", "bits": 4.0}, "EXL2"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"bits": 4}, "a method that config.json does not name"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of the version gemv"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ in the layout marlin"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "compressed-tensors in the layout marlin-24",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "compressed-tensors in the layout sparse-bitmask",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"a": 1}},
            "compressed-tensors with transforms",
        ),
    ],
)
def test_unreadable_weights_are_refused_by_name(tmp_path, settings, method):
    with pytest.raises(StartError, match=rf"quantised with {method}, .*that it was made from"):
        load(with_settings(tmp_path, quantization_config=settings))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4),
            "bloom is not supported: .*no position_ids",
        ),
        (T5Config(), "t5.* no causal language model"),
    ],
)
def test_architectures_that_cannot_be_run_are_told_as_not_supported(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(StartError, match=f"(?i){reason}.*take another model") as told:
        load(tmp_path)
    assert "damaged" not in str(told.value)


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**ENDING, sliding_window=262_144),
        MistralConfig(**ENDING, sliding_window=512),
        Qwen3Config(
            **ENDING, head_dim=8, use_sliding_window=True, sliding_window=4096, max_window_layers=0
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_window_not_shorter_than_the_context_changes_nothing(tmp_path, config):
    model = load(saved(config, tmp_path), dtype="float32", cache_memory="4MiB")
    model.close()
    prompt = list(range(100))
    windows = [layer.scoring.window for layer in model.engine.runner.pool.layers]
    assert windows == [None, None]
    served, _ = load_model(tmp_path, dtype="float32")
    original = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert greedy(served, prompt, 8) == greedy(original, prompt, 8)


@pytest.mark.parametrize(
    ("stated", "rope", "length"),
    [
        (32_768, {"rope_type": "yarn", "factor": 4.0}, 131_072),
        (
            32_768,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            131_072,
        ),
        (
            40_960,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
            131_072,
        ),
        # DeepSeek's config.json states the longer length itself.
        (
            163_840,
            {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
            163_840,
        ),
        (8192, {"rope_type": "default"}, 8192),
        (32_768, {"rope_type": "dynamic", "factor": 2.0}, 32_768),
    ],
)
def test_context_is_what_the_rope_scaling_makes_it(stated, rope, length):
    config = Qwen2Config(max_position_embeddings=stated)
    config.rope_parameters = {"rope_theta": 10_000.0, **rope}
    assert context_length(config) == length
