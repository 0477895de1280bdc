"""Weights in 8 and 4 bits: what is packed, how far off it is, and what is refused."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, GptOssConfig, GptOssForCausalLM

from engine.attention.interface import can_absorb
from engine.checkpoint.checkpoint import best_placement, load_model
from engine.checkpoint.quantizer import QuantizationSettings, quantization_settings
from engine.errors import StartError
from engine.kernels.cpu import why_missing
from engine.layers import autotune as form_trial
from engine.layers.autotune import choose_weight_format
from engine.layers.block_packing import pack_blocks, pairs_of, unpack_blocks
from engine.layers.blocks import BlockExperts, PackedLinear
from engine.layers.cpu_linear import CpuLinear
from engine.layers.fbgemm import Int8Linear, ListedExperts, has_int8_products
from engine.layers.quantized import (
    QuantizedExperts,
    QuantizedLinear,
    bits_of,
    largest_unpacked,
    num_parameters,
    pack,
    unpack,
)
from engine.runner.cache_budget import cache_budget
from engine.runner.self_check import reference_logits, start_runner
from tests.conftest import tiny_llama
from tests.engine.alone import FIXTURES, needs_bitsandbytes, needs_kernels

BOTH = ["8bit", "4bit"]
FAMILIES = ["deepseek_v2", "index", "internlm2", "llama", "xverse"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The families' checkpoints; DeepSeek's with experts twice as wide, to be whole blocks."""
    wide = tmp_path_factory.mktemp("wide") / "deepseek_v2"
    shutil.copytree(FIXTURES / "deepseek_v2", wide)
    config = json.loads((wide / "config.json").read_text())
    config["moe_intermediate_size"] *= 2
    (wide / "config.json").write_text(json.dumps(config))
    weights = load_file(wide / "model.safetensors")
    for name, weight in weights.items():
        if "experts" in name:
            weights[name] = weight.repeat(1, 2) if "down" in name else weight.repeat(2, 1)
    save_file(weights, wide / "model.safetensors", {"format": "pt"})
    return {name: FIXTURES / name for name in FAMILIES} | {"deepseek_v2": wide}


def loaded(folder, quantize: str, dtype: str = "float32"):
    return load_model(folder, dtype=dtype, device_map="cpu", quantize=quantize)[0]


def take_unpacked(plain, packed) -> int:
    """Give a plain model what another's weights unpack to; how many were packed."""
    count = 0
    for path, module in packed.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            scale = getattr(module, f"{name}_scale", None)
            offset = getattr(module, f"{name}_offset", None)
            if scale is not None:
                target = getattr(plain.get_submodule(path), name)
                if offset is None:
                    target.data = unpack(weight, scale, torch.float32)
                else:
                    target.data = unpack_blocks(weight, scale, offset)
                count += 1
    return count


def check_equal(model, plain, bound: float) -> None:
    """Of many tokens and of one, for which a mixture unpacks few of its experts."""
    for ids in (list(range(100, 112)), [7]):
        wanted = reference_logits(plain, ids)
        error = (reference_logits(model, ids) - wanted).norm() / wanted.norm()
        assert error < bound


