"""A chat model with continuous batching over plain transformers.

    import asyncio
    import engine

    model = engine.load("models/demo/demo.gguf")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.prepare(messages, {"max_new_tokens": 40})

    async def main():
        async for delta in model.answer(prompt):
            print(delta.text, end="", flush=True)

    asyncio.run(main())

In a notebook, whose cells run in an event loop already, write `await main()` as the last line.
"""

from typing import TYPE_CHECKING, Any

from engine.child_process import ChildEnded, ChildProcess, answer_questions, end_children
from engine.device_memory import device_memory
from engine.errors import (
    ContextTooLong,
    EngineError,
    EngineStopped,
    InvalidInput,
    ProcessUnavailable,
    QueueFull,
    StartError,
    StepFailed,
    TemplateTooCostly,
    TimedOut,
)
from engine.model import ChatModel
from engine.prompt.families import Message
from engine.prompt.template_renderer import can_render
from engine.prompt.token_bytes import token_bytes
from engine.sampling_params import SamplingParams
from engine.sequence import Delta, FinishReason, Prompt, Token
from engine.tools.grammar import Thoughts
from engine.tools.parser import CallPart, ToolCallParser

if TYPE_CHECKING:
    from engine.loading import load

__all__ = [
    "CallPart",
    "ChatModel",
    "ChildEnded",
    "ChildProcess",
    "ContextTooLong",
    "Delta",
    "EngineError",
    "EngineStopped",
    "FinishReason",
    "InvalidInput",
    "Message",
    "ProcessUnavailable",
    "Prompt",
    "QueueFull",
    "SamplingParams",
    "StartError",
    "StepFailed",
    "TemplateTooCostly",
    "Thoughts",
    "TimedOut",
    "Token",
    "ToolCallParser",
    "answer_questions",
    "can_render",
    "device_memory",
    "end_children",
    "load",
    "token_bytes",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, so they wait for the first use of `load`.
    if name == "load":
        from engine.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
