"""What the demo model answers to thirty questions, at several sampling parameters.

    python benchmarks/demo.py > answers.md
    python benchmarks/demo.py 600 > answers.md    with answers of up to 600 tokens

docs/demo.md counts the right ones; a person has read them.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from model_download import find_model

ENGLISH = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Who wrote Romeo and Juliet?",
    "How many days are there in a week?",
    "What is 7 + 5?",
    "What is 17 times 3?",
    "What is the largest planet in our solar system?",
    "What is the chemical formula of water?",
    "How does rain form? Answer in two sentences.",
    "Why is the sky blue? Answer in two sentences.",
    "What is photosynthesis? Explain it to a child.",
    "Explain what a computer program is, in two sentences.",
    "What is the difference between a list and a tuple in Python?",
    "Write a Python function that reverses a string.",
    "Write a Python function that adds two numbers.",
    "Write a SQL query that selects all users older than 30.",
    "Write a short poem about the sea.",
    "Write a haiku about autumn.",
    "Write a polite email that asks for a day off.",
    "Give me three tips for sleeping better.",
    "Give me three ideas for a birthday present.",
    "Name three fruits.",
    "Translate 'good morning' into French.",
    "Say the opposite of 'hot'.",
    "Correct the grammar: He go to school yesterday.",
)
CHINESE = (
    "法国的首都是哪里？",
    "雨是怎么形成的？请用两句话回答。",
    "用 Python 写一个反转字符串的函数。",
    "写一首关于大海的短诗。",
    "请介绍一下你自己。",
)
BRIEF = "You are a helpful assistant. Answer correctly and in few words."
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy, penalty 1.1": ("", {"repetition_penalty": 1.1}),
    "greedy, no penalty": ("", {"repetition_penalty": 1.0}),
    "greedy, penalty 1.05": ("", {"repetition_penalty": 1.05}),
    "greedy, penalty 1.2": ("", {"repetition_penalty": 1.2}),
    "temperature 0.2, top_p 0.9, no penalty": (
        "",
        {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.0, "seed": 1},
    ),
    "temperature 0.7, penalty 1.1": ("", {"temperature": 0.7, "seed": 1}),
    "greedy, no penalty, and a system text": (BRIEF, {"repetition_penalty": 1.0}),
    "greedy, penalty 1.1, and a system text": (BRIEF, {"repetition_penalty": 1.1}),
}
MAX_NEW_TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 160


async def ask_all(model: engine.ChatModel, system: str, parameters: dict[str, Any]) -> list[str]:
    """The answers to all questions, asked at once, each with its number of tokens."""

    async def ask(question: str) -> str:
        messages: list[engine.Message] = [{"role": "user", "content": question}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        prompt = model.prepare(messages, parameters | {"max_new_tokens": MAX_NEW_TOKENS})
        deltas = [delta async for delta in model.answer(prompt)]
        text = "".join(delta.text for delta in deltas)
        return f"{text} ({deltas[-1].completion_tokens} tokens)"

    return await asyncio.gather(*map(ask, (*ENGLISH, *CHINESE)))


async def main() -> None:
    model = engine.load(find_model("demo"))
    for name, (system, parameters) in TRIED.items():
        print(f"\n# {name}\n", flush=True)
        answers = await ask_all(model, system, parameters)
        for question, answer in zip((*ENGLISH, *CHINESE), answers, strict=True):
            print(f"- {question}\n  {' / '.join(answer.split(chr(10)))}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
