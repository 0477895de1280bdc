"""Where drafts come from: texts that an answer may be repeating, and where it is in them.

Its own prompt and what it has said, what a request predicts, and earlier answers to prompts that
began alike: the longest suffix of the text that stood there before, and what followed. Known as
prompt lookup; with earlier answers as in SuffixDecoding (arXiv 2411.04975).
"""

from collections.abc import Sequence
from typing import NamedTuple

# Tokens that agree before a place is looked up, and with how many it is as good as it gets.
_MIN_MATCH = 3
_MAX_MATCH = 32
# Earlier places of the same tokens that are compared, the latest first.
_MAX_PLACES = 8
# The last tokens of a text that are indexed, some 120 bytes each; and how many of them in a step.
_MAX_INDEXED = 2**14
_CATCH_UP = 2**11
# How far from the place that was lost an edited text is found again, by two tokens; and after how
# many others it is given up.
_NEAR = 32
_MAX_MISSED = 16


class Draft(NamedTuple):
    """Tokens that may come next, how surely by their kind of match, and whether from a prediction.

    The kinds go from 0, a guess, to NUM_KINDS - 1.
    """

    tokens: list[int]
    kind: int
    predicted: bool


# The fewest agreeing tokens of each kind of match, but for the first: a guess.
_KINDS = (0, 1, 3, 6, 12, 24)
NUM_KINDS = len(_KINDS)


def _kind_of(matched: int) -> int:
    """The kind of a match of so many tokens."""
    return sum(matched >= fewest for fewest in _KINDS[1:])


class PlaceIndex:
    """Finds where in a text, which may grow, others' last tokens stand; a place is what follows."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.first = self.end = max(_MIN_MATCH, len(tokens) - _MAX_INDEXED)
        self._latest: dict[int, int] = {}  # by the hash of the _MIN_MATCH tokens before it
        self._earlier: list[int] = []  # of each place, the one before with that hash, or -1

    def catch_up(self) -> None:
        """Index some of what has been added."""
        tokens, latest = self.tokens, self._latest
        end = min(len(tokens), self.end + _CATCH_UP)
        for place in range(self.end, end):
            key = hash(tuple(tokens[place - _MIN_MATCH : place]))
            self._earlier.append(latest.get(key, -1))
            latest[key] = place
        self.end = max(self.end, end)

    def find(self, text: list[int]) -> tuple[int, int]:
        """The place before which most of a text's last tokens stand, and how many; 0 if few do."""
        place = self._latest.get(hash(tuple(text[-_MIN_MATCH:])), -1)
        best, longest = 0, _MIN_MATCH - 1
        for _ in range(_MAX_PLACES):
            if place < 0 or longest >= _MAX_MATCH:
                break
            matched = _agreeing(self.tokens, place, text)
            if matched > longest:
                best, longest = place, matched
            place = self._earlier[place - self.first]
        return (best, longest) if longest >= _MIN_MATCH else (0, 0)


def _agreeing(tokens: list[int], place: int, text: list[int]) -> int:
    """How many tokens before a place are a text's last ones, at most _MAX_MATCH."""
    most = min(_MAX_MATCH, place, len(text))
    count = 0
    while count < most and tokens[place - 1 - count] == text[-1 - count]:
        count += 1
    return count


class DraftSource:
    """Proposes how a text goes on; it is given the list itself, to which the answer is appended."""

    def __init__(self, text: list[int], prediction: Sequence[int] = ()):
        self.text = text
        self.predicted = [*prediction][:_MAX_INDEXED]
        self.indexes = [PlaceIndex(text)]
        # The place of what should come next, in one of the texts, and how many tokens before it
        # have agreed; how many have not since they last did. A prediction begins with the answer.
        self._tokens, self._place, self._matched, self._missed = self.predicted, 0, 0, 0
        if self.predicted:
            self.indexes.append(PlaceIndex(self.predicted))
            self._matched = _MIN_MATCH
        self._seen = len(text)

    def add(self, tokens: list[int]) -> None:
        """Let what is like these be found from now on."""
        self.indexes.append(PlaceIndex(tokens[-_MAX_INDEXED:]))

    def propose(self, most: int) -> Draft:
        """What may come next, at most so many tokens, and none if nothing was found."""
        for index in self.indexes:
            if index.end < len(index.tokens):
                index.catch_up()
        for token in self.text[self._seen :]:
            self._follow(token)
        self._seen = len(self.text)
        if self._matched < _MAX_MATCH:
            self._look_up()
        if self._missed > 1 and not self._matched:
            return Draft([], 0, False)
        return Draft(self._from(most), _kind_of(self._matched), self._tokens is self.predicted)

    def _follow(self, token: int) -> None:
        """Go on by the token that came, or past the one in its place."""
        agrees = self._place < len(self._tokens) and self._tokens[self._place] == token
        self._place += 1
        self._matched = self._matched + 1 if agrees else 0
        self._missed = 0 if agrees else self._missed + 1

    def _look_up(self) -> None:
        """Go to a place before which more tokens agree than where it is, if there is one."""
        for index in self.indexes:
            place, matched = index.find(self.text)
            if matched > self._matched:
                self._tokens, self._place = index.tokens, place
                self._matched, self._missed = matched, 0
        if self._missed and not self._matched and self._missed <= _MAX_MISSED:
            self._look_near()

    def _look_near(self) -> None:
        """Find the nearest place where the last two tokens stand in what was being repeated."""
        tokens, here = self._tokens, self._place
        pair = self.text[-2:]
        near = range(max(2, here - _NEAR), min(len(tokens), here + _NEAR))
        # A text that grows ends with the pair itself.
        found = [place for place in near if tokens[place - 2 : place] == pair]
        if found:
            self._place = min(found, key=lambda place: abs(place - here))
            self._matched, self._missed = len(pair), 0

    def _from(self, most: int) -> list[int]:
        """The tokens from the place on; behind the end of the text itself they recur."""
        draft = self._tokens[self._place : self._place + most]
        period = len(self.text) - self._place
        if self._tokens is self.text and draft:
            while len(draft) < most:
                draft += draft[-period:][: most - len(draft)]
        return draft
