"""The grammar of an answer that calls tools, for llguidance, in its form of Lark.

Its syntax is that of https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidInput
from engine.guided.guide import check_numbers
from engine.guided.json_schema import relaxed
from engine.tools.format import ToolFormat

# Longer schemas, all the tools' together, take too long to compile.
MAX_SCHEMAS_CHARS = 2**16
_TEXT = r"/(.|\n)*/"
# What Python takes for white space, which may stand before a thought.
_SPACE = r"[\s\x1c-\x1f]*"


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools must be called, whether more than one may be, and what else the answer is.

    Without an `answer`, a JSON schema, that is any text.
    """

    required: bool = False
    parallel: bool = True
    answer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Thoughts:
    """What a model's thoughts stand between, and whether the prompt has begun one."""

    opening: str
    closing: str
    begun: bool


class ToolGrammar:
    """Writes grammars in one format; `special` are the special tokens' ids by their text.

    An answer in which no tool has to be called is any text, in which nothing begins a call but one.
    """

    def __init__(self, form: ToolFormat, special: Mapping[str, int]):
        self.form = form
        self.special = special
        words = sorted(special, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, words)) or '(?!)'})")
        texts = (form.head, form.middle, form.tail, form.between or "", *form.arguments.texts)
        parts = [part for text in texts for part in self.pattern.split(text)]
        # The special tokens that an answer may have.
        self.special_ids = sorted({special[part] for part in parts if part in special})

    def write(self, tools: list[Any], choice: ToolChoice, thoughts: Thoughts | None = None) -> str:
        """The grammar of an answer; each tool, its parameters a JSON schema, has a line by itself.

        The first of these is the second line.
        """
        form = self.form
        several = choice.parallel and form.between
        more = f"({self._words(form.between)} call)*" if several and form.between else ""
        names = [f"call_{n}" for n in range(len(tools))]
        schemas = [_without_others(relaxed(tool["function"]["parameters"])) for tool in tools]
        arguments, rules = form.arguments.grammar(schemas, self._words)
        lines = ["%llguidance {}"]
        lines += map(self._call, names, tools, arguments)
        lines += [
            f"call: {' | '.join(names)}",
            f"calls: call {more} {self._words(form.tail)}",
            f"TEXT: {_TEXT}",
            rules,
            *self._start(choice, thoughts),
        ]
        return "\n".join(lines) + "\n"

    def _call(self, rule: str, tool: Any, arguments: str) -> str:
        """A call of one tool, without what stands before its name and behind its arguments."""
        # A text, even where a special token has that name.
        name = json.dumps(tool["function"]["name"])
        return f"{rule}: {name} {self._words(self.form.middle)} {arguments}"

    def _start(self, choice: ToolChoice, thoughts: Thoughts | None) -> list[str]:
        calls = f"{self._words(self.form.head)} calls"
        if choice.required:
            return self._thought_before(calls, thoughts)
        if choice.answer is None:
            return self._free(thoughts)
        if not self.form.trigger:
            raise InvalidInput(
                "this model's calls of tools begin as a JSON answer does; leave out the tools, or"
                " the answer's schema",
                "schema",
            )
        schema = choice.answer | {"x-guidance": {"whitespace_flexible": False}}
        lines = [f"answer: %json {json.dumps(schema)}", f"either: answer | {calls}"]
        return [*self._thought_before("either", thoughts), *lines]

    def _thought_before(self, body: str, thoughts: Thoughts | None) -> list[str]:
        """An answer that is one thing, with nothing but a thought before it."""
        if thoughts is None:
            return [f"start: {body}"]
        either = "" if thoughts.begun else f" | {body}"
        return [f"start: thought /\\n{{0,2}}/ {body}{either}", self._thought(thoughts)]

    def _free(self, thoughts: Thoughts | None) -> list[str]:
        if thoughts is None:
            return ["start: free", *self._may_call("free")]
        lines = [*self._may_call("free"), self._thought(thoughts)]
        if thoughts.begun:
            return ["start: thought free", *lines]
        # Its beginning decides what is a thought, lest a call begin in one.
        unthought = self._may_call("unthought", _SPACE + _as_regex(thoughts.opening))
        return ["start: thought free | unthought", *unthought, *lines]

    def _thought(self, thoughts: Thoughts) -> str:
        opening = "" if thoughts.begun else f"/{_SPACE}{_as_regex(thoughts.opening)}/"
        return f"thought[lazy]: {opening} TEXT {json.dumps(thoughts.closing)}"

    def _may_call(self, rule: str, *excluded: str) -> list[str]:
        """A rule for a text, or a text and calls after it.

        The text begins with nothing that an excluded pattern matches.
        """
        head = self.form.head
        trigger = self.form.trigger
        text = rule.upper()
        if not trigger:
            # Where only its beginning can tell a call from a text, a text begins otherwise.
            begins = "".join(f" & ~/{word}(.|\\n)*/" for word in (*excluded, _as_regex(head[0])))
            return [f"{rule}: {text} | {self._words(head)} calls", f"{text}: TEXT{begins}"]
        begins = "".join(f" & ~/{word}(.|\\n)*/" for word in excluded)
        # A text ends at once with a trigger that is text too; special tokens are none.
        lazy = "" if self.pattern.match(trigger) else "[lazy]"
        return [
            f"{rule}: {text} | {rule}_lead {self._words(head.removeprefix(trigger))} calls",
            f"{rule}_lead{lazy}: {text} {self._words(trigger)}",
            f"{text}: TEXT{begins}",
        ]

    def _words(self, text: str) -> str:
        """A text in a grammar, in which special tokens stand apart."""
        parts = (part for part in self.pattern.split(text) if part)
        return " ".join(
            f"<[{self.special[part]}]>"
            if part in self.special
            else json.dumps(part, ensure_ascii=False)
            for part in parts
        )


