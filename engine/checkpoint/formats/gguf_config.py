"""A GGUF file's metadata as the configuration of transformers' model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from engine.checkpoint.formats.gguf_names import KEYS, Architecture
from engine.checkpoint.formats.gguf_tokenizer import PREFIX, end_ids
from engine.errors import StartError

# Our names for what a file may say of sampling (general.sampling.* in llama.cpp's llama-arch.cpp).
SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip


class Metadata:
    """The fields of a file, of which many begin with the name of its kind."""

    def __init__(self, fields: dict[str, Any], path: Path):
        self.fields, self.path = fields, path
        self.name = str(fields.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """What is said of the kind of model."""
        value = self.fields.get(f"{self.name}.{key}")
        return default if value is None else value


def read_config(said: Metadata, kind: Architecture, tensors: dict[str, Any]) -> Any:
    """The configuration. Raises StartError for what it would leave out."""
    if said.get("expert_gating_func", 1) != 1:
        raise StartError(
            f"{said.path} is a mixture whose router is no softmax, which is not supported of GGUF"
            " files; fetch the model in safetensors"
        )
    fields = {ours: said.get(key) for key, ours in (KEYS | kind.keys).items()}
    fields = {key: value for key, value in fields.items() if value is not None}
    fields |= {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(said),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": said.fields.get(f"{PREFIX}bos_token_id"),
        "eos_token_id": end_ids(said.fields) or None,
        "pad_token_id": said.fields.get(f"{PREFIX}padding_token_id"),
    }
    if said.name == "deepseek2":
        fields |= _latent_sizes(said)
    if kind.model_type.endswith("_moe"):
        fields |= {"norm_topk_prob": kind.model_type == "qwen3_moe", "decoder_sparse_step": 1}
    return AutoConfig.for_model(kind.model_type, **fields)


def sampling_of(said: Metadata) -> dict[str, Any]:
    """What a file wishes of sampling, by the names of transformers' generation_config.json."""
    found = {name: said.fields.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    wishes = {name: value for name, value in found.items() if value is not None}
    if "temperature" in wishes:
        wishes["do_sample"] = wishes["temperature"] > 0
    return wishes


def _latent_sizes(said: Metadata) -> dict[str, Any]:
    """MLA's (arXiv 2405.04434)."""
    rope = int(said.get("rope.dimension_count"))
    # Files that read latents in place state the heads' own widths apart.
    key = int(said.get("attention.key_length_mla", said.get("attention.key_length")))
    value = int(said.get("attention.value_length_mla", said.get("attention.value_length")))
    groups = int(said.get("expert_group_count", 1))
    return {
        "qk_nope_head_dim": key - rope,
        "v_head_dim": value,
        "head_dim": rope,
        "num_key_value_heads": int(said.get("attention.head_count")),
        "q_lora_rank": said.get("attention.q_lora_rank"),
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "n_group": groups,
        "topk_group": int(said.get("expert_group_used_count", 1)),
    }


def _rope(said: Metadata) -> dict[str, Any]:
    """How positions are turned; factors of each frequency are put into the model itself."""
    theta = float(said.get("rope.freq_base", 10_000.0))
    linear = float(said.get("rope.scale_linear", 1.0))  # as files of before 2024 say it
    kind = said.get("rope.scaling.type", "linear" if linear != 1.0 else "none")
    factor = float(said.get("rope.scaling.factor", linear))
    if kind in ("none", "") or factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise StartError(
            f"{said.path} has a rotary embedding of the kind {kind}, which is not known; fetch the"
            " model in safetensors"
        )
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        length = said.get("rope.scaling.original_context_length", said.get("context_length"))
        rope["original_max_position_embeddings"] = int(length)
        log = float(said.get("rope.scaling.yarn_log_multiplier", 0.0))
        if said.name == "deepseek2" and log:
            rope["mscale"] = rope["mscale_all_dim"] = round(10 * log, 6)
    return rope
