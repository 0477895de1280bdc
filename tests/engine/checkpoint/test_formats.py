"""Checkpoints that are quantised already, written here by each format's definition."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import load_model
from engine.checkpoint.formats import settings_of, unpacked
from engine.checkpoint.stored import Stored
from engine.errors import StartError
from tests.conftest import tiny_llama

DATA = Path(os.environ.get("CHAT_TEST_DATA", "/nowhere")) / "fixtures" / "quantised"
OUT, INNER, GROUP = 32, 64, 32


def read(tensors: dict[str, torch.Tensor], method: str, **settings: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint's tensors stand for."""
    stored = {name: Stored.of(tensor) for name, tensor in tensors.items()}
    plain = unpacked(stored, {"quant_method": method, **settings})
    for tensor in plain.values():
        assert tensor.shape == tensor[...].shape
    return {name: tensor[...] for name, tensor in plain.items()}


def numbers(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers as one stream of bits along the last dimension, the lowest first, in int32 words."""
    stream = (values[..., None] >> torch.arange(bits)) & 1
    stream = stream.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32))
    packed = (stream.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return packed.to(torch.int64).where(packed < 2**31, packed - 2**32).to(torch.int32)


def spread(groups: torch.Tensor) -> torch.Tensor:
    """[out, groups] over the columns."""
    return groups.repeat_interleave(GROUP, 1)


# ---- GPTQ and AWQ


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq(bits, layout):
    values, zeros = numbers(bits, OUT, INNER), numbers(bits, OUT, 2, seed=1).clamp(min=1)
    scales = draw(OUT, 2).half()
    tensors = {
        "m.qweight": words(values, bits).T.contiguous(),
        "m.qzeros": words((zeros - int(layout == "gptq")).T, bits),
        "m.scales": scales.T.contiguous(),
        "m.g_idx": torch.arange(INNER) // GROUP,
    }
    wanted = (values - spread(zeros)).float() * spread(scales.float())
    found = read(tensors, "gptq", bits=bits, checkpoint_format=layout)
    assert found.keys() == {"m.weight"}
    assert torch.equal(found["m.weight"], wanted)


def test_gptq_zero_borrows_from_the_next_field():
    values, zeros = numbers(4, OUT, INNER), numbers(4, OUT, 2, seed=1)
    zeros[3] = 0
    scales = draw(OUT, 2).half()
    whole = (zeros.T.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1) - 0x11111111
    stored = torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
    tensors = {
        "m.qweight": words(values, 4).T.contiguous(),
        "m.qzeros": stored,
        "m.scales": scales.T.contiguous(),
    }
    wanted = (values - spread(zeros)).float() * spread(scales.float())
    assert torch.equal(read(tensors, "gptq")["m.weight"], wanted)


def test_gptq_with_columns_in_another_order():
    values, zeros = numbers(4, OUT, INNER), numbers(4, OUT, 2, seed=1)
    scales, group = draw(OUT, 2).half(), numbers(1, INNER, seed=5)
    tensors = {
        "m.qweight": words(values, 4).T.contiguous(),
        "m.qzeros": words(zeros.T, 4),
        "m.scales": scales.T.contiguous(),
        "m.g_idx": group.int(),
    }
    wanted = (values - zeros[:, group]).float() * scales.float()[:, group]
    found = read(tensors, "gptq", checkpoint_format="gptq_v2")
    assert torch.equal(found["m.weight"], wanted)


def test_awq():
    values, zeros = numbers(4, OUT, INNER), numbers(4, OUT, 2, seed=1)
    scales = draw(OUT, 2).half()

    def packed(matrix: torch.Tensor) -> torch.Tensor:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the column of each field
        return words(matrix.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    tensors = {"m.qweight": packed(values.T), "m.qzeros": packed(zeros.T), "m.scales": scales.T}
    wanted = (values - spread(zeros)).float() * spread(scales.float())
    assert torch.equal(read(tensors, "awq")["m.weight"], wanted)


# ---- compressed-tensors, FP8


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_quantized(bits):
    values, scales = numbers(bits, OUT, INNER), draw(OUT, 2).bfloat16()
    half = 2 ** (bits - 1)
    tensors = {
        "m.weight_packed": words(values, bits),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([OUT, INNER]),
    }
    wanted = (values - half).float() * spread(scales.float())
    assert torch.equal(read(tensors, "compressed-tensors")["m.weight"], wanted)
    zeros = numbers(bits, OUT, 2, seed=1)
    tensors["m.weight_zero_point"] = words(zeros.T, bits).T
    wanted = (values - spread(zeros)).float() * spread(scales.float())
    assert torch.equal(read(tensors, "compressed-tensors")["m.weight"], wanted)


@pytest.mark.parametrize("order", ["none", "given"])
def test_pack_quantized_with_columns_of_groups(order):
    """Older files have the group of each column, or -1 where they are in order."""
    values, scales = numbers(4, OUT, INNER), draw(OUT, 2)
    group = numbers(1, INNER, seed=5)
    tensors = {
        "m.weight_packed": words(values, 4),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([OUT, INNER]),
        "m.weight_g_idx": group if order == "given" else torch.full((INNER,), -1),
    }
    wanted = (values - 8).float() * (scales[:, group] if order == "given" else spread(scales))
    assert torch.equal(read(tensors, "compressed-tensors")["m.weight"], wanted)


@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1), (OUT, 2)])
def test_bytes_with_scales(shape):
    values = numbers(8, OUT, INNER) - 128
    scales = draw(*shape)
    factors = (
        spread(scales) if shape == (OUT, 2) else scales[:, None] if shape == (OUT,) else scales
    )
    tensors = {"m.weight": values.to(torch.int8), "m.weight_scale": scales}
    found = read(tensors, "compressed-tensors")["m.weight"]
    assert torch.equal(found, values.float() * factors)


def test_fp8_in_blocks_that_do_not_divide():
    values = (torch.randn(144, 200) * 4).to(torch.float8_e4m3fn)
    scales = draw(2, 2)
    tensors = {"m.weight": values, "m.weight_scale_inv": scales, "m.input_scale": draw(1)}
    rows, columns = torch.arange(144) // 128, torch.arange(200) // 128
    wanted = values.float() * scales[rows][:, columns]
    found = read(tensors, "fp8", weight_block_size=[128, 128])
    assert found.keys() == {"m.weight"}
    assert torch.equal(found["m.weight"], wanted)


def test_fp4_of_compressed_tensors():
    codes = numbers(4, OUT, INNER)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*table, *(-x for x in table)])[codes]
    scales = (torch.rand(OUT, 4) + 0.5).to(torch.float8_e4m3fn)
    tensors = {
        "m.weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "m.weight_scale": scales,
        "m.weight_global_scale": torch.tensor([4.0]),
    }
    wanted = values * (scales.float() / 4).repeat_interleave(16, 1)
    assert torch.equal(read(tensors, "compressed-tensors")["m.weight"], wanted)


# ---- bitsandbytes, gpt-oss


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(kind, nested):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 128)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    parts = {f"m.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = read({"m.weight": packed} | parts, "bitsandbytes")
    assert torch.equal(found["m.weight"], functional.dequantize_4bit(packed, state).float())


def test_bitsandbytes_8_bits():
    values, largest = numbers(8, OUT, INNER) - 128, draw(OUT)
    tensors = {"m.weight": values.to(torch.int8), "m.SCB": largest}
    wanted = values.float() * (largest[:, None] / 127)
    assert torch.equal(read(tensors, "bitsandbytes")["m.weight"], wanted)


def test_mxfp4_of_gpt_oss():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = numbers(8, 3, 32, 2, 16).to(torch.uint8)
    scales = (numbers(4, 3, 32, 2, seed=1) + 120).to(torch.uint8)
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    found = read(tensors, "mxfp4")["experts.down_proj"]
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(found, wanted.reshape(found.shape))


# ---- The whole checkpoint


def test_other_tensors_stay():
    tensors = {"norm.weight": torch.ones(4), "m.bias": torch.ones(2), "m.k_scale": torch.ones(1)}
    assert read(tensors, "fp8").keys() == {"norm.weight", "m.bias"}


def test_part_that_is_not_understood():
    tensors = {"m.qweight": torch.zeros(8, 16, dtype=torch.int32), "m.weight_shape": torch.ones(2)}
    with pytest.raises(StartError, match=r"m\.weight_shape is in the checkpoint"):
        read(tensors, "gptq")


@pytest.mark.parametrize(
    ("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_settings_in_a_file_of_their_own(tmp_path, file, method):
    (tmp_path / file).write_bytes(b'\xef\xbb\xbf{"bits": 4}')
    settings = settings_of(tiny_llama().config, tmp_path)
    assert settings == {"quant_method": method, "bits": 4}


@pytest.mark.parametrize(
    "folder",
    [path.parent for path in sorted(DATA.glob("*/expected.npz"))],
    ids=lambda folder: folder.name,
)
def test_given_checkpoints(folder):
    expected = np.load(folder / "expected.npz")
    file = next(folder.glob("*.gguf"), folder)
    model, tokenizer = load_model(file, dtype="float32", device_map="cpu")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(expected["input_ids"]), use_cache=False).logits
    wanted = torch.tensor(expected["logits"])
    assert (logits - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    if "token_ids" in expected:
        ids = tokenizer.encode(str(expected["text"]), add_special_tokens=False)
        assert ids == expected["token_ids"].tolist()
