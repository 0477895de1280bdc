"""Tries a JSON schema, or a grammar with several, in a process that can be ended, before it is
compiled here.

A schema of forty characters can take a minute and gigabytes to compile, and no thread can be
ended. What the process compiles in time is compiled once more in this one, as quickly.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from tokenizers import Tokenizer

from engine.errors import InvalidInput
from engine.guide import Guide, GuideCompiler, spell_schema

# Seconds to compile one schema, and bytes beyond what the process has when it is ready.
COMPILE_TIMEOUT = 2.0
COMPILE_MEMORY = 256 * 2**20
# Seconds for the process to start.
START_TIMEOUT = 60.0


class TrialCompiler:
    """Compiles JSON schemas and grammars within bounds of time and memory.

    Thread-safe, one after the other; see GuideCompiler.
    """

    def __init__(
        self, tokenizer: Tokenizer, special_ids: Collection[int], end_ids: Collection[int]
    ):
        self.compiler = GuideCompiler(tokenizer, special_ids, end_ids)
        self.setup = [tokenizer.to_str(), list(special_ids), list(end_ids)]
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def compile(self, schema: dict[str, Any]) -> Guide:
        """A guide for answers that match a JSON schema.

        Raises InvalidInput if it is invalid, or takes too much to compile.
        """
        spell_schema(schema)
        self._check({"schema": schema}, "schema")
        return self.compiler.compile(schema)

    def compile_grammar(self, grammar: str, marks: Collection[int]) -> Guide:
        """The same for a grammar for tools, by which answers may have these special tokens."""
        self._check({"grammar": grammar, "marks": list(marks)}, "tools")
        return self.compiler.compile_grammar(grammar, marks)

    def warm_up(self) -> None:
        """Build here and there what every schema needs, which takes seconds, before one comes."""
        with suppress(InvalidInput):  # it was closed meanwhile
            self.compile({})

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._closed = True
        if process := self._process:
            process.kill()
        with self._lock:  # whoever has it gets no answer any more
            self._end()

    def _check(self, question: dict[str, Any], argument: str) -> None:
        """Raise InvalidInput if the process refuses a schema or a grammar."""
        with self._lock:
            refusal = self._try(question)
        if refusal:
            raise InvalidInput(refusal, argument)

    def _try(self, question: dict[str, Any]) -> str | None:
        """Why a schema or a grammar is refused, None if it is not."""
        if self._process and self._process.poll() is not None:
            self._end()  # it died while it had nothing to do
        try:
            if self._process is None:
                self._process = start_process()
                self._ask(self.setup, START_TIMEOUT)
            refusal: str | None = self._ask(question, COMPILE_TIMEOUT)
            return refusal
        except (OSError, ValueError):
            self._end()
            return (
                f"the JSON schema takes more than {COMPILE_TIMEOUT:g} seconds or"
                f" {COMPILE_MEMORY // 2**20} MiB to compile; ask for less, for example without"
                " large numbers in multipleOf, or without patterns that repeat"
            )

    def _ask(self, question: Any, seconds: float) -> Any:
        """The process's answer; it is killed when the time is over. Raises OSError, ValueError."""
        process = self._process
        assert process
        assert process.stdin
        assert process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            if self._closed:
                process.kill()
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            # Empty, which is no JSON, if the process ended.
            return json.loads(process.stdout.readline())
        finally:
            timer.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


def start_process() -> subprocess.Popen[str]:
    # The same modules as here, wherever they were found; -P: but none from the current folder.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "engine.schema_trial"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what it says when it runs out of memory
        text=True,
        encoding="utf-8",
    )


def limit_memory() -> None:
    """Let this process grow by COMPILE_MEMORY, where the system has such limits."""
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + COMPILE_MEMORY, resource.RLIM_INFINITY))


def limit_time() -> None:
    """End this process soon if the one that would kill it is gone."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + 2 * COMPILE_TIMEOUT)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def serve_trials() -> None:
    """The process: a tokenizer in, then schemas or grammars, and for each a refusal or null."""
    spec, special_ids, end_ids = json.loads(sys.stdin.readline())
    compiler = GuideCompiler(Tokenizer.from_str(spec), special_ids, end_ids)
    compiler.compile({})  # builds what all of them need
    limit_memory()
    answer(None)
    for line in sys.stdin:
        limit_time()
        try:
            compile_question(compiler, json.loads(line))
        except InvalidInput as error:
            answer(str(error))
        else:
            answer(None)


def compile_question(compiler: GuideCompiler, question: dict[str, Any]) -> None:
    if "schema" in question:
        compiler.compile(question["schema"])
    else:
        compiler.compile_grammar(question["grammar"], question["marks"])


def answer(refusal: str | None) -> None:
    sys.stdout.write(json.dumps(refusal) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve_trials()
