"""Messages, blocks and tools as Anthropic's API has them, read into the engine's shapes.

https://platform.claude.com/docs/en/api/messages
"""

import re
from dataclasses import dataclass, field
from typing import Any

from engine import InvalidInput, Message
from serving.fields import MAX_PARTS, reject_lone_surrogates
from serving.lenient import ObjectReader
from serving.thought_code import ThoughtDecoder
from serving.tool_fields import MAX_CALLS_IN_ALL, MAX_TOOLS, NO_PARAMETERS, check_parameters
from serving.unknown_fields import IgnoredFields

# What stands for an image in a tool's result: to refuse it would end the session for good.
IMAGE_PLACEHOLDER = "[image: this model reads text only]"
# Claude Code's account of who pays, which differs between sessions: in front of all else, it would
# keep each of them from finding the others' prompts in the cache.
_BILLING = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n*")
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# What a server runs by itself, as it stands in the histories of other servers.
_SERVER_BLOCKS = re.compile(r"server_tool_use|mcp_tool_use|\w+_tool_result|container_upload")
READS_TEXT = "cannot be read: this model reads text only; leave it out"


@dataclass
class ReadConversation:
    """The turns of a conversation, and which deferred tools it refers to."""

    turns: list[Message] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    call_ids: set[str] = field(default_factory=set)


