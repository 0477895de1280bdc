"""A card is not needed to see that no tensor meets one of another device, and who waits for it.

`OnCard` are the CPU's tensors that say they are a card's; `Card` sees every operation on them.
"""

import numpy
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from engine.checkpoint.checkpoint import load_model
from engine.runner.create import create_runner
from engine.runner.runner import Runner
from engine.runner.self_check import start_runner
from engine.sampling_params import SamplingParams
from engine.scheduling.sampler import apply_guide, sample_tokens
from engine.sequence import KVSpan, Sequence
from tests.engine.alone import FAMILIES, FIXTURES
from tests.engine.stand_ins import as_on_a_card, flash_attention

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")
# What tells Python a number that a card may still have to compute.
WAITS = {"tolist", "item", "numpy", "nonzero", "__int__", "__bool__", "__float__", "__index__"}
# What may take a tensor of the CPU's beside a card's, as it copies it.
COPIES = {"copy_", "__get__", "__set__"}


class OnCard(torch.Tensor):
    device = CARD


def on_card(tree):
    return tree_map_only(torch.Tensor, lambda x: x.as_subclass(OnCard), tree)


def off_card(tree):
    return tree_map_only(OnCard, lambda x: x.as_subclass(torch.Tensor), tree)


def tensors_of(*tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class Card(TorchFunctionMode):
    """Computes on the CPU what it is given, by a card's rules; `waits` are those for it."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        tensors = tensors_of(args, kwargs)
        here = any(isinstance(x, OnCard) for x in tensors)
        if here and name not in COPIES and func is not torch.Tensor.to:
            # A number may come from anywhere.
            strangers = [x for x in tensors if x.dim() and not isinstance(x, OnCard)]
            assert not strangers, f"{name} of tensors on two devices"
        args, kwargs, target = told_devices(args, kwargs)
        lies_there = target.type == "cuda" if target else here
        if here and (name in WAITS or not lies_there or chosen_by_bools(name, args)):
            self.waits.append(name)
        args, kwargs = off_card((args, kwargs))
        if func is torch.histc:  # a card's counts whole numbers, too
            args = (args[0].float(), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return on_card(out) if lies_there else out


def told_devices(args, kwargs):
    """The arguments with the CPU in the card's place, and the device that they named."""
    named = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
    args, kwargs = tree_map_only(
        torch.device, lambda device: CPU if device == CARD else device, (args, kwargs)
    )
    return args, kwargs, named[0] if named else None


def chosen_by_bools(name: str, args) -> bool:
    """Whether it takes those elements for which a mask says yes, of which a card must be asked."""
    chosen = args[1] if name in ("__getitem__", "__setitem__") else None
    return any(x.dtype == torch.bool for x in tree_flatten(chosen)[0] if isinstance(x, OnCard))


@pytest.fixture
def card(monkeypatch):
    """A pretended card, with stand-ins for its kernel and its graphs."""

    def kernel(*args, **kwargs):
        assert all(isinstance(x, OnCard) for x in tensors_of(args, kwargs))
        with torch._C.DisableTorchFunction():
            return on_card(flash_attention(*off_card(args), **off_card(kwargs)))

    as_on_a_card(monkeypatch, kernel)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**26, 2**26))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with Card() as card:
        yield card


def moved(model):
    """The model with its weights on the pretended card."""
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: on_card(x.detach()) for name, x in tensors.items() if x is not None}
    return model


def loaded(name: str, quantize: str = "none"):
    return load_model(FIXTURES / name, dtype="float32", device_map="cpu", quantize=quantize)[0]


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


# Llama with other names for its weights.
RENAMED = sorted({*FAMILIES} - {"llama", "deepseek_v2"})


def some_work() -> list[tuple[KVSpan, int]]:
    """Single tokens of different lengths between a chunk and a whole prompt."""
    given = [(19, 1), (20, 20), (0, 7), (2, 1), (29, 1)]
    return [
        (KVSpan(list(range(5, 5 + old + new)), 50 * n, 50, old), new)
        for n, (old, new) in enumerate(given)
    ]


