"""What is asked of a running engine: how full it is, how late, and what it died of."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.scheduling.engine import Engine

_SLOW = 10.0  # times as long as is likely a step may take before it counts as late


class EngineStatus:
    """Of a model that has an engine."""

    engine: "Engine"

    @property
    def failure(self) -> BaseException | None:
        """What the engine died of."""
        return self.engine.failure

    @property
    def seconds_late(self) -> float:
        """By how much the current step is longer than it may be by what steps have taken; or 0."""
        if not self.engine.num_running:
            return 0.0
        due = self.engine.last_step + _SLOW * self.engine.expected_step
        return max(0.0, time.monotonic() - due)

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        return self.engine.num_waiting

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.engine.cache.rows

    @property
    def cache_tokens_used(self) -> int:
        return self.engine.cache.num_used

    @property
    def cache_tokens_kept(self) -> int:
        """Those of finished requests, kept as prefixes until their room is needed."""
        return sum(span.room for span in [*self.engine.cache.kept])

    @property
    def state_slots(self) -> int:
        """Slots for the states of layers that keep one; 0 if none does."""
        pool = self.engine.cache.states.pool
        return pool.slots if pool else 0

    @property
    def state_slots_used(self) -> int:
        pool = self.engine.cache.states.pool
        return pool.slots - len(pool.free) if pool else 0

    @property
    def num_drafts(self) -> int:
        """Drafts that were computed so far; of them, tokens, and those that were right."""
        speculation = self.engine.speculation
        return speculation.num_drafts if speculation else 0

    @property
    def num_draft_tokens(self) -> int:
        speculation = self.engine.speculation
        return speculation.num_drafted if speculation else 0

    @property
    def num_accepted_tokens(self) -> int:
        speculation = self.engine.speculation
        return speculation.num_accepted if speculation else 0
