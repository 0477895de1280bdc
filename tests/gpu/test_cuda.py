"""What only a CUDA card can show: kernels over spans, captured steps, a split model, no waiting.

Skipped where there is no card. `CHAT_TEST_DEVICE=cpu` runs them without one, with stand-ins for
FlashAttention and CUDA graphs, which shows no more than that the tests themselves are sound.
"""

import asyncio
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models

from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import Scoring
from engine.checkpoint.checkpoint import load_model
from engine.checkpoint.model_config import context_length
from engine.layers.autotune import choose_weight_format
from engine.layers.quantized import QuantizedLinear, pack
from engine.runner.create import create_runner
from engine.runner.runner import Runner
from engine.runner.self_check import start_runner
from engine.scheduling.engine import Engine
from engine.scheduling.sampler import sample_tokens
from engine.sequence import KVSpan
from tests.conftest import GREEDY, greedy
from tests.engine.alone import FAMILIES, FIXTURES
from tests.engine.runner.test_devices import some_sequences
from tests.engine.stand_ins import add_and_norm as stand_in_add_and_norm
from tests.engine.stand_ins import as_on_a_card
from tests.engine.stand_ins import expert_product as stand_in_expert_product
from tests.engine.stand_ins import latent_attention as stand_in_latent_attention
from tests.engine.stand_ins import rotate_and_store as stand_in_rotate_and_store
from tests.engine.stand_ins import silu_and_mul as stand_in_silu_and_mul

DEVICE = torch.device(os.environ.get("CHAT_TEST_DEVICE", "cuda:0"))
ON_CARD = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    ON_CARD and not torch.cuda.is_available(), reason="there is no CUDA card"
)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    if not ON_CARD:
        as_on_a_card(monkeypatch)


def spans(lengths: list[tuple[int, int]], gap: int = 3) -> list[tuple[KVSpan, int]]:
    """Work of (cached, new) tokens each, whose spans lie in another order than they come."""
    work, start = [], 0
    for cached, new in lengths:
        work.append((KVSpan([7] * (cached + new), start, cached + new, cached), new))
        start += cached + new + gap
    return work[1::2] + work[::2]


def attended(step: ForwardBatch, query, keys, values, device, scoring: Scoring) -> torch.Tensor:
    """Attention as a layer has it: query [tokens, heads, width], and the pool's rows."""
    groups = step.on(device).groups
    return torch.cat(
        [g.attend(query[g.tokens], g.select(keys), g.select(values), scoring) for g in groups]
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(32, 8, 128), (16, 16, 128), (9, 3, 64), (4, 1, 256)]
)
@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 1), (1, 1), (63, 1), (64, 1), (500, 1), (4000, 1)],
        [(0, 17), (0, 1), (129, 64), (3, 2), (700, 333)],
        [(10, 1), (0, 40), (2000, 1), (255, 5), (1, 1)],
    ],
    ids=["tokens", "chunks", "both"],
)
@pytest.mark.parametrize("window", [None, 1, 100])
def test_attention_in_place_is_attention_over_copied_rows(heads, kv_heads, width, lengths, window):
    """A chunk's last token sees all rows of its span, the one before all but one, and so on."""
    generator = torch.Generator().manual_seed(0)
    work = spans(lengths)
    rows = max(span.start + span.room for span, _ in work) + 50

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)

    keys, values = some(rows, kv_heads, width), some(rows, kv_heads, width)
    by_span = {span.start: some(new, heads, width) for span, new in work}
    outs = []
    for backend in ("in place", "copied", "sliced"):
        step = ForwardBatch(work, backend)
        # Each way packs the spans in an order of its own.
        order = sorted(work, key=lambda item: step._group_key(*item))
        query = torch.cat([by_span[span.start] for span, _ in order])
        out = attended(step, query, keys, values, DEVICE, Scoring(window=window))
        parts = out.split([new for _, new in order])
        outs.append({span.start: out for (span, _), out in zip(order, parts, strict=True)})
    for start, out in outs[0].items():
        for other in outs[1:]:
            torch.testing.assert_close(out, other[start], atol=2e-2, rtol=2e-2)


def runner_of(name: str, dtype: str) -> Runner:
    model, _ = load_model(FIXTURES / name, dtype=dtype, device_map=str(DEVICE))
    return start_runner(model, "64MiB", max_batch=8)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_batches_on_the_card(name):
    """In float32, which has no kernel over spans: token for token what `generate` says."""
    model, _ = load_model(FIXTURES / name, dtype="float32", device_map=str(DEVICE))
    room = context_length(model.config) - 12
    prompts = [list(range(20, 20 + n)) for n in (3, 17, min(40, room))]
    alone = [greedy(model, prompt, 12) for prompt in prompts]
    runner = create_runner(model, "64MiB")
    assert together(runner, prompts) == alone


