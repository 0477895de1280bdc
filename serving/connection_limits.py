"""How many connections there may be, and how much of the event loop's time small chunks get."""

from typing import ClassVar
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

# Connections whose next request has not come wholly; a further one takes the place of the oldest.
MAX_CONNECTIONS = 1024
# Files that a process may need beside its connections: a card's, those of its children, its log's.
OTHER_FILES = 96
# So many times as long as small chunks of bodies were read, no further ones are.
PAUSE_FACTOR = 3


def num_connectable() -> int:
    """Connections for which this process may open files, half of them kept for bursts."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return 2**20
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if most < 0 else max(16, (most - OTHER_FILES) // 2)


def max_waiting(num_answering: int) -> int:
    """How many connections may wait for their client, while so many are answered."""
    return min(MAX_CONNECTIONS, max(1, num_connectable() - num_answering))


class Turns:
    """When bodies of many small chunks are read on: one at a time, and leaving time to others."""

    of_servers: ClassVar[WeakKeyDictionary[ServerState, "Turns"]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.free_at = 0.0  # by the event loop's clock

    @classmethod
    def of(cls, server: ServerState) -> "Turns":
        """Those of one server."""
        return cls.of_servers.setdefault(server, cls())

    def next(self, now: float, took: float) -> float:
        """The time of a turn for a body whose last one took so many seconds."""
        turn = max(now, self.free_at) + PAUSE_FACTOR * took
        self.free_at = turn + took
        return turn


class Flow(FlowControl):
    """uvicorn's; while `held`, nothing is read, whoever asks for more."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()
