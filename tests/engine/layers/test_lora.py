"""Adapters beside the weights: a batch of several says what each does alone, and merged."""

import re
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.checkpoint.stored import stored_in
from engine.errors import StartError
from engine.layers.lora import Part, Table, Update
from engine.layers.named_adapters import Updates
from engine.layers.weight_format import WeightFormat, convert
from engine.runner.create import create_runner
from engine.runner.runner import Runner
from engine.sequence import KVSpan
from tests.conftest import tiny_llama
from tests.engine.alone import needs_kernels
from tests.engine.stand_ins import as_on_a_card
from tests.engine.states import plain_model

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Such as our kernels compute in one call: heads as wide as a vector.
SIZES = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 512}
PROMPTS = [
    torch.randint(5, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 2, 3, 9, 17, 31, 64, 40)
]


def llama(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return tiny_llama(**SIZES).to(torch.bfloat16).to(dtype)


def draw_adapter(rank: int, seed: int, layers: tuple[str, ...] = LAYERS) -> Updates:
    """Updates as large as the weights, of the layers that are called so."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    return {
        name: Update(draw(rank, module.in_features), draw(module.out_features, rank))
        for name, module in llama().named_modules()
        if name.rpartition(".")[2] in layers
    }


ADAPTERS = [
    draw_adapter(8, seed=1),
    draw_adapter(5, seed=2, layers=("k_proj", "up_proj", "down_proj")),
    draw_adapter(33, seed=3),
    draw_adapter(1, seed=4, layers=("v_proj", "o_proj")),
]


@torch.inference_mode()
def merged_logits(prompt: list[int], adapter: int) -> torch.Tensor:
    """Of the last token, in float32, by weights into which the adapter was added."""
    model = llama().float()
    for name, (down, up) in ADAPTERS[adapter - 1].items() if adapter else ():
        model.get_submodule(name).weight += up @ down
    return model(input_ids=torch.tensor([prompt])).logits[0, -1]


def runner_of(form: WeightFormat, adapters: list[Updates] = ADAPTERS) -> Runner:
    model = llama() if form != "as it is" else llama(torch.float32)
    convert(model, form)
    return create_runner(model, "64MiB", 2000, adapters=adapters)


def spans_of(which: list[tuple[int, int]]) -> list[KVSpan]:
    """A span for each pair of a prompt and an adapter, by their numbers."""
    return [
        KVSpan(PROMPTS[prompt], 100 * place, 100, adapter=adapter)
        for place, (prompt, adapter) in enumerate(which)
    ]


def logits_alone(runner: Runner, prompt: int, adapter: int) -> torch.Tensor:
    (span,) = spans_of([(prompt, adapter)])
    return runner.forward([(span, len(span.tokens))])[0]


def run_together(runner: Runner, spans: list[KVSpan], chunk: int) -> list[torch.Tensor]:
    """The last token's logits of each, all computed in the same steps of so many tokens each."""
    found: dict[KVSpan, torch.Tensor] = {}
    while todo := [span for span in spans if span.pending]:
        work = [(span, min(chunk, span.pending)) for span in todo]
        for (span, new), logits in zip(work, runner.forward(work), strict=True):
            span.num_computed_tokens += new
            found[span] = logits.clone()  # a graph overwrites them
    return [found[span] for span in spans]


MIXTURE = [
    (n % len(PROMPTS), adapter) for n, adapter in enumerate((0, 1, 2, 3, 4, 1, 0, 3, 3, 2, 2))
]


@needs_kernels
@settings(max_examples=12)
@given(
    which=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), min_size=2, max_size=12),
    chunk=st.sampled_from([1, 2, 5, 13, 64]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_adapted_batch_equals_each_alone_exactly(which, chunk, threads):
    """To the last bit, in any company, by any chunks, on any number of threads."""
    runner = one_call_runner()
    alone = [logits_alone(runner, *each) for each in which]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    runner.cores = None
    try:
        together = run_together(runner, spans_of(which), chunk)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


RUNNERS: dict[str, Runner] = {}


def one_call_runner() -> Runner:
    if not RUNNERS:
        RUNNERS["our kernels"] = runner_of("our kernels")
        assert RUNNERS["our kernels"].one_call
    return RUNNERS["our kernels"]


@needs_kernels
def test_adapters_leave_others_as_they_were():
    """Requests without one get the same bits as where no adapter is loaded."""
    without, beside = runner_of("our kernels", []), one_call_runner()
    spans = spans_of(MIXTURE)
    mixed = run_together(beside, spans, 13)
    for span, found, (prompt, adapter) in zip(spans, mixed, MIXTURE, strict=True):
        own = logits_alone(without, prompt, 0)
        assert torch.equal(found, own) is (span.adapter == 0), (prompt, adapter)


FORMS = [pytest.param("our kernels", marks=needs_kernels), "fp16 weights", "float32", "as it is"]


@pytest.mark.parametrize("form", FORMS)
def test_adapter_equals_the_merged_model(form):
    runner = runner_of(form)
    found = run_together(runner, spans_of(MIXTURE), 16)
    for logits, (prompt, adapter) in zip(found, MIXTURE, strict=True):
        wanted = merged_logits(PROMPTS[prompt], adapter)
        torch.testing.assert_close(logits, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_adapter_on_a_card_equals_the_merged_model(monkeypatch):
    """Single tokens are steps of a CUDA graph, which is told each token's adapter."""
    as_on_a_card(monkeypatch)
    runner = create_runner(llama(torch.float32), "64MiB", 2000, adapters=ADAPTERS)
    runner.backend = "in place"
    runner.capture_graphs(16, 200)
    assert {graph.adapted for graph in runner.graphs} == {False, True}
    for chunk in (16, 1):
        found = run_together(runner, spans_of(MIXTURE), chunk)
        for logits, (prompt, adapter) in zip(found, MIXTURE, strict=True):
            wanted = merged_logits(PROMPTS[prompt], adapter)
            most = 2e-5 * float(wanted.abs().max())
            torch.testing.assert_close(logits, wanted, atol=most, rtol=0)


def test_base_steps_have_graphs_without_adapters(monkeypatch):
    as_on_a_card(monkeypatch)
    runner = create_runner(llama(torch.float32), "64MiB", 2000, adapters=ADAPTERS)
    runner.backend = "in place"
    runner.capture_graphs(4, 200)
    plain, adapted = KVSpan([1, 2], 0, 9, 1), KVSpan([1, 2], 10, 9, 1, adapter=2)
    assert not runner._fitting_graph([(plain, 1)]).adapted
    assert runner._fitting_graph([(plain, 1), (adapted, 1)]).adapted


@needs_kernels
@pytest.mark.parametrize(("inner", "out"), [(64, 64), (70, 33), (7, 5), (16, 200)])
def test_kernel_adds_updates_of_any_shape(inner, out):
    """Widths that fill no vector, parts of a product, and an adapter without any."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    half = out // 2
    parts = {
        1: [Part(0, Update(draw(3, inner), draw(half, 3)))],
        2: [
            Part(0, Update(draw(8, inner), draw(half, 8))),
            Part(half, Update(draw(5, inner), draw(out - half, 5))),
        ],
    }
    table = Table(inner, parts, 3)
    adapters = torch.tensor([0, 2, 1, 1, 3, 2, 2, 2, 2, 2, 0, 1])
    x, before = draw(len(adapters), inner), draw(len(adapters), out)
    found, wanted = before.clone(), before.double()
    step = type("Step", (), {"adapters": adapters})
    table.add(step, x, found)
    for token, adapter in enumerate(adapters.tolist()):
        for first, (down, up) in parts.get(adapter, []):
            added = up.double() @ (down.double() @ x[token].double())
            wanted[token, first : first + len(up)] += added
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)
    assert torch.equal(found[adapters % 3 == 0], before[adapters % 3 == 0])


@needs_kernels
def test_adapters_file_may_be_written_anew(tmp_path):
    """As a training does, which keeps its last checkpoints: what it maps is no longer read."""
    save_file({"A": torch.ones(4, 64), "B": torch.ones(64, 4)}, tmp_path / "x.safetensors")
    read = stored_in(tmp_path / "x.safetensors")
    table = Table(64, {1: [Part(0, Update(read["A"][...], read["B"][...]))]}, 1)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(0)  # what is mapped beyond a file's end kills the process
    out = torch.zeros(1, 64)
    table.add(type("Step", (), {"adapters": torch.tensor([1])}), torch.ones(1, 64), out)
    assert torch.equal(out, torch.full((1, 64), 256.0))


@pytest.mark.parametrize(
    ("kind", "layer"), [("qwen3_5_text", "linear_attn.in_proj_qkv"), ("lfm2", "conv.in_proj")]
)
def test_layer_with_a_state_must_be_merged(kind, layer):
    """Its tokens come in another order; the attention beside it can have an adapter."""
    model = deepcopy(plain_model(kind))
    name = next(name for name, _ in model.named_modules() if name.endswith(layer))
    product = model.get_submodule(name)
    update = Update(torch.ones(2, product.in_features), torch.ones(product.out_features, 2))
    with pytest.raises(StartError, match=f"{re.escape(name)} is in a layer that keeps a state"):
        create_runner(model, "64MiB", 300, adapters=[{name: update}])


def test_adapted_layer_computed_for_other_rows_is_refused(monkeypatch):
    """Such as an expert's, which sees some of the tokens: their adapters would be others'."""
    monkeypatch.setattr("engine.layers.named_adapters.why_missing", lambda: "none here")
    model = llama(torch.float32)
    runner = create_runner(model, "64MiB", 300, adapters=ADAPTERS)
    spans = spans_of([(4, 1)])
    layer = next(m for m in model.modules() if type(m).__name__ == "Adapted")
    right = layer.forward
    layer.forward = lambda x: right(x[..., :-1, :])
    with pytest.raises(RuntimeError, match="once for each token"):
        runner.forward([(spans[0], 17)])
