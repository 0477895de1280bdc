"""How many prompt tokens a step computes."""

import pytest
import torch

from engine.runner.step_costs import efficient_size, step_costs
from engine.scheduling.step_budget import FEWEST, STRETCH, StepBudget

# Seconds as measured on two cores, and on a card, whose recorded step of one token is short.
CPU = {1: 0.012, 16: 0.038, 32: 0.066, 64: 0.122, 128: 0.24}
CARD = {1: 0.005, 16: 0.0252, 32: 0.0254, 64: 0.0258, 512: 0.031, 1024: 0.038, 2048: 0.075}


@pytest.mark.parametrize(("costs", "size"), [(CPU, 32), (CARD, 1024), ({1: 0.1}, 1)])
def test_chunk_is_the_smallest_that_is_efficient(costs, size):
    assert efficient_size(costs) == size
    assert StepBudget(4096, costs).prompt_tokens(0) == size


def test_flag_is_the_most():
    tokens = 16
    assert StepBudget(tokens, CPU).prompt_tokens(0) == tokens
    assert StepBudget(tokens).prompt_tokens(5) == tokens


def test_step_beside_one_that_decodes_is_short():
    tokens = StepBudget(4096, CPU).prompt_tokens(1)
    assert tokens == FEWEST
    # What the fewest cost, and not a chunk.
    assert 0.012 + (0.038 - 0.012) / 15 * tokens < 1.1 * STRETCH * 0.012


def test_more_that_decode_leave_more_to_prompts():
    budget = StepBudget(4096, CPU)
    found = [budget.prompt_tokens(decoding) for decoding in (1, 4, 16, 48)]
    assert found == sorted(found)
    assert found[-1] == 32


def test_step_of_a_card_is_bounded_by_its_own_overhead():
    """A recorded step is shorter than any with prompts: few tokens would be no shorter."""
    assert StepBudget(4096, CARD).prompt_tokens(1) == 1024


def test_longer_contexts_leave_fewer_tokens():
    budget = StepBudget(4096, CPU)
    before = budget.prompt_tokens(16)
    for _ in range(20):
        budget.note(16, before, 3 * 0.08)
    assert FEWEST <= budget.prompt_tokens(16) < before
    for _ in range(20):
        budget.note(16, before, 0.06)
    assert budget.prompt_tokens(16) >= before


def test_slow_machine_changes_nothing():
    """Others who use it make steps of either kind longer."""
    budget = StepBudget(4096, CPU)
    before = budget.prompt_tokens(16)
    for _ in range(30):
        budget.note(16, 0, 2 * 0.038)
        budget.note(0, 64, 2 * 0.122)
    assert abs(budget.prompt_tokens(16) - before) <= 1


def test_measurements_that_others_disturb_still_rise():
    costs = {1: 0.05, 16: 0.04, 32: 0.07}
    assert StepBudget(4096, costs).prompt_tokens(2) >= FEWEST


class Machine:
    """In place of a runner: steps last as long as they say, and one size fails."""

    rows = 300

    def __init__(self, monkeypatch, seconds, fails_at=1000):
        self.now, self.seconds, self.fails_at = 0.0, seconds, fails_at
        self.model = torch.nn.Module()
        self.model.get_input_embeddings = lambda: torch.nn.Embedding(10, 2)
        self.checked = 0
        self.forgotten = []
        monkeypatch.setattr("engine.runner.step_costs.time.perf_counter", lambda: self.now)

    def forward(self, work):
        ((span, count),) = work
        assert len(span.tokens) == count
        assert max(span.tokens) < 10
        if count >= self.fails_at:
            raise torch.OutOfMemoryError("no memory")
        self.now += self.seconds(count)
        return torch.zeros(1, 10)

    def forget(self, spans):
        self.forgotten += [len(span.tokens) for span in spans]

    def check_device(self):
        self.checked += 1


def test_measuring_ends_where_larger_steps_bring_no_more(monkeypatch):
    machine = Machine(monkeypatch, lambda count: 0.001 * max(count, 60))
    assert [*step_costs(machine, 4096)] == [1, 16, 32, 64, 128]
    machine = Machine(monkeypatch, lambda count: 0.01)
    assert [*step_costs(machine, 4096)] == [1, 16, 32, 64, 128, 256]  # all that the cache holds
    machine = Machine(monkeypatch, lambda count: 0.5 + 0.1 * count)
    assert [*step_costs(machine, 4096)] == [1, 16]  # a slow one is not tried at length


def test_size_for_which_there_is_no_memory_is_left_out(monkeypatch):
    machine = Machine(monkeypatch, lambda count: 0.01, fails_at=64)
    assert [*step_costs(machine, 4096)] == [1, 16, 32]
    assert machine.checked == 1
    assert machine.forgotten == [1, 16, 32, 64]  # whose states, if layers keep any, are freed
