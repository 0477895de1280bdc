"""Runs the Markdown renderer in a process of its own.

Its libraries take, on texts made for it, the square of a text's length; a process can be ended. It
also keeps the renderer's work off the server's interpreter lock.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from engine import ChildEnded, ChildProcess, ProcessUnavailable

# Seconds for one text.
RENDER_TIMEOUT = 5.0
MAX_WAITING = 64


class Refused(Exception):
    """A text that is not rendered; `status` is HTTP's number for the reason."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Renderer:
    """One process, started when it is first needed; it renders one text after the other."""

    def __init__(self) -> None:
        self.process = ChildProcess("chat_page.markdown")
        # One thread: it is the queue of the texts that wait.
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
        self.process.close()
        self.executor.shutdown()

    def _render(self, text: str) -> str:
        try:
            return str(self.process.ask(text, RENDER_TIMEOUT))
        except ProcessUnavailable as error:
            raise Refused(503, str(error)) from None
        except ChildEnded:
            raise Refused(422, "the text takes too long to render; show it as it is") from None