@pytest.mark.parametrize("quantize", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_model_computes_with_what_its_weights_unpack_to(folders, name, quantize):
    packed = loaded(folders[name], quantize)
    plain = loaded(folders[name], "none")
    assert packed.get_memory_footprint() < plain.get_memory_footprint()
    assert num_parameters(packed) == num_parameters(plain)
    assert take_unpacked(plain, packed) >= 18
    check_equal(packed, plain, 1e-5)
    assert start_runner(packed, "1MiB").difference < 1e-4


@needs_kernels
@pytest.mark.parametrize("quantize", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_products_by_our_kernels_are_those_of_the_unpacked_weights(folders, name, quantize):
    packed = loaded(folders[name], quantize)
    plain = loaded(folders[name], "none")
    take_unpacked(plain, packed)
    assert "(products by our kernels" in choose_weight_format(packed, "float32")
    kinds = {type(module) for module in packed.modules()}
    assert CpuLinear in kinds
    assert (ListedExperts in kinds) == (name == "deepseek_v2")
    assert not {QuantizedLinear, QuantizedExperts, PackedLinear, BlockExperts} & kinds
    check_equal(packed, plain, 1e-5)
    assert start_runner(packed, "1MiB").difference < 1e-5


@pytest.mark.skipif(not has_int8_products(), reason="needs FBGEMM")
@pytest.mark.parametrize("name", FAMILIES)
def test_products_by_fbgemm_are_those_of_the_unpacked_weights(folders, name, without_kernels):
    packed = loaded(folders[name], "8bit")
    plain = loaded(folders[name], "none")
    take_unpacked(plain, packed)
    assert f"(products by FBGEMM; without our kernels: {without_kernels}" in choose_weight_format(
        packed, "float32"
    )
    kinds = {type(module) for module in packed.modules()}
    assert Int8Linear in kinds
    assert (ListedExperts in kinds) == (name == "deepseek_v2")
    assert not {QuantizedLinear, QuantizedExperts} & kinds
    check_equal(packed, plain, 3e-3)
    assert start_runner(packed, "1MiB").difference < 1e-3


@pytest.mark.skipif(not has_int8_products(), reason="needs FBGEMM")
def test_a_row_of_int8_products_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    packed, scale = pack(torch.randn(96, 256), 8)
    layer = Int8Linear(packed, scale, torch.randn(96))
    x = torch.randn(5, 256) * torch.tensor([[1e-6], [1.0], [1e6], [0.0], [30.0]])
    together = layer(x)
    wanted = torch.nn.functional.linear(x, unpack(packed, scale, torch.float32), layer.bias)
    for row in range(5):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
        assert (together[row] - wanted[row]).norm() < 2e-4 * wanted[row].norm()


@pytest.mark.skipif(not has_int8_products(), reason="needs FBGEMM")
def test_broken_activations_stay_broken():
    layer = Int8Linear(*pack(torch.randn(8, 64), 8))
    for value in (torch.nan, torch.inf):
        x = torch.ones(2, 64)
        x[1, 3] = value
        assert not layer(x)[1].isfinite().any()
        assert layer(x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_starts_in_8_bits(folders, dtype):
    model = loaded(folders["deepseek_v2"], "8bit", dtype)
    said = choose_weight_format(model)
    assert re.fullmatch(r"in 8 bits, \d+ KiB \(products by our kernels\)", said) or why_missing()
    assert start_runner(model, "1MiB").difference < 0.1


def test_without_kernels_and_fbgemm_weights_are_unpacked(folders, monkeypatch, without_kernels):
    monkeypatch.setattr(form_trial, "has_int8_products", lambda: False)
    model = loaded(folders["llama"], "8bit", "bfloat16")
    assert "unpacked before each product" in choose_weight_format(model)
    assert bits_of(model) == 8
    assert start_runner(model, "1MiB").difference < 0.1


@pytest.mark.parametrize("quantize", BOTH)
def test_head_embeddings_router_and_latents_stay(folders, quantize):
    model = loaded(folders["deepseek_v2"], quantize)
    assert sum(map(can_absorb, model.modules())) == model.config.num_hidden_layers
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    routers = [x for name, x in model.named_modules() if name.endswith("mlp.gate")]
    assert routers
    assert all(router.weight.dtype == torch.float32 for router in routers)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=needs_bitsandbytes)])
def test_packing_loses_little(bits):
    matrix = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    for dtype, bound in (
        (torch.float32, {8: 0.01, 4: 0.1}),
        (torch.bfloat16, {8: 0.012, 4: 0.1}),
        (torch.float16, {8: 0.01, 4: 0.1}),
    ):
        packed, scale = pack(matrix.to(dtype), bits)
        assert packed.nbytes == matrix.numel() * bits // 8
        back = unpack(packed, scale, dtype)
        assert back.dtype == dtype
        assert (back.float() - matrix).norm() / matrix.norm() < bound[bits]


def test_tiny_weights_of_fp16_have_a_scale():
    matrix = torch.full((2, 64), 3e-6, dtype=torch.float16)
    torch.testing.assert_close(unpack(*pack(matrix, 8), torch.float16), matrix)


def test_a_row_of_zeros_stays_zero():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        packed, scale = pack(torch.zeros(4, 64, dtype=dtype), 8)
        assert not unpack(packed, scale, dtype).any()


@pytest.mark.parametrize("quantize", BOTH)
def test_tensors_of_another_shape_are_refused(folders, tmp_path, quantize):
    """Of packed ones transformers does not tell."""
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = torch.cat([weights[name], weights[name]])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartError, match=r"of another shape.*up_proj"):
        loaded(folder, quantize)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("quantize", BOTH)
def test_packed_model_keeps_no_file_in_memory(folders, tmp_path, quantize):
    """Norms alone, which are not packed, would keep the files mapped of which they are a part."""
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    model = loaded(folder, quantize)
    assert bits_of(model)
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_cache_leaves_room_for_the_largest_stack_of_experts(folders):
    model = loaded(folders["deepseek_v2"], "8bit")
    experts = next(x for x in model.modules() if isinstance(x, QuantizedExperts))
    room = experts.gate_up_proj.numel() + experts.down_proj.numel()
    assert largest_unpacked(model, torch.device("cpu")) == 4 * room
    assert largest_unpacked(model, torch.device("cuda:0")) == 0