def computed(runner: Runner, work: list[tuple[KVSpan, int]]) -> torch.Tensor:
    """What it computes of the work, once it has computed what comes before."""
    before = [
        (KVSpan(span.tokens[: span.num_computed_tokens], span.start), span.num_computed_tokens)
        for span, _ in work
        if span.num_computed_tokens
    ]
    runner.forward(before)
    return off_card(runner.forward(work).clone())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek_v2", *map(slow, RENAMED)])
def test_step_stays_on_the_card_and_waits_for_nothing(card, name):
    plain = create_runner(loaded(name), "1MiB")
    plain.backend = "copied"
    expected = computed(plain, some_work())
    runner = start_runner(moved(loaded(name)), "1MiB", max_batch=8)
    assert runner.device == CARD
    assert runner.difference < 1e-4
    captured, runner.graphs = runner.graphs, []
    assert {step.size for step in captured} == {1, 2, 4, 8}
    card.waits.clear()
    for runner.backend in ("in place", "copied", "sliced"):
        torch.testing.assert_close(computed(runner, some_work()), expected)
    runner.backend = "in place"
    singles = [(span, new) for span, new in some_work() if new == 1]
    expected = computed(runner, singles)
    runner.graphs = captured
    torch.testing.assert_close(computed(runner, singles), expected)
    runner.copy(singles[0][0], 100, 5)
    assert card.waits == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_step_in_8_bits_stays_on_the_card_and_waits_for_nothing(card, name):
    """A mixture's experts are unpacked without asking which were chosen."""
    plain = create_runner(loaded(name, "8bit"), "1MiB")
    plain.backend = "copied"
    expected = computed(plain, some_work())
    runner = start_runner(moved(loaded(name, "8bit")), "1MiB", max_batch=2)
    runner.graphs = []
    card.waits.clear()
    torch.testing.assert_close(computed(runner, some_work()), expected)
    assert card.waits == []


def some_sequences() -> list[Sequence]:
    hows = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=0, top_p=1.0, seed=1),
        SamplingParams(top_k=5, repetition_penalty=1.1, seed=2),
        SamplingParams(top_k=0, top_p=0.5, min_p=0.1, presence_penalty=1.0, seed=3),
    ]
    return [Sequence([1, 2, 3], 8 * n, 8, 2, params=how) for n, how in enumerate(hows)]


def test_sampling_waits_for_the_card_once(card):
    torch.manual_seed(0)
    logits, pool_ids = torch.randn(4, 300) * 5, torch.arange(32)
    expected = sample_tokens(some_sequences(), logits.clone(), pool_ids)
    assert card.waits == []
    there = on_card(logits.clone()), on_card(pool_ids)
    assert sample_tokens(some_sequences(), *there) == expected
    assert card.waits == ["tolist"]


def test_guide_masks_logits_on_the_card(card):
    class Guide:
        def token_mask(self):
            return numpy.arange(300) % 7 == 3

    logits = on_card(torch.zeros(1, 310))
    apply_guide(Guide(), logits[0])
    assert card.waits == []
    assert off_card(logits).isfinite().nonzero()[:, 1].tolist() == list(range(3, 300, 7))


def test_pretended_card_notices_mixed_devices_and_waits(card):
    """That is, it is a card enough for the tests above to fail."""
    there = on_card(torch.arange(4.0))
    with pytest.raises(AssertionError, match="mul of tensors on two devices"):
        torch.mul(there, torch.ones(4))
    with pytest.raises(AssertionError, match="two devices"):
        there[torch.tensor([0, 1])]
    assert isinstance(torch.zeros(2, device=CARD) + there[:2], OnCard)
    assert isinstance(torch.ones(4).to(CARD, non_blocking=True) + there * 2, OnCard)
    assert card.waits == []
    assert there[there > 1].tolist() == [2, 3]
    assert not isinstance(there.to(CPU), OnCard)
    assert bool(there[0] == 0)
    assert card.waits == ["__getitem__", "tolist", "to", "__bool__"]
