"""Families that are Llama but for their names: how their checkpoints' tensors become its."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming


class UngroupQKV(ConversionOps):
    """Splits InternLM2's fused wqkv.

    Its rows are grouped by key head: its query heads, the key, the value.
    """

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((matrix,),) = input_dict.values()
        queries = config.num_attention_heads // config.num_key_value_heads
        groups = matrix.unflatten(0, (config.num_key_value_heads, queries + 2, config.head_dim))
        parts = groups.split([queries, 1, 1], dim=1)
        named = zip(target_patterns, parts, strict=True)
        return {name: part.flatten(0, 2).contiguous() for name, part in named}


class NormalizeRows(ConversionOps):
    """Index normalises its output head at every forward pass; doing so at load is the same."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any, **_: Any
    ) -> dict[str, torch.Tensor]:
        ((matrix,),) = input_dict.values()
        return {target_patterns[0]: F.normalize(matrix, dim=-1) if config.norm_head else matrix}


# Models that are Llama but for their names: model_type, and how the checkpoint's tensors differ.
_LLAMA_LIKE = {
    "xverse": [],
    "index": [WeightConverter("lm_head.weight", "lm_head.weight", [NormalizeRows()])],
    "internlm2": [
        WeightRenaming("tok_embeddings", "embed_tokens"),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming("attention_norm", "input_layernorm"),
        WeightRenaming("ffn_norm", "post_attention_layernorm"),
        WeightRenaming("attention.wo", "self_attn.o_proj"),
        WeightRenaming("feed_forward.w1", "mlp.gate_proj"),
        WeightRenaming("feed_forward.w3", "mlp.up_proj"),
        WeightRenaming("feed_forward.w2", "mlp.down_proj"),
        WeightConverter(
            "attention.wqkv",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [UngroupQKV()],
        ),
    ],
}


@cache
def register_families() -> None:
    """Make the families known to transformers.

    Once registered, transformers' own code is used and a checkpoint's `auto_map` is not.
    """
    for name, mapping in _LLAMA_LIKE.items():
        config_class = type(f"{name}Config", (LlamaConfig,), {"model_type": name})
        model_class = type(
            f"{name}ForCausalLM", (LlamaForCausalLM,), {"config_class": config_class}
        )
        AutoConfig.register(name, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
