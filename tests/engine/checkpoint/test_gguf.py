"""GGUF files, written here by llama.cpp's own package, its names and its keys."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from engine.checkpoint import load_model
from engine.checkpoint.formats.gguf_blocks import READ, affine, weights_of
from engine.checkpoint.formats.gguf_reader import BLOCKS, Tensor, read_gguf
from engine.checkpoint.formats.gguf_splits import SPLITS
from engine.checkpoint.formats.gguf_tokenizer import read_tokenizer
from engine.errors import StartError
from engine.layers.quantized import num_parameters
from engine.prompt.generation_defaults import checkpoint_defaults
from engine.prompt.tokenizer_files import load_sentencepiece
from engine.sampling_params import SamplingParams
from tests.conftest import ROOT, TINY, byte_tokenizer, tiny_llama

PROMPT = torch.arange(40, 60)[None]
SMALL: dict[str, Any] = TINY | {"rms_norm_eps": 1e-5, "rope_theta": 20_000.0}
MIXTURE = SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = SMALL | {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 3, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5, "head_dim": 4,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen2moe": Qwen2MoeConfig(**MIXTURE, shared_expert_intermediate_size=32),
    "qwen3moe": Qwen3MoeConfig(**MIXTURE, head_dim=16, norm_topk_prob=True),
    "deepseek2": DeepseekV2Config(**LATENT),
}


def metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """The keys that convert_hf_to_gguf.py writes."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "moe" in config.model_type or hasattr(config, "n_routed_experts"):
        writer.add_expert_count(getattr(config, "num_experts", 3))
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "deepseek_v2":
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
        writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length(config.v_head_dim)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
    elif getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def vocabulary(writer: gguf.GGUFWriter, split: str = "gpt-2") -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    special = {*tokenizer.all_special_tokens}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([])
    writer.add_eos_token_id(256)
    writer.add_eot_token_id(257)
    writer.add_chat_template(tokenizer.chat_template)


