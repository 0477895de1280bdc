"""Renders chat templates in a process that can be ended.

A chat template is a program that comes with a checkpoint. A sandbox keeps it from files and from
other modules, but `{{ 'a' * 10**10 }}`, or two loops one in the other, would take all memory, or
run for ever; so may a request that a template was not written for.
"""

import traceback
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from engine.child_process import ChildEnded, ChildProcess, answer_questions
from engine.errors import InvalidInput, TemplateTooCostly

# Seconds to render one conversation, and bytes beyond what the process has when it is ready.
RENDER_TIMEOUT = 5.0
RENDER_MEMORY = 512 * 2**20
# What a template says of what it refuses may repeat all of that.
_MAX_REASON = 500


@cache
def renderer() -> ChildProcess:
    """The process, one for all templates."""
    return ChildProcess("engine.prompt.template_renderer")


def can_render() -> bool:
    """Whether the process starts, as far as is known; if it does not, it is tried again."""
    return renderer().is_able()


def render_template(
    template: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> str:
    """What a chat template makes of messages and other variables, as transformers renders it.

    Raises InvalidInput if it refuses them, TemplateTooCostly if it takes too much, and
    ProcessUnavailable if there is no process for it.
    """
    # As transformers' tokenizers do it, for templates that write out whatever is there.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    process = renderer()
    process.start()  # its time is not the template's
    try:
        answer = process.ask([template, messages, dict(variables)], RENDER_TIMEOUT)
    except ChildEnded:
        answer = {"costly": True}
    if "text" in answer:
        return str(answer["text"])
    if "refused" in answer:
        reason = answer["refused"]
        raise InvalidInput(f"the model's chat template refuses these turns: {reason}", "messages")
    if "failed" in answer:  # which is our fault, and neither the template's nor the messages'
        raise RuntimeError(f"rendering failed in its process:\n{answer['failed']}")
    raise TemplateTooCostly(
        f"the model's chat template takes more than {RENDER_TIMEOUT:g} seconds or"
        f" {RENDER_MEMORY // 2**20} MiB to render these turns"
    )


# ---- In the process


def _prepare(_: Any) -> Callable[[Any], dict[str, Any]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def answer(question: Any) -> dict[str, Any]:
        template, messages, variables = question
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
        except MemoryError:
            return {"costly": True}
        except Exception as error:  # noqa: BLE001 - whose fault it is, is told
            if _is_of_template(error):
                return {"refused": str(error)[:_MAX_REASON]}
            return {"failed": traceback.format_exc()}
        return {"text": text}

    return answer


def _is_of_template(error: Exception) -> bool:
    """Whether a template is at fault: jinja says so, or its code, or what it called, raised it."""
    from jinja2 import TemplateError

    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(f.filename == "<template>" for f in frames)


if __name__ == "__main__":
    answer_questions(_prepare, RENDER_MEMORY)
