"""Checkpoints' own bits, kept: the same model as of the unpacked weights, in as many bytes."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.checkpoint import load_model
from engine.checkpoint.checkpoint import load_model as load_by_name
from engine.layers.blocks import BlockEmbedding, BlockLinear
from engine.layers.cpu_layer import CpuLayer
from engine.layers.weight_format import convert, held_bytes
from engine.loading import load
from engine.runner.self_check import start_runner
from tests.conftest import TINY, byte_tokenizer, tiny_llama
from tests.engine.alone import needs_kernels
from tests.engine.checkpoint.test_adapters import save_adapter, update
from tests.engine.checkpoint.test_formats import words
from tests.engine.checkpoint.test_gguf import metadata, named_tensors, vocabulary

pytestmark = needs_kernels
SIZES: dict[str, Any] = TINY | {
    "hidden_size": 64, "intermediate_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "eos_token_id": 256,
}  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = torch.arange(40, 60)[None]


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT, use_cache=False).logits


def assert_same(folder: Path) -> Any:
    """The packed model, which must say what the unpacked one does, and by our kernels."""
    model, _ = load_model(folder)
    wanted = logits_of(load_model(folder, dtype="float32")[0])
    convert(model, "our kernels")
    torch.testing.assert_close(logits_of(model), wanted, atol=1e-4, rtol=1e-4)
    return model


def blocks_of(folder: Path) -> list[str]:
    model, _ = load_model(folder)
    kinds = BlockLinear | BlockEmbedding
    return [name.split(".")[-1] for name, x in model.named_modules() if isinstance(x, kinds)]


# ---- Integers


def quantised(folder: Path, order: bool = False, bits: int = 4) -> Path:
    """A tiny Llama as GPTQ keeps it, by the format's definition."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).bfloat16()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.split(".")[-2] in LINEAR]:
        rows, columns = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        groups = columns // 32
        tensors |= {
            f"{module}.qweight": words(torch.randint(0, 2**bits, (rows, columns)), bits).T,
            f"{module}.qzeros": words(torch.randint(0, 2**bits, (groups, rows)), bits),
            f"{module}.scales": (torch.rand(groups, rows) / 100).half(),
            f"{module}.g_idx": (torch.arange(columns) // 32).int(),
        }
        if order:
            generator = torch.Generator().manual_seed(columns)  # alike for layers of one input
            shuffled = torch.randperm(columns, generator=generator)
            tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"][shuffled]
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq_v2"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_gptq_stays_packed(tmp_path, order, bits):
    folder = quantised(tmp_path, order, bits)
    assert {*blocks_of(folder)} == {*LINEAR}
    model = assert_same(folder)
    runner = start_runner(model, "4MiB", 4)
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}
    assert runner.difference < 2e-5


def test_given_type_and_quantize_unpack(tmp_path):
    folder = quantised(tmp_path)
    for wish in ({"dtype": "bfloat16"}, {"quantize": "8bit"}):
        model, _ = load_by_name(folder, **wish)
        assert not any(isinstance(x, BlockLinear) for x in model.modules())


def test_adapter_on_packed_base(tmp_path):
    base = quantised(tmp_path / "base")
    folder = save_adapter(tmp_path / "a", update("model.layers.0.self_attn.q_proj", 64, 64))
    model, _ = load_model(folder, base=base)
    assert not any(isinstance(x, BlockLinear) for x in model.modules())


def test_bytes_with_scales_of_rows(tmp_path):
    tiny_llama(**SIZES).bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.split(".")[-2] in LINEAR]:
        shape = tensors[name].shape
        tensors[name] = torch.randint(-128, 128, shape).to(torch.int8)
        tensors[f"{name}_scale"] = (torch.rand(shape[0], 1) / 100).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert {*blocks_of(tmp_path)} == {*LINEAR}
    assert_same(tmp_path)


def test_bitsandbytes_stays_packed(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    tiny_llama(**SIZES).bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.split(".")[-2] in LINEAR]:
        packed, state = functional.quantize_4bit(
            tensors[name], quant_type="nf4", compress_statistics=True
        )
        parts = {f"{name}.{key}": x for key, x in state.as_dict(packed=True).items()}
        tensors |= {name: packed} | parts
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert {*blocks_of(tmp_path)} == {*LINEAR}
    assert_same(tmp_path)


# ---- GGUF


def random_blocks(kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Blocks of random bytes, of small scales."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(shape[0])
    data = rng.integers(0, 256, (shape[0] * shape[1] // 256, size), np.uint8)
    for at in [208] if kind == "Q6_K" else [0, 2]:
        half = (rng.random((len(data), 1)) / 5000).astype(np.float16)
        data[:, at : at + 2] = half.view(np.uint8)
    return data.reshape(shape[0], -1)


def file_of(path: Path, kinds: dict[str, str], tied: bool = False, **sizes: int) -> Path:
    """A tiny Llama in a file, each matrix in the kind of the first name that is in its own."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | sizes), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, "llama")
    metadata(writer, config)
    vocabulary(writer)
    for name, tensor in named_tensors(model, "llama").items():
        if tied and name == "output.weight":
            continue
        kind = next((k for part, k in kinds.items() if part in name and tensor.ndim > 1), "F32")
        asked = gguf.GGMLQuantizationType[kind]
        own = random_blocks(kind, tensor.shape) if "_K" in kind else gguf.quantize(tensor, asked)
        writer.add_tensor(name, own, raw_dtype=asked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_stays_packed(tmp_path, kind, tied):
    file = file_of(tmp_path / "m.gguf", {"token_embd": "Q8_0", "": kind}, tied)
    assert {*blocks_of(file)} == {*LINEAR, "embed_tokens", "lm_head"}
    runner = start_runner(assert_same(file), "4MiB", 4)
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}


def test_layers_of_one_input_in_several_kinds(tmp_path):
    """As Q4_K_M has the values of some layers in six bits."""
    kinds = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K", "": "Q4_K"}
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    file = file_of(tmp_path / "m.gguf", kinds, **sizes)
    runner = start_runner(assert_same(file), "8MiB", 4)
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}


def test_memory_is_that_of_the_file(tmp_path):
    """Of five bits as of eight; a tied matrix is held twice, for its rows and for the head."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    file = file_of(tmp_path / "m.gguf", {"": "Q4_1"}, **sizes)
    model, _ = load_model(file)
    assert held_bytes(model) < 1.1 * sum(t.n_bytes for t in gguf.GGUFReader(file).tensors)


def test_served_from_its_file(tmp_path):
    file = file_of(tmp_path / "tiny-Q4_1.gguf", {"": "Q4_1"})
    model = load(file, cache_memory="4MiB")
    model.close()
    assert model.name == "tiny-Q4_1"
    assert model.facts["weights"].startswith("as they are in the checkpoint")