def named_tensors(model: Any, name: str) -> dict[str, np.ndarray]:
    """A model's weights by the package's names, experts stacked."""
    arch = next(kind for kind, named in gguf.MODEL_ARCH_NAMES.items() if named == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    tensors = {}
    for key, tensor in model.state_dict().items():
        pairs = {key: tensor.float()}
        if key.endswith("experts.gate_up_proj"):
            gate, up = tensor.float().chunk(2, 1)
            stem = key.removesuffix("gate_up_proj")
            pairs = {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif key.endswith("experts.down_proj"):
            pairs = {f"{key}.weight": tensor.float()}
        for part, x in pairs.items():
            if name == "llama" and (found := re.search(r"\.(q|k)_proj\.", part)):
                count = heads[0 if found[1] == "q" else 1]
                x = x.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
            ours = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert ours, part
            tensors[ours] = x.contiguous().numpy()
    return tensors


@pytest.fixture(params=CONFIGS)
def original(request) -> tuple[str, Any]:
    torch.manual_seed(0)
    return request.param, AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def write(
    path: Path, name: str, model: Any, kind: str = "F32", split: int = 0, **wishes: float
) -> Path:
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split)
    metadata(writer, model.config)
    for key, value in wishes.items():
        writer.add_key_value(f"general.sampling.{key}", value, gguf.GGUFValueType.FLOAT32)
    vocabulary(writer)
    asked = gguf.GGMLQuantizationType[kind]
    tied = model.config.tie_word_embeddings
    for key, tensor in named_tensors(model, name).items():
        if key == "output.weight" and tied:
            continue
        packed = tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 and "gate_inp" not in key
        used = asked if packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quantize(tensor, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT, use_cache=False).logits


WISHES = {"temp": 0.5, "top_p": 0.25, "min_p": 0.125, "penalty_repeat": 1.25}


def test_sampling_that_a_file_wishes(tmp_path):
    file = write(tmp_path / "model.gguf", "llama", tiny_llama(), **WISHES, top_k=30)
    config = load_model(file, device_map="cpu")[0].generation_config
    wishes = SamplingParams(
        temperature=0.5, top_p=0.25, min_p=0.125, repetition_penalty=1.25, top_k=30
    )
    assert checkpoint_defaults(config) == wishes
    assert config.eos_token_id == [256, 257]


def test_greedy_sampling_that_a_file_wishes(tmp_path):
    file = write(tmp_path / "model.gguf", "llama", tiny_llama(), temp=0.0)
    config = load_model(file, device_map="cpu")[0].generation_config
    assert checkpoint_defaults(config).temperature == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_settings_beside_a_file_go_before_its_own(tmp_path, encoding):
    file = write(tmp_path / "model.gguf", "llama", tiny_llama(), **WISHES)
    beside = tmp_path / "generation_config.json"
    beside.write_text('{"max_new_tokens": 7, "temperature": 0.75}', encoding=encoding)
    config = load_model(file, device_map="cpu")[0].generation_config
    assert checkpoint_defaults(config) == SamplingParams(temperature=0.75, max_new_tokens=7)
    assert config.eos_token_id == [256, 257]
    beside.write_text('{"max_new_tokens": 7, "eos_token_id": 3}', encoding=encoding)
    assert load_model(file, device_map="cpu")[0].generation_config.eos_token_id == 3


def test_damaged_settings_beside_a_file_are_named(tmp_path):
    file = write(tmp_path / "model.gguf", "llama", tiny_llama())
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(StartError, match=r"generation_config\.json \("):
        load_model(file, device_map="cpu")


def test_head_that_is_the_embedding_counts_once(tmp_path):
    original = tiny_llama(tie_word_embeddings=True)
    for kind in ("Q8_0", "Q4_0"):
        file = write(tmp_path / f"{kind}.gguf", "llama", original, kind)
        assert num_parameters(load_model(file, device_map="cpu")[0]) == original.num_parameters()


def test_kinds_of_models(tmp_path, original):
    name, model = original
    file = write(tmp_path / "model.gguf", name, model)
    served, tokenizer = load_model(file, device_map="cpu")
    assert served.dtype == torch.float32
    torch.testing.assert_close(logits_of(served), logits_of(model), atol=1e-5, rtol=1e-5)
    assert served.generation_config.eos_token_id == [256, 257]
    assert tokenizer.chat_template == byte_tokenizer().chat_template


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()


def test_file_in_parts(tmp_path):
    model = llama()
    write(tmp_path / "model.gguf", "llama", model, split=6)
    first, second = sorted(tmp_path.glob("*.gguf"))[:2]
    served, _ = load_model(first, device_map="cpu")
    torch.testing.assert_close(logits_of(served), logits_of(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(StartError, match="give --model the first"):
        load_model(second)
    second.unlink()
    with pytest.raises(StartError, match=f"{second.name} is not there"):
        load_model(first)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)]
)
def test_type_of_weights(tmp_path, kind, dtype):
    file = write(tmp_path / "model.gguf", "llama", llama(), kind)
    assert load_model(file, device_map="cpu")[0].dtype == dtype


# ---- Blocks


def tensor_of(kind: str, rows: int = 6) -> Tensor:
    """Blocks of random bytes, their fp16 numbers being such."""
    _, weights, size = next(block for block in BLOCKS.values() if block[0] == kind)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, 2 * size), np.uint8).reshape(-1, size)
    halves = {"Q6_K": [208]}.get(kind, [0, 2] if kind[-1] == "1" or "_K" in kind else [0])
    for at in halves:
        half = rng.normal(size=(len(data), 1)).astype(np.float16)
        data[:, at : at + 2] = half.view(np.uint8)
    return Tensor("x", kind, (rows, 2 * weights), data.reshape(rows, -1))


@pytest.mark.parametrize("kind", READ)
def test_weights_bit_for_bit(kind):
    tensor = tensor_of(kind)
    wanted = gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[kind])
    assert weights_of(tensor).numpy().tobytes() == wanted.tobytes()
    values, scale, offset = affine(tensor)
    assert values.dtype == (torch.uint8 if kind.startswith("Q4") else torch.int8)
    blocks = values.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    if offset is not None:
        blocks += offset[..., None]
    assert np.array_equal(blocks.flatten(1).numpy(), wanted)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"])
