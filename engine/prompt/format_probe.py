"""What a model's chat format can express, as it shows by rendering a short conversation."""

from collections.abc import Callable

from engine.errors import EngineError
from engine.prompt.families import Message

_ASKED: Message = {"role": "user", "content": "hi"}
_ANSWERED: Message = {"role": "assistant", "content": "hello"}
_WORD = "qzasystem"  # that no format says by itself


def can_continue(encode: Callable[..., list[int]]) -> bool:
    """Whether an answer can go on from a message."""
    try:
        return bool(encode([_ASKED, _ANSWERED], continue_final=True))
    except EngineError:
        return False


def has_system_turns(encode: Callable[..., list[int]], decode: Callable[[list[int]], str]) -> bool:
    """Whether a system turn behind others is taken, and shown in its place."""
    try:
        text = decode(encode([_ASKED, _ANSWERED, _ASKED, {"role": "system", "content": _WORD}]))
    except EngineError:
        return False
    return _WORD in text.partition(_ANSWERED["content"])[2]