# With one of these, an object may have properties beside those under "properties".
_OTHERS = {
    "$dynamicRef", "$ref", "additionalProperties", "allOf", "anyOf", "dependencies",
    "dependentSchemas", "if", "minProperties", "oneOf", "patternProperties", "propertyNames",
    "unevaluatedProperties",
}  # fmt: skip


def _without_others(parameters: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of arguments, with no others than those that it names, if it names any.

    JSON schema allows others where nothing is said of them, but a function takes none.
    """
    named = parameters.get("properties")
    if not isinstance(named, dict) or _OTHERS & parameters.keys():
        return parameters
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return parameters
    if not named.keys() >= set(required):
        return parameters
    return parameters | {"additionalProperties": False}


def check_size(tools: Sequence[Any]) -> None:
    """Raise InvalidInput if the tools' schemas are too long, or have too large integers."""
    spelled = [json.dumps(tool["function"]["parameters"]) for tool in tools]
    if sum(map(len, spelled)) > MAX_SCHEMAS_CHARS:
        most = f"{MAX_SCHEMAS_CHARS:,} characters"
        raise InvalidInput(f"the tools' JSON schemas are longer than {most} together", "tools")
    for tool in tools:
        check_numbers(relaxed(tool["function"]["parameters"]), "tools")


def explained(error: InvalidInput, tools: list[Any]) -> InvalidInput:
    """An error about a grammar that was written for the tools, naming the one that is at fault."""
    found = re.match(r"(.*?)at (\d+)\(\d+\): (.*)", str(error), re.DOTALL)
    if found is None or not 0 <= int(found[2]) - 2 < len(tools):
        return error
    name = tools[int(found[2]) - 2]["function"]["name"]
    return InvalidInput(f"the parameters of {name}: {found[3]}", "tools")


def _as_regex(text: str) -> str:
    """A pattern between slashes that matches a text."""
    return re.escape(text).replace("/", r"\/")
