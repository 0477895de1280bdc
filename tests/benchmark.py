"""Closed-loop clients against chat servers, all in one run on one machine.

    python tests/benchmark.py                       ours, on the demo model
    python tests/benchmark.py --against             and beside it, one-at-a-time `generate` behind
                                                    FastAPI, and `transformers serve`
    python tests/benchmark.py --url URL [--openai MODEL]    a server that runs already

Each client sends a prompt, reads the whole stream, and sends the next. Figures: tokens a second
over all clients, seconds to a reply's first token and for each later one. Each is the median of
runs that take turns with the other servers'.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
TOPICS = ["the sea", "a fox", "bread", "winter", "an old map", "rivers", "a violin", "the moon"]


@dataclass
class Reply:
    """When a reply's pieces came, in seconds after it was asked for, and its tokens."""

    times: list[float]
    tokens: int


def prompt(number: int) -> str:
    return f"Write a long story, number {number}, about {TOPICS[number % len(TOPICS)]}."


async def classic(client: httpx.AsyncClient, number: int, tokens: int) -> AsyncIterator[int]:
    """Our own call; yields 1 for each delta, and the whole number of tokens at the end."""
    body = {"prompt": prompt(number), "max_length": tokens, "temperature": 0, "stream": True}
    async with client.stream("POST", "/", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                yield event["usage"]["completion_tokens"] if "usage" in event else 0


async def openai(
    client: httpx.AsyncClient, number: int, tokens: int, model: str
) -> AsyncIterator[int]:
    messages = [{"role": "user", "content": prompt(number)}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
    body["temperature"] = 1e-9  # zero kills some servers
    count = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                said = bool(choices and choices[0]["delta"].get("content"))
                count += said
                yield 0
    yield count


async def ask(client: httpx.AsyncClient, number: int, tokens: int, model: str | None) -> Reply:
    started, times, total = time.perf_counter(), [], 0
    stream = openai(client, number, tokens, model) if model else classic(client, number, tokens)
    async for count in stream:
        times.append(time.perf_counter() - started)
        total = count or total
    return Reply(times, total)


async def load(
    url: str, clients: int, requests: int, tokens: int, model: str | None, first: int = 0
) -> tuple[float, list[Reply]]:
    """Run the clients to the end, from prompt number `first` on; the seconds and the replies."""
    numbers = iter(range(first, first + requests))
    replies: list[Reply] = []

    async def one(client: httpx.AsyncClient) -> None:
        for number in numbers:
            replies.append(await ask(client, number, tokens, model))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return time.perf_counter() - started, replies


def quantile(values: list[float], q: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(q * 100) - 1]


def figures(seconds: float, replies: list[Reply]) -> dict[str, float]:
    first = [reply.times[0] for reply in replies]
    later = [(r.times[-1] - r.times[0]) / max(1, r.tokens - 1) for r in replies]
    first, later = (values * 2 if len(values) == 1 else values for values in (first, later))
    return {
        "tokens/s": sum(reply.tokens for reply in replies) / seconds,
        "first p50": quantile(first, 0.5),
        "first p99": quantile(first, 0.99),
        "later p50": quantile(later, 0.5),
        "later p99": quantile(later, 0.99),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(name: str, command: list[str], url: str, health: str) -> Iterator[str]:
    """Start a server, wait until it answers, and end it afterwards."""
    log = open(f"/tmp/benchmark-{name.replace(' ', '-')}.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ, cwd=ROOT)
    try:
        for _ in range(1200):
            try:
                if httpx.get(url + health).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise SystemExit(f"{name} ended at its start; see {log.name}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


# One request at a time, as the tutorials' programs do it, but with a stream.
NAIVE = """
import json, sys, threading, torch, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
app, lock = FastAPI(), threading.Lock()

@app.get("/health")
def health(): return {}

@app.post("/")
def chat(body: dict):
    def events():
        with lock:
            turns = [{"role": "user", "content": body["prompt"]}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
            count = []
            def run():
                out = model.generate(**ids, streamer=streamer, do_sample=False,
                    max_new_tokens=body["max_length"], repetition_penalty=1.1)
                count.append(out.shape[1] - ids["input_ids"].shape[1])
            thread = threading.Thread(target=run); thread.start()
            for text in streamer:
                if text: yield "data: " + json.dumps({"delta": text}) + "\\n\\n"
            thread.join()
            yield "data: " + json.dumps({"usage": {"completion_tokens": count[0]}}) + "\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")

uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


# Name, command, address, health route, and the model if it speaks OpenAI's dialect.
Server = tuple[str, list[str], str, str, str | None]


def rivals(folder: str) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    yield "one at a time", [sys.executable, "-c", NAIVE, folder, str(port)], url, "/health", None
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1"]
    serve += [
        "--port",
        str(port),
        "--continuous-batching",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    ]
    yield "transformers serve", serve, url, "/health", folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", action="store_true", help="measure the rivals too")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--openai", help="its model, if it speaks OpenAI's dialect")
    parser.add_argument("--model", default=str(DEMO), help="the folder that is served")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a request")
    parser.add_argument("--rounds", type=int, default=1, help="requests a client, each time")
    parser.add_argument("--repeats", type=int, default=5, help="times; the median is shown")
    options = parser.parse_args()
    port = free_port()
    ours = [sys.executable, "api.py", "--model", options.model, "--host", "127.0.0.1"]
    ours += ["--port", str(port)]
    servers = [("chat-api", ours, f"http://127.0.0.1:{port}", "/health", None)]
    if options.url:
        servers = [("given", ["sleep", "99999"], options.url, "/health", options.openai)]
    if options.against:
        servers += rivals(options.model)
    measure(servers, options)


def measure(servers: list[Server], options: argparse.Namespace) -> None:
    """Run all servers at once but load one at a time, in turns: a noisy machine is noisy to all."""
    seen: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        for name, command, url, health, model in servers:
            stack.enter_context(started(name, command, url, health))
            asyncio.run(load(url, 1, 1, 8, model))
        repeats = range(options.repeats)
        turns = [(s, n, 1000 * r) for r in repeats for n in options.clients for s in servers]
        for (name, _, url, _, model), clients, first in tqdm(turns, unit="run"):
            requests = clients * options.rounds
            # Other prompts each time, so that nobody gains by remembering them.
            outcome = asyncio.run(load(url, clients, requests, options.tokens, model, first))
            seen.setdefault((name, clients), []).append(figures(*outcome))
    print("| server | clients | tokens/s | first p50 | first p99 | later p50 | later p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, clients), runs in seen.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        cells = [f"{middle['tokens/s']:.1f}"] + [f"{middle[key]:.3f} s" for key in list(middle)[1:]]
        print(f"| {name} | {clients} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
