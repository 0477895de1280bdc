"""LoRA adapters: each way in which one changes a model, beside the same computed by hand."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from engine.checkpoint import load_model
from engine.checkpoint.adapters import is_adapter
from engine.errors import StartError
from tests.conftest import ROOT, TINY, byte_tokenizer, tiny_llama

DATA = Path(os.environ.get("CHAT_TEST_DATA", "/nowhere")) / "fixtures" / "adapters"
PROMPT = torch.arange(40, 60)[None]
Q_0 = "model.layers.0.self_attn.q_proj"
DOWN_1 = "model.layers.1.mlp.down_proj"
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def update(module: str, out: int, inner: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """The two matrices of a module's update, as peft names them."""
    return {
        f"{module}.lora_A.weight": draw(rank, inner),
        f"{module}.lora_B.weight": draw(out, rank, seed=2),
    }


def change(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """B A, [out, in]."""
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def save_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    prefix: str = "base_model.model.",
    **settings: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{prefix}{name}": x.contiguous() for name, x in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits_of(folder: Path, base: Path | None = None) -> torch.Tensor:
    model, _ = load_model(folder, base=base, dtype="float32", device_map="cpu")
    with torch.inference_mode():
        return model(input_ids=PROMPT, use_cache=False).logits


@torch.inference_mode()
def logits_with(base: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> torch.Tensor:
    """Those of the base whose weights a test has changed itself."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    edit(dict(model.named_parameters()))
    return model(input_ids=PROMPT, use_cache=False).logits


def assert_merges(folder: Path, base: Path, edit: Callable[[Any], None]) -> None:
    wanted = logits_with(base, edit)
    assert (wanted - logits_with(base, lambda _: None)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(folder, base), wanted, atol=2e-6, rtol=1e-5)


def test_update_is_added(tmp_path, base):
    tensors = update(Q_0, 32, 32) | update(DOWN_1, 32, 64)

    def edit(weights):
        for module in (Q_0, DOWN_1):
            weights[f"{module}.weight"] += 2 * change(tensors, module)

    assert_merges(save_adapter(tmp_path / "a", tensors), base, edit)


@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.", "module.base_model.model.", "_orig_mod.base_model.model."]
)
@pytest.mark.parametrize("ending", [".weight", ".default.weight", ".my-adapter.weight"])
def test_spellings_of_names(tmp_path, base, prefix, ending):
    tensors = update(Q_0, 32, 32)
    named = {name.replace(".weight", ending): x for name, x in tensors.items()}

    def edit(weights):
        weights[f"{Q_0}.weight"] += 2 * change(tensors, Q_0)

    assert_merges(save_adapter(tmp_path / "a", named, prefix), base, edit)


def test_patterns_and_rank_stabilised_scale(tmp_path, base):
    tensors = update(Q_0, 32, 32, rank=2) | update(DOWN_1, 32, 64)
    settings = {
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 16},
        "use_rslora": True,
    }

    def edit(weights):
        weights[f"{Q_0}.weight"] += 8 / math.sqrt(2) * change(tensors, Q_0)
        weights[f"{DOWN_1}.weight"] += 16 / math.sqrt(4) * change(tensors, DOWN_1)

    assert_merges(save_adapter(tmp_path / "a", tensors, **settings), base, edit)


def test_dora_sets_lengths_of_rows(tmp_path, base):
    tensors = update(Q_0, 32, 32)
    tensors[f"{Q_0}.lora_magnitude_vector"] = draw(32, seed=3).abs() + 1

    def edit(weights):
        weight = weights[f"{Q_0}.weight"]
        weight += 2 * change(tensors, Q_0)
        weight *= (tensors[f"{Q_0}.lora_magnitude_vector"] / weight.norm(dim=1))[:, None]

    assert_merges(save_adapter(tmp_path / "a", tensors, use_dora=True), base, edit)


def test_modules_saved_whole_and_new_words(tmp_path, base):
    rows, head = draw(266, 32), draw(266, 32, seed=2)
    tensors = {
        "model.embed_tokens.modules_to_save.default.weight": rows,
        "lm_head.modules_to_save.weight": head,
    }
    folder = save_adapter(tmp_path / "a", tensors)
    model, tokenizer = load_model(folder, base=base, dtype="float32", device_map="cpu")
    assert torch.equal(model.get_input_embeddings().weight, rows)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert model.config.vocab_size == 266
    assert len(tokenizer) == len(byte_tokenizer())


def test_rows_of_some_tokens(tmp_path, base):
    rows = draw(2, 32)
    tensors = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    folder = save_adapter(tmp_path / "a", tensors, trainable_token_indices=[41, 50])

    def edit(weights):
        weights["model.embed_tokens.weight"][[41, 50]] = rows

    assert_merges(folder, base, edit)


def test_updates_of_embedding_and_head(tmp_path, base):
    a, b = draw(4, 260), draw(32, 4, seed=2)
    embedding = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    tensors = embedding | update("lm_head", 260, 32)

    def edit(weights):
        weights["model.embed_tokens.weight"] += 2 * (b @ a).T
        weights["lm_head.weight"] += 2 * change(tensors, "lm_head")

    assert_merges(save_adapter(tmp_path / "a", tensors), base, edit)


def saved_qwen2(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TINY, **settings)).save_pretrained(folder)
    return folder


def test_tied_head_parts_from_its_embedding(tmp_path):
    base = saved_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    tensors = update("lm_head", 260, 32)
    model, _ = load_model(
        save_adapter(tmp_path / "a", tensors), base=base, dtype="float32", device_map="cpu"
    )
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(embedding, own.get_input_embeddings().weight)
    torch.testing.assert_close(head, embedding + 2 * change(tensors, "lm_head"))


def test_biases_of_model_and_update(tmp_path):
    base = saved_qwen2(tmp_path / "base")
    bias = draw(32, seed=5)
    tensors = update(Q_0, 32, 32) | {f"{Q_0}.lora_B.bias": bias}
    whole = {"model.layers.1.self_attn.q_proj.bias": draw(32, seed=6)}
    folder = save_adapter(tmp_path / "a", tensors | whole, lora_bias=True, bias="all")

    def edit(weights):
        weights[f"{Q_0}.weight"] += 2 * change(tensors, Q_0)
        weights[f"{Q_0}.bias"] += 2 * bias
        weights["model.layers.1.self_attn.q_proj.bias"].copy_(*whole.values())

    assert_merges(folder, base, edit)


def test_weights_kept_as_inputs_by_outputs(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    module = "transformer.h.0.attn.c_attn"
    tensors = update(module, 96, 32)

    def edit(weights):
        weights[f"{module}.weight"] += 2 * change(tensors, module).T

    folder = save_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)
    assert_merges(folder, tmp_path / "base", edit)


# ---- Mixtures of experts


@pytest.fixture
def mixture(tmp_path) -> Path:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **TINY, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_experts_by_name(tmp_path, mixture):
    module = "model.layers.1.mlp.experts.2.up_proj"
    tensors = update(module, 24, 32)

    def edit(weights):
        weights["model.layers.1.mlp.experts.gate_up_proj"][2, 24:] += 2 * change(tensors, module)

    assert_merges(save_adapter(tmp_path / "a", tensors), mixture, edit)


def stacked(place: str, out: int, inner: int, seed: int) -> dict[str, torch.Tensor]:
    """peft's two matrices of a parameter of three experts."""
    return {
        f"{place}.lora_A.weight": draw(3 * 4, inner, seed=seed),
        f"{place}.lora_B.weight": draw(out, 4 * 3, seed=seed + 1),
    }


def stacked_change(tensors: dict[str, torch.Tensor], place: str) -> torch.Tensor:
    a, b = tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"]
    return torch.einsum("ore,eri->eoi", b.unflatten(1, (4, 3)), a.unflatten(0, (3, 4)))


def test_stacked_experts(tmp_path, mixture):
    module = "model.layers.0.mlp.experts"
    tensors = stacked(f"{module}.base_layer", 48, 32, 1) | stacked(module, 32, 24, 3)
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def edit(weights):
        weights[f"{module}.gate_up_proj"] += 2 * stacked_change(tensors, f"{module}.base_layer")
        weights[f"{module}.down_proj"] += 2 * stacked_change(tensors, module)

    assert_merges(save_adapter(tmp_path / "a", tensors, target_parameters=both), mixture, edit)


def test_stacked_experts_of_early_peft(tmp_path, mixture):
    """Its first releases took a stack for [experts, in, out]."""
    module = "model.layers.0.mlp.experts"
    tensors = stacked(module, 24, 32, 1)

    def edit(weights):
        weights[f"{module}.down_proj"] += 2 * stacked_change(tensors, module).transpose(1, 2)

    folder = save_adapter(tmp_path / "a", tensors, target_parameters=["experts.down_proj"])
    assert_merges(folder, mixture, edit)


def test_stacked_experts_that_are_not_told(tmp_path, mixture):
    tensors = stacked("model.layers.0.mlp.experts", 48, 32, 1)
    with pytest.raises(StartError, match="target_parameters does not say which"):
        load_model(save_adapter(tmp_path / "a", tensors), base=mixture)
    folder = save_adapter(tmp_path / "a", tensors, target_parameters=["experts.down_proj"])
    with pytest.raises(StartError, match=r"its .*down_proj is \[48, 32\]"):
        load_model(folder, base=mixture)


# ---- What is refused


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "of the type IA3"),
        ({"task_type": "SEQ_CLS"}, "trained for SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_16"}, "began as pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "began as olora"),
        ({"init_lora_weights": "loftq"}, "began as loftq"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"not_invented_yet": {"a": 1}}, "sets not_invented_yet"),
        ({"r": 64}, "has rank 4, and its settings say 64"),
        ({"use_dora": True}, "lora_magnitude_vector is not there"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path, base, settings, reason):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32), **settings)
    with pytest.raises(StartError, match=f"the adapter in .* cannot be merged: .*{reason}"):
        load_model(folder, base=base)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian", "loftq_config": {}, "target_modules": "all-linear"},
        {"alora_invocation_tokens": None, "not_invented_yet": False},
        {"lora_dtype": "fp16", "auto_mapping": {"unsloth_fixed": True}},
    ],
)
def test_settings_of_training_alone(tmp_path, base, settings):
    load_model(save_adapter(tmp_path / "a", update(Q_0, 32, 32), **settings), base=base)


