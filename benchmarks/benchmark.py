"""Closed-loop clients against chat servers, all in one run on one machine.

    python benchmarks/benchmark.py                   ours, on the demo model
    python benchmarks/benchmark.py --against         and beside it, one-at-a-time `generate` behind
                                                     FastAPI, and `transformers serve`
    python benchmarks/benchmark.py --llama-server PATH --gguf FILE   and llama.cpp's server
    python benchmarks/benchmark.py --checkout FOLDER    and ours from another checkout
    python benchmarks/benchmark.py --also quantize=8bit quantize=4bit    and ours set otherwise
    python benchmarks/benchmark.py --prefill 2000    prompts of about so many tokens, read once each
    python benchmarks/benchmark.py --beside-prompt 2000    a stream, while such a prompt is read
    python benchmarks/benchmark.py --adapters 0 1 4 16    requests for none of 16 LoRA adapters, for
                                                     one, four and all in turn
    python benchmarks/benchmark.py --engine          and beside it, our engine without HTTP
    python benchmarks/benchmark.py --url URL [--openai MODEL]    a server that runs already
    python benchmarks/benchmark.py --conversation    first text of each turn, with reuse and without
    python benchmarks/benchmark.py --rush 400        so many requests at once, and /health meanwhile

Each client sends a prompt, reads the whole stream, and sends the next. Figures: tokens a second
over all clients, seconds to a reply's first token and for each later one. Each is the median of
runs that take turns with the other servers'. `--plot FILE` draws tokens a second over clients.

llama.cpp's server is built by whoever wants to compare: docs/benchmarks.md says how.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import requests
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo" / "demo.gguf"
# Sentences behind each prompt, of about nine tokens each, so that it is long.
PAGES = 0
TOPICS = ["the sea", "a fox", "bread", "winter", "an old map", "rivers", "a violin", "the moon"]


@dataclass
class Reply:
    """When a reply's pieces came, in seconds after it was asked for, and its tokens."""

    times: list[float]
    tokens: int


Outcome = tuple[float, list[Reply]]  # seconds that all took, and each
Ask = Callable[[int], Awaitable[Reply]]  # of the prompt of that number


def prompt(number: int) -> str:
    story = f"Write a long story, number {number}, about {TOPICS[number % len(TOPICS)]}."
    return story + "".join(f" Page {number * 1000 + n} is new." for n in range(PAGES))


def details(number: int) -> str:
    """What makes one turn of a conversation long, and unlike the others."""
    return " and ".join(f"{topic}, seen from place {number}" for topic in TOPICS)


async def timed(counts: AsyncIterator[int]) -> Reply:
    """A reply of which each piece yields its number of tokens, or 0 until the whole is known."""
    started, times, total = time.perf_counter(), [], 0
    async for count in counts:
        times.append(time.perf_counter() - started)
        total = count or total
    return Reply(times, total)


async def closed_loop(ask: Ask, clients: int, requests: int, first: int) -> Outcome:
    """Run the clients to the end, from prompt number `first` on."""
    numbers = iter(range(first, first + requests))
    replies: list[Reply] = []

    async def one() -> None:
        for number in numbers:
            replies.append(await ask(number))  # noqa: PERF401 - several add to it

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return time.perf_counter() - started, replies


# ---- Over HTTP --------------------------------------------------------------


def session(url: str, seconds: float = 900) -> aiohttp.ClientSession:
    """A client that costs the machine little, as it shares the cores with the server."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(seconds))


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


async def classic(
    client: aiohttp.ClientSession, number: int, tokens: int, adapters: int | None = None
) -> AsyncIterator[int]:
    body = {"prompt": prompt(number), "max_length": tokens, "temperature": 0, "stream": True}
    if adapters is not None:  # what is random ends anywhere
        body["ignore_eos"] = True
    if adapters:
        body["model"] = f"a{number % adapters}"
    async with client.post("/", json=body, raise_for_status=True) as response:
        async for event in events(response):
            yield event["usage"]["completion_tokens"] if "usage" in event else 0


async def openai(
    client: aiohttp.ClientSession, number: int, tokens: int, model: str
) -> AsyncIterator[int]:
    messages = [{"role": "user", "content": prompt(number)}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
    body["temperature"] = 1e-9  # zero kills some servers
    count = 0
    async with client.post("/v1/chat/completions", json=body, raise_for_status=True) as response:
        async for event in events(response):
            choices = event["choices"]
            count += bool(choices and choices[0]["delta"].get("content"))
            yield 0
    yield count


def free_port() -> int:
    """A port that the system gives to nobody else for half a minute, but to who asks for it.

    A connection that was closed there keeps it.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = listening.accept()
            connection.close()  # first, so that it is this side that waits for what is late
            client.recv(1)
    return port


