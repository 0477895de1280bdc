"""Parts what a model thinks aloud from what it says, as its text comes."""

from typing import NamedTuple

from engine import CallPart


class ParsedMessage(NamedTuple):
    """Text of an answer, parted: what the model thought aloud, what it says, and its calls."""

    reasoning: str
    content: str
    calls: list[CallPart] = []  # noqa: RUF012 - never changed


class ReasoningParser:
    """Parts an answer that begins with a thought, piece by piece.

    `markers` stand before and after a thought; `inside` says whether the prompt has opened one.
    White space at the edges belongs to neither part.
    """

    def __init__(self, markers: tuple[str, str], inside: bool):
        self.opening, self.closing = markers
        self.state = "thought" if inside else "start"
        self.held = ""
        self.has_thought = False  # anything but white space

    def push(self, text: str) -> ParsedMessage:
        """The next text; returns what is sure by now."""
        self.held += text
        if self.state == "start":
            self._begin()
        reasoning = self._think() if self.state == "thought" else ""
        if self.state == "after":
            self.held = self.held.lstrip()
            if self.held:
                self.state = "said"
        content = ""
        if self.state == "said":
            content, self.held = self.held, ""
        return ParsedMessage(reasoning, content)

    def flush(self) -> ParsedMessage:
        """What was held back, once no more comes."""
        rest, self.held = self.held, ""
        if self.state == "thought":
            return ParsedMessage(rest.rstrip(), "")
        return ParsedMessage("", rest if self.state == "start" else "")

    def _begin(self) -> None:
        begun = self.held.lstrip()
        if begun.startswith(self.opening):
            self.held = begun.removeprefix(self.opening)
            self.state = "thought"
        elif not self.opening.startswith(begun):
            self.state = "said"

    def _think(self) -> str:
        """The part of what is held that is certainly thought, and no part of its end."""
        thought, closed, rest = self.held.partition(self.closing)
        if closed:
            self.state, self.held = "after", rest
            return self._trimmed(thought).rstrip()
        sure = len(thought) - _overlap(thought, self.closing)
        sure = len(thought[:sure].rstrip())
        self.held = thought[sure:]
        return self._trimmed(thought[:sure])

    def _trimmed(self, thought: str) -> str:
        if not self.has_thought:
            thought = thought.lstrip()
        self.has_thought = self.has_thought or bool(thought)
        return thought


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may begin a marker."""
    sizes = range(min(len(text), len(marker) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)