def without_a(tensors):
    del tensors[f"{Q_0}.lora_A.weight"]


def of_another_shape(tensors):
    tensors.update(update(Q_0, 64, 32))


def of_another_model(tensors):
    tensors.update(update("model.layers.9.self_attn.q_proj", 32, 32))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a, r"q_proj\.lora_A is not there"),
        (of_another_shape, r"is \[64, 32\], and the model's is \[32, 32\]"),
        (of_another_model, r"has no model\.layers\.9\.self_attn"),
        (lambda tensors: tensors.clear(), "no tensors of a LoRA adapter"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, base, damage, reason):
    tensors = update(Q_0, 32, 32)
    damage(tensors)
    with pytest.raises(StartError, match=reason):
        load_model(save_adapter(tmp_path / "a", tensors), base=base)


def test_adapter_on_layers_on_disk(tmp_path, base):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32))
    with pytest.raises(StartError, match="layers on disk"):
        load_model(folder, base=base, device_map='{"": "disk"}')


# ---- Folders


def test_base_by_the_path_that_is_named(tmp_path, base):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32), base_model_name_or_path=f"{base}/")
    assert torch.equal(logits_of(folder), logits_of(folder, base))


def test_base_that_is_not_here(tmp_path):
    folder = save_adapter(
        tmp_path / "a", update(Q_0, 32, 32), base_model_name_or_path="/root/model"
    )
    with pytest.raises(StartError, match=r"belongs to /root/model, .* give its folder with --base"):
        load_model(folder)