class Target(Protocol):
    """What the clients can be let loose on."""

    name: str
    process: subprocess.Popen[Any] | None  # with its children a process group; none if not ours

    def load(self, clients: int, requests: int, tokens: int, first: int) -> Outcome: ...


def stop(process: subprocess.Popen[Any] | None) -> None:
    """Take the cores from a server: some poll for work, or spin in their threads, when idle."""
    if process and process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)


def go_on(process: subprocess.Popen[Any] | None) -> None:
    if process and process.poll() is None:
        os.killpg(process.pid, signal.SIGCONT)


@dataclass
class Server:
    """A server at a URL; `model` if it speaks OpenAI's dialect."""

    name: str
    url: str
    model: str | None = None
    process: subprocess.Popen[Any] | None = None
    adapters: int | None = None  # so many that requests name in turn

    def load(self, clients: int, requests: int, tokens: int, first: int) -> Outcome:
        return asyncio.run(self._load(clients, requests, tokens, first))

    async def _load(self, clients: int, requests: int, tokens: int, first: int) -> Outcome:
        async with session(self.url) as client:

            async def ask(number: int) -> Reply:
                if self.model:
                    return await timed(openai(client, number, tokens, self.model))
                return await timed(classic(client, number, tokens, self.adapters))

            return await closed_loop(ask, clients, requests, first)


@contextmanager
def started(name: str, command: list[str], port: int, model: str | None = None) -> Iterator[Server]:
    """Start a server, wait until it is healthy, and end it afterwards."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w", prefix="benchmark-", delete=False) as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ, cwd=ROOT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not asyncio.run(healthy(url)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} does not start; see {log.name}")
            time.sleep(0.1)
        yield Server(name, url, model, process)
    finally:
        go_on(process)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # it waits for clients that are gone
            process.kill()
            process.wait()


async def healthy(url: str) -> bool:
    try:
        async with session(url) as client, client.get("/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def ours(name: str, folder: str, *more: str, checkout: Path = ROOT) -> Any:
    port = free_port()
    command = [sys.executable, str(checkout / "api.py"), "--model", folder, "--host", "127.0.0.1"]
    return started(name, [*command, "--port", str(port), *more], port)


def draw_adapters(model: str, count: int, under: Path, rank: int = 8) -> list[str]:
    """Write random LoRA adapters of all linear layers but the head; the flags that load them."""
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors.torch import save_file

    from engine.checkpoint import load_model

    path = next(Path(model).glob("*.gguf"), Path(model))
    loaded, _ = load_model(path, device_map="cpu")
    head = loaded.get_output_embeddings()
    layers = [
        (name, layer)
        for name, layer in loaded.named_modules()
        if hasattr(layer, "in_features") and layer is not head
    ]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    flags = []
    for number in range(count):
        tensors = {}
        for name, layer in layers:
            down, up = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down / layer.in_features**0.5
            tensors[f"base_model.model.{name}.lora_B.weight"] = up / 100
        folder = under / f"a{number}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        flags += ["--adapter", f"{folder.name}={folder}"]
    return flags


# One request at a time, as the tutorials' programs do it, but with a stream.
NAIVE = """
import json, sys, threading, torch, uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
device = sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map=device)
app, lock = FastAPI(), threading.Lock()

@app.get("/health")
def health(): return {}

