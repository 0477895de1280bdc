"""A checkpoint that takes images too is loaded as its text model, without what sees."""

import model_types
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration

from engine.checkpoint.checkpoint import load_model
from engine.relative_error import relative_error


def test_vision_tower_and_drafts_are_left_on_disk(tmp_path):
    """Qwen 3.5's files have both, and the text model one level down."""
    torch.manual_seed(0)
    config = model_types.tiny_config("qwen3_5", 40)
    whole = Qwen3_5ForConditionalGeneration(config).float().eval()
    whole.save_pretrained(tmp_path)
    model_types.words().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"mtp.norm.weight": torch.ones(3)}, file, {"format": "pt"})
    with safe_open(file, "pt") as stored:
        assert any("visual" in name for name in stored.keys())  # noqa: SIM118
    model, _ = load_model(tmp_path, dtype="float32", device_map="cpu")
    names = [name for name, _ in model.named_parameters()]
    assert not any("visual" in name or "mtp" in name for name in names)
    ids = torch.tensor([model_types.texts()[2]])
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=False).logits
        assert relative_error(found, whole(input_ids=ids).logits) < 1e-4
