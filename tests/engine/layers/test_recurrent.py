"""Modules that keep a state, called group by group."""

import model_types
import pytest
import torch

from engine.attention.state_pool import StatePool, state_groups
from engine.layers.recurrent import InGroups, StateCache
from engine.runner.runner import Runner
from engine.sequence import KVSpan
from tests.engine.states import plain_model, prepared

IDLE = KVSpan([0], 1000, 1)


class Sums(torch.nn.Module):
    """All tokens so far, added; one that is forgetful begins anew with each chunk."""

    def __init__(self, forgets: bool):
        super().__init__()
        self.forgets = forgets

    def forward(self, x, cache_params):
        state = cache_params.get_recurrent_state(0)
        sums = x.cumsum(1)
        if state is not None and (x.shape[1] == 1 or not self.forgets):
            sums = sums + state[:, None]
        cache_params.update_recurrent_state(sums[:, -1], 0)
        return sums


@pytest.mark.parametrize("forgets", [True, False])
def test_module_that_forgets_is_given_one_token_at_a_time(forgets):
    module, pool, span = Sums(forgets), StatePool(9), KVSpan([0] * 20)
    calls = []
    module.register_forward_pre_hook(lambda _, args, given: calls.append(1), with_kwargs=True)
    packed = InGroups(lambda *args, **given: module(*args, **given))
    x = torch.randn(1, 20, 4)
    parts = []
    for new in (8, 7, 5):
        groups = state_groups(pool, [(span, new)], IDLE)
        begin = span.num_computed_tokens
        calls.clear()
        parts.append(packed(x[:, begin : begin + new], cache_params=StateCache(pool, groups, new)))
        span.num_computed_tokens += new
    assert torch.allclose(torch.cat(parts, 1), x.cumsum(1), atol=1e-5)
    assert packed.one_by_one is forgets
    assert len(calls) == (5 if forgets else 1)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_selective_scan_goes_on_from_a_state(kind):
    """Whose layers are given whole chunks, beside another text; also with few tokens at a time."""
    runner = Runner(prepared(kind), 400, 20)
    wanted = [model_types.logits_of(plain_model(kind), ids) for ids in model_types.texts()[:2]]
    assert model_types.largest_error(runner, wanted) < 1e-4
    modules = runner.model.state_modules
    assert [module.forward.one_by_one for module in modules] == [False] * len(modules)
