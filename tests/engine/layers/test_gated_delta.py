"""The gated delta rule by our kernel: what transformers computes, and the same in any pieces."""

import pytest
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from engine.attention.state_pool import StatePool, state_groups
from engine.layers.gated_delta import PackedDelta, can_be_packed
from engine.layers.recurrent import InGroups, StateCache
from engine.relative_error import relative_error
from engine.sequence import KVSpan
from tests.engine.alone import needs_kernels

pytestmark = needs_kernels
IDLE = KVSpan([0], 1000, 1)
WIDTH = 64


def layer(**sizes: int) -> Qwen3_5GatedDeltaNet:
    """A layer with random weights, float32."""
    torch.manual_seed(0)
    shape = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 80,
    }
    config = Qwen3_5TextConfig(
        vocab_size=260, hidden_size=WIDTH, num_hidden_layers=2, **(shape | sizes)
    )
    made = Qwen3_5GatedDeltaNet(config, 0).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        made.norm.weight.uniform_(0.5, 1.5)
        made.dt_bias.normal_()
    return made


def noise(length: int) -> torch.Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length))


class Texts:
    """Texts that go through a layer in steps, in slots of their own."""

    def __init__(self, module, *lengths: int):
        self.module, self.pool = module, StatePool(40)
        self.given = [noise(n) for n in lengths]
        self.spans = [KVSpan([0] * n) for n in lengths]
        self.out: list[list[torch.Tensor]] = [[] for _ in lengths]

    @torch.inference_mode()
    def step(self, *news: int, pads: int = 0) -> None:
        work = [(span, n) for span, n in zip(self.spans, news, strict=True) if n]
        each = [
            x[s.num_computed_tokens :][:n]
            for x, s, n in zip(self.given, self.spans, news, strict=True)
        ]
        packed = torch.cat([*each, torch.zeros(pads, WIDTH)])
        work += [(IDLE, 1)] * pads
        cache = StateCache(self.pool, state_groups(self.pool, work, IDLE), len(packed))
        out = self.module.forward(packed[None], cache_params=cache)[0]
        for n, (span, new) in enumerate(zip(self.spans, news, strict=True)):
            self.out[n].append(out[:new])
            out = out[new:]
            span.num_computed_tokens += new
            self.pool.tidy(span)

    def whole(self) -> list[torch.Tensor]:
        return [torch.cat(parts) for parts in self.out]


def in_one_step(module, *lengths: int) -> list[torch.Tensor]:
    texts = Texts(module, *lengths)
    texts.step(*lengths)
    return texts.whole()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
        {"linear_key_head_dim": 20, "linear_value_head_dim": 24, "linear_num_key_heads": 4},
    ],
    ids=["odd columns", "Qwen 3.5", "less than a vector"],
)
def test_kernel_computes_what_transformers_does(sizes):
    own = layer(**sizes)
    assert can_be_packed(own)
    packed = PackedDelta(own)
    for length in (1, 3, 77):
        [out] = in_one_step(packed, length)
        with torch.inference_mode():
            wanted = own(noise(length)[None])[0]
        assert relative_error(out, wanted) < 1e-5


def test_kernel_agrees_with_the_models_own_mixer_in_groups():
    """Its states are the same too, so that either may go on where the other was."""
    own = layer()
    packed = PackedDelta(own)
    slow = layer()
    slow.forward = InGroups(slow.forward)
    texts = [Texts(module, 9, 30, 5) for module in (packed, slow)]
    for each in texts:
        each.spans[1].kept_states = {8, 11}
        each.step(9, 12, 0)
        each.step(0, 18, 4)
        each.step(0, 0, 1, pads=3)
        assert each.spans[1].states.keys() == {8, 11, 30}
    for a, b in zip(texts[0].whole(), texts[1].whole(), strict=True):
        assert relative_error(a, b) < 1e-5
    for key, tensor in texts[1].pool.tensors.items():
        for one, other in zip(texts[0].spans, texts[1].spans, strict=True):
            for position, slot in one.states.items():
                found = texts[0].pool.tensors[key][slot]
                assert relative_error(found, tensor[other.states[position]]) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_and_neighbours_change_no_bit(threads):
    packed = PackedDelta(layer())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Products whose rows do not depend on each other, as our kernels' do not.
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"):
        product = getattr(packed.own, name)
        product.forward = lambda x, w=product.weight: torch.stack([w @ row for row in x])
    try:
        [alone] = in_one_step(packed, 77)
        for cuts in ([5, 72], [64, 13], [1] * 77, [3, 1, 73]):
            texts = Texts(packed, 77, 40)
            texts.spans[0].kept_states = {20, 66}
            for n, count in enumerate(cuts):
                texts.step(count, int(n < 40), pads=n % 2)
            assert torch.equal(texts.whole()[0], alone)
    finally:
        torch.set_num_threads(before)


def test_source_slot_is_never_written():
    packed = PackedDelta(layer())
    texts = Texts(packed, 20)
    texts.step(10)
    source = texts.spans[0].states[10]
    kept = {key: tensor[source].clone() for key, tensor in texts.pool.tensors.items()}
    texts.pool.share(source)
    texts.step(5)
    texts.step(1)
    assert all(torch.equal(texts.pool.tensors[key][source], x) for key, x in kept.items())


def test_other_layers_are_left():
    assert not can_be_packed(torch.nn.Linear(3, 3))
    biased = layer()
    biased.conv1d.bias = torch.nn.Parameter(torch.zeros(1))
    assert not can_be_packed(biased)
    assert not can_be_packed(layer().bfloat16())