@app.post("/")
def chat(body: dict):
    def events():
        with lock:
            turns = [{"role": "user", "content": body["prompt"]}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(device)
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


def one_at_a_time(folder: str, device: str = "cpu") -> Any:
    port = free_port()
    return started("one at a time", [sys.executable, "-c", NAIVE, folder, str(port), device], port)


def transformers_serve(folder: str, device: str = "cpu", batching: bool = True) -> Any:
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--continuous-batching"] if batching else []
    command += ["--dtype", "bfloat16", "--device", device]
    return started("transformers serve", command, port, folder)


def llama_server(program: str, gguf: str, places: int) -> Any:
    """llama.cpp's server, with as many places in its batch as there are clients."""
    port = free_port()
    command = [program, "--model", gguf, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(places), "--ctx-size", str(4096 * places)]
    command += ["--threads", str(os.cpu_count())]
    return started(f"llama.cpp, {Path(gguf).stem}", command, port, "any")


# ---- Without HTTP -----------------------------------------------------------


class EngineAlone:
    """The same prompts for our engine, in a process of its own: what HTTP is measured by."""

    name = "engine without HTTP"

    def __init__(self, folder: str, stack: ExitStack):
        command = [sys.executable, __file__, "--serve-pipe", "--model", folder]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        stack.enter_context(self.process)
        stack.callback(self.process.kill)

    def load(self, clients: int, requests: int, tokens: int, first: int) -> Outcome:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([clients, requests, tokens, first]) + "\n")
        self.process.stdin.flush()
        seconds, replies = json.loads(self.process.stdout.readline())
        return seconds, [Reply(*reply) for reply in replies]


def serve_pipe(folder: str) -> None:
    """Answer EngineAlone's lines."""
    sys.path.insert(0, str(ROOT))
    import api
    from engine import ChatModel

    loaded: list[ChatModel] = []
    settings = api.read_settings(["--model", folder])
    # On a thread that ends: the threads of torch's work here would slow the engine's.
    loader = threading.Thread(target=lambda: loaded.append(api.load_served(settings)))
    loader.start()
    loader.join()
    model = loaded[0]

    async def pieces(number: int, tokens: int) -> AsyncIterator[int]:
        messages = [{"role": "user", "content": prompt(number)}]
        given = {"max_new_tokens": tokens, "temperature": 0.0}
        async with aclosing(model.answer(model.prepare(messages, given, False))) as deltas:
            async for delta in deltas:
                yield delta.completion_tokens

    for line in sys.stdin:
        clients, requests, tokens, first = json.loads(line)

        async def ask(number: int, tokens: int = tokens) -> Reply:
            return await timed(pieces(number, tokens))

        seconds, replies = asyncio.run(closed_loop(ask, clients, requests, first))
        print(json.dumps([seconds, [[r.times, r.tokens] for r in replies]]), flush=True)


# ---- The machine ----------------------------------------------------------


# Variables that hold torch's libraries to fewer instructions than the processor has end so.
LIMITS = ("_ISA", "CPU_CAPABILITY", "_ENABLE_INSTRUCTIONS")


def machine() -> str:
    """The processor, its cores, and which of its instructions matter here."""
    import torch

    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    names = {name.strip(): value.strip() for name, value in lines.items()}
    flags = set(names.get("flags", "").split())
    has = sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"})
    limits = [f"{k}={v}" for k, v in os.environ.items() if k.endswith(LIMITS)]
    return (
        f"{names.get('model name', 'unknown')}, {os.cpu_count()} cores, {' '.join(has)};"
        f" torch {torch.__version__} uses {torch.backends.cpu.get_cpu_capability()}"
        f"{''.join(f', {limit}' for limit in limits)}"
    )


# ---- The table --------------------------------------------------------------


