"""The form of linear layers on a CPU: what is chosen, and what it computes."""

import weakref
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from engine.checkpoint.checkpoint import load_model
from engine.layers import autotune as form_trial
from engine.layers import fbgemm as linear
from engine.layers import weight_format as form
from engine.layers.autotune import choose_weight_format, fastest_format, kinds_of, measure_forms
from engine.layers.cpu_linear import CpuLinear
from engine.layers.experts import computes_alike, has_fused_experts
from engine.layers.fbgemm import (
    BY_FBGEMM,
    BY_KERNELS,
    HalfLinear,
    WideEmbedding,
    fits_fp16,
    is_available,
)
from engine.layers.merged import FusedMLP, RMSNorm, plain_norm
from engine.layers.weight_format import convert, held_bytes, held_size
from engine.runner.self_check import probes, reference_logits
from tests.conftest import tiny_llama
from tests.engine.alone import FAMILIES, FIXTURES, needs_kernels

# The forms that read weights in few bits, and their layers.
PACKED = [pytest.param("our kernels", CpuLinear, marks=needs_kernels), ("fp16 weights", HalfLinear)]


def test_fp16_weights_compute_what_float32_does():
    """With the same weights: bfloat16's fit fp16 exactly, but for very small ones."""
    torch.manual_seed(0)
    weight = torch.randn(300, 128).bfloat16()
    bias = torch.randn(300)
    layer = HalfLinear(weight, bias)
    for count in (1, 3, 16, 70):
        x = torch.randn(1, count, 128)
        wanted = torch.nn.functional.linear(x, weight.float(), bias)
        torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


def test_a_row_does_not_depend_on_how_many_there_are():
    torch.manual_seed(0)
    layer = HalfLinear(torch.randn(256, 576).bfloat16())
    x = torch.randn(64, 576)
    together = layer(x)
    for row in range(64):
        torch.testing.assert_close(layer(x[row : row + 1])[0], together[row], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("form", "linear"), PACKED)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_its_logits_in_few_bits(name, form, linear):
    model, _ = load_model(FIXTURES / name, dtype="bfloat16")
    exact = deepcopy(model).float()
    half = [reference_logits(model, ids) for ids in probes(model)]
    convert(model, form)
    assert any(isinstance(module, linear) for module in model.modules())
    assert isinstance(model.get_input_embeddings(), WideEmbedding)
    for ids, before in zip(probes(model), half, strict=True):
        wanted = reference_logits(exact, ids)
        found = reference_logits(model, ids)
        error = (found - wanted).norm() / wanted.norm()
        assert error < 1e-4
        assert error < (before.float() - wanted).norm() / wanted.norm()


def test_layers_of_one_input_are_one_product_and_norms_are_fused():
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    exact = deepcopy(model).float()
    convert(model, "fp16 weights")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.shared is attention.k_proj.shared is attention.v_proj.shared
    assert isinstance(model.model.norm, RMSNorm)
    x = torch.randn(1, 3, 32)
    other = torch.randn(1, 3, 32)
    names = ("q_proj", "k_proj", "v_proj")
    # In any order, and of several inputs in turn.
    for name, given in ((names[2], x), (names[0], x), (names[1], other), (names[2], other)):
        wanted = getattr(exact.model.layers[0].self_attn, name)(given)
        torch.testing.assert_close(getattr(attention, name)(given), wanted, atol=1e-3, rtol=1e-3)
    assert attention.q_proj.shared.given is None, "the last of them lets go"


@pytest.mark.parametrize(("added", "is_ours"), [(0, True), (1, True), (2, False)])
def test_norm_that_computes_something_else_stays(added, is_ours):
    class OtherRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, (8,), added + self.weight, self.eps)

    assert (plain_norm(OtherRMSNorm()) is not None) == is_ours


