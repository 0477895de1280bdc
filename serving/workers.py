"""Work that would block the event loop, such as tokenizing: in threads, in order of arrival."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from engine import EngineStopped

T = TypeVar("T")

# More would not tokenize faster, and take the cores from the model where it runs on them.
NUM_THREADS = max(2, min(4, os.cpu_count() or 1))


class Workers:
    """Runs functions in threads, first come, first served; one whose caller left is never begun.

    It refuses nobody: who calls it looks at `num_pending` first. All calls are on one event loop.
    """

    def __init__(self, num_threads: int = NUM_THREADS):
        self.closed = False
        self._executor = ThreadPoolExecutor(num_threads, "worker")
        self._jobs: set[Future[Any]] = set()

    @property
    def num_pending(self) -> int:
        """Functions that wait for a thread, or run in one."""
        return len(self._jobs)

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns; raises what it raises, or EngineStopped when this is closed."""
        if self.closed:
            raise self._stopped()
        held = [work]
        job = self._executor.submit(lambda: held.pop()())
        self._jobs.add(job)
        # In whichever thread it ends; a change of a set is one step.
        job.add_done_callback(self._jobs.discard)
        result = asyncio.wrap_future(job)
        try:
            await asyncio.wait((result, self._end), return_when=asyncio.FIRST_COMPLETED)
            if not result.done() or result.cancelled():
                raise self._stopped()
            return result.result()
        finally:
            result.cancel()
            held.clear()  # a job that was not begun keeps its place in the executor, and no data

    def close(self) -> None:
        """Give up what waits and what runs; a thread that is busy is left behind."""
        self.closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        if not self._end.done():
            self._end.set_result(None)

    @cached_property
    def _end(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    @staticmethod
    def _stopped() -> EngineStopped:
        return EngineStopped("the server is stopping")