def join(texts: list[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    return _BILLING.sub("", text, count=1) if _BILLING.match(text) else text


def read_system(system: Any, ignored: IgnoredFields) -> list[Message]:
    """The system turn, if there is a text for one."""
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system
    if blocks is None:
        return []
    if not isinstance(blocks, list) or len(blocks) > MAX_PARTS:
        raise InvalidInput(f"system must be a text, or at most {MAX_PARTS} text blocks", "system")
    texts = []
    for at, value in enumerate(blocks):
        block = ObjectReader(value, f"system[{at}]", ignored)
        if block.text("type") != "text":
            raise block.error('must be of type "text"', "type")
        texts.append(_without_billing(read_text(block)))
    text = join(texts)
    return [{"role": "system", "content": text}] if text else []


def read_text(block: ObjectReader) -> str:
    text = block.text("text")
    if block.take("citations"):
        block.report("citations")
    block.done("cache_control")
    return text


class ConversationReader:
    """Reads messages one after the other."""

    def __init__(self, ignored: IgnoredFields):
        self.ignored = ignored
        self.read = ReadConversation()
        self.thoughts = ThoughtDecoder()

    def add(self, value: Any, path: str) -> None:
        """Read the next message. Raises InvalidInput."""
        message = ObjectReader(value, path, self.ignored)
        role = message.text("role")
        content = message.take("content")
        if role not in ("user", "assistant", "system"):
            raise message.error("must be user, assistant or system", "role")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
            problem = f"must be a text, or a list of 1 to {MAX_PARTS} blocks"
            raise message.error(problem, "content")
        message.done("cache_control", "id")
        blocks = [
            ObjectReader(block, f"{path}.content[{at}]", self.ignored)
            for at, block in enumerate(content)
        ]
        read = {"user": self._user, "assistant": self._assistant, "system": self._system}[role]
        read(blocks)

    def _user(self, blocks: list[ObjectReader]) -> None:
        """Results, each a turn by itself; then what the user says beside them."""
        texts: list[str] = []
        has_results = False
        for block in blocks:
            kind = block.text("type")
            if kind == "tool_result":
                self._result(block)
                has_results = True
            elif kind in ("tool_addition", "tool_removal"):
                self._change(kind, block)
            else:
                texts += self._texts(kind, block)
        if texts or not has_results:
            self.read.turns.append({"role": "user", "content": join(texts)})

    def _system(self, blocks: list[ObjectReader]) -> None:
        texts: list[str] = []
        for block in blocks:
            kind = block.text("type")
            if kind in ("tool_addition", "tool_removal"):
                self._change(kind, block)
            else:
                texts += map(_without_billing, self._texts(kind, block))
        if content := join(texts):
            self.read.turns.append({"role": "system", "content": content})

    def _assistant(self, blocks: list[ObjectReader]) -> None:
        thoughts, texts, calls = [], [], []
        for block in blocks:
            kind = block.text("type")
            if kind == "thinking":
                thoughts.append(self._thought(block))
            elif kind == "redacted_thinking":
                block.report()
            elif kind == "tool_use":
                calls.append(self._call(block))
            else:
                texts += self._texts(kind, block)
        turn: Message = {"role": "assistant", "content": join(texts)}
        if thought := join(thoughts):
            turn["reasoning_content"] = thought
        if calls:
            turn["tool_calls"] = calls
        self.read.turns.append(turn)

    def _texts(self, kind: str, block: ObjectReader) -> list[str]:
        """The texts of a block that anybody may send."""
        if kind == "text":
            return [read_text(block)]
        if kind in ("document", "search_result"):
            return [self._document(kind, block)]
        if kind == "image":
            raise block.error(READS_TEXT)
        if kind == "container_upload" or not _SERVER_BLOCKS.fullmatch(kind):
            raise block.error(f"is of type {kind[:64]!r}, which is not supported; leave it out")
        block.report()
        return []

    def _document(self, kind: str, block: ObjectReader) -> str:
        """The title and the text of a document, or of what a search found."""
        source = block.child("source") if kind == "document" else None
        titles = [block.text(name, "") for name in ("title", "context")]
        if kind == "search_result":
            titles.append(block.text("source", ""))
            content = block.take("content")
        elif source is None:
            raise block.error("is missing", "source")
        else:
            source_kind = source.text("type")
            if source_kind not in ("text", "content"):
                raise block.error(READS_TEXT)
            content = source.text("data") if source_kind == "text" else source.take("content")
            source.done("media_type")
        if block.take("citations"):
            block.report("citations")
        block.done("cache_control")
        return join([*titles, self._plain(content, block)])

    def _plain(self, content: Any, block: ObjectReader) -> str:
        """A text, or text blocks; an image leaves a placeholder."""
        if content is None or isinstance(content, str):
            return block.checked("content", content or "", str, "a text", reject_lone_surrogates)
        if not isinstance(content, list) or len(content) > MAX_PARTS:
            raise block.error(f"must be a text, or at most {MAX_PARTS} blocks", "content")
        texts = []
        for at, value in enumerate(content):
            inner = ObjectReader(value, f"{block.path}.content[{at}]", self.ignored)
            kind = inner.text("type")
            if kind == "image" or (kind == "document" and not _is_text(inner.fields.get("source"))):
                inner.report()
                texts.append(IMAGE_PLACEHOLDER)
            elif kind == "tool_reference":
                self.read.loaded.add(inner.text("tool_name"))
                inner.done("cache_control")
            else:
                texts += self._texts(kind, inner)
        return join(texts)

    def _result(self, block: ObjectReader) -> None:
        call = block.text("tool_use_id")
        if call not in self.read.call_ids:
            raise block.error("names a call that no message before it makes", "tool_use_id")
        text = self._plain(block.take("content"), block)
        if block.flag("is_error") and not text.lower().lstrip().startswith("error"):
            text = f"Error: {text}"
        block.done("cache_control")
        self.read.turns.append({"role": "tool", "tool_call_id": call, "content": text})

    def _call(self, block: ObjectReader) -> dict[str, Any]:
        function = {"name": block.text("name"), "arguments": block.json_object("input", {})}
        call_id = block.text("id")
        block.done("cache_control", "caller")
        self.read.call_ids.add(call_id)
        if len(self.read.call_ids) > MAX_CALLS_IN_ALL:
            raise block.error(f"is one of more than {MAX_CALLS_IN_ALL} calls; send fewer")
        return {"id": call_id, "type": "function", "function": function}

    def _thought(self, block: ObjectReader) -> str:
        shown, signature = block.text("thinking", ""), block.text("signature", "")
        block.done("cache_control")
        return shown or self.thoughts.decode(signature) or ""

    def _change(self, kind: str, block: ObjectReader) -> None:
        """A deferred tool that is there from now on, or no longer."""
        tool = block.child("tool")
        if tool is None or tool.text("type") != "tool_reference":
            raise block.error("must be a reference to one of tools", "tool")
        name = tool.text("name", "") or tool.text("tool_name")
        into, out = self.read.loaded, self.read.removed
        if kind == "tool_removal":
            into, out = out, into
        into.add(name)
        out.discard(name)
        block.done("cache_control")


def _is_text(source: Any) -> bool:
    return isinstance(source, dict) and source.get("type") in ("text", "content")


@dataclass(frozen=True)
class DeclaredTools:
    """The tools of a request, in the shape of OpenAI's, and those that are left out."""

    usable: list[dict[str, Any]]
    left_out: frozenset[str]


def read_tools(tools: Any, read: ReadConversation, ignored: IgnoredFields) -> DeclaredTools:
    """The tools that the model is told of: deferred ones only where they were referred to."""
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidInput(f"tools must be a list of at most {MAX_TOOLS}", "tools")
    usable, left_out, names = [], set(), set()
    for at, value in enumerate(tools):
        tool = ObjectReader(value, f"tools[{at}]", ignored)
        kind, name = tool.text("type", "custom"), tool.text("name", "")
        if kind != "custom":
            tool.report()
            left_out.add(name)
            continue
        function, deferred = _read_tool(tool, name)
        if name in names:
            raise tool.error(f"has the name of another tool, {name}")
        names.add(name)
        if name in read.removed or (deferred and name not in read.loaded):
            left_out.add(name)
        else:
            usable.append({"type": "function", "function": function})
    return DeclaredTools(usable, frozenset(left_out))


def _read_tool(tool: ObjectReader, name: str) -> tuple[dict[str, Any], bool]:
    """A tool as a function, and whether it is deferred."""
    if not TOOL_NAME.fullmatch(name):
        raise tool.error("must have 1 to 128 letters, digits, or any of _ . -", "name")
    function: dict[str, Any] = {"name": name}
    if description := tool.text("description", ""):
        function["description"] = description
    schema = tool.json_object("input_schema", NO_PARAMETERS)
    function["parameters"] = tool.checked(
        "input_schema", schema, dict, "an object", check_parameters
    )
    deferred = tool.flag("defer_loading")
    tool.done(
        "cache_control", "input_examples", "strict", "eager_input_streaming", "allowed_callers"
    )
    return function, deferred