def together(runner: Runner, prompts: list[list[int]]) -> list[list[int]]:
    """What the engine says to all prompts at once, as ids."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    engine = Engine(runner, words, set(), prefill_chunk=16)

    async def one(prompt: list[int]) -> list[int]:
        sampling = replace(GREEDY, max_new_tokens=12, logprobs=0)
        tokens = [d.token async for d in engine.stream(prompt, sampling)]
        return [token.id for token in tokens if token]

    async def everyone() -> list[list[int]]:
        return await asyncio.gather(*map(one, prompts))

    try:
        return asyncio.run(everyone())
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_starts_in_half_precision(name, dtype):
    """Packed steps, in place and captured where the widths allow it, agree with plain ones."""
    runner = runner_of(name, dtype)
    assert runner.difference < 0.05
    if name != "deepseek_v2" or ON_CARD:
        wanted = "latents" if name == "deepseek_v2" else "in place"
        assert runner.backend == wanted, runner.fallback_reason
        assert {r.size for r in runner.graphs} == {1, 2, 4, 8}
    if ON_CARD and name != "deepseek_v2":
        kinds = {type(layer).__name__ for layer in runner.model.model.layers}
        assert kinds == {"CudaLayer"}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_starts_in_8_bits(name):
    """Packed steps of the quantised model agree with its plain ones, whoever multiplies."""
    model, _ = load_model(
        FIXTURES / name, dtype="bfloat16", device_map=str(DEVICE), quantize="8bit"
    )
    assert choose_weight_format(model).startswith("in 8 bits")
    assert start_runner(model, "64MiB", max_batch=8).difference < 0.05


@pytest.mark.skipif(not ON_CARD, reason="the kernel is for cards")
def test_int8_kernel_multiplies_with_what_the_weights_unpack_to():
    pytest.importorskip("triton")
    from engine.layers.int8 import Int8Kernel, check

    for out_features, in_features, bias in ((4096, 4096, False), (70, 300, True), (48, 64, True)):
        linear = torch.nn.Linear(in_features, out_features, bias, DEVICE, torch.bfloat16)
        layer = QuantizedLinear(linear, 8)
        layer.weight.data, layer.weight_scale.data = pack(linear.weight.data, 8)
        check(Int8Kernel(), layer, torch.bfloat16)


@pytest.mark.skipif(not ON_CARD, reason="the kernels are for cards")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "norms"),
    [(32, 8, 128, False), (16, 16, 128, True), (9, 3, 64, False), (4, 1, 96, True)],
)
def test_heads_are_turned_and_stored_as_by_torch(heads, kv_heads, width, norms, dtype):
    pytest.importorskip("triton")
    from engine.kernels.cuda import rotate_and_store

    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    weights = (some(width), some(width)) if norms else None
    for tokens in (1, 7, 64):
        packed = some(tokens, heads + 2 * kv_heads, width)
        cos = some(tokens, width // 2).repeat(1, 2)
        sin = cos.flip(0)
        rows = torch.randperm(100, generator=generator)[:tokens].to(DEVICE)
        outs = []
        for compute in (rotate_and_store, stand_in_rotate_and_store):
            keys, values = torch.zeros(2, 100, kv_heads, width, device=DEVICE, dtype=dtype)
            query = compute(packed, cos, sin, rows, keys, values, weights, 1e-6)
            outs.append((query, keys, values))
        for found, wanted in zip(*outs, strict=True):
            torch.testing.assert_close(found, wanted, atol=5e-2, rtol=2e-2)


@pytest.mark.skipif(not ON_CARD, reason="the kernels are for cards")
@pytest.mark.parametrize("shape", [(1, 64), (5, 3000), (1, 3, 4096), (7, 2, 128)])
def test_norm_is_torchs(shape):
    pytest.importorskip("triton")
    from engine.kernels.cuda import add_and_norm

    generator = torch.Generator().manual_seed(0)
    x, more = torch.randn(2, *shape, generator=generator).to(DEVICE, torch.bfloat16)
    weight = torch.rand(shape[-1], generator=generator).to(DEVICE, torch.bfloat16)
    for added in (None, more):
        mine, other = x.clone(), x.clone()
        found = add_and_norm(mine, added, weight, 1e-5)
        torch.testing.assert_close(
            found, stand_in_add_and_norm(other, added, weight, 1e-5), atol=2e-2, rtol=2e-2
        )
        assert torch.equal(mine, other)


@pytest.mark.skipif(not ON_CARD, reason="the kernels are for cards")
@pytest.mark.parametrize("shape", [(1, 64), (5, 3000), (1, 3, 28672)])
def test_gate_lets_through_what_it_does_by_torch(shape):
    pytest.importorskip("triton")
    from engine.kernels.cuda import silu_and_mul

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    torch.testing.assert_close(silu_and_mul(x), stand_in_silu_and_mul(x), atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not ON_CARD, reason="the kernel is for cards")
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (4, 32, 8), (20, 128, 32)])
def test_latents_are_attended_as_by_torch(heads, rank, rope):
    pytest.importorskip("triton")
    from engine.kernels.cuda import latent_attention

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6000, 1, rank + rope, generator=generator).to(DEVICE, torch.bfloat16)
    for lengths in ([1], [33, 4000], [1, 31, 32, 300, 64, 7, 2, 900, 500, 65]):
        counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        starts = counts.cumsum(0, dtype=torch.int32) - counts + 5
        query = torch.randn(len(lengths), heads, rank + rope, generator=generator) / 8
        given = query.to(DEVICE, torch.bfloat16), rows, starts, counts, rank, 0.2
        found, wanted = latent_attention(*given), stand_in_latent_attention(*given)
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not ON_CARD, reason="the kernel is for cards")
@pytest.mark.parametrize("bits", [16, 8])
def test_experts_multiply_as_by_torch(bits):
    pytest.importorskip("triton")
    from engine.kernels.cuda import expert_product

    generator = torch.Generator().manual_seed(0)
    for rows, experts, out, width, k in ((1, 64, 2816, 2048, 6), (32, 64, 2048, 1408, 1)):
        x = torch.randn(rows, width, generator=generator).to(DEVICE, torch.bfloat16)
        weight = torch.randn(experts, out, width, generator=generator).to(DEVICE, torch.bfloat16)
        chosen = torch.randint(0, experts, (rows, k), generator=generator).to(DEVICE)
        scale = None
        if bits == 8:
            scale = (weight.abs().amax(2, keepdim=True) / 127).bfloat16()
            weight = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        given = x, weight, scale, chosen
        found, wanted = expert_product(*given).float(), stand_in_expert_product(*given).float()
        assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_cuda_graphs_compute_what_other_steps_do():
    runner = runner_of("llama", "bfloat16")
    captured, generator = runner.graphs, torch.Generator().manual_seed(3)
    assert captured
    for batch in (1, 2, 3, 5, 8, 3, 1):
        lengths = torch.randint(1, 60, (batch,), generator=generator).tolist()
        work = spans([(n, 1) for n in lengths])
        for span, _ in work:
            count = len(span.tokens)
            span.tokens = torch.randint(5, 290, (count,), generator=generator).tolist()
            runner.forward([(KVSpan(span.tokens, span.start), span.num_computed_tokens)])
        replayed = runner.forward(work).clone()
        runner.graphs = []
        plain = runner.forward(work)
        runner.graphs = captured
        torch.testing.assert_close(replayed, plain, atol=5e-2, rtol=5e-2)


def test_a_model_on_two_devices_says_what_it_says_on_one():
    """The second card where there is one, else the CPU."""
    other = "cuda:1" if ON_CARD and torch.cuda.device_count() > 1 else "cpu"
    whole, _ = load_model(FIXTURES / "llama", dtype="float32", device_map=str(DEVICE))
    names = ["model.embed_tokens", "model.rotary_emb", "model.layers.0"]
    later = [f"model.layers.{n}" for n in range(1, whole.config.num_hidden_layers)]
    places = dict.fromkeys(names, str(DEVICE)) | dict.fromkeys(
        [*later, "model.norm", "lm_head"], other
    )
    split, _ = load_model(FIXTURES / "llama", dtype="float32", device_map=json.dumps(places))
    prompts = [list(range(20, 20 + n)) for n in (3, 17, 40)]
    runner = create_runner(split, "64MiB")
    assert runner.split == (str(DEVICE) != other)
    assert together(runner, prompts) == together(create_runner(whole, "64MiB"), prompts)
    # What lies on the CPU beside a card is brought to the card to compute.
    held = {str(DEVICE)} if ON_CARD and other == "cpu" else {str(DEVICE), other}
    assert {str(layer.keys.device) for layer in runner.pool.layers} == held


@pytest.mark.skipif(not ON_CARD, reason="only a card is waited for")
def test_a_card_is_waited_for_once_a_pick():
    seqs = some_sequences()
    logits = torch.randn(4, 128_256, device=DEVICE) * 5
    ids = torch.arange(32, device=DEVICE)
    sample_tokens(seqs, logits.clone(), ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sample_tokens(seqs, logits, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 1, [str(w.message) for w in caught]
