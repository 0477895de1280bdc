"""The last answers of the Responses API, for requests that go on from one by its id.

Their items are in this process alone, within bounds, least recently used out first, and gone at a
restart. Each belongs to the key that asked for it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True)
class KeptItem:
    """An item of an answer's output."""

    answer: str  # its id
    value: dict[str, Any]
    num_bytes: int


def num_bytes(value: Any) -> int:
    return len(json.dumps(value))


class KeptAnswers:
    """Answers by their ids, so many bytes of JSON in all; thread-safe."""

    def __init__(self, most: int, most_per_key: int = _MAX_BYTES_PER_KEY):
        self.most, self.most_per_key = most, min(most, most_per_key)
        self._answers: OrderedDict[str, KeptAnswer] = OrderedDict()  # least recently used first
        self._items: dict[str, KeptItem] = {}  # of all outputs, by their ids
        self._num_bytes: dict[str, int] = {}  # of each owner
        self._lock = threading.Lock()

    def keep(
        self, owner: str, name: str, previous: str | None, asked: _Items, output: _Items
    ) -> bool:
        """Keep an answer; False if it is larger than there is room for."""
        sizes = [num_bytes(item) for item in output]
        size = num_bytes(asked) + sum(sizes)
        with self._lock:
            if size > self.most_per_key:
                return False
            while self._num_bytes.get(owner, 0) + size > self.most_per_key:
                self._drop(next(n for n, kept in self._answers.items() if kept.owner == owner))
            while sum(self._num_bytes.values()) + size > self.most:
                self._drop(next(iter(self._answers)))
            self._answers[name] = KeptAnswer(owner, previous, asked, output, size)
            self._num_bytes[owner] = self._num_bytes.get(owner, 0) + size
            for item, item_size in zip(output, sizes, strict=True):
                self._items[item["id"]] = KeptItem(name, item, item_size)
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
            found = self._items.get(name)
            if found is None or self._answers[found.answer].owner != owner:
                return None
            self._answers.move_to_end(found.answer)
            return found.value

    def num_bytes_behind(self, owner: str, name: str, item_ids: Iterable[str]) -> int:
        """How many bytes of JSON a conversation has, and items by their ids; unknown ones none."""
        with self._lock:
            items = (self._items.get(item_id) for item_id in item_ids)
            own = (item for item in items if item and self._answers[item.answer].owner == owner)
            chain = self._chain(owner, name)
            return sum(kept.num_bytes for _, kept in chain) + sum(item.num_bytes for item in own)

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
        for item in kept.output:
            del self._items[item["id"]]
        self._num_bytes[kept.owner] -= kept.num_bytes
        if not self._num_bytes[kept.owner]:
            del self._num_bytes[kept.owner]


@dataclass(frozen=True)
class OwnAnswers:
    """What one key may keep and see."""

    answers: KeptAnswers
    owner: str

    def num_bytes_referred(self, body: Any) -> int:
        """How many bytes of JSON are read with a body because it refers to them."""
        if not isinstance(body, dict):
            return 0
        name, items = body.get("previous_response_id"), body.get("input")
        ids = (
            item["id"]
            for item in (items if isinstance(items, list) else ())
            if isinstance(item, dict)
            and item.get("type") == "item_reference"
            and isinstance(item.get("id"), str)
        )
        return self.answers.num_bytes_behind(self.owner, name if isinstance(name, str) else "", ids)