def test_what_is_unpacked_is_not_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))
    card = torch.device("cuda:0")
    assert cache_budget("0.5", card, 2**32) == 3 * 2**31
    assert cache_budget("auto", card, 2**30) < cache_budget("auto", card)


# The configuration of DeepSeek-Coder-V2-Lite.
DEEPSEEK = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
    "dtype": torch.bfloat16,
}


@pytest.mark.parametrize(
    ("bits", "placed"),
    [(None, "auto"), (8, "cuda:0"), pytest.param(4, "cuda:0", marks=needs_bitsandbytes)],
)
def test_deepseek_fits_one_card_of_24_gb_in_fewer_bits(monkeypatch, bits, placed):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (int(23.6 * 2**30), 24 * 2**30))
    settings = QuantizationSettings(bits) if bits else None
    assert best_placement(DeepseekV2Config(**DEEPSEEK), "auto", settings) == placed


def test_mixture_whose_experts_do_more_is_refused(tmp_path):
    """gpt-oss's have biases, and clamp."""
    config = GptOssConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(StartError, match="cannot pack the experts of GptOssExperts; start without"):
        loaded(tmp_path, "8bit")


def test_layers_on_disk_are_refused(folders):
    with pytest.raises(StartError, match="layers on disk; take them out of --device-map"):
        load_model(
            folders["llama"], device_map='{"model": "cpu", "lm_head": "disk"}', quantize="8bit"
        )


def test_checkpoint_in_an_unknown_format_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"quantization_config": {"quant_method": "aqlm"}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(StartError, match="quantised with AQLM, which is not supported"):
        loaded(folder, "8bit")


def test_missing_bitsandbytes_is_one_sentence_with_the_command(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(StartError, match=r"on a card .*pip install 'bitsandbytes>=0.50,<1'"):
        quantization_settings("4bit", "auto", on_cpu=False)
    assert bits_of(loaded(folders["llama"], "4bit")) == 4


def test_unknown_width_is_refused(folders):
    with pytest.raises(StartError, match="--quantize 3bit is not known"):
        loaded(folders["llama"], "3bit")


def test_start_log_says_what_is_not_packed(folders, tmp_path):
    whole = choose_weight_format(loaded(folders["deepseek_v2"], "4bit", "bfloat16"))
    assert "stay as they are" not in whole
    tiny_llama(intermediate_size=80).save_pretrained(tmp_path)
    narrow = choose_weight_format(loaded(tmp_path, "4bit", "bfloat16"))
    assert "; 2 layers stay as they are, whose rows are not whole blocks of 32 weights" in narrow


def relative_loss(matrix: torch.Tensor) -> float:
    parts = pack_blocks(matrix)
    return float((unpack_blocks(*parts) - matrix.float()).norm() / matrix.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_lose_less_than_their_range_asks(dtype):
    """0.0782 by the range alone, 0.0919 in NF4's blocks of 64."""
    torch.manual_seed(0)
    assert relative_loss(torch.randn(1500, 256).to(dtype)) < 0.0735


@pytest.mark.parametrize("places", [(), (3,), (2, 3)])
def test_weights_that_fit_blocks_are_kept(places):
    """Numbers times scales and offsets that fp16 holds, of a matrix or a stack."""
    torch.manual_seed(0)
    numbers = torch.randint(0, 16, (*places, 8, 2, 32))
    numbers[..., 0], numbers[..., 1] = 0, 15
    matrix = numbers * 2.0**-8 + torch.randint(-9, 9, (*places, 8, 2, 1)) * 2.0**-6
    packed, scale, offset = pack_blocks(matrix.flatten(-2))
    assert packed.shape == (*places, 8, 32)
    assert scale.shape == offset.shape == (*places, 8, 2)
    torch.testing.assert_close(unpack_blocks(packed, scale, offset), matrix.flatten(-2))


def test_blocks_of_one_value_are_kept():
    matrix = torch.tensor([0.0, 1.5, -0.25, 2.0**-20])[:, None].expand(4, 64)
    torch.testing.assert_close(unpack_blocks(*pack_blocks(matrix)), matrix.contiguous())


def test_one_large_weight_spoils_its_block_alone():
    torch.manual_seed(0)
    matrix = torch.randn(4, 64)
    plain = unpack_blocks(*pack_blocks(matrix))
    matrix[0, 0] = 1000
    spoilt = unpack_blocks(*pack_blocks(matrix))
    assert torch.equal(spoilt[:, 32:], plain[:, 32:])
    assert torch.equal(spoilt[1:], plain[1:])
    assert abs(spoilt[0, 0] - 1000) < 1


def test_numbers_of_4_bits_share_bytes():
    values = torch.tensor([[1, 2, 15, 0], [0, 15, 9, 8]], dtype=torch.uint8)
    assert pairs_of(values).tolist() == [[0x12, 0xF0], [0x0F, 0x98]]
