"""A process that answers questions and can be ended, for work that could take for ever.

Some libraries take minutes, or gigabytes, for a text that was made for it, and Python cannot end a
thread. Questions and answers are JSON, a line each.
"""

import atexit
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from weakref import WeakSet

import psutil

from engine.errors import ProcessUnavailable

log = logging.getLogger("chat")

# Seconds for the process to start, and to prepare what all of its answers need.
_START_TIMEOUT = 60.0
# A process is ended after so many times its seconds, however few of them it had the processor.
MOST_TIMES = 10
# Most seconds that are waited for a process that was ended.
_END_TIMEOUT = 5.0
# Seconds after which a process that did not start is tried again, if anybody looks.
RETRY_S = 5.0
# Variables that are none of a child's business.
_SECRETS = re.compile(r"^CHAT_|(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)


class ChildEnded(Exception):
    """The process gave no answer: it was ended after some time, or has died of the question."""


class _ChildKilled(ChildEnded):
    """The process was ended by others, as where the system has no memory left."""


class ChildProcess:
    """Asks a module that calls `answer_questions`; thread-safe, one question after the other.

    The process starts when it is first needed, and again after it has ended. `setup` is JSON that
    it is given before the questions.
    """

    def __init__(self, module: str, setup: Any = None):
        self.module, self.setup = module, setup
        self.process: subprocess.Popen[str] | None = None
        self.failed_at: float | None = None  # when it last did not start, by time.monotonic()
        self._closed = False
        self._lock = threading.Lock()
        _EVERY.add(self)

    def start(self) -> None:
        """Start the process if it does not run. Raises ProcessUnavailable."""
        with self._lock:
            self._start()

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer; raises ChildEnded if there is none after so many seconds of the processor.

        Those in which other programs have it do not count, or a busy machine would refuse what an
        idle one answers. Once it is ended by others it is asked anew. Raises ProcessUnavailable if
        it cannot be started, or is ended again.
        """
        with self._lock:
            self._start()
            try:
                return self._answer(question, seconds)
            except _ChildKilled:
                log.warning("%s was killed; it is started again", self.module)
            self._start()
            try:
                return self._answer(question, seconds)
            except _ChildKilled:
                raise self._unavailable("was killed twice") from None

    def start_behind(self) -> None:
        """Start the process while the caller goes on; if it does not start, who asks is told."""
        threading.Thread(target=self._try_again, name="start", daemon=True).start()

    def is_able(self) -> bool:
        """Whether it started when it was last needed; it is tried again, for whoever asks next."""
        process, failed_at = self.process, self.failed_at
        has_died = process is not None and process.poll() is not None
        is_due = failed_at is not None and time.monotonic() - failed_at > RETRY_S
        if (has_died or is_due) and not self._lock.locked():
            threading.Thread(target=self._try_again, name="restart", daemon=True).start()
        return failed_at is None

    def close(self) -> None:
        """End the process, whatever it is doing, for good."""
        self._closed = True
        self.end()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if process := self.process:
            process.kill()
        # Whoever has it gets no answer any more; but nobody waits for who only starts it.
        if self._lock.acquire(timeout=_END_TIMEOUT):
            self._end()
            self._lock.release()

    def _start(self) -> None:
        if self.process and self.process.poll() is not None:
            self._end()  # it died while it had nothing to do
        if self.process is not None:
            return
        if self._closed:
            raise ChildEnded
        try:
            self.process = _start_module(self.module)
            self._answer(self.setup, _START_TIMEOUT)
        except (OSError, ChildEnded) as error:
            if self._closed:
                raise ChildEnded from None
            self.failed_at = time.monotonic()
            raise self._unavailable(f"does not start ({error or 'it ended'})") from error
        self.failed_at = None

    def _try_again(self) -> None:
        with suppress(ChildEnded, ProcessUnavailable):
            self.start()

    def _unavailable(self, what: str) -> ProcessUnavailable:
        log.error("%s %s", self.module, what)
        return ProcessUnavailable(
            "a process that this request needs does not run, the server's log says why; try again"
            f" in {ProcessUnavailable.retry_after} seconds"
        )

    def _answer(self, question: Any, seconds: float) -> Any:
        process = self.process
        if process is None:
            raise ChildEnded
        assert process.stdin
        assert process.stdout
        try:
            with _time_bounded(process, seconds) as expired:
                if self._closed:
                    process.kill()
                process.stdin.write(json.dumps([seconds, question]) + "\n")
                process.stdin.flush()
                # Empty, which is no JSON, if the process ended.
                return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            # Of itself it has ended by now, or does so soon.
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
            was_killed = process.poll() == -signal.SIGKILL
            self._end()
            if was_killed and not (expired.is_set() or self._closed):
                raise _ChildKilled("it was killed") from None
            raise ChildEnded(f"it ended with {process.returncode}") from None

    def _end(self) -> None:
        process, self.process = self.process, None
        if process:
            process.kill()
            process.communicate()


@contextmanager
def _time_bounded(process: subprocess.Popen[str], seconds: float) -> Iterator[threading.Event]:
    """End the process if within the block it uses the processor for so many seconds.

    The event says whether it was ended so.
    """
    answered, expired = threading.Event(), threading.Event()
    begun = _cpu_seconds(process)

    def watch() -> None:
        latest = time.monotonic() + MOST_TIMES * seconds
        left = seconds
        while not answered.wait(left):
            left = seconds - (_cpu_seconds(process) - begun)
            if left < 0.01 or time.monotonic() > latest:  # the clocks' own step is as long
                expired.set()
                return process.kill()

    watcher = threading.Thread(target=watch, name="watcher", daemon=True)
    watcher.start()
    try:
        yield expired
    finally:
        answered.set()
        watcher.join()


def _cpu_seconds(process: subprocess.Popen[str]) -> float:
    """The time for which a process has had the processor."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0  # it has ended, and whoever asked it finds that out
    return times.user + times.system


def _start_module(module: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not _SECRETS.search(name)}
    # The same modules as here, wherever they were found; -P: but none from the current folder.
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what it says when it runs out of memory
        text=True,
        encoding="utf-8",
        process_group=0,  # Ctrl-C is for the server, which has answers to finish
    )


