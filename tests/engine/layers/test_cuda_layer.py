"""Layers in few kernels, by stand-ins for these: which are replaced, and that they say the same."""

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine.checkpoint.checkpoint import load_model
from engine.checkpoint.quantizer import quantize_layers
from engine.layers.quantized import QuantizedLinear
from engine.runner.create import prepare_model
from engine.runner.runner import Runner
from engine.runner.self_check import probes, reference_logits
from engine.sequence import KVSpan
from tests.conftest import tiny_llama
from tests.engine.alone import FIXTURES
from tests.engine.layers.test_merged import attention_of, model_of
from tests.engine.stand_ins import as_on_a_card, with_kernels


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    with_kernels(monkeypatch)


def fused(model):
    """A runner of a model whose layers were replaced as on a GPU."""
    from engine.layers.cuda_layer import fuse_on_gpu

    prepare_model(model)
    runner = Runner(model, 64)
    fuse_on_gpu(model, lambda: runner.forward([(KVSpan([*range(7)]), 7)]))
    return runner


def error_of(runner, wanted):
    """How far a prompt's logits are from those before, relatively."""
    ids = probes(runner.model)[0]
    found = runner.forward([(KVSpan(ids, 20, all_logits=True), len(ids))])
    return float((found - wanted).norm() / wanted.norm())


def names(modules):
    return {type(module).__name__ for module in modules}


def logits_of(model):
    return reference_logits(model, probes(model)[0]).float()


PLAIN = [
    pytest.param(lambda: tiny_llama().bfloat16(), id="llama"),
    pytest.param(lambda: model_of(Qwen2Config), id="biases"),
    pytest.param(lambda: model_of(Qwen3Config), id="norms of each head"),
    pytest.param(lambda: model_of(GraniteConfig, residual_multiplier=1.0), id="a factor of 1"),
]


@pytest.mark.parametrize("model", PLAIN)
def test_whole_layer_takes_few_kernels_and_says_the_same(model):
    model = model()
    wanted = logits_of(model)
    runner = fused(model)
    assert names(model.model.layers) == {"CudaLayer"}
    assert error_of(runner, wanted) < 0.03


@pytest.mark.parametrize(
    ("model", "attention_too"),
    [
        pytest.param(lambda: model_of(GraniteConfig, residual_multiplier=0.5), True, id="a factor"),
        pytest.param(lambda: model_of(Gemma2Config), True, id="norms on both sides"),
        pytest.param(lambda: model_of(Olmo2Config), False, id="norms behind"),
        pytest.param(
            lambda: model_of(GlmConfig, partial_rotary_factor=0.5), False, id="half is turned"
        ),
        pytest.param(lambda: model_of(CohereConfig), False, id="neighbours are turned together"),
        pytest.param(
            lambda: model_of(GptOssConfig, num_local_experts=2, num_experts_per_tok=2),
            False,
            id="of each angle there is one cosine",
        ),
        pytest.param(
            lambda: model_of(
                Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            ),
            True,
            id="experts",
        ),
    ],
)
def test_layer_of_another_kind_stays(model, attention_too):
    from engine.layers.cuda_layer import CudaAttention

    model = model()
    wanted = logits_of(model)
    runner = fused(model)
    assert "CudaLayer" not in names(model.modules())
    assert (CudaAttention in map(type, attention_of(model))) == attention_too
    assert error_of(runner, wanted) < 0.03


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_products_are_joined_packed(bits):
    model = model_of(LlamaConfig, intermediate_size=64)  # whole blocks of 64
    quantize_in_place(model, bits)
    wanted = logits_of(model)
    runner = fused(model)
    assert names(model.model.layers) == {"CudaLayer"}
    assert {type(layer.mlp.product) for layer in model.model.layers} == {QuantizedLinear}
    assert error_of(runner, wanted) < 0.03


def quantize_in_place(model, bits):
    """Pack a model's weights that are loaded already."""
    from engine.layers.quantized import pack

    weights = {name: p.data for name, p in model.named_parameters()}
    quantize_layers(model, bits)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            packed = pack(weights[f"{name}.weight"], bits)
            module.weight.data, module.weight_scale.data = packed


def test_weights_are_held_once():
    model = tiny_llama().bfloat16()
    before = sum(p.nbytes for p in model.parameters())
    attention = model.model.layers[0].self_attn
    fused(model)
    assert sum(p.nbytes for p in model.parameters()) == before
    joined = model.model.layers[0].self_attn.product.weight
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert layer.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


def test_module_that_computes_something_else_stays():
    model = tiny_llama().bfloat16()
    second = model.model.layers[1].mlp
    plain = type(second).forward
    second.forward = lambda x: 2 * plain(second, x)
    fused(model)
    assert type(model.model.layers[0]).__name__ == "CudaLayer"
    assert type(model.model.layers[1].mlp) is type(second)


def deepseek():
    model, _ = load_model(FIXTURES / "deepseek_v2", dtype="bfloat16")
    return model


@pytest.mark.parametrize("quantize", ["none", "8bit"])
def test_experts_read_their_weights_where_they_lie(quantize):
    from engine.layers.cuda_layer import CudaExperts, CudaMLP

    model, _ = load_model(FIXTURES / "deepseek_v2", dtype="bfloat16", quantize=quantize)
    wanted = logits_of(model)
    runner = fused(model)
    found = [module for module in model.modules() if isinstance(module, CudaExperts)]
    assert found
    assert {type(layer.mlp) for layer in model.model.layers[:1]} == {CudaMLP}
    assert error_of(runner, wanted) < 0.06


def test_many_tokens_are_left_to_the_experts_themselves():
    from engine.layers.cuda_layer import CudaExperts

    model = deepseek()
    fused(model)
    experts = next(module for module in model.modules() if isinstance(module, CudaExperts))
    width = experts.experts.gate_up_proj.shape[2]
    x = torch.randn(experts.MAX_TOKENS + 1, width).bfloat16()
    chosen = torch.randint(0, 4, (len(x), 2))
    weights = torch.rand(len(x), 2).bfloat16()
    assert torch.equal(experts(x, chosen, weights), experts.experts(x, chosen, weights))


def test_latents_are_read_in_place_as_from_copies():
    model = deepseek().float()
    prepare_model(model)
    outs = []
    for backend in ("copied", "latents"):
        runner = Runner(model, 200)
        runner.backend = backend
        spans = [KVSpan([*range(20, 20 + n)], start) for n, start in ((5, 3), (40, 60), (17, 140))]
        runner.forward([(span, len(span.tokens)) for span in spans])
        for span in spans:
            span.num_computed_tokens = len(span.tokens)
            span.tokens.append(9)
        outs.append(runner.forward([(span, 1) for span in spans]))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)


def test_decode_graphs_replay_with_other_latents(monkeypatch):
    as_on_a_card(monkeypatch)
    model = deepseek().float()
    prepare_model(model)
    runner = Runner(model, 200)
    runner.backend = "latents"
    runner.capture_graphs(4, 100)
    assert {graph.size for graph in runner.graphs} == {1, 2, 4}
    captured = runner.graphs
    spans = [KVSpan([*range(20, 20 + n)], start) for n, start in ((5, 3), (40, 60), (17, 140))]
    runner.forward([(span, len(span.tokens)) for span in spans])
    for span in spans:
        span.num_computed_tokens = len(span.tokens)
        span.tokens.append(9)
    work = [(span, 1) for span in spans]
    replayed = runner.forward(work).clone()
    runner.graphs = []
    torch.testing.assert_close(replayed, runner.forward(work), atol=1e-5, rtol=1e-5)
    assert captured
