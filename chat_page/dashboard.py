"""The dashboard: what the server does now and did in the last minutes, for a person who looks.

Its files are static, and one stream of events feeds it. A sample is taken once a second, while
somebody looks and for all who do: it costs nothing else.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

FILES = {
    "/dashboard/": ("dashboard.html", "text/html"),
    "/dashboard/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard/dashboard.js": ("dashboard.js", "text/javascript"),
}
PERIOD = 1.0  # seconds between samples
MAX_SAMPLES = 300
MAX_WATCHERS = 32

# What the server does at this moment; and what its start decided, once it is known.
Observe = Callable[[], dict[str, Any]]


class Watch:
    """Samples for all who look."""

    def __init__(self, observe: Observe, facts: Observe):
        self.num_watchers = 0
        self._observe = observe
        self._facts = facts
        self._samples: deque[dict[str, Any]] = deque(maxlen=MAX_SAMPLES)
        # The next sample's event, and whether it is the last.
        self._next: asyncio.Future[tuple[str, bool]] | None = None
        self._task: asyncio.Task[None] | None = None

    async def events(self) -> AsyncIterator[str]:
        """First all samples that there are, then each; ends when the server stops.

        Each is written once, for however many look.
        """
        self.num_watchers += 1
        try:
            if self._task is None:
                self._next = asyncio.get_running_loop().create_future()
                self._task = asyncio.create_task(self._take_samples())
            yield event({"first": True, "samples": [*self._samples], "facts": self._facts()})
            while self._next is not None:
                text, is_last = await asyncio.shield(self._next)
                yield text
                if is_last:
                    return
        finally:
            self.num_watchers -= 1

    async def _take_samples(self) -> None:
        try:
            while self.num_watchers and self._next is not None:
                sample = self._observe()
                # The requests of long ago are nobody's concern.
                self._samples.append({k: v for k, v in sample.items() if k != "requests"})
                told, self._next = self._next, asyncio.get_running_loop().create_future()
                text = event({"samples": [sample], "facts": self._facts()})
                told.set_result((text, sample["status"] == "draining"))
                await asyncio.sleep(PERIOD)
        finally:
            if self._next is not None:
                self._next.cancel()
            self._next = self._task = None


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def add_routes(
    router: APIRouter,
    serve: Callable[[str, str], Callable[[Request], Response]],
    observe: Observe,
    facts: Observe,
) -> None:
    """Add the dashboard's routes; `serve` gives the route of a file of this package."""
    watch = Watch(observe, facts)
    for path, (name, media_type) in FILES.items():
        router.add_api_route(path, serve(name, media_type), methods=["GET", "HEAD"])
    router.add_api_route(
        "/dashboard", lambda: RedirectResponse("dashboard/"), methods=["GET", "HEAD"]
    )

    @router.get("/dashboard/events")
    async def events() -> Response:
        if watch.num_watchers >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} are looking already; try again later"
            detail = {"message": message, "type": "rate_limit_error", "param": None}
            return JSONResponse({"error": detail | {"code": "too_many_watchers"}}, 429)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(watch.events(), media_type="text/event-stream", headers=headers)
