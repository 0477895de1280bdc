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
from alone import FAMILIES, FIXTURES
from conftest import GREEDY, greedy
from stand_ins import as_on_a_card
from test_devices import some_sequences
from tokenizers import Tokenizer, models

from engine.attention import Scoring
from engine.checkpoint import load_model
from engine.engine import Engine
from engine.form_trial import settle_form
from engine.loading import start_runner
from engine.model_config import context_length
from engine.quantized import QuantizedLinear, pack
from engine.runner import Runner, create_runner
from engine.sampler import sample_tokens
from engine.sequence import Span
from engine.step import Step

DEVICE = torch.device(os.environ.get("CHAT_TEST_DEVICE", "cuda:0"))
ON_CARD = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    ON_CARD and not torch.cuda.is_available(), reason="there is no CUDA card"
)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    if not ON_CARD:
        as_on_a_card(monkeypatch)


def spans(lengths: list[tuple[int, int]], gap: int = 3) -> list[tuple[Span, int]]:
    """Work of (cached, new) tokens each, whose spans lie in another order than they come."""
    work, start = [], 0
    for cached, new in lengths:
        work.append((Span([7] * (cached + new), start, cached + new, cached), new))
        start += cached + new + gap
    return work[1::2] + work[::2]


def attended(step: Step, query, keys, values, device, scoring: Scoring) -> torch.Tensor:
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
    for way in ("in place", "copied", "sliced"):
        step = Step(work, way)
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
    if name != "deepseek_v2":
        assert runner.way == "in place", runner.fallback_reason
        assert {r.size for r in runner.graphs} == {1, 2, 4, 8}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_starts_in_8_bits(name):
    """Packed steps of the quantised model agree with its plain ones, whoever multiplies."""
    model, _ = load_model(
        FIXTURES / name, dtype="bfloat16", device_map=str(DEVICE), quantize="8bit"
    )
    assert settle_form(model).startswith("in 8 bits")
    assert start_runner(model, "64MiB", max_batch=8).difference < 0.05


@pytest.mark.skipif(not ON_CARD, reason="the kernel is for cards")
def test_int8_kernel_multiplies_with_what_the_weights_unpack_to():
    pytest.importorskip("triton")
    from engine.int8_kernel import Int8Kernel, check

    for out_features, in_features, bias in ((4096, 4096, False), (70, 300, True), (48, 64, True)):
        linear = torch.nn.Linear(in_features, out_features, bias, DEVICE, torch.bfloat16)
        layer = QuantizedLinear(linear, 8)
        layer.weight.data, layer.weight_scale.data = pack(linear.weight.data, 8)
        check(Int8Kernel(), layer, torch.bfloat16)


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
            runner.forward([(Span(span.tokens, span.start), span.num_cached)])
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