@pytest.mark.parametrize("products", [BY_KERNELS, BY_FBGEMM], ids=["kernels", "FBGEMM"])
def test_experts_are_those_of_the_mixture(products):
    model, _ = load_model(FIXTURES / "deepseek_v2", dtype="bfloat16")
    experts = next(m for m in model.modules() if has_fused_experts(m))
    torch.manual_seed(0)
    x = torch.randn(9, experts.gate_up_proj.shape[2])
    chosen = torch.stack([torch.randperm(len(experts.gate_up_proj))[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    with torch.inference_mode():
        found = products.half_experts(experts)(x, chosen, weights)
        wanted = experts.float()(x, chosen, weights)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


class Clamped(torch.nn.Module):
    """What another module gives, but no more than 7, as some models' experts have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).clamp(max=7)


def test_experts_that_clamp_are_not_those_of_a_plain_mixture():
    """Only large activations show it."""
    model, _ = load_model(FIXTURES / "deepseek_v2", dtype="bfloat16")
    experts = next(m for m in model.modules() if has_fused_experts(m))
    with torch.inference_mode():
        assert computes_alike(BY_FBGEMM.half_experts(experts), experts)
        half = BY_FBGEMM.half_experts(experts)
        experts.act_fn = Clamped(experts.act_fn)
        assert not computes_alike(half, experts)


def test_embedding_that_scales_what_it_gives_keeps_doing_so():
    """As Gemma's does; the check at the start compares with what it says by then."""
    config = Gemma2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval().bfloat16()
    exact = deepcopy(model).float()
    convert(model, "fp16 weights")
    wanted = reference_logits(exact, probes(model)[0])
    assert (reference_logits(model, probes(model)[0]) - wanted).norm() < 0.05 * wanted.norm()


def test_weights_that_do_not_fit_fp16_stay_exact():
    model = tiny_llama().bfloat16()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.up_proj.weight[0, 0] = 1e6
        layer.down_proj.weight *= 1e-9
    convert(model, "fp16 weights")
    assert isinstance(model.model.layers[1].mlp, FusedMLP)
    for kept in (layer.up_proj, layer.down_proj):
        assert type(kept) is torch.nn.Linear
        assert kept.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_that_was_asked_for_is_kept(dtype):
    model = tiny_llama().to(getattr(torch, dtype))
    assert choose_weight_format(model, dtype) == f"{dtype}, {held_size(model)}"
    assert model.dtype == getattr(torch, dtype)


def test_weights_of_single_precision_are_kept():
    model = tiny_llama()
    assert choose_weight_format(model) == f"float32, {held_size(model)}"
    assert not any(isinstance(module, HalfLinear) for module in model.modules())


def test_a_torch_without_the_products_chooses_among_the_others(monkeypatch, without_kernels):
    monkeypatch.setattr(form_trial, "is_available", lambda: False)
    model = tiny_llama().bfloat16()
    assert "fp16" not in choose_weight_format(model)
    assert not any(isinstance(module, HalfLinear) for module in model.modules())


def test_products_that_this_cpu_lacks_are_not_available(monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("Didn't find engine for operation")

    monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", refuse)
    assert not linear.is_available()


@pytest.mark.parametrize(
    ("as_it_is", "fp16", "chosen"),
    [
        ([19.0, 222.0], [14.0, 41.0], "fp16 weights"),  # an AVX2 CPU
        ([10.0, 22.0], [14.0, 41.0], "as it is"),  # one with avx512_bf16
        ([10.0, 22.0], [9.0, 20.0], "as it is"),  # no clear difference
        ([11.8, 20.9], [6.6, 25.4], "as it is"),  # faster for one, slower for many
    ],
)
def test_the_fastest_form_is_chosen_if_it_clearly_is(as_it_is, fp16, chosen):
    taken = {"as it is": as_it_is, "fp16 weights": fp16, "float32": [30.0, 90.0]}
    assert fastest_format(taken) == chosen


def test_each_kind_of_layer_is_measured():
    """Of DeepSeek's, the first has no mixture."""
    model, _ = load_model(FIXTURES / "deepseek_v2", dtype="bfloat16")
    kinds = kinds_of(model)
    assert list(kinds) == [*model.model.layers[:2]]
    assert list(kinds.values()) == [1, 2]
    taken = measure_forms(model)
    assert set(taken) >= {"as it is", "float32"}
    assert all(milliseconds > 0 for times in taken.values() for milliseconds in times)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_model_that_keeps_its_layers_otherwise_stays_as_it_is():
    model = tiny_llama().bfloat16()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    assert choose_weight_format(model).startswith("bfloat16, ")


def test_the_start_log_says_what_was_chosen_and_why(monkeypatch, without_kernels):
    monkeypatch.setattr(
        form_trial,
        "measure_forms",
        lambda model: {"as it is": [19.0, 222.0], "fp16 weights": [14.0, 41.0]},
    )
    said = choose_weight_format(model := tiny_llama().bfloat16())
    assert said == (
        f"fp16 weights, {held_size(model)} (a step of 1 and 16 tokens here:"
        " bfloat16 19 and 222 ms, fp16 weights 14 and 41 ms;"
        f" without our kernels: {without_kernels})"
    )


@needs_kernels
def test_our_kernels_are_chosen_where_they_are_fastest(monkeypatch):
    measured = {"as it is": [19.0, 222.0], "our kernels": [6.0, 31.0], "float32": [30.0, 90.0]}
    monkeypatch.setattr(form_trial, "measure_forms", lambda model: measured)
    model = tiny_llama().bfloat16()
    assert choose_weight_format(model) == (
        f"bfloat16 by our kernels, {held_size(model)} (a step of 1 and 16 tokens here:"
        " bfloat16 19 and 222 ms, our kernels 6 and 31 ms, float32 30 and 90 ms)"
    )
    assert any(isinstance(module, CpuLinear) for module in model.modules())


@pytest.mark.skipif(not is_available(), reason="needs FBGEMM")
def test_memory_of_fp16_weights_is_that_of_whole_blocks():
    assert held_bytes(HalfLinear(torch.ones(48, 512))) == 48 * 512 * 2
    assert held_bytes(HalfLinear(torch.ones(48, 513))) == 48 * 1024 * 2


def test_weights_anywhere_in_a_large_matrix_must_fit_fp16():
    weight = torch.ones(9000, 8)
    assert fits_fp16(weight)
    for row in (0, 8999):
        large = weight.clone()
        large[row] = 1e6
        assert not fits_fp16(large)


@pytest.mark.skipif(not is_available(), reason="needs FBGEMM")
def test_each_layer_is_freed_before_others_change_their_form(monkeypatch):
    model = tiny_llama(num_hidden_layers=4).bfloat16()
    layers = [weakref.ref(x) for x in model.modules() if type(x) is torch.nn.Linear]
    alive = [len(layers)]
    monkeypatch.setattr(
        form, "return_freed_memory", lambda: alive.append(sum(x() is not None for x in layers))
    )
    convert(model, "fp16 weights")
    # Queries, keys and values are one product, and so are gate and up; others come one by one.
    assert max(before - after for before, after in pairwise(alive)) <= 3
    assert alive[-1] <= 2
