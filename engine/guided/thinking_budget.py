"""A bound on how long a model thinks aloud, exact to the token."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from tokenizers import Tokenizer


@dataclass(eq=False)
class ThinkingBudget:
    """Ends one answer's thought after `most` tokens with the chat template's own marker.

    `opening` and `closing` are the markers, `closing_ids` the tokens of the latter, and `spell`
    gives the text of tokens. Where the prompt has opened the thought, `is_open` says so; else an
    answer that does not begin with the opening marker has no thought.
    """

    most: int
    opening: str
    closing: str
    closing_ids: tuple[int, ...]
    spell: Callable[[list[int]], str]
    is_open: bool
    _state: Literal["start", "open", "closing", "over"] = field(init=False)
    _tail: list[int] = field(default_factory=list, init=False)  # the latest tokens
    _num_thought: int = field(default=0, init=False)
    _left: tuple[int, ...] = field(default=(), init=False)  # of the marker that is written

    def __post_init__(self) -> None:
        self._state = "open" if self.is_open else "start"
        self._close_if_full()

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, most: int, markers: tuple[str, str], is_open: bool
    ) -> "ThinkingBudget":
        """The budget of a model whose markers are these."""
        ids = tuple(tokenizer.encode(markers[1], add_special_tokens=False).ids)
        spell = partial(tokenizer.decode, skip_special_tokens=False)
        return cls(most, *markers, ids, spell, is_open)

    def copy(self) -> "ThinkingBudget":
        """The same for another answer, of which nothing is there yet."""
        return replace(self)

    @property
    def next_id(self) -> int | None:
        """The token that has to come next, if any has."""
        return self._left[0] if self._state == "closing" else None

    def note(self, token: int) -> None:
        """Take the next token of the answer."""
        if self._state == "over":
            return
        if self._state == "closing":
            self._left = self._left[1:]
            self._state = "closing" if self._left else "over"
            return
        self._tail.append(token)
        if self._state == "start":
            self._begin()
            return
        self._num_thought += 1
        # A marker has so many tokens, if it is not spelled in others.
        self._tail = self._tail[-2 * len(self.closing_ids) - 2 :]
        if self.closing in self.spell(self._tail):
            self._state = "over"
            return
        self._close_if_full()

    def _begin(self) -> None:
        text = self.spell(self._tail).lstrip()
        if text.startswith(self.opening):
            self._state, self._tail = "open", []
            self._close_if_full()
        elif not self.opening.startswith(text):
            self._state = "over"

    def _close_if_full(self) -> None:
        """Begin to write the marker, or go on where the thought has begun to."""
        if self._state != "open" or self._num_thought < self.most:
            return
        sizes = range(len(self.closing_ids) - 1, 0, -1)
        tail = tuple(self._tail)
        begun = next((n for n in sizes if tail[-n:] == self.closing_ids[:n]), 0)
        self._state, self._left = "closing", self.closing_ids[begun:]
