"""What the engine counts by itself, for Prometheus, under vLLM's names."""

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily

_COUNTERS = {
    "spec_decode_num_drafts": "num_drafts",
    "spec_decode_num_draft_tokens": "num_draft_tokens",
    "spec_decode_num_accepted_tokens": "num_accepted_tokens",
}


class EngineCounters:
    """A collector that asks for each count when it is read."""

    def __init__(self, count_of: Callable[[str], float]):
        self.count_of = count_of

    def collect(self) -> Iterator[CounterMetricFamily]:
        """By prometheus_client's interface."""
        for name, counted in _COUNTERS.items():
            text = name.replace("_", " ")
            yield CounterMetricFamily(f"chat_{name}", text, self.count_of(counted))
