"""Logging that never waits for its reader: a bounded queue, and a thread that writes.

A stderr that is a pipe which nobody reads would stop whoever logs: the event loop and the engine.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import Any

# Lines that wait to be written; further ones are dropped.
MAX_LINES = 1000
# Most seconds that the end of the program waits for them.
FLUSH_TIMEOUT = 2.0
# Seconds between two lines that say that something still goes on.
STILL_EVERY = 10.0

log = logging.getLogger("chat")


class LogQueue(QueueHandler):
    """Puts records into a queue that a thread writes out; counts those that it drops."""

    def __init__(self, writer: logging.Handler):
        self.lines: queue.Queue[Any] = queue.Queue(MAX_LINES)
        super().__init__(self.lines)
        self.num_dropped = 0
        QueueListener(self.lines, writer).start()

    def prepare(self, record: logging.LogRecord) -> Any:
        # The writer makes text of it, with its traceback and its fields: it is in this process.
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.lines.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1

    def flush(self) -> None:
        """Wait until all lines are written, for FLUSH_TIMEOUT at most."""
        with self.lines.all_tasks_done:
            self.lines.all_tasks_done.wait_for(
                lambda: not self.lines.unfinished_tasks, FLUSH_TIMEOUT
            )


def start_log(as_json: bool = False, level: str = "info") -> None:
    """Log plain text lines, or JSON lines, to stderr; debug is for our own lines only."""
    shape = "%(asctime)s %(levelname)s %(message)s"
    writer = logging.StreamHandler()
    writer.setFormatter(logging.Formatter(shape))
    if as_json:
        from pythonjsonlogger.json import JsonFormatter

        writer.setFormatter(JsonFormatter(shape))
    root = logging.getLogger()
    # A library that says something while it is imported leaves such a handler behind, which would
    # wait for its reader, and know nothing of JSON. Any other is an operator's, and stays alone.
    for handler in [each for each in root.handlers if type(each) is logging.StreamHandler]:
        root.removeHandler(handler)
    if not root.handlers:
        root.addHandler(LogQueue(writer))
        root.setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
    log.setLevel(level.upper())
    _settle_progress(as_json)


def _settle_progress(as_json: bool = False) -> None:
    """Let the progress bars of all libraries vanish when they are full, or show none at all.

    They are all tqdm's, which reads these variables when it is imported. In a file, or between
    lines of JSON, a bar would be rubbish; the log names the same stages, and `still_logged` says
    that they go on.
    """
    os.environ.setdefault("TQDM_LEAVE", "")  # to tqdm, an empty text is False
    if as_json or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def still_logged(what: str) -> Iterator[None]:
    """Say every STILL_EVERY seconds that something goes on, where no progress bar shows it."""
    begun, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(STILL_EVERY):
            log.info("still %s (%.0f s)", what, time.monotonic() - begun)

    teller = threading.Thread(target=tell, name="still", daemon=True)
    if os.environ.get("TQDM_DISABLE"):
        teller.start()
    try:
        yield
    finally:
        ended.set()
        if teller.ident:
            teller.join()


def _log_queues() -> list[LogQueue]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, LogQueue)]


def num_dropped() -> int:
    """Lines that were dropped since the start."""
    return sum(handler.num_dropped for handler in _log_queues())


def flush_log() -> None:
    """Write what waits, before the process ends without the interpreter's own exit."""
    for handler in _log_queues():
        handler.flush()
