"""Layers in few operations: which are replaced, and that they compute what the model's own do."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Ernie4_5Config,
    FlexOlmoConfig,
    Gemma2Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    Ministral3Config,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from engine.layers import fused_layer
from engine.layers.fused_attention import FusedAttention, RotaryCache
from engine.layers.fused_layer import FusedLayer
from engine.layers.merged import FusedMLP, RMSNorm
from engine.layers.weight_format import convert
from engine.runner.self_check import start_runner
from tests.conftest import tiny_llama

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}


# By this, queries grow with their position, though not over the first ones.
GROWING = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}


def model_of(config_class, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | settings)).eval().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that do something
            parameter += 0.1 * torch.rand_like(parameter)
    return model


def attention_of(model):
    return [module for name, module in model.named_modules() if name.endswith(".self_attn")]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny_llama().bfloat16(), id="llama"),
        pytest.param(lambda: model_of(Qwen2Config), id="biases"),
        pytest.param(lambda: model_of(Qwen3Config), id="norms of each head"),
        pytest.param(
            lambda: model_of(Gemma2Config, sliding_window=5), id="soft caps and sliding windows"
        ),
    ],
)
def test_attention_is_fused_and_says_the_same(model):
    model = model()
    convert(model, "fp16 weights")
    runner = start_runner(model, "64MiB")  # compares it with the model's own
    assert {type(module) for module in attention_of(model)} == {FusedAttention}
    assert runner.difference < 1e-4


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: model_of(GlmConfig, partial_rotary_factor=0.5), id="half is turned"),
        pytest.param(
            lambda: model_of(FlexOlmoConfig, num_experts=2, num_experts_per_tok=2),
            id="a norm of all heads together",
        ),
        pytest.param(lambda: model_of(CohereConfig), id="neighbours are turned together"),
        pytest.param(lambda: model_of(Ernie4_5Config), id="so too, and all keys look alike"),
        pytest.param(
            lambda: model_of(Ministral3Config, rope_parameters=GROWING), id="queries grow"
        ),
        pytest.param(
            lambda: model_of(GptOssConfig, num_local_experts=2, num_experts_per_tok=2),
            id="of each angle there is one cosine",
        ),
    ],
)
def test_attention_of_another_kind_stays(model):
    model = model()
    convert(model, "fp16 weights")
    runner = start_runner(model, "64MiB")
    assert FusedAttention not in {type(module) for module in attention_of(model)}
    assert runner.difference < 1e-4


def test_attention_as_it_is_stays():
    model = tiny_llama().bfloat16()
    start_runner(model, "64MiB")
    assert FusedAttention not in {type(module) for module in model.modules()}


def test_attention_that_computes_something_else_stays(monkeypatch):
    class TooFar(RotaryCache):
        def of(self, cos, sin):
            return super().of(cos, sin).square()

    monkeypatch.setattr(fused_layer, "RotaryCache", TooFar)
    model = tiny_llama().bfloat16()
    convert(model, "fp16 weights")
    start_runner(model, "64MiB")
    assert FusedAttention not in {type(module) for module in model.modules()}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny_llama().bfloat16(), id="llama"),
        pytest.param(lambda: model_of(Qwen2Config), id="biases"),
        pytest.param(lambda: model_of(Qwen3Config), id="norms of each head"),
        pytest.param(lambda: model_of(GraniteConfig, residual_multiplier=1.0), id="a factor of 1"),
    ],
)
def test_whole_layer_is_fused_and_says_the_same(model):
    model = model()
    convert(model, "fp16 weights")
    runner = start_runner(model, "64MiB")
    assert {type(layer) for layer in model.model.layers} == {FusedLayer}
    assert runner.difference < 1e-4


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: model_of(GraniteConfig, residual_multiplier=0.5), id="a factor of a half"
        ),
        pytest.param(lambda: model_of(Gemma2Config), id="norms on both sides"),
        pytest.param(lambda: model_of(Olmo2Config), id="norms behind"),
    ],
)
def test_layer_of_another_kind_stays(model):
    model = model()
    convert(model, "fp16 weights")
    runner = start_runner(model, "64MiB")
    assert FusedLayer not in {type(module) for module in model.modules()}
    assert runner.difference < 1e-4


def test_gated_mlp_is_fused_only_where_it_is_no_more():
    model = tiny_llama().bfloat16()
    first, second = (layer.mlp for layer in model.model.layers[:2])
    plain = type(second).forward
    second.forward = lambda x: 2 * plain(second, x)
    convert(model, "fp16 weights")
    assert isinstance(model.model.layers[0].mlp, FusedMLP)
    assert type(model.model.layers[1].mlp) is type(first)


def check_norm(width: int) -> None:
    """Of each row, and the same if it is alone."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.rand(width))
    norm = RMSNorm(weight, 1e-5)
    for scale in (0.0, 1e-4, 1.0, 1e4):
        x = scale * torch.randn(1, 7, width)
        wanted = torch.nn.functional.rms_norm(x, (width,), weight, 1e-5)
        torch.testing.assert_close(norm(x), wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(norm(x[0, 3]), norm(x)[0, 3], atol=1e-6, rtol=1e-5)
        assert norm.kernel is None or torch.equal(norm(x[0, 3]), norm(x)[0, 3])


def test_norm_in_four_operations_is_of_the_mean_square(without_kernels):
    check_norm(96)
    assert RMSNorm(torch.nn.Parameter(torch.ones(8)), 1e-5).kernel is None
