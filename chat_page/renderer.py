"""Runs the Markdown renderer in a process of its own.

Its libraries take, on texts made for it, the square of a text's length, and Python cannot end a
thread; a process can be ended. It also keeps the renderer's work off the server's interpreter lock.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

# Seconds for one text, the start of the process included.
RENDER_TIMEOUT = 5.0
MAX_WAITING = 64


class Refused(Exception):
    """A text that is not rendered; `status` is HTTP's number for the reason."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def start_worker() -> subprocess.Popen[str]:
    # The same modules as here, wherever they were found; -P: but none from the current folder.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "chat_page.markdown"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


class Renderer:
    """One process, started when it is first needed; it renders one text after the other."""

    def __init__(self) -> None:
        self.worker: subprocess.Popen[str] | None = None
        # One thread: it is the queue of the texts that wait, and it alone talks to the process.
        self.executor = ThreadPoolExecutor(1, "renderer")
        self.num_waiting = 0

    async def render(self, text: str) -> str:
        """The text as safe HTML. Raises Refused if too many wait, or this one takes too long."""
        if self.num_waiting >= MAX_WAITING:
            raise Refused(503, "too many texts wait to be rendered; try again soon")
        self.num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.executor, self._render, text)
        finally:
            self.num_waiting -= 1

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        if self.worker:
            self.worker.kill()
        self.executor.shutdown()
        self._end_worker()

    def _render(self, text: str) -> str:
        if self.worker and self.worker.poll() is not None:
            self._end_worker()  # it died while it had nothing to do
        self.worker = self.worker or start_worker()
        timer = threading.Timer(RENDER_TIMEOUT, self.worker.kill)
        timer.start()
        try:
            return self._ask(self.worker, text)
        except (OSError, ValueError):
            self._end_worker()
            raise Refused(422, "the text takes too long to render; show it as it is") from None
        finally:
            timer.cancel()

    def _ask(self, worker: subprocess.Popen[str], text: str) -> str:
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write(json.dumps(text) + "\n")
        worker.stdin.flush()
        # Empty, which is no JSON, if the process ended.
        return str(json.loads(worker.stdout.readline()))

    def _end_worker(self) -> None:
        worker, self.worker = self.worker, None
        if worker:
            worker.kill()
            worker.communicate()
