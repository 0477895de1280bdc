"""Lets the CPU pass for a CUDA card."""

import sys
from itertools import pairwise
from types import SimpleNamespace

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


def rotate_and_store(heads, cos, sin, rows, keys, values, norms=None, eps=0.0):
    """What engine.kernels.cuda says of its kernel, in torch's operations."""
    key_heads = keys.shape[1]
    query, key, value = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)
    width = heads.shape[2]
    if norms:
        query, key = (
            torch.nn.functional.rms_norm(x, (width,), weight, eps)
            for x, weight in zip((query, key), norms, strict=True)
        )

    def turned(x):
        first, second = x.chunk(2, -1)
        swapped = torch.cat([-second, first], -1)
        return x * cos[:, None] + swapped * sin[:, None]

    keys.index_copy_(0, rows, turned(key))
    values.index_copy_(0, rows, value)
    return turned(query)


def add_and_norm(x, more, weight, eps):
    if more is not None:
        x += more
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_and_mul(x):
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def latent_attention(query, rows, starts, counts, rank, scale):
    outs = []
    for one, start, count in zip(query, starts.tolist(), counts.tolist(), strict=True):
        keys = rows[start : start + count, 0]
        weights = (one.float() @ keys.float().T * scale).softmax(-1)
        outs.append(weights @ keys[:, :rank].float())
    return torch.stack(outs).to(query.dtype)


def expert_product(x, weight, scale, chosen):
    weight = weight[chosen].float() * (1 if scale is None else scale[chosen].float())
    return torch.einsum("ti,tkoi->tko", x.float(), weight).to(x.dtype)


def with_kernels(patch):
    """Let `engine.layers.cuda_layer` be imported where there is no Triton, with these kernels."""
    kernels = {add_and_norm, rotate_and_store, silu_and_mul, latent_attention, expert_product}
    named = SimpleNamespace(**{kernel.__name__: kernel for kernel in kernels})
    patch.setitem(sys.modules, "engine.kernels.cuda", named)
    patch.delitem(sys.modules, "engine.layers.cuda_layer", raising=False)


def as_on_a_card(patch, attention=flash_attention, capturing=capture):
    """Let the CPU pass for a card, by the stand-ins above."""
    with_kernels(patch)
    patch.setattr("engine.runner.create.why_not_in_place", lambda layers: None)
    patch.setattr("engine.attention.in_place.flash_attention", attention)
    patch.setattr("engine.runner.cuda_graph.capture", capturing)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
