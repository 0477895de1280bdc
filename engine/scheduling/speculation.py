"""Speculative decoding without a second model: how long each sequence's draft is in a step.

A draft's tokens are computed in the step of the token before them, and kept as far as the sampler
would have said them. As long a one is given as brings the most tokens a second: by how often such
drafts were right, and by what rows cost on this machine.
"""

from collections import abc
from collections.abc import Iterable, Mapping
from itertools import accumulate
from math import inf

from engine.scheduling.draft_source import NUM_KINDS, Draft, DraftSource
from engine.scheduling.step_budget import line_through, points_of, times_of_late
from engine.sequence import Sequence

# Most tokens of a draft, and of all drafts in a step: each has logits as wide as the vocabulary.
_MAX_DRAFT = 32
_MAX_DRAFTED = 128
# How many times as long a step may take beside sequences that have no draft.
_STRETCH = 1.25
# How often a token of each kind of match is right until it has been seen, and how many tokens that
# counts for, and the kind's own odds beside a sequence's.
_PRIOR = (0.2, 0.4, 0.4, 0.6, 0.8, 0.9)
_WEIGHT = 8.0
# What is left of old observations with each new one, and after a step without a draft.
_FADING = 0.95
_RESTING = 0.99
# No draft is worth its row that is right so seldom.
_LEAST = 0.02


class Odds:
    """How often drafts' tokens were right where those before them were, by their kind of match."""

    def __init__(self) -> None:
        self.right = [0.0] * NUM_KINDS
        self.tried = [0.0] * NUM_KINDS

    def chance(self, kind: int, prior: float) -> float:
        return (self.right[kind] + _WEIGHT * prior) / (self.tried[kind] + _WEIGHT)

    def note(self, kind: int, right: int, tried: int) -> None:
        self.right[kind] = _FADING * self.right[kind] + right
        self.tried[kind] = _FADING * self.tried[kind] + tried

    def rest(self, kind: int) -> None:
        """Forget a little, so that what was given up is tried again some time."""
        self.right[kind] *= _RESTING
        self.tried[kind] *= _RESTING


class Drafts:
    """One answer's: where they come from, and what became of them."""

    def __init__(self, source: DraftSource):
        self.source = source
        self.odds = Odds()
        self.draft = Draft([], 0, False)


class RowCosts:
    """Seconds of a step by its tokens, all of whose logits are wanted, as steps take of late."""

    def __init__(self, costs: Mapping[int, float]):
        self.points = points_of(costs)
        self._known: dict[int, float] = {}  # what was asked for of them
        # How many times as long as measured, without drafts and with them.
        self.without = self.drafted = 1.0

    def seconds(self, tokens: int, drafted: int) -> float:
        """Of a step of so many tokens and so many drafted ones."""
        times = self.drafted if drafted else self.without
        return times * self._measured(tokens + drafted)

    def _measured(self, tokens: int) -> float:
        if tokens not in self._known:
            self._known[tokens] = line_through(self.points, tokens)
        return self._known[tokens]

    def note(self, tokens: int, drafted: int, seconds: float) -> None:
        """Note what a step took."""
        measured = self._measured(tokens + drafted)
        if drafted:
            self.drafted = times_of_late(self.drafted, seconds, measured)
        else:
            self.without = times_of_late(self.without, seconds, measured)
            self.drafted += (1 - _RESTING) * (self.without - self.drafted)


class Speculation:
    """Gives sequences their drafts, step after step."""

    def __init__(self, costs: Mapping[int, float]):
        self.costs = RowCosts(costs)
        self.odds = Odds()
        self.num_drafts = self.num_drafted = self.num_accepted = 0

    def plan(self, decoding: abc.Sequence[Sequence], prompt_tokens: int) -> None:
        """Set the drafts of sequences that decode beside so many prompts' tokens."""
        chances: list[tuple[float, int]] = []  # that a row brings a token, and whose it is
        for n, seq in enumerate(decoding):
            chances += [(chance, n) for chance in self._offer(seq)]
        chances.sort(key=lambda pair: -pair[0])
        most = inf if all(seq.draft for seq in decoding) else _STRETCH
        rows = self._best([chance for chance, _ in chances], len(decoding), prompt_tokens, most)
        given = [0] * len(decoding)
        for _, n in chances[:rows]:
            given[n] += 1
        for count, seq in zip(given, decoding, strict=True):
            if seq.draft and not count:
                kind = seq.drafts.draft.kind
                seq.drafts.odds.rest(kind)
                self.odds.rest(kind)
            del seq.draft[count:]

    def _offer(self, seq: Sequence) -> Iterable[float]:
        """Let a sequence have the longest draft; yields each of its tokens' chance to be kept."""
        seq.draft = []
        # One more comes of the last token's own logits.
        most = min(_MAX_DRAFT, seq.room - len(seq.tokens), seq.max_tokens - len(seq.tokens) - 1)
        if not seq.drafts or most < 1:
            return []
        seq.drafts.draft = draft = seq.drafts.source.propose(most)
        seq.draft = _until_end(draft.tokens, seq)
        kind = draft.kind
        each = seq.drafts.odds.chance(kind, self.odds.chance(kind, _PRIOR[kind]))
        chances = accumulate([each] * len(seq.draft), lambda before, one: before * one)
        return [chance for chance in chances if chance > _LEAST]

    def _best(self, chances: list[float], decoding: int, prompt_tokens: int, most: float) -> int:
        """How many rows, the likeliest first, bring the most tokens a second.

        The step takes at most so many times as long as without any.
        """
        tokens = decoding + prompt_tokens
        without = self.costs.seconds(tokens, 0)
        best, brought = 0, float(decoding)
        rate = brought / without
        for rows, chance in enumerate(chances[:_MAX_DRAFTED], 1):
            brought += chance
            seconds = self.costs.seconds(tokens, rows)
            if seconds > most * without:
                break
            if brought > rate * seconds:
                best, rate = rows, brought / seconds
        return best

    def note(self, seq: Sequence, accepted: int) -> None:
        """Note how many tokens of a sequence's draft were right."""
        drafts, drafted = seq.drafts, len(seq.draft)
        if not drafts or not drafted:
            return
        kind, tried = drafts.draft.kind, min(accepted + 1, drafted)
        for odds in (self.odds, drafts.odds):
            odds.note(kind, accepted, tried)
        if drafts.draft.predicted:
            seq.accepted_prediction_tokens += accepted
            seq.rejected_prediction_tokens += drafted - accepted
        self.num_drafts += 1
        self.num_drafted += drafted
        self.num_accepted += accepted


def _until_end(draft: list[int], seq: Sequence) -> list[int]:
    """A draft as far as it can be kept: up to what ends the answer, and by the guide."""
    for n, token in enumerate(draft):
        if token in seq.end_ids:
            draft = draft[: n + 1]
            break
    if seq.guide and draft:
        draft = draft[: seq.guide.matcher.validate_tokens(draft)]
    return draft
