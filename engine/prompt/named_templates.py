"""The chat templates of a checkpoint: the one for conversations, and the one for tools.

By transformers' names `default` and `tool_use`, as a list in tokenizer_config.json or as files in
additional_chat_templates/.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.blame import read_object
from engine.errors import StartError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Templates(NamedTuple):
    """Jinja texts; most checkpoints have one for both."""

    default: str
    tools: str


def templates_of(tokenizer: "PreTrainedTokenizerFast") -> Templates | None:
    """What a tokenizer has; None if it has none. Raises StartError if it is not clear which to use.

    An editor's byte order mark would be in every prompt, and is left out.
    """
    held = tokenizer.chat_template
    if not held:
        return None
    named = held if isinstance(held, dict) else {"default": held}
    named = {name: template.removeprefix("\ufeff") for name, template in named.items()}
    default = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    if default is None:
        raise StartError(
            f"the checkpoint has the chat templates {', '.join(sorted(named))} and none called"
            " default; pass the one to use with --chat-template FILE"
        )
    return Templates(default, named.get("tool_use", default))


def add_lone_template(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Give a tokenizer the template of chat_template.json, which transformers leaves to processors.

    Only where it has no other.
    """
    file = folder / "chat_template.json"
    if tokenizer.chat_template or not file.is_file():
        return
    held = read_object(file).get("chat_template")
    if isinstance(held, list):
        held = {one["name"]: one["template"] for one in held}
    tokenizer.chat_template = held


def needs_tools(messages: list[dict[str, object]], tools: object) -> bool:
    """Whether a conversation is for the template for tools: it has some, or calls, or results."""
    return bool(tools) or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