_EVERY: WeakSet[ChildProcess] = WeakSet()


@atexit.register
def end_children() -> None:
    """End all processes, for a program that ends; also for one that does so without Python."""
    for child in list(_EVERY):
        child.end()


# ---- In the process


def answer_questions(
    prepare: Callable[[Any], Callable[[Any], Any]], memory: int | None = None
) -> None:
    """Answer until stdin is closed, which also happens when the program that asks dies.

    `prepare` is given the setup and returns what answers. `memory` is by how many bytes the process
    may grow then.
    """
    _, setup = json.loads(sys.stdin.readline())
    answer = prepare(setup)
    if memory is not None:
        limit_memory(memory)
    say(None)
    for line in sys.stdin:
        seconds, question = json.loads(line)
        # Twice as many, for when the one that would end it is gone.
        limit_time(2 * seconds)
        say(answer(question))


def say(answer: Any) -> None:
    """Write an answer, a line of JSON, to who has asked."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def limit_memory(num_bytes: int) -> None:
    """Let this process grow by so many bytes, where the system has such limits."""
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _lower_limit(resource.RLIMIT_AS, size + num_bytes)


def limit_time(seconds: float) -> None:
    """End this process when it has used so many further seconds of the processor."""
    with suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds))


def _lower_limit(which: int, most: int) -> None:
    """Set one of this process's limits, unless a lower one was set when it started.

    A hard limit is left as it is: raising one is allowed to few, and to lower it is not needed.
    """
    import resource

    _, hard = resource.getrlimit(which)
    given = _first_limit(which)
    with suppress(OSError, ValueError):  # macOS refuses some
        resource.setrlimit(which, (most if given < 0 else min(most, given), hard))


@cache
def _first_limit(which: int) -> int:
    """What a limit was when it was first asked for; negative where there was none."""
    import resource

    set_ones = [x for x in resource.getrlimit(which) if x != resource.RLIM_INFINITY]
    return min(set_ones, default=-1)