def quantile(values: list[float], q: float) -> float:
    """The nearest rank, so that it is a value that was measured."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def figures(outcome: Outcome) -> dict[str, float]:
    seconds, replies = outcome
    first = [reply.times[0] for reply in replies]
    later = [(r.times[-1] - r.times[0]) / max(1, r.tokens - 1) for r in replies]
    return {
        "tokens/s": sum(reply.tokens for reply in replies) / seconds,
        "first p50": quantile(first, 0.5),
        "first p99": quantile(first, 0.99),
        "later p50": quantile(later, 0.5),
        "later p99": quantile(later, 0.99),
    }


Row = tuple[str, int]  # a target's name, and how many clients


def measure(targets: list[Target], options: argparse.Namespace) -> dict[Row, dict[str, float]]:
    """All targets are up, but one at a time has the cores, in turns: noise comes to all alike."""
    seen: dict[Row, list[dict[str, float]]] = {}
    for target in targets:
        go_on(target.process)
        target.load(1, 1, 8, 0)
        stop(target.process)
    repeats = range(1, options.repeats + 1)
    turns = [(t, n, 1000 * r) for r in repeats for n in options.clients for t in targets]
    for target, clients, first in tqdm(turns, unit="run"):
        # Other prompts each time, so that nobody gains by remembering them.
        go_on(target.process)
        outcome = target.load(clients, clients * options.rounds, options.tokens, first)
        stop(target.process)
        seen.setdefault((target.name, clients), []).append(figures(outcome))
    return {
        row: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for row, runs in seen.items()
    }


def print_table(rows: dict[Row, dict[str, float]]) -> None:
    print("| server | clients | tokens/s | first p50 | first p99 | later p50 | later p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, clients), middle in sorted(rows.items(), key=lambda row: row[0][1]):
        cells = [f"{middle['tokens/s']:.1f}"] + [f"{middle[key]:.3f} s" for key in list(middle)[1:]]
        print(f"| {name} | {clients} | {' | '.join(cells)} |")


def plot(rows: dict[Row, dict[str, float]], path: str) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "chat-api"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name in dict.fromkeys(name for name, _ in rows):
        points = sorted((n, middle["tokens/s"]) for (who, n), middle in rows.items() if who == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", xlabel="clients at once", ylabel="tokens a second, all together")
    axes.set_xticks(ticks := sorted({n for _, n in rows}), map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


# ---- A conversation, and a rush ---------------------------------------------


async def turn(url: str, question: str, history: list[Any], tokens: int) -> tuple[float, Any]:
    """Seconds to the first text, and the whole answer's object."""
    body = {"prompt": question, "history": history, "max_length": tokens, "temperature": 0}
    body["stream"] = True
    started, first, last = time.perf_counter(), 0.0, None
    async with session(url) as client, client.post("/", json=body) as response:
        async for event in events(response):
            first, last = first or time.perf_counter() - started, event
    return first, last


