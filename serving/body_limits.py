"""Bodies of requests: how many bytes of them may be here at once, and how many items in each.

A body of some megabytes can be read as gigabytes of lists and objects, and a thousand bodies of a
decent size are gigabytes too.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import chain

from engine import InvalidInput, QueueFull

# Of each body so many bytes are not counted, so that large bodies never keep small ones away.
FREE_BYTES = 64 * 2**10
MAX_BYTES_IN_ALL = 64 * 2**20
# Seconds after which to try again while there are too many.
RETRY_S = 5
# Most refusals a second, for want of room for a body or in the queue; whoever sends many requests
# hears so much later that there is none. Callers who come back at once would else take the event
# loop's time from all others.
MAX_REFUSALS_PER_S = 200
# So many times as long as a large body was parsed, no other one is.
IDLE_PER_PARSE = 3
# Most lists, objects and fields of one body, and most items in all.
MAX_CONTAINERS = 2**17
MAX_ITEMS = 2**19

# A string of a JSON text, to the text's end if nothing closes it; and up to a thousand of them with
# what stands before each, or else what follows the last one.
_STRING = rb'"(?:[^"\\]+|\\.)*+"?'
_PIECE = re.compile(rb'(?:[^"]*+%b){1,1000}|[^"]+' % _STRING, re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)


class BodyBudget:
    """Counts the bytes of the bodies that are here, from their heads until they are answered."""

    def __init__(self) -> None:
        self.num_reserved = 0
        self.next_refusal = 0.0  # when it is due
        self.parsing = asyncio.Lock()  # a large one, or a while ago

    @contextmanager
    def reserve(self) -> Iterator["BodyReservation"]:
        """A place for one body, which is free again at the end."""
        reservation = BodyReservation(self)
        try:
            yield reservation
        finally:
            self.num_reserved -= reservation.size

    def has_room(self, num_bytes: int) -> bool:
        return self.num_reserved + num_bytes <= MAX_BYTES_IN_ALL

    @asynccontextmanager
    async def exclusive_parse(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait until a body of so many bytes may be parsed here; a small one never waits.

        Parsing eight megabytes takes a tenth of a second, in which the interpreter does nothing
        else. So large bodies are parsed one by one, and most of the time is left to others.
        """
        if num_bytes <= FREE_BYTES:
            yield
            return
        await self.parsing.acquire()
        began = time.monotonic()
        try:
            yield
        finally:
            rest = IDLE_PER_PARSE * (time.monotonic() - began)
            asyncio.get_running_loop().call_later(rest, self.parsing.release)

    async def wait_to_refuse(self) -> None:
        """Wait until a further refusal is due, or not at all if that is longer than RETRY_S."""
        now = time.monotonic()
        due = max(self.next_refusal, now)
        if due - now < RETRY_S:
            self.next_refusal = due + 1 / MAX_REFUSALS_PER_S
            await asyncio.sleep(due - now)


class BodyReservation:
    """The bytes that one body takes of what there is for all."""

    def __init__(self, budget: BodyBudget):
        self.budget, self.size = budget, 0

    async def grow_to(self, num_bytes: int) -> None:
        """Reserve so many bytes, or more if it has them already.

        Raises QueueFull if there is no room, and none either when a refusal is due.
        """
        more = num_bytes - FREE_BYTES - self.size
        if more <= 0:
            return
        if not self.budget.has_room(more):
            await self.budget.wait_to_refuse()
        if not self.budget.has_room(more):
            raise QueueFull(
                f"the bodies of the requests that are here have {MAX_BYTES_IN_ALL // 2**20} MiB;"
                f" try again in {RETRY_S} seconds, or send at most {FREE_BYTES // 2**10} KiB",
                RETRY_S,
            )
        self.size += more
        self.budget.num_reserved += more


def check_items(*texts: bytes, name: str = "the body", argument: str | None = None) -> None:
    """Raise InvalidInput if JSON texts have more items together than any request needs.

    Parsing them would take the event loop's time, and many times the memory of the texts.
    """
    counts = [_num_items(text) for text in texts]
    containers = sum(count for count, _ in counts)
    items = sum(count for _, count in counts)
    if containers <= MAX_CONTAINERS and items <= MAX_ITEMS:
        return  # even if what stands in strings is counted too, which is most of all texts
    containers = items = 0
    for piece in chain.from_iterable(map(_PIECE.finditer, texts)):
        more_containers, more_items = _num_items(_STRINGS.sub(b"", piece[0]))
        containers, items = containers + more_containers, items + more_items
        if containers > MAX_CONTAINERS:
            raise InvalidInput(
                f"{name} has more than {MAX_CONTAINERS:,} lists, objects and fields; send fewer",
                argument,
            )
        if items > MAX_ITEMS:
            raise InvalidInput(
                f"{name} has lists of more than {MAX_ITEMS:,} items; send fewer", argument
            )


def _num_items(text: bytes) -> tuple[int, int]:
    """Lists, objects and fields of a JSON text without strings, and its items in all."""
    containers = text.count(b"[") + text.count(b"{") + text.count(b":")
    return containers, containers + text.count(b",")
