"""Who is computed in the next step, and who waits."""

import time
from collections import Counter, deque
from collections.abc import Hashable, Mapping
from math import inf
from typing import Generic, NamedTuple, TypeVar

from engine.scheduling.kv_cache import SpanCache
from engine.scheduling.speculation import Speculation
from engine.scheduling.step_budget import StepBudget
from engine.sequence import Sequence

# Most smaller requests that may overtake one that waits for room.
MAX_OVERTAKING = 16
# Most tokens in a step of a prompt whose logits are all wanted: each is as wide as the vocabulary.
_MAX_SCORED = 128


S = TypeVar("S", bound=Sequence)
R = TypeVar("R", bound=Hashable)


def _chunk_of(seq: Sequence) -> int:
    """Most tokens of a sequence's prompt that a step may compute."""
    return min(seq.pending, _MAX_SCORED) if seq.all_logits else seq.pending


class StepSizes(NamedTuple):
    """How many sequences of a step decode, and how many tokens of prompts and of drafts it has."""

    decoding: int
    prompt_tokens: int
    drafted: int


def sizes_of(work: list[tuple[S, int]]) -> StepSizes:
    """A step's sizes, before it is computed."""
    drafted = sum(len(seq.draft) for seq, _ in work)
    single = [count == 1 + len(seq.draft) for seq, count in work]
    total = sum(count for _, count in work)
    return StepSizes(sum(single), total - drafted - sum(single), drafted)