def conversation(folder: str, turns: int, tokens: int) -> None:
    """Ten turns on two servers that take turns too; each conversation is its server's own."""
    print(
        "| turn | prompt tokens | first text | without reuse: prompt tokens | first text | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    with ours("with", folder) as fast, ours("without", folder, "--no-reuse") as slow:
        histories: dict[str, list[Any]] = {fast.url: [], slow.url: []}
        for server in (fast, slow):
            server.load(1, 1, 8, 0)
        for number in range(1, turns + 1):
            question = f"Go on with the story, now with {details(number)}."
            cells, seconds = [], []
            for url, history in histories.items():
                first, answer = asyncio.run(turn(url, question, history, tokens))
                histories[url] = answer["history"]
                cells += [str(answer["usage"]["prompt_tokens"]), f"{first:.3f} s"]
                seconds.append(first)
            print(f"| {number} | {' | '.join(cells)} | {seconds[1] / seconds[0]:.1f} |", flush=True)


async def rush_of(url: str, count: int, tokens: int, seconds: float) -> Counter[str]:
    """How that many requests at once end; one that takes longer than the seconds is in none."""
    ends: Counter[str] = Counter()

    async def end_of(client: aiohttp.ClientSession, number: int) -> str:
        body = {"prompt": prompt(number), "max_length": tokens, "stream": True}
        async with client.post("/", json=body) as response:
            if response.status == 429:
                return "429, " + ("with" if "Retry-After" in response.headers else "no")
            text = await response.text()
            whole = response.status == 200 and text.endswith("data: [DONE]\n\n")
            return "served" if whole else f"failed with {response.status}"

    async def one(client: aiohttp.ClientSession, number: int) -> None:
        with suppress(aiohttp.ClientError, TimeoutError):
            ends[await end_of(client, number)] += 1

    async with session(url, seconds) as client:
        await asyncio.gather(*(one(client, number) for number in range(count)))
    return ends


def watch_health(url: str, pipe: Connection) -> None:
    """Ask /health every 20 ms until the pipe says to stop; send the seconds that each took."""
    seconds = []
    with requests.Session() as client:
        while not pipe.poll(0.02):
            started = time.perf_counter()
            client.get(f"{url}/health", timeout=60)
            seconds.append(time.perf_counter() - started)
            if len(seconds) == 1:
                pipe.send("watching")
    pipe.send(seconds)


@contextmanager
def watched_health(url: str) -> Iterator[list[float]]:
    """The seconds of each call of /health meanwhile, from another process; known at the end."""
    processes = get_context("spawn")
    pipe, theirs = processes.Pipe()
    watcher = processes.Process(target=watch_health, args=(url, theirs), daemon=True)
    watcher.start()
    pipe.recv()
    seconds: list[float] = []
    try:
        yield seconds
        pipe.send("stop")
        seconds += pipe.recv()
    finally:
        watcher.kill()
        watcher.join()


@dataclass
class Rush:
    """How so many requests at once ended, what that took, and each call of /health meanwhile."""

    count: int
    ends: Counter[str]
    seconds: float
    health: list[float]

    @property
    def lost(self) -> int:
        return self.count - self.ends.total()

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {end}" for end, n in sorted(self.ends.items()))
        return (
            f"{self.count} requests at once, {self.seconds:.1f} s: {ends}; {self.lost} lost\n"
            f"/health meanwhile, {len(self.health)} times: p50 {quantile(self.health, 0.5):.3f} s,"
            f" p99 {quantile(self.health, 0.99):.3f} s, longest {max(self.health):.3f} s"
        )


def rush(server: Server, count: int, tokens: int, deadline: float = 900) -> Rush:
    """That many requests at once; /health is asked from another process meanwhile."""
    server.load(1, 1, 8, 0)
    with watched_health(server.url) as health:
        started = time.perf_counter()
        ends = asyncio.run(rush_of(server.url, count, tokens, deadline))
        seconds = time.perf_counter() - started
    return Rush(count, ends, seconds, health)


# ---- A stream beside a long prompt ------------------------------------------

# Of a page whose number has six digits.
TOKENS_OF_A_PAGE = 11


@dataclass
class Beside:
    """A stream's tokens a second alone and while a prompt is read, and the prompt's seconds."""

    alone: float
    meanwhile: float
    longest_gap: float
    prompt_alone: float
    prompt_beside: float

    def __str__(self) -> str:
        return (
            f"a stream beside a prompt: {self.meanwhile:.1f} tokens/s, {self.alone:.1f} alone"
            f" ({self.meanwhile / self.alone:.2f}); longest gap {1000 * self.longest_gap:.0f} ms\n"
            f"the prompt: {self.prompt_beside:.2f} s, {self.prompt_alone:.2f} s alone"
            f" ({self.prompt_beside / self.prompt_alone:.2f})"
        )


Counts = Callable[[int, int], AsyncIterator[int]]  # of a prompt's number, and tokens


async def read_prompt(counts: Counts, number: int) -> tuple[float, float]:
    """When a prompt was sent, and when its only token came."""
    began = time.perf_counter()
    async for _ in counts(number, 1):
        pass
    return began, time.perf_counter()


async def beside_prompt(server: Server, pages: int, tokens: int) -> Beside:
    """One stream, beside which a prompt of so many sentences is read; and that prompt alone."""
    async with session(server.url) as client:

        def counts(number: int, tokens: int) -> AsyncIterator[int]:
            if server.model:
                return openai(client, number, tokens, server.model)
            return classic(client, number, tokens)

        return await measure_beside(counts, pages, tokens)


async def measure_beside(counts: Counts, pages: int, tokens: int) -> Beside:
    global PAGES
    PAGES = pages
    # Unlikely to be in a cache of prefixes, and of as many digits each time, which are tokens.
    number = random.randrange(100, 997)
    began, ended = await read_prompt(counts, number)
    prompt_alone = ended - began
    PAGES = 0
    times: list[float] = []
    enough = asyncio.Event()

    async def stream() -> None:
        async for _ in counts(number + 1, tokens):
            times.append(time.perf_counter())
            if len(times) == 40:
                enough.set()

    reading = asyncio.create_task(stream())
    await enough.wait()
    alone = (len(times) - 1) / (times[-1] - times[0])
    PAGES = pages
    began, ended = await read_prompt(counts, number + 2)
    if reading.done():
        raise SystemExit("the stream ended before the prompt was read; give more --tokens")
    PAGES = 0
    reading.cancel()
    await asyncio.wait([reading])
    during = [began, *(when for when in times if began <= when <= ended), ended]
    gaps = [b - a for a, b in pairwise(during)]
    rate = (len(during) - 2) / (ended - began)
    return Beside(alone, rate, max(gaps), prompt_alone, ended - began)


def print_beside(server: Server, options: argparse.Namespace) -> None:
    """Each figure's median."""
    server.load(1, 1, 8, 0)
    pages, tokens = options.beside_prompt // TOKENS_OF_A_PAGE, max(options.tokens, 600)
    runs = [asyncio.run(beside_prompt(server, pages, tokens)) for _ in range(options.repeats)]
    middle = (
        statistics.median(getattr(run, field.name) for run in runs) for field in fields(Beside)
    )
    print(f"{machine()}\n\n{Beside(*middle)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", action="store_true", help="measure the rivals too")
    parser.add_argument(
        "--adapters", type=int, nargs="+", help="so many that requests name in turn"
    )
    parser.add_argument("--engine", action="store_true", help="measure our engine alone too")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--openai", help="its model, if it speaks OpenAI's dialect")
    parser.add_argument("--conversation", type=int, nargs="?", const=10, help="turns (10)")
    parser.add_argument("--beside-prompt", type=int, help="tokens of a prompt beside a stream")
    parser.add_argument("--rush", type=int, help="requests at once")
    parser.add_argument("--llama-server", help="llama.cpp's program of that name")
    parser.add_argument("--gguf", nargs="+", default=[], help="the model for it, in files")
    parser.add_argument("--checkout", type=Path, help="another checkout of this project")
    parser.add_argument(
        "--also", nargs="+", default=[], help="more of ours, by settings such as quantize=8bit"
    )
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt, about")
    parser.add_argument(
        "--model", default=str(DEMO), help="what is served: a folder, or a GGUF file"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a request")
    parser.add_argument("--rounds", type=int, default=1, help="requests a client, each time")
    parser.add_argument("--repeats", type=int, default=5, help="times; the median is shown")
    parser.add_argument("--plot", help="an svg file for tokens a second over clients")
    parser.add_argument("--serve-pipe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.against and not Path(options.model).is_dir():
        parser.error("--against needs a checkpoint's folder in --model, which transformers reads")
    global PAGES
    PAGES = options.prefill // 9
    if options.serve_pipe:
        return serve_pipe(options.model)
    if options.conversation:
        return conversation(options.model, options.conversation, options.tokens)
    with ExitStack() as stack:
        if options.url:
            server = Server("given", options.url, options.openai)
        else:
            flags = []
            if options.adapters:
                under = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                flags = draw_adapters(options.model, max(options.adapters), under)
            server = stack.enter_context(ours("chat-api", options.model, *flags))
        if options.beside_prompt:
            return print_beside(server, options)
        if options.rush:
            return print(rush(server, options.rush, options.tokens))
        targets: list[Target] = [
            replace(server, name=f"{count} adapters", adapters=count)
            for count in options.adapters or ()
        ] or [server]
        if options.engine:
            targets.append(EngineAlone(options.model, stack))
        if options.checkout:
            other = ours("another checkout", options.model, checkout=options.checkout)
            targets.append(stack.enter_context(other))
        for given in options.also:
            flags = [f"--{setting}" for setting in given.split(",")]
            other = ours(f"chat-api, {given}", options.model, *flags)
            targets.append(stack.enter_context(other))
        for gguf in options.gguf:
            rival = llama_server(options.llama_server, gguf, max(options.clients))
            targets.append(stack.enter_context(rival))
        if options.against:
            targets.append(stack.enter_context(one_at_a_time(options.model)))
            targets.append(stack.enter_context(transformers_serve(options.model)))
        rows = measure(targets, options)
        print(f"{machine()}\n")
        print_table(rows)
        if options.plot:
            plot(rows, options.plot)


if __name__ == "__main__":
    main()
