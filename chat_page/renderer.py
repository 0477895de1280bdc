"""Runs the Markdown renderer in a process of its own.

Its libraries take, on texts made for it, the square of a text's length; a process can be ended. It
also keeps the renderer's work off the server's interpreter lock.
"""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from engine import ChildEnded, ChildProcess, ProcessUnavailable

# Seconds for one text.
RENDER_TIMEOUT = 5.0
_MAX_WAITING = 64
_MAX_OF_CLIENT = 16

_Turn = asyncio.Future[None]


class Refused(Exception):
    """A text that is not rendered; `status` is HTTP's number for the reason."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Renderer:
    """One process, started when it is first needed; it renders one text after the other.

    A client's next text waits until each other client that waits has had one, and a text whose
    client has gone is not begun.
    """

    def __init__(self) -> None:
        self.process = ChildProcess("chat_page.markdown")
        # One thread: there is one process.
        self.executor = ThreadPoolExecutor(1, "renderer")
        self.waiting: dict[str, deque[_Turn]] = {}  # of each client, who is next first
        self.is_busy = False

    async def render(self, text: str, client: str = "") -> str:
        """The text as safe HTML; cancelled, it waits no more. Raises Refused if too many wait."""
        mine = self.waiting.get(client, ())
        if len(mine) >= _MAX_OF_CLIENT or sum(map(len, self.waiting.values())) >= _MAX_WAITING:
            raise Refused(503, "too many texts wait to be rendered; try again soon")
        await self._turn(client)
        job = asyncio.get_running_loop().run_in_executor(self.executor, self._render, text)
        # The process goes on with it, whoever has gone, for RENDER_TIMEOUT at most.
        job.add_done_callback(lambda _: self._next())
        return await asyncio.shield(job)

    async def _turn(self, client: str) -> None:
        """Wait until this client may have the process."""
        if not self.is_busy:
            self.is_busy = True
            return
        turn: _Turn = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()  # it had come just then
            raise

    def _next(self) -> None:
        """Give the process to the next client in turn, whose next text goes behind all others."""
        while self.waiting:
            client = next(iter(self.waiting))
            turns = self.waiting.pop(client)
            while turns and turns[0].done():
                turns.popleft()
            if not turns:
                continue
            turns.popleft().set_result(None)
            if turns:
                self.waiting[client] = turns
            return
        self.is_busy = False

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