def fair_shares(total: int, wanted: Mapping[R, int]) -> dict[R, int]:
    """Divide a total among those who want some of it.

    Half of it evenly, so that all go on; the rest goes to who wants the least, so that short ones
    are through soon, and of several that are alike one is, rather than all of them late.
    """
    even = max(1, total // 2 // max(1, len(wanted)))
    given = dict.fromkeys(wanted, 0)
    for most in (even, total):
        for who in sorted(wanted, key=wanted.__getitem__):
            more = min(most, wanted[who] - given[who], total)
            given[who] += more
            total -= more
    return given


class Scheduler(Generic[S]):
    """Waiting and running sequences: first come, first served, as the KV cache has room.

    Places and prompts' tokens are divided among requests, however many sequences each of them has.
    """

    def __init__(
        self,
        cache: SpanCache,
        max_batch: int = 64,
        prefill_chunk: int = 512,
        costs: Mapping[int, float] | None = None,
        speculation: Speculation | None = None,
    ):
        self.cache, self.max_batch, self.speculation = cache, max_batch, speculation
        self.budget = StepBudget(prefill_chunk, costs)
        # Most places of one request: those who come later find some.
        self.max_places = max_batch - max_batch // 8
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self._ended: deque[float] = deque(maxlen=64)

    def admit(self) -> None:
        """Move waiting sequences into the batch, in turns but for MAX_OVERTAKING."""
        first_blocked: S | None = None
        blocked_size = inf
        for seq in self._in_turns():
            if len(self.running) == self.max_batch:
                return
            if first_blocked and first_blocked.times_overtaken >= MAX_OVERTAKING:
                return
            # Where one found no room, nobody who wants as much needs to look.
            if seq.rows_needed >= blocked_size or self._lets_another_go_first(seq):
                continue
            if not self.cache.place(seq):
                first_blocked = first_blocked or seq
                blocked_size = seq.rows_needed
                continue
            if first_blocked:
                first_blocked.times_overtaken += 1
            self.waiting.remove(seq)
            self.running.append(seq)
            if seq.drafts and not seq.admitted:
                for tokens in self.cache.continuations(seq):
                    seq.drafts.source.add(tokens)
            seq.admitted = seq.admitted or time.monotonic()

    def grow_or_preempt(self) -> None:
        """Widen the spans that are full; who finds no room waits again, with its tokens."""
        for seq in list(self.running):
            if len(seq.tokens) > seq.room and not seq.done and not self.cache.grow(seq):
                self.running.remove(seq)
                self.waiting.appendleft(seq)

    def plan(self) -> list[tuple[S, int]]:
        """The next step's work: one token of each in decode, and chunks of prompts.

        What a request has of the step's prompt tokens goes to its prompts in order.
        """
        running = [seq for seq in self.running if not seq.done]
        chunks = {seq: _chunk_of(seq) for seq in running if seq.pending > 1}
        wanted: Counter[Hashable] = Counter()
        for seq, most in chunks.items():
            wanted[seq.request] += most
        decoding = len(running) - len(chunks)
        left = fair_shares(self.budget.prompt_tokens(decoding), wanted)
        work = []
        for seq in running:
            count = 1
            if seq in chunks:
                count = min(chunks[seq], left[seq.request])
                left[seq.request] -= count
            if count:
                work.append((seq, count))
        return self._with_drafts(work)

    def _with_drafts(self, work: list[tuple[S, int]]) -> list[tuple[S, int]]:
        """The same, and a draft behind the tokens of those in decode."""
        decoding = [seq for seq, _ in work if seq.pending == 1]
        if not (self.speculation and decoding):
            return work
        prompt_tokens = sum(count for seq, count in work if seq.pending > 1)
        self.speculation.plan(decoding, prompt_tokens)
        return [(seq, count + len(seq.draft)) for seq, count in work]

    def expected(self, sizes: StepSizes) -> float:
        """Seconds that a step is likely to take, by what steps have taken; 0 if not known."""
        return self.budget.expected(sizes.decoding + sizes.drafted, sizes.prompt_tokens)

    def note(self, sizes: StepSizes, seconds: float) -> None:
        """Note how long a step took, by which the next ones are planned."""
        self.budget.note(sizes.decoding + sizes.drafted, sizes.prompt_tokens, seconds)
        if self.speculation and sizes.decoding:
            self.speculation.costs.note(
                sizes.decoding + sizes.prompt_tokens, sizes.drafted, seconds
            )

    def advance(self, work: list[tuple[S, int]], right: Mapping[S, int]) -> None:
        """Note that the work has been computed, and how much of the drafts was right."""
        for seq, count in work:
            seq.num_computed_tokens += count - len(seq.draft) + right.get(seq, 0)
            self.cache.advance(seq)
            if self.speculation:
                self.speculation.note(seq, right.get(seq, 0))
            seq.draft = []

    def remove_finished(self) -> None:
        """Remove the sequences that are done, and free their rows."""
        # Read `done` once: the event loop may set it at any moment.
        gone = {seq for seq in (*self.running, *self.waiting) if seq.done}
        if not gone:
            return
        for seq in self.running:
            if seq in gone:
                self.cache.release(seq)
                self._ended.append(time.monotonic())
        self.running = [seq for seq in self.running if seq not in gone]
        self.waiting = deque(seq for seq in self.waiting if seq not in gone)

    def seconds_to_serve(self, count: int) -> int:
        """About how long it takes until so many more requests have ended, at most a minute."""
        now = time.monotonic()
        recent = [ended for ended in list(self._ended) if now - ended < 60]
        rate = len(recent) / (now - recent[0] + 1e-3) if recent else 1.0
        return min(60, 1 + int(count / rate))

    def _in_turns(self) -> list[S]:
        """Who may have the next places: requests in turns, those that have fewer places first."""
        if not self.waiting or len(self.running) == self.max_batch:
            return []
        places = Counter(seq.request for seq in self.running)
        turns: list[tuple[int, S]] = []
        for seq in self.waiting:
            turns.append((places[seq.request], seq))
            places[seq.request] += 1
        turns.sort(key=lambda pair: pair[0])
        return [seq for turn, seq in turns if turn < self.max_places]

    def _lets_another_go_first(self, seq: S) -> bool:
        """Whether a sequence waits for another's prefill, to copy the prefix that they share."""
        leader = seq.waiting_for
        if leader is None or leader.pending <= 1 or leader.done:
            seq.waiting_for = self.cache.prefix_in_prefill(seq)
        return seq.waiting_for is not None