def test_weights_of_other_kinds(kind):
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(0).integers(0, 60, (4, 2 * size), np.uint8)
    found = weights_of(Tensor("x", kind, (4, 2 * weights), data))
    wanted = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.numpy(), wanted, equal_nan=True)


# ---- Rotary embeddings


def written_with(tmp_path: Path, name: str = "llama", **keys: Any) -> Path:
    """A file that says more of its model."""
    path = tmp_path / "said.gguf"
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    writer = gguf.GGUFWriter(path, name)
    metadata(writer, model.config)
    vocabulary(writer, str(keys.pop("split", "gpt-2")))
    for key, value in keys.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key.replace("__", ".").replace("ARCH", name), value)
    for key, tensor in named_tensors(model, name).items():
        writer.add_tensor(key, tensor)
    factors = np.linspace(1, 8, 4, dtype=np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_frequency_factors_divide(tmp_path):
    model, _ = load_model(written_with(tmp_path), device_map="cpu")
    rope = model.model.rotary_emb
    wanted = 20_000.0 ** -(torch.arange(0, 8, 2) / 8) / torch.linspace(1, 8, 4)
    torch.testing.assert_close(rope.inv_freq, wanted)
    assert torch.equal(rope.inv_freq, rope.original_inv_freq)


def test_yarn(tmp_path):
    file = written_with(
        tmp_path,
        ARCH__rope__scaling__type="yarn",
        ARCH__rope__scaling__factor=4.0,
        ARCH__rope__scaling__original_context_length=128,
    )
    rope = load_model(file, device_map="cpu")[0].config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 128


# ---- What is refused


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"split": "tekken"}, "splits text as tekken does"),
        ({"ARCH__rope__scaling__type": "odd", "ARCH__rope__scaling__factor": 2.0}, "kind odd"),
        ({"ARCH__expert_gating_func": 2}, "router is no softmax"),
    ],
)
def test_settings_that_are_not_known(tmp_path, keys, reason):
    with pytest.raises(StartError, match=reason):
        load_model(written_with(tmp_path, **keys), device_map="cpu")


def test_architecture_that_is_not_known(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StartError, match="of the kind mamba, of which only deepseek2, internlm2"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("left", [3, 20, 200, 30_000])
def test_file_cut_short(tmp_path, left):
    file = write(tmp_path / "model.gguf", "llama", llama())
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(StartError, match=r"is no whole GGUF file .*run the download again"):
        load_model(file)


def test_file_of_another_format(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"<!DOCTYPE html>" * 100)
    with pytest.raises(StartError, match="is no whole GGUF file"):
        load_model(file)


# ---- Tokenizers


@pytest.mark.parametrize("split", SPLITS)
def test_splits_compile(split):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": byte_tokenizer().convert_ids_to_tokens([*range(260)]),
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 256,
    }
    tokenizer = read_tokenizer(fields, Path("x.gguf"))
    text = "It's 2026: 你好, naïve\n\n  code(x)\t= 12345"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_from_metadata():
    from sentencepiece import SentencePieceProcessor

    folder = ROOT / "tests" / "fixtures" / "tokenizers" / "index_like"
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [*range(len(pieces))]
    types = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6
             if pieces.is_byte(i) else 1 for i in ids]  # fmt: skip
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": pieces.eos_id(),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer, own = read_tokenizer(fields, Path("x.gguf")), load_sentencepiece(folder)
    for text in ("Hello  world", "你好，世界", "12 apples\n\tx", " begins with a space"):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(
            text, add_special_tokens=False
        )


def test_reader_of_values(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("a", ["x", "ü"])
    writer.add_array("b", [1, -2, 3])
    writer.add_bool("c", True)
    writer.add_float64("d", 1.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    assert (fields["a"], fields["b"], fields["c"], fields["d"]) == (
        ["x", "ü"],
        [1, -2, 3],
        True,
        1.5,
    )
    assert tensors == {}
