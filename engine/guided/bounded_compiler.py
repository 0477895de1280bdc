"""Tries a JSON schema, or a grammar with several, in a process that can be ended, before it is
compiled here.

A schema of forty characters can take a minute and gigabytes to compile. What the process compiles
in time is compiled once more in this one, as quickly.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from tokenizers import Tokenizer

from engine.child_process import ChildEnded, ChildProcess, answer_questions
from engine.errors import InvalidInput, ProcessUnavailable
from engine.guided.guide import Guide, GuideCompiler, spell_schema

# Seconds to compile one schema, and bytes beyond what the process has when it is ready.
COMPILE_TIMEOUT = 2.0
COMPILE_MEMORY = 256 * 2**20


class BoundedCompiler:
    """Compiles JSON schemas and grammars within bounds of time and memory.

    Thread-safe, one after the other; see GuideCompiler.
    """

    def __init__(
        self, tokenizer: Tokenizer, special_ids: Collection[int], end_ids: Collection[int]
    ):
        self.compiler = GuideCompiler(tokenizer, special_ids, end_ids)
        setup = [tokenizer.to_str(), list(special_ids), list(end_ids)]
        self.trial = ChildProcess("engine.guided.bounded_compiler", setup)

    def compile(self, schema: dict[str, Any], closing: str = "") -> Guide:
        """A guide for answers that match a JSON schema, behind a thought that `closing` ends.

        Raises InvalidInput if it is invalid, or takes too much to compile.
        """
        spell_schema(schema)
        self._check({"schema": schema, "closing": closing}, "schema")
        return self.compiler.compile(schema, closing)

    def compile_grammar(self, grammar: str, special_ids: Collection[int]) -> Guide:
        """The same for a grammar for tools, by which answers may have these special tokens."""
        self._check({"grammar": grammar, "marks": list(special_ids)}, "tools")
        return self.compiler.compile_grammar(grammar, special_ids)

    def warm_up(self) -> None:
        """Build here and there what every schema needs, which takes seconds, before one comes."""
        # It was closed meanwhile; or else who needs it is told.
        with suppress(InvalidInput, ProcessUnavailable):
            self.compile({})

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.trial.close()

    def _check(self, question: dict[str, Any], argument: str) -> None:
        """Raise InvalidInput if the process refuses a schema or a grammar."""
        try:
            refusal = self.trial.ask(question, COMPILE_TIMEOUT)
        except ChildEnded:
            refusal = (
                f"the JSON schema takes more than {COMPILE_TIMEOUT:g} seconds or"
                f" {COMPILE_MEMORY // 2**20} MiB to compile; ask for less, for example without"
                " large numbers in multipleOf, or without patterns that repeat"
            )
        if refusal:
            raise InvalidInput(refusal, argument)


def _trial_of(setup: Any) -> Callable[[Any], str | None]:
    """In the process: what says why a schema or a grammar is refused, or None."""
    spec, special_ids, end_ids = setup
    compiler = GuideCompiler(Tokenizer.from_str(spec), special_ids, end_ids)
    compiler.compile({})  # builds what all of them need

    def refusal_of(question: dict[str, Any]) -> str | None:
        try:
            if "schema" in question:
                compiler.compile(question["schema"], question["closing"])
            else:
                compiler.compile_grammar(question["grammar"], question["marks"])
        except InvalidInput as error:
            return str(error)
        return None

    return refusal_of


if __name__ == "__main__":
    answer_questions(_trial_of, COMPILE_MEMORY)
