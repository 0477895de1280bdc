"""Operations of a decoder layer for which torch launches several kernels, as one each, in Triton.

Beside the products, a decode step's time on a GPU goes by the number of kernels: each takes about
two microseconds, however little it computes.
"""

import torch
import triton
import triton.language as tl

# Elements that a program of silu_and_mul computes.
BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, more_ptr, weight_ptr, out_ptr, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row; see add_and_norm."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    mask = at < width
    exact = tl.load(x_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        exact += tl.load(more_ptr + row + at, mask=mask, other=0.0).to(tl.float32)
        added = exact.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row + at, added, mask=mask)
        exact = added.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(exact * exact) / width + eps)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + at, (exact * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def add_and_norm(
    x: torch.Tensor, more: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, of x, to which more is added in place.

    For a few rows it takes a third of the time of torch's own.
    """
    width = x.shape[-1]
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _norm_kernel[(x.numel() // width,)](
            x, x if more is None else more, weight, out, width, eps,
            ADDS=more is not None, BLOCK=triton.next_power_of_2(width),
            num_warps=8 if width > 2048 else 4,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _normed(first, second, weight_ptr, half, mask, eps, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm of a head in two halves, in float32."""
    mean = (tl.sum(first * first) + tl.sum(second * second)) / (2 * HALF)
    scale = 1 / tl.sqrt(mean + eps)
    first_weight = tl.load(weight_ptr + half, mask=mask, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + half, mask=mask, other=0.0).to(tl.float32)
    return first * scale * first_weight, second * scale * second_weight


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    heads_ptr, cos_ptr, sin_ptr, rows_ptr, query_ptr, keys_ptr, values_ptr,
    query_norm_ptr, key_norm_ptr, eps, cos_stride, sin_stride,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """One head of one token. All are contiguous, but for the tokens of cos and sin."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, BLOCK_HALF)
    mask = half < HALF
    source = heads_ptr + (token * (QUERIES + 2 * KEYS) + head) * 2 * HALF + half
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + token) * KEYS
    if head < QUERIES + KEYS:
        if NORMS:
            if head < QUERIES:
                first, second = _normed(first, second, query_norm_ptr, half, mask, eps, HALF)
            else:
                first, second = _normed(first, second, key_norm_ptr, half, mask, eps, HALF)
        cos = tl.load(cos_ptr + token * cos_stride + half, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * sin_stride + half, mask=mask, other=0.0).to(tl.float32)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if head < QUERIES:
        target = query_ptr + (token * QUERIES + head) * 2 * HALF + half
    elif head < QUERIES + KEYS:
        target = keys_ptr + (row + head - QUERIES) * 2 * HALF + half
    else:
        target = values_ptr + (row + head - QUERIES - KEYS) * 2 * HALF + half
    tl.store(target, first.to(query_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(query_ptr.dtype.element_ty), mask=mask)


def rotate_and_store(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The turned queries; the turned keys, and the values, are stored in their rows of the cache.

    `heads` are a token's queries, keys and values, [tokens, heads, width]; `cos` and `sin` of its
    position, [tokens, width], the halves of each the same (arXiv 2104.09864, as in transformers);
    `keys` and `values` [rows, key heads, width]; `norms` the weights of an RMSNorm of each query
    and each key before it is turned, [width].
    """
    tokens, count, width = heads.shape
    key_heads = keys.shape[1]
    query = torch.empty(
        tokens, count - 2 * key_heads, width, dtype=heads.dtype, device=heads.device
    )
    query_norm, key_norm = norms or (heads, heads)
    with torch.cuda.device_of(heads):
        _rotate_and_store_kernel[(tokens, count)](
            heads, cos, sin, rows, query, keys, values,
            query_norm, key_norm, eps, cos.stride(0), sin.stride(0),
            QUERIES=count - 2 * key_heads, KEYS=key_heads, HALF=width // 2,
            BLOCK_HALF=triton.next_power_of_2(width // 2), NORMS=norms is not None, num_warps=1,
        )  # fmt: skip
    return query


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of one token's numbers."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    gate = tl.load(x_ptr + token * 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * width + width + at, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * width + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202): SiLU of the first half times the second, [..., 2 width]."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _silu_and_mul_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](
            x, out, width, BLOCK=BLOCK
        )
    return out


# Keys that a program of _latent_kernel reads at a time.
BLOCK_KEYS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _latent_kernel(  # type: ignore[no-untyped-def]
    query_ptr, rows_ptr, starts_ptr, counts_ptr, out_ptr, sums_ptr, scale, heads,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr, BLOCK_KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, over one of SPLITS parts of its span; see latent_attention."""
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    rank, rope = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    start, count = tl.load(starts_ptr + token).to(tl.int64), tl.load(counts_ptr + token)
    part = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    first = split * part
    last = tl.minimum(first + part, count)
    query = query_ptr + (token * heads + head)[:, None] * (RANK + ROPE)
    known = (head < heads)[:, None]
    plain = tl.load(query + rank[None, :], mask=known & (rank < RANK)[None, :], other=0.0)
    turned = tl.load(query + RANK + rope[None, :], mask=known & (rope < ROPE)[None, :], other=0.0)
    largest = tl.full((BLOCK_HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    out = tl.zeros((BLOCK_HEADS, BLOCK_RANK), tl.float32)
    for at in range(first, last, BLOCK_KEYS):
        key = at + tl.arange(0, BLOCK_KEYS)
        inside = key < last
        row = rows_ptr + (start + key) * (RANK + ROPE)
        latent = tl.load(
            row[:, None] + rank[None, :], mask=inside[:, None] & (rank < RANK)[None, :], other=0.0
        )
        rotated = tl.load(
            row[None, :] + RANK + rope[:, None],
            mask=inside[None, :] & (rope < ROPE)[:, None],
            other=0.0,
        )
        scores = tl.dot(plain, tl.trans(latent)) + tl.dot(turned, rotated)
        scores = tl.where(inside[None, :], scores * scale, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        shrunk = tl.exp(largest - larger)
        out = out * shrunk[:, None] + tl.dot(weights.to(latent.dtype), latent)
        total = total * shrunk + tl.sum(weights, 1)
        largest = larger
    place = (token * SPLITS + split) * heads + head
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out_ptr + place[:, None] * RANK + rank[None, :], out, mask=known & (rank < RANK)[None, :]
    )
    tl.store(sums_ptr + place, largest + tl.log(total), mask=head < heads)


@triton.jit  # type: ignore[untyped-decorator]
def _joined_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, sums_ptr, out_ptr, heads,
    RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """What the parts of one token's span say to one head, by the sums of their weights."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, rank = tl.arange(0, SPLITS), tl.arange(0, BLOCK_RANK)
    place = (token * SPLITS + split) * heads + head
    sums = tl.load(sums_ptr + place)
    weights = tl.exp(sums - tl.max(sums, 0))
    mask = (rank < RANK)[None, :]
    parts = tl.load(parts_ptr + place[:, None] * RANK + rank[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(
        out_ptr + (token * heads + head) * RANK + rank,
        out.to(out_ptr.dtype.element_ty),
        mask=rank < RANK,
    )


def latent_attention(
    query: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    rank: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one token each to the latents of its span, [tokens, heads, rank].

    `query` is [tokens, heads, rank + rope width], `rows` [rows, 1, rank + rope width]: all of a row
    is the key, its first `rank` numbers the value. `starts` and `counts`, int32 [tokens], are the
    spans' first rows and their lengths, at least 1. Each span is divided among several programs,
    as Flash-Decoding does.
    """
    tokens, heads, width = query.shape
    splits = 32 if tokens <= 8 else 8
    parts = torch.empty(tokens, splits, heads, rank, dtype=torch.float32, device=query.device)
    sums = torch.empty(tokens, splits, heads, dtype=torch.float32, device=query.device)
    out = torch.empty(tokens, heads, rank, dtype=query.dtype, device=query.device)
    blocks = {"BLOCK_RANK": max(16, triton.next_power_of_2(rank)), "SPLITS": splits, "RANK": rank}
    with torch.cuda.device_of(query):
        _latent_kernel[(tokens, triton.cdiv(heads, 16), splits)](
            query.contiguous(), rows, starts, counts, parts, sums, scale, heads,
            ROPE=width - rank, BLOCK_HEADS=16, BLOCK_KEYS=BLOCK_KEYS,
            BLOCK_ROPE=max(16, triton.next_power_of_2(width - rank)), **blocks, num_stages=1,
        )  # fmt: skip
        _joined_kernel[(tokens, heads)](parts, sums, out, heads, **blocks)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _expert_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, chosen_ptr, out_ptr, out_features, in_features,
    SHARING: tl.constexpr, SCALED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Some features of what one expert makes of one row; see expert_product."""
    pair = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known = feature < out_features
    row = tl.load(chosen_ptr + pair).to(tl.int64) * out_features + feature
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        at = start + tl.arange(0, BLOCK_IN)
        inside = at < in_features
        x = tl.load(x_ptr + pair // SHARING * in_features + at, mask=inside, other=0.0)
        weight = tl.load(
            weight_ptr + row[:, None] * in_features + at[None, :],
            mask=known[:, None] & inside[None, :],
            other=0,
        )
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, 1)
    if SCALED:
        out *= tl.load(scale_ptr + row, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair * out_features + feature, out.to(out_ptr.dtype.element_ty), mask=known)


def expert_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, chosen: torch.Tensor
) -> torch.Tensor:
    """Each row by the matrices of its experts, [rows, top k, out].

    `x` is [rows, in], `weight` [experts, out, in], in int8 with a `scale` [experts, out, 1], and
    `chosen` [rows, top k]. Only the chosen experts' weights are read, and none is copied.
    """
    out_features, in_features = weight.shape[1:]
    out = torch.empty(*chosen.shape, out_features, dtype=x.dtype, device=x.device)
    block = 16
    with torch.cuda.device_of(x):
        _expert_kernel[(chosen.numel(), triton.cdiv(out_features, block))](
            x.contiguous(), weight, weight if scale is None else scale, chosen.contiguous(), out,
            out_features, in_features, SHARING=chosen.shape[1], SCALED=scale is not None,
            BLOCK_OUT=block, BLOCK_IN=256,
        )  # fmt: skip
    return out
