"""What a model's layers call for attention, by transformers' interface.

The model's own cache is not used: new rows are written to ours, and the old ones read there.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import Group, Scoring


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: ForwardBatch,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each group's tokens to their own rows, by transformers' interface.

    Takes [1, heads, tokens, width], returns [1, tokens, heads, width]. What a layer may ask for,
    `attention_windows` has checked.
    """
    scoring = Scoring(scaling, module.attention_window, kwargs.get("softcap"), kwargs.get("s_aux"))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    layer_idx = layer_of(module, step.states)
    if _keeps_latent(module):
        return _attend_latents(step, module, query, key, value, scoring)[None], None
    return attend_rows(step, layer_idx, query, key, value, scoring)[None], None


def layer_of(module: Any, states: Any) -> int:
    """The layer that an attention module computes, of which some share a module.

    `states` stands in for the model's cache, if it has one: it was told the layer last.
    """
    known: int | None = getattr(module, "layer_idx", None)
    if known in (None, -1) and states is not None:
        return int(states.layer_idx)
    return -1 if known is None else known


def attend_rows(
    step: ForwardBatch,
    layer_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """A layer's attention for [tokens, heads, width], of which keys and values are cached."""
    layer = step.enter(layer_idx, scoring)
    here = step.on(query.device)
    keys, values = layer.write(here.write, key, value)
    return attend_pool(here, query, keys, values, scoring)


def attend_pool(
    step: ForwardBatch,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of [tokens, heads, width] to a layer's rows, [rows, heads, width].

    The step is on their device.
    """
    parts = [
        group.attend(query[group.tokens], group.select(keys), group.select(values), scoring)
        for group in step.groups
    ]
    return joined(parts)


def _attend_latents(
    step: ForwardBatch,
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    rotated: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """The same of MLA, of which latents and rotated keys are cached, side by side."""
    layer = step.enter(module.layer_idx, scoring)
    here = step.on(query.device)
    rows, _ = layer.write(here.write, torch.cat([latent, rotated], dim=-1), None)
    parts = [
        _attend_latent(module, group, query[group.tokens], group.select(rows), scoring)
        for group in here.groups
    ]
    return joined(parts)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """What the groups say, one behind the other, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_latent(
    module: Any, group: Group, query: torch.Tensor, rows: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """Multi-head latent attention over rows [rows, 1, rank + rope width]: latent, rotated key.

    In prefill, keys and values are expanded from the latents, as many queries share them. In
    decode that would dominate the step, so the up-projections are absorbed into the query and
    the output instead: q · (W c) = (Wᵀ q) · c (section 2.1.2 of arXiv 2405.04434, DeepSeek-V2).
    """
    rank = module.kv_lora_rank
    if group.is_prefill:
        given = (x.transpose(0, 1)[None] for x in (rows[..., :rank], rows[..., rank:]))
        key, value = (x[0].transpose(0, 1) for x in type(module).expand_kv(module, *given))
        return group.attend(query, key, value, scoring)
    widths = [module.qk_nope_head_dim, module.v_head_dim]
    make_key, make_value = module.kv_b_proj.weight.unflatten(0, (-1, sum(widths))).split(widths, 1)
    plain, turned = query.split([widths[0], rows.shape[-1] - rank], dim=-1)
    query = torch.cat([torch.einsum("thw,hwr->thr", plain, make_key), turned], dim=-1)
    out = group.attend(query, rows, rows[..., :rank], scoring)
    return torch.einsum("thr,hwr->thw", out, make_value)


def keep_latent(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces MLA's expand_kv: the cache then holds latents, and attend_latent expands them."""
    return latent, rotated


def _keeps_latent(module: Any) -> bool:
    return getattr(module, "expand_kv", None) is keep_latent


def can_absorb(module: Any) -> bool:
    """Whether a module is MLA whose up-projection is a plain matrix, loaded on this device."""
    up = getattr(module, "kv_b_proj", None)
    plain = type(up) is torch.nn.Linear and up.bias is None and not up.weight.is_meta
    return plain and hasattr(module, "expand_kv")


def use_packed_attention(model: Any) -> None:
    """Let a model's layers call `packed_attention`; those of MLA then cache their latents.

    Each attention module has an `attention_window` by then.
    """
    AttentionInterface.register("packed", packed_attention)
    # cuDNN makes a plan for each new length, and copied keys have a new one at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if can_absorb(module):
            module.expand_kv = keep_latent
    model.set_attn_implementation("packed")
