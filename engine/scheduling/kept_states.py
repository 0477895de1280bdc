"""Which states of a model's layers are kept for other prompts, and which are given up for them.

Rows of keys and values can be cut anywhere, a state cannot: it is of just as many tokens as it was
made of. So it is settled before a prompt is computed after how many of its tokens others will want
one, as in section 4.2 of arXiv 2411.19379 (Marconi). A model without such layers has no pool, and
nothing happens here.
"""

from collections.abc import Iterable

from engine.attention.state_pool import StatePool, slots_needed
from engine.scheduling.prefix_index import PrefixIndex, StateIndex, equal_tokens, in_blocks
from engine.sequence import KVSpan, ScheduledBatch, Sequence


class KeptStates:
    """The states of a cache's spans, running ones and prefixes."""

    def __init__(self, pool: StatePool | None, reuse: bool):
        self.pool, self.reuse = pool, reuse
        self.index = StateIndex()

    def plan(self, seq: Sequence, known: int) -> None:
        """Settle after how many tokens of a prompt its states will be kept for others.

        Where the next turn will surely go on, or near its end; and after the `known` tokens with
        which a text began, of which no state was kept: what two have begun with, a third will.
        """
        if self.pool and self.reuse:
            last = len(seq.tokens) - 1
            near = in_blocks(last) if seq.num_stable is None else min(seq.num_stable, last)
            # Less than a block is never looked for.
            seq.kept_states |= {
                p for p in (near, known) if p > seq.num_computed_tokens and in_blocks(p)
            }

    def advance(self, seq: Sequence) -> None:
        """Free what a sequence no longer needs, and let what it keeps be found."""
        if self.pool:
            self.pool.tidy(seq)
            for position in seq.kept_states & seq.states.keys() if self.reuse else ():
                self.index.add(seq, position)

    def share(self, source: KVSpan, position: int, seq: Sequence) -> None:
        """Let a sequence begin with another span's state."""
        if self.pool:
            seq.states[position] = self.pool.share(source.states[position])
            self.index.touch(source, position)

    def hand_over(self, old: KVSpan, new: KVSpan) -> None:
        """Give all that a span has to another, of the same tokens."""
        if self.pool:
            self.pool.tidy(old)
            self.index.rename(old, new)
            new.states, new.kept_states = dict(old.states), {*old.states}
            old.states.clear()
            for position in new.states:
                self.index.add(new, position)

    def drop(self, span: KVSpan) -> None:
        """Free all states of a span."""
        if self.pool:
            self.index.remove(span)
            self.pool.drop(span)

    def coming(
        self, seq: Sequence, prefilling: PrefixIndex[Sequence], count: int
    ) -> Sequence | None:
        """One of those in prefill that share a sequence's first tokens, and will pass their end.

        It then keeps the state there, if it does not keep one of even more of the shared tokens.
        """
        known = self.index.longest(seq)[0]
        for leader in prefilling.sharing(seq, count):
            shared = equal_tokens(leader.tokens, seq.tokens, count)
            kept = (position for position in leader.kept_states if position <= shared)
            position = max([min(shared, count), *kept])
            if position > max(known, leader.num_computed_tokens):
                leader.kept_states.add(position)
                return leader
        return None

    def free(self, work: ScheduledBatch, kept: Iterable[KVSpan]) -> Iterable[KVSpan]:
        """Free as many slots as a step takes; yields prefixes that have no state any more.

        First go states of kept prefixes, those unused for longest. If that is not enough, no states
        of running sequences are kept for others.
        """
        if not self.pool:
            return
        needed = sum(slots_needed(span, new) for span, new in work)
        while len(self.pool.free) < needed and (oldest := self.index.oldest(kept)):
            span, position = oldest
            self.index.remove(span, position)
            self.pool.release(span.states.pop(position))
            if not span.states:
                yield span
        if len(self.pool.free) < needed:
            for span in {*(span for span, _ in work), *self.index.keys}:
                self.index.remove(span)
                span.kept_states.clear()
                self.pool.tidy(span)
