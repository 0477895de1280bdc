"""`python api.py` with a scripted model: a process of its own that need not import torch anew.

Each is forked from one that has imported everything and done nothing, so it starts in a moment, and
is in all else what a user starts: `api.main` with flags, signals, sockets and an exit code.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import api
from engine import ChatModel


class ServerProcess:
    """As much of subprocess.Popen as tests of a server need."""

    def __init__(self, process: BaseProcess, log: Path):
        self.process, self.log = process, log

    def send_signal(self, sent: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, sent)

    def wait(self, seconds: float) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it still runs; it said: {self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        """Its standard output and error so far."""
        return self.log.read_text(encoding="utf-8")


def run_main(
    flags: list[str],
    log: Path,
    load: Callable[[api.Settings], ChatModel],
    before: Callable[[], object],
) -> None:
    """The whole life of the server's process."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["api.py", *flags]
    before()
    api.build_app = functools.partial(api.build_app, load=load)
    api.main()


@functools.cache
def forking() -> Any:
    """The process that has imported everything, once for all tests."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["api", "engine.loading", "tests.conftest", __name__])
    # In Python 3.11 it does not hear of our path in another way before it imports.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def server_process(
    load: Callable[[api.Settings], ChatModel], *flags: str, before: Callable[[], object] = int
) -> Iterator[ServerProcess]:
    """A server whose model is what `load` returns; `before` is called first of all.

    Both can be pickled, as they run over there.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        process = forking().Process(target=run_main, args=(list(flags), log, load, before))
        process.start()
        try:
            yield ServerProcess(process, log)
        finally:
            process.kill()
            process.join()
