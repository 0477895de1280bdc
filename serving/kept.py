"""The last answers of the Responses API, for requests that go on from one by its id.

Their items are in this process alone, within bounds, least recently used out first, and gone at a
restart. Each belongs to the key that asked for it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_MAX_BYTES_PER_KEY = 8 * 2**20
_Items = list[Any]


@dataclass(frozen=True)
class KeptAnswer:
    """An answer and what was asked for it, behind an earlier one or none."""

    owner: str
    previous: str | None
    asked: _Items
    output: _Items
    num_bytes: int = field(default=0)


class KeptAnswers:
    """Answers by their ids, so many bytes of JSON in all; thread-safe."""

    def __init__(self, most: int, most_per_key: int = _MAX_BYTES_PER_KEY):
        self.most, self.most_per_key = most, min(most, most_per_key)
        self._answers: OrderedDict[str, KeptAnswer] = OrderedDict()  # least recently used first
        self._num_bytes: dict[str, int] = {}  # of each owner
        self._lock = threading.Lock()

    def keep(
        self, owner: str, name: str, previous: str | None, asked: _Items, output: _Items
    ) -> bool:
        """Keep an answer; False if it is larger than there is room for."""
        size = len(json.dumps([asked, output]))
        with self._lock:
            if size > self.most_per_key:
                return False
            while self._num_bytes.get(owner, 0) + size > self.most_per_key:
                self._drop(next(n for n, kept in self._answers.items() if kept.owner == owner))
            while sum(self._num_bytes.values()) + size > self.most:
                self._drop(next(iter(self._answers)))
            self._answers[name] = KeptAnswer(owner, previous, asked, output, size)
            self._num_bytes[owner] = self._num_bytes.get(owner, 0) + size
        return True

    def conversation(self, owner: str, name: str) -> _Items | None:
        """All items up to an answer's end; None if it, or one before it, is not there."""
        with self._lock:
            chain = list(self._chain(owner, name))
            for kept_name, _ in reversed(chain):
                self._answers.move_to_end(kept_name)
        if not chain or chain[-1][1].previous is not None:
            return None
        return [item for _, kept in reversed(chain) for item in (*kept.asked, *kept.output)]

    def item(self, owner: str, name: str) -> Any | None:
        """The item of an answer, by its own id."""
        with self._lock:
            for kept_name, kept in self._answers.items():
                found = next((i for i in kept.output if i["id"] == name), None)
                if kept.owner == owner and found is not None:
                    self._answers.move_to_end(kept_name)
                    return found
        return None

    def _chain(self, owner: str, name: str | None) -> Iterator[tuple[str, KeptAnswer]]:
        """An answer and those before it, each with its id, the last first."""
        while name is not None:
            kept = self._answers.get(name)
            if kept is None or kept.owner != owner:
                return
            yield name, kept
            name = kept.previous

    def _drop(self, name: str) -> None:
        kept = self._answers.pop(name)
        self._num_bytes[kept.owner] -= kept.num_bytes
        if not self._num_bytes[kept.owner]:
            del self._num_bytes[kept.owner]


@dataclass(frozen=True)
class OwnAnswers:
    """What one key may keep and see."""

    answers: KeptAnswers
    owner: str
