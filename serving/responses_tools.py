"""Tools of the Responses API: functions, custom ones, namespaces, and those that come later."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from engine import InvalidInput
from serving.lenient import ObjectReader
from serving.message_blocks import TOOL_NAME
from serving.tool_fields import MAX_TOOLS, NO_PARAMETERS, check_parameters
from serving.unknown_fields import IgnoredFields

# What a server runs by itself; any other unknown type of tool is left out as well.
_ToolKind = Literal["function", "custom", "tool_search"]


@dataclass(frozen=True)
class Tool:
    """A tool as the model is told of it, and how the client calls it."""

    kind: _ToolKind
    name: str
    namespace: str
    function: dict[str, Any]
    is_deferred: bool = False

    @property
    def flat_name(self) -> str:
        return str(self.function["name"])


def _text_parameters(pattern: str = "") -> dict[str, Any]:
    """The schema of a custom tool's one text."""
    text = {"type": "string"} | ({"pattern": pattern} if pattern else {})
    return {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }


class Toolbox:
    """The tools of a request, by the flat names under which the model knows them."""

    def __init__(self, ignored: IgnoredFields):
        self.ignored = ignored
        self.tools: dict[str, Tool] = {}
        self.left_out: set[str] = set()  # by name or type

    @property
    def usable(self) -> list[Tool]:
        return [tool for tool in self.tools.values() if not tool.is_deferred]

    def add(self, value: Any, path: str, namespace: str = "", *, is_named: bool = False) -> None:
        """Read a tool. One that is named within the conversation is deferred no longer."""
        reader = ObjectReader(value, path, self.ignored)
        kind = reader.text("type")
        if kind == "namespace" and not namespace:
            self._namespace(reader, is_named)
            return
        if kind == "function":
            tool = self._function(reader, namespace)
        elif kind == "custom":
            tool = self._custom(reader, namespace)
        elif kind == "tool_search" and reader.take("execution") == "client":
            tool = self._search(reader)
        else:
            self.left_out.add(reader.text("name", "") or kind)
            reader.report()
            return
        known = self.tools.get(tool.flat_name)
        if known and not is_named:
            raise reader.error(f"has the name of another tool, {tool.flat_name}")
        if len(self.tools) == MAX_TOOLS:
            raise reader.error(f"is one of more than {MAX_TOOLS} tools; send fewer")
        deferred = tool.is_deferred and not is_named
        self.tools[tool.flat_name] = Tool(
            tool.kind, tool.name, tool.namespace, tool.function, deferred
        )

    def has(self, tool: Any) -> bool:
        """Whether a tool was not left out, as a client declared it."""
        return not {tool["type"], tool.get("name", "")} & self.left_out

    def _namespace(self, reader: ObjectReader, is_named: bool) -> None:
        name = _checked_name(reader)
        reader.text("description", "")
        for at, inner in enumerate(reader.items("tools", MAX_TOOLS)):
            self.add(inner, f"{reader.path}.tools[{at}]", name, is_named=is_named)
        reader.done()

    def _function(self, reader: ObjectReader, namespace: str) -> Tool:
        name = _checked_name(reader)
        schema = reader.json_object("parameters", NO_PARAMETERS)
        schema = reader.checked("parameters", schema, dict, "an object", check_parameters)
        deferred = reader.flag("defer_loading")
        function = self._described(reader, name, namespace) | {"parameters": schema}
        reader.done("strict")
        return Tool("function", name, namespace, function, deferred)

    def _custom(self, reader: ObjectReader, namespace: str) -> Tool:
        name = _checked_name(reader)
        pattern, grammar = "", ""
        form = reader.child("format")
        if form and form.text("type") == "grammar":
            syntax, definition = form.text("syntax"), form.text("definition")
            if syntax == "regex":
                pattern = f"^(?:{definition})$"
            else:
                # A text inside of JSON is no grammar that holds: the model is told of it.
                grammar = f"\n\nIts input is a text of this {syntax} grammar:\n{definition}"
                form.report()
        if form:
            form.done()
        deferred = reader.flag("defer_loading")
        function = self._described(reader, name, namespace, grammar)
        function |= {"parameters": _text_parameters(pattern)}
        reader.done()
        return Tool("custom", name, namespace, function, deferred)

    def _search(self, reader: ObjectReader) -> Tool:
        schema = reader.json_object("parameters", NO_PARAMETERS)
        schema = reader.checked("parameters", schema, dict, "an object", check_parameters)
        function = self._described(reader, "tool_search", "") | {"parameters": schema}
        reader.done()
        return Tool("tool_search", "tool_search", "", function)

    def _described(
        self, reader: ObjectReader, name: str, namespace: str, more: str = ""
    ) -> dict[str, Any]:
        description = reader.text("description", "") + more
        function: dict[str, Any] = {"name": f"{namespace}.{name}" if namespace else name}
        return function | ({"description": description.strip()} if description.strip() else {})

    def find(self, choice: ObjectReader) -> str:
        """The flat name of the tool that a choice names. Raises InvalidInput if it is not there."""
        kind = choice.text("type")
        name, namespace = choice.text("name", kind), choice.text("namespace", "")
        choice.done()
        flat = f"{namespace}.{name}" if namespace else name
        found = [
            tool.flat_name
            for tool in self.usable
            if flat in (tool.flat_name, tool.name) and tool.kind == kind
        ]
        if not found:
            raise choice.error(f"names {flat[:64]!r}, which is not among the usable tools")
        return found[0]


def _checked_name(reader: ObjectReader) -> str:
    name = reader.text("name")
    if not TOOL_NAME.fullmatch(name):
        raise reader.error("must have 1 to 128 letters, digits, or any of _ . -", "name")
    return name


def read_toolbox(tools: Any, ignored: IgnoredFields) -> Toolbox:
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidInput(f"tools must be a list of at most {MAX_TOOLS}", "tools")
    toolbox = Toolbox(ignored)
    for at, tool in enumerate(tools):
        toolbox.add(tool, f"tools[{at}]")
    return toolbox


_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
# What stands before the text of a custom tool's input, in the JSON that the model writes.
_BEFORE = re.compile(r'\{\s*"input"\s*:\s*"')
# Whole characters of a JSON string; half a surrogate pair waits for the other.
_WHOLE = re.compile(
    r'[^"\\]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}'
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u]"
)


class InputDecoder:
    """The text of a custom tool's input, out of the JSON of its arguments, as it comes."""

    def __init__(self) -> None:
        self.text = ""
        self._held = ""
        self._is_within = self._is_over = False

    def push(self, json_text: str) -> str:
        """The next characters of the arguments; returns those of the input that are sure."""
        self._held += json_text
        if not self._is_within:
            begun = _BEFORE.match(self._held)
            if begun is None:
                return ""
            self._is_within, self._held = True, self._held[begun.end() :]
        pieces, at = [], 0
        while not self._is_over and at < len(self._held):
            found = _WHOLE.match(self._held, at)
            if found is None:
                self._is_over = self._held[at] == '"'
                break
            pieces.append(_unescaped(found[0]))
            at = found.end()
        self._held = self._held[at:]
        new = "".join(pieces)
        self.text += new
        return new


def _unescaped(piece: str) -> str:
    if not piece.startswith("\\"):
        return piece
    if piece[1] != "u":
        return _ESCAPES.get(piece[1], piece[1])
    units = bytes.fromhex(piece.replace("\\u", ""))
    return units.decode("utf-16-be", errors="replace")
