"""From tokens to logits: memory, kernels, sizes of steps."""

import gc
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig

from engine.attention.forward_batch import ForwardBatch
from engine.attention.groups import Scoring
from engine.attention.kv_pool import LayerKVCache
from engine.checkpoint.model_config import context_length
from engine.errors import StartError
from engine.runner.cache_budget import CHILDREN, cache_budget
from engine.runner.create import create_runner, why_not_in_place
from engine.runner.runner import padded_size
from engine.sequence import KVSpan
from tests.conftest import tiny_llama


def test_cache_budget_is_a_size_or_a_fraction():
    cpu = torch.device("cpu")
    assert cache_budget("4GiB", cpu) == 4 * 2**30
    assert cache_budget("500MB", cpu) == 500 * 10**6
    free = psutil.virtual_memory().available
    assert 0.4 * free < cache_budget("0.5", cpu) < 0.6 * free


def test_cache_of_a_cpu_takes_half_of_what_is_free_at_most(monkeypatch):
    for free, taken in ((2**40, 2**31), (2**30, (2**30 - CHILDREN) // 2)):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free)
        )
        assert cache_budget("auto", torch.device("cpu")) == taken


def test_cache_budget_buys_rows(tiny_model):
    runner = create_runner(tiny_llama(), "1MiB")
    # Two layers of keys and values, two heads of eight float32 each.
    assert runner.rows == 2**20 // (2 * 2 * 2 * 8 * 4)


def test_cache_budget_that_holds_nothing_is_refused():
    with pytest.raises(StartError, match="--cache-memory"):
        create_runner(tiny_llama(), "1KB")


def test_step_tensors_are_freed_without_garbage_collection():
    """Not at a collection, which may be hundreds of steps away."""
    gc.disable()
    try:
        step = ForwardBatch([(KVSpan([1, 2], room=2), 2)])
        there = weakref.ref(step.on(torch.device("meta")).write)
        assert there() is not None
        del step
        assert there() is None
    finally:
        gc.enable()


class Lying(torch.Tensor):
    """A tensor of the CPU's that says it is a card's."""

    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("key", "value", "dtype", "capability", "reason"),
    [
        ((2, 64), (2, 64), torch.bfloat16, (8, 6), None),
        ((2, 64), (2, 64), torch.float16, (9, 0), None),
        ((2, 64), (2, 64), torch.float32, (8, 6), "float32"),
        ((2, 64), (2, 64), torch.float16, (7, 5), "older than Ampere"),
        ((1, 512), (1, 64), torch.bfloat16, (8, 6), "512 wide, values 64"),
        ((2, 264), (2, 264), torch.bfloat16, (8, 6), "264 wide"),
        ((2, 20), (2, 20), torch.bfloat16, (8, 6), "20 wide"),
    ],
)
def test_flash_attention_is_used_where_it_can_be(
    monkeypatch, key, value, dtype, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    layer = LayerKVCache(2)
    layer.keys, layer.values = (
        torch.zeros(3, *shape, dtype=dtype).as_subclass(Lying) for shape in (key, value)
    )
    found = why_not_in_place([layer])
    assert found is None if reason is None else reason in found
    layer.keys = layer.keys.as_subclass(torch.Tensor)
    assert why_not_in_place([layer]) == "layers on cpu"
    monkeypatch.setattr("engine.runner.create.flash_attention", None)
    assert "no FlashAttention" in why_not_in_place([layer])


@pytest.mark.parametrize("news", [(1, 1), (5, 3)])
def test_flash_attention_takes_our_arguments(news):
    """Torch's own, which here is told shapes alone: its arguments, and the shape of its answer."""
    work = [(KVSpan([7] * (9 + new), n * 20, 20, 9), new) for n, new in enumerate(news)]
    (group,) = ForwardBatch(work, "in place").on(torch.device("meta")).groups
    query = torch.empty(sum(news), 4, 64, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(50, 2, 64, dtype=torch.bfloat16, device="meta")
    assert group.attend(query, keys, keys, Scoring(0.5)).shape == query.shape


def test_half_precision_steps_are_padded_to_few_sizes(monkeypatch):
    """Of each size something stays in memory; and what fills a step up changes nothing in it."""
    model = tiny_llama().bfloat16()
    runner = create_runner(model, "4MiB")
    sizes, right = set(), ForwardBatch

    def step(work, backend):
        sizes.add(sum(new for _, new in work))
        return right(work, backend)

    monkeypatch.setattr("engine.runner.runner.ForwardBatch", step)
    neighbour = KVSpan(list(range(40)), 700, 40)
    runner.forward([(neighbour, 40)])
    kept = [x[700:740].clone() for layer in runner.pool.layers for x in (layer.keys, layer.values)]
    # The first and the last of those that are filled up to the same size.
    edges = [n for n in range(1, 200) if len({padded_size(m) for m in (n - 1, n, n + 1)}) > 1]
    for total in [*edges, 300, 500, 512, 576]:
        work = [(KVSpan([7] * total, 0, total), total)]
        filled = runner.forward(work)
        assert filled.shape == (1, 260)
        runner.pads = False
        assert torch.allclose(filled, runner.forward(work), atol=0.05)
        runner.pads = True
    for total in range(200, 577):
        assert total <= padded_size(total) < 1.5 * total
    assert len({padded_size(total) for total in range(1, 577)}) == 38
    after = [x[700:740] for layer in runner.pool.layers for x in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert not create_runner(tiny_llama(), "4MiB").pads


@pytest.mark.parametrize(("kind", "most"), [("dynamic", 64), ("longrope", 32), ("linear", 64)])
def test_dynamic_rope_is_held_to_its_original_length(kind, most):
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = {"rope_type": kind, "factor": 2.0}
    if kind == "longrope":
        config.rope_parameters["original_max_position_embeddings"] = 32
    assert context_length(config) == most


def test_memory_beside_a_new_shape_is_given_back(monkeypatch):
    runner = create_runner(tiny_llama().bfloat16(), "1MiB")
    calls = []
    monkeypatch.setattr("engine.runner.runner.return_freed_memory", lambda: calls.append(1))
    for count, given_back in ((3, 1), (3, 1), (5, 2), (3, 2)):
        runner.forward([(KVSpan([*range(count)], 0, runner.rows), count)])
        assert len(calls) == given_back
