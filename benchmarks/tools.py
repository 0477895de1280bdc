"""What tools cost: to start, to compile, and for each token of an answer that may call them.

    python benchmarks/tools.py [--model FOLDER] [--tools 8] [--tokens 128] [--batch 1 8]

Answers are greedy and have no end, so that all are as long. Three kinds take turns: without tools,
with tools in the prompt alone, and with tools that the answer may call (`auto`). Times are of the
tokens after the first.
"""

import argparse
import asyncio
import statistics
import sys
import time
from typing import Any

from benchmark import ROOT

sys.path.insert(0, str(ROOT))

import engine

ROUNDS = 3


def tools_of(count: int) -> list[dict[str, Any]]:
    """Tools as agents have them: several arguments, nested ones and lists."""
    parameters = {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": "a file"},
            "lines": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            "mode": {"enum": ["read", "write", "append"]},
            "options": {"type": "object", "properties": {"binary": {"type": "boolean"}}},
        },
        "required": ["path", "mode"],
        "additionalProperties": False,
    }
    functions = [
        {"name": f"tool_{n}", "description": f"Does the {n}th thing", "parameters": parameters}
        for n in range(count)
    ]
    return [{"type": "function", "function": function} for function in functions]


async def milliseconds_per_token(model: engine.ChatModel, prompts: list[engine.Prompt]) -> float:
    """Of all answers together, from the first token that each of them has."""
    started = 0.0
    tokens = dict.fromkeys(range(len(prompts)), 0)
    at_start = 0
    async for delta in model.answer_all(prompts):
        if delta.completion_tokens:
            tokens[delta.index] = delta.completion_tokens
        if not started and all(tokens.values()):
            started = time.perf_counter()
            at_start = sum(tokens.values())
    return (time.perf_counter() - started) * 1000 / (sum(tokens.values()) - at_start)


def prepared(
    model: engine.ChatModel, kind: str, tools: list[Any], tokens: int, number: int
) -> engine.Prompt:
    messages = [{"role": "user", "content": f"Write a long story about {number} ships."}]
    unending = tuple((end, -100.0) for end in sorted(model.engine.end_ids))
    given = {"max_new_tokens": tokens, "temperature": 0.0, "logit_bias": unending}
    prompt = model.prepare(messages, given, tools=[] if kind == "none" else tools)
    return model.with_tools(prompt, tools) if kind == "auto" else prompt


def milliseconds_per_mask(model: engine.ChatModel, prompt: engine.Prompt, text: str) -> float:
    """Of the CPU's time, for what a guide does at each token of a text, the median."""
    assert prompt.guide
    guide = prompt.guide.copy()
    times = []
    for token in model.tokenizer.encode_text(text, begin=False):
        started = time.thread_time()
        guide.token_mask()
        guide.matcher.consume_token(token)
        times.append(time.thread_time() - started)
    return 1000 * statistics.median(times)


def timed(what: str, work: Any) -> None:
    started = time.perf_counter()
    work()
    sys.stdout.write(f"{what}: {1000 * (time.perf_counter() - started):.1f} ms\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "demo" / "demo.gguf"))
    parser.add_argument("--tools", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    model = engine.load(given.model)
    tools = tools_of(given.tools)
    prompt = model.prepare([{"role": "user", "content": "hi"}], {}, tools=tools)
    timed(
        "the first tools, with the process and both tries", lambda: model.with_tools(prompt, tools)
    )
    timed(f"{given.tools} tools, tried and compiled", lambda: model.with_tools(prompt, tools))
    timed("128 tools, tried and compiled", lambda: model.with_tools(prompt, tools_of(128)))
    prompt = model.with_tools(prompt, tools)
    story = "Once upon a time there was a ship, and the sea was blue. " * 10
    arguments = {"path": "/home/me/some/file.txt", "lines": list(range(1, 21)), "mode": "write"}
    call = {"function": {"name": "tool_3", "arguments": arguments}}
    for what, text in (("text", story), ("a call", model.tokenizer.tools.form.spell([call]))):
        each = milliseconds_per_mask(model, prompt, text)
        sys.stdout.write(f"masks in {what}: {each:.3f} ms of the CPU a token\n")
    for size in given.batch:
        times: dict[str, list[float]] = {"none": [], "prompt": [], "auto": []}
        for _ in range(ROUNDS):
            for kind, measured in times.items():
                prompts = [prepared(model, kind, tools, given.tokens, n) for n in range(size)]
                measured.append(asyncio.run(milliseconds_per_token(model, prompts)))
        for kind, measured in times.items():
            each = statistics.median(measured)
            sys.stdout.write(
                f"batch {size}, tools {kind}: {each:.2f} ms a token, {1000 / each:.1f} tokens/s"
                f" ({min(measured):.2f} to {max(measured):.2f} ms)\n"
            )
    model.close()


if __name__ == "__main__":
    main()
