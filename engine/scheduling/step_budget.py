"""How many prompt tokens a step computes: what is efficient, and short beside who decodes."""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

from engine.runner.step_costs import efficient_size

# How many times as long as without prompts a step may take: who decodes keeps half of its rate.
STRETCH = 2.0
# The fewest prompt tokens of a step, so that a prompt goes on however long its steps take.
FEWEST = 8
# The part that the last step has in what is known of steps now.
_NEWEST = 0.3
# Within which a step may differ from what was measured of it: beyond, something else was the cause.
_UNLIKE = 8.0


class StepBudget:
    """The prompt tokens of each step, by what steps cost at the start and have cost of late.

    `most` bounds them; without `costs`, seconds of a step by its tokens, it is all that does.
    """

    def __init__(self, most: int, costs: Mapping[int, float] | None = None):
        self.costs = points_of(costs or {})
        self.most = min(most, efficient_size(costs)) if costs else most
        self._overhead = _overhead(self.costs[1:])
        # How many times as long as measured steps take now, with prompts and without: what they
        # attend to is longer, and others may use the machine.
        self._with_prompts = self._without = 1.0

    def prompt_tokens(self, decoding: int) -> int:
        """How many prompt tokens a step may compute beside so many sequences that decode."""
        if not decoding or not self.costs:
            return self.most
        without = self._seconds(decoding) * self._without
        seconds = STRETCH * max(without, self._overhead * self._with_prompts)
        tokens = int(self._tokens(seconds / self._with_prompts)) - decoding
        return min(self.most, max(FEWEST, tokens))

    def expected(self, decoding: int, prompt_tokens: int) -> float:
        """Seconds that a step is likely to take now; 0 where nothing was measured."""
        if not self.costs:
            return 0.0
        times = self._with_prompts if prompt_tokens else self._without
        return times * self._seconds(decoding + prompt_tokens)

    def note(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Note how long a step took."""
        if not self.costs or not decoding + prompt_tokens:
            return
        measured = self._seconds(decoding + prompt_tokens)
        if prompt_tokens:
            self._with_prompts = times_of_late(self._with_prompts, seconds, measured)
        else:
            self._without = times_of_late(self._without, seconds, measured)

    def _seconds(self, tokens: float) -> float:
        """What a step of so many tokens cost at the start, between and beyond those measured."""
        return line_through(self.costs, tokens)

    def _tokens(self, seconds: float) -> float:
        """The reverse of it."""
        return line_through([(cost, size) for size, cost in self.costs], seconds)


def _overhead(costs: list[tuple[float, float]]) -> float:
    """What a step with prompts costs however few they are: on a card, more than a recorded one."""
    return max(0.0, line_through(costs, 0.0)) if len(costs) > 1 else 0.0


def points_of(costs: Mapping[int, float]) -> list[tuple[float, float]]:
    """Tokens and seconds in order; more tokens take no less, whatever disturbed a measurement."""
    sizes = sorted(costs)
    seconds = accumulate((costs[size] for size in sizes), max)
    return [(float(size), cost) for size, cost in zip(sizes, seconds, strict=True)]


def times_of_late(times: float, seconds: float, measured: float) -> float:
    """How many times as long as measured steps take, after one more."""
    ratio = min(_UNLIKE, max(1 / _UNLIKE, seconds / measured))
    return times + _NEWEST * (ratio - times)


def line_through(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear between points (x, y) in order, beyond them by the line of the last two."""
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    n = min(max(1, bisect_left(points, (x,))), len(points) - 1)
    (x0, y0), (x1, y1) = points[n - 1], points[n]
    return y0 if x1 <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