def test_weights_as_a_pickle(tmp_path, base):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32))
    wanted = logits_of(folder, base)
    (folder / "adapter_model.safetensors").unlink()
    tensors = {f"base_model.model.{name}": x for name, x in update(Q_0, 32, 32).items()}
    for as_archive in (True, False):  # not so before torch 1.6
        torch.save(tensors, folder / "adapter_model.bin", _use_new_zipfile_serialization=as_archive)
        assert torch.equal(logits_of(folder, base), wanted)


def test_own_tokenizer_goes_before(tmp_path, base):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32))
    own = byte_tokenizer()
    own.chat_template = "own"
    own.save_pretrained(folder)
    assert load_model(folder, base=base)[1].chat_template == "own"
    own.chat_template = None
    own.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert load_model(folder, base=base)[1].chat_template == byte_tokenizer().chat_template


def test_tokenizer_larger_than_the_embedding(tmp_path, base):
    folder = save_adapter(tmp_path / "a", update(Q_0, 32, 32))
    own = byte_tokenizer()
    own.add_tokens(["<new>"])
    own.save_pretrained(folder)
    with pytest.raises(StartError, match="has 261 tokens, and the model 260"):
        load_model(folder, base=base)


@pytest.fixture
def beside(tmp_path, base) -> Path:
    """A merged model, with the files of its adapter left beside it."""
    adapter = save_adapter(base, update(Q_0, 32, 32), base_model_name_or_path=str(base))
    assert not is_adapter(adapter)
    return adapter


def test_merged_model_beside_its_adapter(beside, monkeypatch):
    """transformers must not be told the folder: where peft is, it would add the adapter again."""
    from transformers import LlamaForCausalLM

    own, names = LlamaForCausalLM.from_pretrained, []
    recorded = lambda name, *args, **options: names.append(name) or own(name, *args, **options)  # noqa: E731
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", recorded)
    merged = logits_of(beside)
    assert names == [None]
    for file in beside.glob("adapter_*"):
        file.unlink()
    assert torch.equal(merged, logits_of(beside))


def test_merged_model_with_peft_installed(beside):
    pytest.importorskip("peft")
    merged = logits_of(beside)
    for file in beside.glob("adapter_*"):
        file.unlink()
    assert torch.equal(merged, logits_of(beside))


# ---- Beside peft itself


# peft's own.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "targets", [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.experts.down_proj"]]
)
def test_peft_of_stacked_experts(tmp_path, mixture, targets):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], target_parameters=targets
    )
    model = peft.get_peft_model(model, config)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if "lora_" in name:
            weight.data = draw(*weight.shape, seed=number)
    model.save_pretrained(tmp_path / "a")
    with torch.inference_mode():
        wanted = model(input_ids=PROMPT, use_cache=False).logits
    own = logits_of(tmp_path / "a", mixture)
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "folder",
    [path.parent for path in sorted(DATA.glob("*/adapter_config.json"))],
    ids=lambda folder: folder.name,
)
def test_peft_of_given_adapters(folder):
    expected = np.load(folder / "expected.npz")
    name = str(expected["base"])
    places = ROOT / "tests" / "fixtures" / name, DATA / name
    base = next(place for place in places if (place / "config.json").is_file())
    model, _ = load_model(folder, base=base, dtype="float32", device_map="cpu")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(expected["input_ids"]), use_cache=False).logits
    wanted = torch.tensor(expected["logits"])
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
