"""What layers ask of attention is found without computing it, and refused if it is not done."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DiffLlamaConfig,
    DogeConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    MistralConfig,
    StableLmConfig,
)
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from engine.checkpoint.attention_probe import Mask, attention_windows, check_attention, window_of
from engine.checkpoint.checkpoint import load_model
from engine.errors import StartError
from engine.loading import load
from tests.conftest import TINY, tiny_llama


def test_window_is_how_many_keys_a_query_sees():
    assert window_of(Mask(causal_mask_function), 4096) is None
    assert window_of(Mask(sliding_window_causal_mask_function(2047)), 4096) == 2047
    assert window_of(Mask(sliding_window_causal_mask_function(1)), 4096) == 1


def test_window_not_shorter_than_the_context_is_none():
    for window in (4096, 262_144):
        assert window_of(Mask(sliding_window_causal_mask_function(window)), 4096) is None


def only_even_keys(batch, head, query, key):
    return key % 2 == 0


@pytest.mark.parametrize(
    "sees",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(1000, torch.zeros(1, dtype=torch.long)),
        and_masks(causal_mask_function, only_even_keys),
    ],
    ids=["bidirectional", "chunked", "sparse"],
)
def test_other_masks_are_refused(sees):
    with pytest.raises(StartError, match="neither causal nor a sliding window"):
        window_of(Mask(sees), 4096)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(vocab_size=260, hidden_size=32, num_attention_heads=4), "mask is neither"),
        (DiffLlamaConfig(**TINY), "do not compute attention once each"),
        (DogeConfig(**TINY), "change their attention's mask"),
        (GPTNeoConfig(vocab_size=260, hidden_size=32, num_heads=4), "code of its own"),
        (StableLmConfig(**TINY), "do not pass on what its forward pass is given"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attention_is_refused_before_any_weights_are_read(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(StartError, match=f"is not supported: .*{reason}.*; take another model$"):
        load(tmp_path)


def test_other_kinds_of_layers_are_refused_by_their_names(tmp_path):
    Llama4TextConfig().save_pretrained(tmp_path)
    with pytest.raises(StartError, match="not supported: it has layers of chunked_attention"):
        load_model(tmp_path)


def test_option_that_attention_does_not_do_is_refused():
    model = tiny_llama()
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *given, forward=forward, **named: forward(
            *given, **named, position_bias=torch.zeros(1)
        )
    with pytest.raises(StartError, match="attention uses position_bias"):
        attention_windows(model, 512, "cpu")


def test_trial_on_tensors_without_data_leaves_the_configuration_alone():
    config = MistralConfig(**TINY, sliding_window=64)
    before = config.to_dict()
    check_attention(config)
    assert config.to_dict() == before
    assert config._attn_implementation != "trial"


def test_trial_finds_the_windows_of_a_model_on_tensors_without_data():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MistralConfig(**TINY, sliding_window=64))
    assert [*attention_windows(model, 512, "meta").values()] == [64, 64]


def test_type_that_transformers_lacks_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    said = file.read_text().replace('"model_type": "llama"', '"model_type": "chatglm"')
    file.write_text(said)
    with pytest.raises(StartError, match="no model of the type chatglm; take another model"):
        load(tmp_path)
    own_code = '"auto_map": {"AutoConfig": "configuration.Config"}, "model_type"'
    file.write_text(said.replace('"model_type"', own_code))
    with pytest.raises(StartError, match="chatglm, and code in a model's folder is never executed"):
        load(tmp_path)
