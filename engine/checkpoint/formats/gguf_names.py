"""Kinds of models in GGUF files: what transformers calls them, their settings and tensors.

The names are llama.cpp's (gguf-py/gguf/constants.py). A kind is here once it has been tested.
"""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """How a kind of model is called in transformers, and what llama.cpp changes in its weights."""

    model_type: str
    interleaved: bool = False  # rows of queries and keys, as ggml's own rotary embedding has them
    renames: tuple[tuple[str, str], ...] = ()  # before those of all
    keys: dict[str, str] = field(default_factory=dict)  # of the configuration, beside those of all

    def renamed(self, name: str) -> str:
        """A tensor's name in transformers' checkpoints; "" of one that is not known."""
        for pattern, ours in (*self.renames, *_RENAMES):
            name = re.sub(pattern, ours, name)
        return "" if re.search(r"^blk\.|\.(ffn|attn)_", name) else name


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_QWEN_2_MOE = Architecture(
    "qwen2_moe",
    renames=(
        (r"\.ffn_gate_inp_shexp\.", ".mlp.shared_expert_gate."),
        (r"\.ffn_(gate|up|down)_shexp\.", r".mlp.shared_expert.\1_proj."),
    ),
    keys=_EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
)
_DEEPSEEK_2 = Architecture(
    "deepseek_v2",
    renames=(
        (r"\.attn_kv_a_mqa\.", ".self_attn.kv_a_proj_with_mqa."),
        (r"\.attn_kv_a_norm\.", ".self_attn.kv_a_layernorm."),
        (r"\.attn_kv_b\.", ".self_attn.kv_b_proj."),
        (r"\.attn_q_(a|b)\.", r".self_attn.q_\1_proj."),
        (r"\.attn_q_a_norm\.", ".self_attn.q_a_layernorm."),
        (r"\.ffn_(gate|up|down)_shexp\.", r".mlp.shared_experts.\1_proj."),
    ),
    keys={
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "leading_dense_block_count": "first_k_dense_replace",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.q_lora_rank": "q_lora_rank",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "rope.dimension_count": "qk_rope_head_dim",
    },
)
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "internlm2": Architecture("llama", interleaved=True),
    "xverse": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": _QWEN_2_MOE,
    "qwen3moe": Architecture("qwen3_moe", keys=_EXPERTS),
    "deepseek2": _DEEPSEEK_2,
}
_RENAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_(q|k)_norm\.", r".self_attn.\1_norm."),
    (r"\.attn_(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.ffn_gate_inp\.", ".mlp.gate."),
)
KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
