"""Lets the CPU pass for a CUDA card."""

from itertools import pairwise

import torch


def flash_attention(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale,
    window_size_left,
    window_size_right,
    seqused_k,
):
    """What the documentation of torch.nn.attention.varlen says of its kernel, in plain words."""
    assert not dropout_p
    assert not return_debug_mask
    for numbers in (cu_seq_q, cu_seq_k, seqused_k):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    begins, starts, used = cu_seq_q.tolist(), cu_seq_k.tolist(), seqused_k.tolist()
    assert starts == sorted(starts)
    assert len(begins) == len(starts) == len(used) + 1
    assert begins[-1] == len(query)
    assert max_k >= max(used)
    assert max_q == max(end - begin for begin, end in pairwise(begins))
    outs = []
    for (begin, end), start, total in zip(pairwise(begins), starts, used, strict=False):
        aligned = total - (end - begin)
        mask = torch.ones(end - begin, total, dtype=torch.bool)
        if is_causal or window_size_right is not None:
            mask = mask.tril(aligned + (window_size_right or 0))
        if window_size_left is not None:
            mask = mask.triu(aligned - window_size_left)
        states = query[begin:end], key[start : start + total], value[start : start + total]
        q, k, v = (x.transpose(0, 1)[None] for x in states)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs), *[torch.empty(0)] * 4


def capture(compute, device, memory):
    """A CUDA graph's manners: only what lies in the same tensors counts when it is replayed."""
    out = compute().clone()
    return out, lambda: out.copy_(compute())


def as_on_a_card(patch, attention=flash_attention, capturing=capture):
    """Let the CPU pass for a card, by the stand-ins above."""
    patch.setattr("engine.runner.why_not_in_place", lambda layers: None)
    patch.setattr("engine.attention.flash_attention", attention)
    patch.setattr("engine.cuda_graph.capture", capturing)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
