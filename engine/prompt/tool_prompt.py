"""Messages with tools, calls and results, as a chat template or a family's format takes them."""

from collections.abc import Collection
from itertools import groupby
from typing import Any

from engine.prompt.families import Family, Message
from engine.tools.arguments import spell_json
from engine.tools.format import COMMON, ToolFormat
from engine.tools.learning import Render, learn_format

_HELP = """You may call functions to answer the user. These are their signatures, as JSON:
{}
To call one, answer with its name and its arguments as JSON, in this way:
{}"""
_EXAMPLE = {"function": {"name": "the_name", "arguments": {"the_argument": "its value"}}}


class ToolPrompt:
    """How one model is told of tools, of calls and of their results.

    `form` is how it writes calls: as its family's models were trained to if its tokenizer has the
    tokens, or as its chat template does, which is learnt from what `render` makes of some.
    """

    def __init__(self, family: Family | None, special: Collection[str], render: Render):
        self.roles: Collection[str] = ()  # those that a family's format has beside OpenAI's
        self.by_template = family is None
        self.form = COMMON
        if family is None:
            self.form = learn_format(render)
        elif family.tools and family.tools.trigger in special:
            self.form = family.tools
            self.roles = family.turns

    def arrange(
        self, messages: list[Message], tools: list[Any]
    ) -> tuple[list[Message], dict[str, Any]]:
        """The messages for the format, and what a chat template is to be given beside them."""
        messages = _with_results_in_order(messages)
        if not self.by_template or not self.form.native:
            messages = _calls_as_text(messages, self.form, self.roles)
        elif self.form.arguments_as_text:
            messages = [_with_spelled_arguments(message) for message in messages]
        if not tools:
            return messages, {}
        if self.by_template and self.form.lists_tools:
            return messages, {"tools": tools}
        listed = [spell_json(tool["function"]) for tool in tools]
        if "tools" in self.roles:
            first = messages[0]["role"] == "system"
            turn = {"role": "tools", "content": f"[{', '.join(listed)}]"}
            return [*messages[:first], turn, *messages[first:]], {}
        help_text = _HELP.format("\n".join(listed), self.form.spell([_EXAMPLE]))
        return _with_help(messages, help_text, self.form.takes_system), {}


def _is_result(message: Message) -> bool:
    return bool(message["role"] == "tool")


def _with_results_in_order(messages: list[Message]) -> list[Message]:
    """The messages with results in the order of their calls, which tell them apart in most formats.

    Each has the name of its tool.
    """
    turns: list[Message] = []
    order: dict[str, int] = {}
    names: dict[str, str] = {}
    for are_results, group in groupby(messages, _is_result):
        some = list(group)
        if are_results:
            some.sort(key=lambda result: order.get(result.get("tool_call_id", ""), len(order)))
            some = [_named(result, names) for result in some]
        calls = some[-1].get("tool_calls") or []
        order = {call.get("id", ""): at for at, call in enumerate(calls)}
        names |= {call.get("id", ""): call["function"]["name"] for call in calls}
        turns += some
    return turns


def _named(result: Message, names: dict[str, str]) -> Message:
    """A result with the name of the tool that was called, where it is known and not there."""
    name = names.get(result.get("tool_call_id", ""))
    return {"name": name, **result} if name else result


def _with_help(messages: list[Message], help_text: str, takes_system: bool) -> list[Message]:
    """The messages with a text at their system text's end, or else in front of the first one."""
    first = messages[0]
    if first["role"] == "system":
        both = f"{first['content']}\n\n{help_text}"
    elif takes_system:
        return [{"role": "system", "content": help_text}, *messages]
    else:
        both = f"{help_text}\n\n{first['content']}"
    return [first | {"content": both}, *messages[1:]]


def _calls_as_text(
    messages: list[Message], form: ToolFormat, roles: Collection[str]
) -> list[Message]:
    """The messages in the roles that every format has; results that follow one another are one."""
    turns: list[Message] = []
    for are_results, group in groupby(messages, _is_result):
        if not are_results:
            turns += [_with_written_calls(message, form) for message in group]
        elif "tool" in roles:
            turns += [{"role": "tool", "content": message["content"]} for message in group]
        else:
            results = [f"<tool_response>\n{m['content']}\n</tool_response>" for m in group]
            turns.append({"role": "user", "content": "\n".join(results)})
    return turns


def _with_written_calls(message: Message, form: ToolFormat) -> Message:
    """The message with its calls at the end of its content."""
    if not message.get("tool_calls"):
        return message
    content = message["content"]
    if content and not form.native:
        content += "\n"
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": content + form.spell(message["tool_calls"])}


def _with_spelled_arguments(message: Message) -> Message:
    """The message with its calls' arguments as JSON."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        spelled = function | {"arguments": spell_json(function["arguments"])}
        calls.append(call | {"function": spelled})
    return message | {"tool_calls": calls}
