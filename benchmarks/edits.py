"""Time answers that repeat what was said, with speculation and without, in turns in one process.

    python benchmarks/edits.py                            the demo model, 1, 4 and 16 clients
    python benchmarks/edits.py --clients 1 --repeats 5

Four kinds of requests, greedy but for the chat:

- edits: a file of 50 to 300 lines of this repository in the prompt, and the answer is the beginning
  of the same file with its most frequent name changed, a line added and one left out. The small
  demo model does not edit, so the answer is dictated token by token by a mask on the logits: what
  is measured is how fast a model is that edits without fault. Drafts come from the prompt alone.
- tools: a call of a tool that repeats much of the one before, dictated too.
- json: records to be written as JSON by a schema, and chat: questions, sampled by the model's own
  defaults. Here the demo answers by itself.

Prompts are in the prefix cache by then; that drafts come from kept answers is turned off, as the
same requests are sent again. A line each: tokens a second of all clients, the best and the median
of the repeats, without and with, their ratio by the medians, and how many draft tokens were right.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import engine
from engine import ChatModel, Prompt

ROOT = Path(__file__).resolve().parents[1]
TOKENS = {1: 256, 4: 128, 16: 64}  # of an answer, by the clients
QUESTIONS = (
    "How do bees find their way home?",
    "Write a short story about a lighthouse keeper.",
    "What should I know before I learn to bake bread?",
    "Explain to a child why the sky is blue.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 5,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 30},
                    "city": {"type": "string", "maxLength": 30},
                },
                "required": ["name", "city"],
            },
        }
    },
    "required": ["people"],
}


class Dictation:
    """A guide that allows one token at a time, those of a script; it knows of no draft."""

    def __init__(self, ids: list[int], vocabulary: int):
        self.ids, self.vocabulary, self.said = ids, vocabulary, 0
        self.matcher = SimpleNamespace(consume_token=self.consume, validate_tokens=len)

    def copy(self) -> "Dictation":
        return Dictation(self.ids, self.vocabulary)

    def consume(self, _: int) -> None:
        self.said += 1

    def token_mask(self) -> Any:
        mask = np.zeros(self.vocabulary, bool)
        mask[self.ids[self.said]] = True
        return mask


def sources() -> list[str]:
    """Files of this repository of 50 to 300 lines, the shortest first."""
    texts = [path.read_text("utf-8") for path in (ROOT / "engine").rglob("*.py")]
    return sorted((text for text in texts if 50 <= len(text.splitlines()) <= 300), key=len)


def edited(text: str) -> str:
    """A text with its most frequent long name changed, a line added and one left out."""
    words = Counter("".join(c if c.isidentifier() else " " for c in text).split())
    name = max((word for word in words if len(word) > 5), key=words.__getitem__)
    lines = text.replace(name, f"{name}_of_all").splitlines()
    return "\n".join([*lines[:12], "# Checked by hand.", *lines[12:18], *lines[19:]])


def asked(model: ChatModel, question: str, clients: int, **how: Any) -> Prompt:
    messages = [{"role": "user", "content": question}]
    return model.prepare(messages, {"max_new_tokens": TOKENS.get(clients, 64), **how})


def dictated(model: ChatModel, question: str, answer: str, clients: int) -> Prompt:
    """A greedy answer to a question that is this text."""
    ids = model.tokenizer.plain.encode(answer, add_special_tokens=False).ids
    prompt = asked(model, question, clients, temperature=0.0)
    params = replace(prompt.params, max_new_tokens=min(prompt.params.max_new_tokens, len(ids)))
    guide: Any = Dictation(ids, model.vocabulary)
    return replace(prompt, guide=guide, params=params)


def edits(model: ChatModel, n: int, clients: int) -> Prompt:
    texts = sources()
    # Of many clients the shortest, so that the cache holds them all.
    text = texts[n if clients > 4 else (n + 1) * len(texts) // 6]
    return dictated(
        model, f"Rename what is used most, in the whole file:\n{text}", edited(text), clients
    )


def tools(model: ChatModel, n: int, clients: int) -> Prompt:
    def call(path: str, line: int) -> str:
        return (
            f'{{"name": "read_file", "arguments": {{"path": "src/project_{n}/{path}", "encoding":'
            f' "utf-8", "first_line": {line}, "last_line": {line + 80}}}}}\n'
        )

    names = ("main.py", "server.py", "settings.py", "errors.py")
    before = "".join(f"{call(name, 1)}the text of {name}\n" for name in names)
    after = "".join(call(name, 81) for name in names)
    return dictated(model, f"You called:\n{before}Go on.", after, clients)


def as_json(model: ChatModel, n: int, clients: int) -> Prompt:
    people = ("Ada Lovelace", "Grace Hopper", "Emmy Noether", "Alan Turing", "Kurt Goedel")
    cities = ("London", "New York", "Erlangen", "Manchester", "Princeton", "Vienna", "Paris")
    told = " ".join(f"{name} lives in {cities[(n + k) % 7]}." for k, name in enumerate(people))
    prompt = asked(
        model, f"{told} List each person with name and city as JSON.", clients, temperature=0.0
    )
    return model.guided(prompt, SCHEMA)


def chat(model: ChatModel, n: int, clients: int) -> Prompt:
    return asked(model, QUESTIONS[n % len(QUESTIONS)], clients, seed=n)


KINDS: dict[str, Callable[[ChatModel, int, int], Prompt]] = {
    "edits": edits,
    "tools": tools,
    "json": as_json,
    "chat": chat,
}


async def answers(model: ChatModel, prompts: list[Prompt]) -> tuple[float, list[str]]:
    """Tokens a second from the first token on, and what was said."""
    began: list[float] = []

    async def one(prompt: Prompt) -> tuple[int, str]:
        text, count = "", 0
        async for delta in model.answer(prompt):
            began.append(time.perf_counter())
            text, count = text + delta.text, delta.completion_tokens or count
        return count, text

    told = await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - min(began)
    return sum(count for count, _ in told) / seconds, [text for _, text in told]


def compare(model: ChatModel, kind: str, clients: int, repeats: int) -> str:
    """A line of the table. Raises AssertionError if a draft changed an answer."""
    speculation = model.engine.speculation
    assert speculation
    prompts = [KINDS[kind](model, n, clients) for n in range(clients)]
    warm = [replace(p, params=replace(p.params, max_new_tokens=1)) for p in prompts]
    asyncio.run(answers(model, warm))
    rates: dict[bool, list[float]] = {False: [], True: []}
    said: dict[bool, list[str]] = {}
    drafted, accepted = speculation.num_drafted, speculation.num_accepted
    for turn in range(2 * repeats):
        on = turn % 4 in (1, 2)
        model.engine.scheduler.speculation = speculation if on else None
        rate, said[on] = asyncio.run(answers(model, prompts))
        rates[on].append(rate)
    assert said[False] == said[True], f"a draft changed an answer: {kind}"
    without, with_drafts = (statistics.median(rates[on]) for on in (False, True))
    drafted = speculation.num_drafted - drafted
    accepted = speculation.num_accepted - accepted
    return (
        f"{kind:6} {clients:3} clients  {max(rates[False]):7.1f} {without:7.1f}"
        f"  {max(rates[True]):7.1f} {with_drafts:7.1f}  x {with_drafts / without:.2f}"
        f"  {accepted} of {drafted} right"
    )


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function, which notes how long its calls take."""

    def call(*given: Any) -> Any:
        began = time.perf_counter()
        result = function(*given)
        seconds.append(time.perf_counter() - began)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "demo" / "demo.gguf"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = engine.load(args.model, speculate="on", measure_anew=True)
    try:
        speculation = model.engine.speculation
        assert speculation, model.facts["speculation"]
        model.engine.cache.continuations = lambda seq: []  # type: ignore[method-assign]
        costs = ", ".join(f"{n:.0f}: {1000 * s:.1f}" for n, s in speculation.costs.points)
        print(f"{model.facts['weights']}; milliseconds of a step by its rows: {costs}", flush=True)
        planning: list[float] = []
        speculation.plan = timed(speculation.plan, planning)  # type: ignore[method-assign]
        for clients in args.clients:
            for kind in args.kinds:
                planning.clear()
                line = compare(model, kind, clients, args.repeats)
                mean = 1e6 * statistics.mean(planning or [0.0])
                print(f"{line}; {mean:.0f} us a step for drafts", flush=True)
    finally:
        model.close()


if __name__ == "__main__":
    main()
