"""What is being served at this moment, and how long the last answers took: for the dashboard."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from serving.parts import Choice, cached_tokens_of, usage_of

# Answers of which the times are kept, and seconds for which they count.
_MAX_ANSWERS = 1024
_WINDOW = 60.0
# Requests that are told one by one.
_MAX_TOLD = 50


class _Served(Protocol):
    """A request from its arrival to its end; times are by time.monotonic()."""

    id: str
    route: str
    arrived: float
    choices: list[Choice]


class _Times(NamedTuple):
    """Of one answer: when it ended, and seconds to its first and to each later token."""

    ended: float
    first_token: float | None
    each_token: float | None


class LiveRequests:
    """The requests that run, and counts of all that ever ran."""

    def __init__(self) -> None:
        self._running: dict[str, _Served] = {}
        self._ended = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        self._times: deque[_Times] = deque(maxlen=_MAX_ANSWERS)

    def begin(self, request: _Served) -> None:
        self._running[request.id] = request

    def end(self, request: _Served, line: dict[str, Any]) -> None:
        """Count a request that has ended; `line` is what the log says of it."""
        self._running.pop(request.id, None)
        for name in self._ended:
            self._ended[name] += line.get(name, 0)
        times = line.get("first_token"), line.get("each_token")
        if times[0] is not None:
            self._times.append(_Times(time.monotonic(), *times))

    def sample(self) -> dict[str, Any]:
        """Tokens of all requests so far, times of the last minute's answers, and who runs."""
        now = time.monotonic()
        told = sorted(self._running.values(), key=lambda request: request.arrived)
        recent = [times for times in self._times if times.ended > now - _WINDOW]
        return {
            **self._tokens(told),
            "first_token": percentiles(times.first_token for times in recent),
            "each_token": percentiles(times.each_token for times in recent),
            "requests": [_describe(request, now) for request in told[:_MAX_TOLD]],
        }

    def _tokens(self, running: Iterable[_Served]) -> dict[str, int]:
        counts = dict(self._ended)
        for request in running:
            for name, count in _counts_of(request).items():
                counts[name] += count
        return counts


def _counts_of(request: _Served) -> dict[str, int]:
    usage = usage_of(request.choices)
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cached_tokens": cached_tokens_of(request.choices),
    }


def _describe(request: _Served, now: float) -> dict[str, Any]:
    """A request that runs, without a word of its text."""
    seconds = round(now - request.arrived, 1)
    return {"id": request.id, "route": request.route, "seconds": seconds, **_counts_of(request)}


def percentiles(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """The 50th and the 99th, by the nearest rank; None where there is nothing."""
    known = sorted(one for one in seconds if one is not None)
    if not known:
        return None
    return {f"p{p}": known[max(0, -(-len(known) * p // 100) - 1)] for p in (50, 99)}
