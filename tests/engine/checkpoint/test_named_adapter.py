"""Named adapters: which layers each changes, and what must be merged instead."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import load_model
from engine.checkpoint.named_adapter import NamedAdapters, read_named_adapter, updates_of
from engine.errors import StartError
from engine.prompt.tokenizer import ChatTokenizer
from engine.runner.create import create_runner
from engine.sequence import KVSpan
from tests.conftest import byte_tokenizer, tiny_llama
from tests.engine.checkpoint.test_adapters import DOWN_1, Q_0, draw, save_adapter, update

BASES = Path(__file__).parents[2] / "fixtures"
DATA = Path(os.environ.get("CHAT_TEST_DATA", "/nowhere")) / "fixtures" / "adapters"


def refusal(folder: Path, model: object = None) -> str:
    """Why an adapter is refused, as far as its own files say or by the model."""
    try:
        updates_of(read_named_adapter(folder), tiny_llama() if model is None else model)
    except StartError as refused:
        return str(refused)
    raise AssertionError("it was not refused")


def test_update_has_the_scale_and_the_layers_name(tmp_path):
    tensors = update(Q_0, 32, 32) | update(DOWN_1, 32, 64)
    settings = {"alpha_pattern": {"down_proj": 2}, "use_rslora": True}
    found = updates_of(
        read_named_adapter(save_adapter(tmp_path / "a", tensors, **settings)), tiny_llama()
    )
    assert found.keys() == {Q_0, DOWN_1}
    for name, alpha in ((Q_0, 8), (DOWN_1, 2)):
        wanted = tensors[f"{name}.lora_B.weight"] * alpha / 2
        torch.testing.assert_close(found[name].up, wanted)
        assert torch.equal(found[name].down, tensors[f"{name}.lora_A.weight"])


PAIR = update(Q_0, 32, 32)
EMBEDDING = "model.embed_tokens"
MUST_BE_MERGED = {
    "lm_head.weight itself": ({"lm_head.weight": draw(260, 32)}, {}),
    "lm_head,": (update("lm_head", 260, 32), {}),
    f"{EMBEDDING} itself": (
        {f"{EMBEDDING}.trainable_tokens_delta": draw(2, 32)},
        {"trainable_token_indices": [1, 2]},
    ),
    f"{EMBEDDING}.lora_embedding_A": (
        {
            f"{EMBEDDING}.lora_embedding_A": draw(4, 260),
            f"{EMBEDDING}.lora_embedding_B": draw(32, 4),
        },
        {},
    ),
    f"{Q_0}.bias itself": (PAIR | {f"{Q_0}.bias": draw(32)}, {"bias": "lora_only"}),
    f"{Q_0}.lora_B.bias": (PAIR | {f"{Q_0}.lora_B.bias": draw(32)}, {"lora_bias": True}),
    f"{Q_0}.lora_magnitude_vector": (
        PAIR | {f"{Q_0}.lora_magnitude_vector.weight": draw(32)},
        {"use_dora": True},
    ),
    "the transposed matrix": (PAIR, {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("what", MUST_BE_MERGED)
def test_what_is_no_linear_layer_must_be_merged(tmp_path, what):
    tensors, settings = MUST_BE_MERGED[what]
    folder = save_adapter(tmp_path / "a", tensors, **settings)
    told = refusal(folder)
    assert f"changes {what}" in told
    assert f"merge it instead, with --model {folder}" in told


def test_another_models_adapter_is_refused(tmp_path):
    tensors = update("model.layers.7.self_attn.q_proj", 32, 32)
    assert "has no model.layers.7" in refusal(save_adapter(tmp_path / "a", tensors))
    told = refusal(save_adapter(tmp_path / "b", update(Q_0, 64, 64)))
    assert "q_proj is [64, 64]" in told
    assert "[32, 32] in the model" in told


def test_folder_without_adapter_is_refused(tmp_path):
    assert "is no folder of a LoRA adapter" in refusal(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    assert "is no folder of a LoRA adapter" in refusal(tmp_path)


@pytest.mark.parametrize("module", ["mlp.experts.0.gate_proj", "self_attn.kv_b_proj"])
def test_experts_and_absorbed_layers_must_be_merged(tmp_path, module):
    model, _ = load_model(BASES / "deepseek_v2", dtype="float32", device_map="cpu")
    folder = save_adapter(tmp_path / "a", update(f"model.layers.1.{module}", 64, 32))
    assert "merge it instead" in refusal(folder, model)


def test_models_own_name_is_refused(tmp_path):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32))
    with pytest.raises(StartError, match="the model itself is called tiny; choose another"):
        NamedAdapters({"tiny": folder}, "tiny")


def test_adapter_is_prompted_by_its_own_template(tmp_path):
    """Where its folder has another one; a tokenizer of other tokens is refused."""
    base = ChatTokenizer(byte_tokenizer())
    folders = {name: save_adapter(tmp_path / name, update(Q_0, 32, 32)) for name in "abcd"}
    byte_tokenizer().save_pretrained(folders["b"])
    other = byte_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}!"
    other.save_pretrained(folders["c"])
    byte_tokenizer(["<|end|>", "<|more|>"]).save_pretrained(folders["d"])
    model = tiny_llama()
    named = NamedAdapters({name: folders[name] for name in "abc"}, "tiny")
    named.fit(model, base, own_templates=True)
    assert named.texts["a"] is named.texts["b"] is base
    assert named.texts["c"].tokenizer.chat_template == other.chat_template
    assert base.tokenizer.chat_template != other.chat_template
    with pytest.raises(StartError, match="changes the tokenizer, which is not"):
        NamedAdapters({"d": folders["d"]}, "tiny").fit(model, base, own_templates=True)


def test_adapter_has_ends_of_its_own(tmp_path):
    """Of its generation config, its tokenizer's eos and its template; not one beyond the model."""
    base = ChatTokenizer(byte_tokenizer(["<|end|>", "<|more|>"]))
    folders = {name: save_adapter(tmp_path / name, update(Q_0, 32, 32)) for name in "abcd"}
    said = {"eos_token_id": [7, 100_000]}
    (folders["b"] / "generation_config.json").write_text(json.dumps(said))
    own = byte_tokenizer(["<|end|>", "<|more|>"])
    own.eos_token = "<|more|>"
    own.save_pretrained(folders["c"])
    own = byte_tokenizer(["<|end|>", "<|more|>"])
    own.chat_template = "{% for m in messages %}{{ m['content'] }}<|more|>{% endfor %}"
    own.save_pretrained(folders["d"])
    named = NamedAdapters(folders, "tiny")
    named.fit(tiny_llama(), base, own_templates=True)
    more = own.convert_tokens_to_ids("<|more|>")
    assert named.ends["b"] == named.ends["a"] | {7}
    assert more not in named.ends["a"] | named.ends["b"]
    assert more in named.ends["c"]
    assert more in named.ends["d"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs CHAT_TEST_DATA")
@pytest.mark.parametrize(
    "name", ["internlm2_fused", "llama_patterns", "llama_some_layers", "llama_tutorial"]
)
def test_adapter_gives_what_peft_computes(name):
    """Beside a request of the base, on the families' own names of modules."""
    expected = np.load(DATA / name / "expected.npz")
    model, _ = load_model(BASES / str(expected["base"]), dtype="float32", device_map="cpu")
    updates = updates_of(read_named_adapter(DATA / name), model)
    runner = create_runner(model, "64MiB", 500, adapters=[updates])
    ids = expected["input_ids"][0].tolist()
    spans = KVSpan(ids, 0, all_logits=True, adapter=1), KVSpan(ids, 100, all_logits=True)
    found = runner.forward([(span, len(ids)) for span in spans])[: len(ids)]
    wanted = torch.tensor(expected["logits"][0])
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_fused_projection_becomes_its_parts(tmp_path):
    """InternLM2's wqkv is loaded as three layers: their rows of B go where the matrix's do."""
    folder = BASES / "internlm2"
    config = json.loads((folder / "config.json").read_text())
    model, _ = load_model(folder, dtype="float32", device_map="cpu")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, inner = model.config.head_dim, config["hidden_size"]
    tensors = update("model.layers.0.attention.wqkv", (heads + 2 * groups) * width, inner)
    adapter = read_named_adapter(save_adapter(tmp_path / "a", tensors))
    found = updates_of(adapter, model)
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "k_proj", "v_proj"]
    rows = [len(update.up) for update in found.values()]
    assert rows == [heads * width, groups * width, groups * width]
    last = tensors["model.layers.0.attention.wqkv.lora_B.weight"][-width:] * 2
    torch.testing.assert_close(found["model.layers.0.self_attn.v_proj"].up[-width:], last)
