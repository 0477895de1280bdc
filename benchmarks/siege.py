"""Hostile callers of many kinds, and honest ones beside them; `soak.py siege` and `soak.py trial`.

Each attack is one attempt of one hostile caller, which a process of its own makes again and again;
what it costs is what the honest callers, /health and the server's process show meanwhile.
"""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Any

import aiohttp
import psutil
from benchmark import quantile, session

MIB = 2**20
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PATIENCE = 30.0  # seconds that a hostile caller waits for what the server says


def post(path: str, body: Any, headers: str = "") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(url: str):  # type: ignore[no-untyped-def]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def told(reader: asyncio.StreamReader) -> str:
    """The status of what the server says, or that it has closed."""
    try:
        async with asyncio.timeout(PATIENCE):
            line = await reader.readline()
    except TimeoutError:
        return "silent"
    except ConnectionError:
        return "closed"
    return line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"


async def ask(url: str, sent: bytes) -> str:
    """Send it all, and hear the status."""
    async with connected(url) as (reader, writer):
        with suppress(ConnectionError):
            writer.write(sent)
            await writer.drain()
        return await told(reader)


async def leave(url: str, sent: bytes, seconds: float) -> str:
    """Send it all, and hang up after so many seconds."""
    async with connected(url) as (_, writer):
        writer.write(sent)
        await asyncio.sleep(seconds)
    return "left"


# ---- The attacks: of a URL, and dice ----------------------------------------


async def trailers(url: str, dice: random.Random) -> str:
    begin = dice.choice([b"0\r\n", b"0\r\nx: ", b"1;x=", b""])
    more = dice.choice([b"a:b\r\n" * 13_000, b"y" * 65536, b"0" * 65536])
    async with connected(url) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + begin)
        with suppress(ConnectionError):
            for _ in range(256):
                writer.write(more)
                await writer.drain()
        return await told(reader)


def schema_of(schema: Any) -> bytes:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    messages = [{"role": "user", "content": "x"}]
    return post(CHAT, {"messages": messages, "max_tokens": 5, "response_format": shape})


async def schemas(url: str, dice: random.Random) -> str:
    hard = [
        {"type": "integer", "multipleOf": dice.choice([999_983, 3_000_017])},
        {"type": "string", "pattern": "^(a{1000}){1000}$"},
        {"type": "array", "items": {"enum": ["x" * n for n in range(300)]}, "minItems": 10_000},
    ]
    return await leave(url, schema_of(dice.choice(hard)), 0.5)


def filled(before: bytes, item: bytes, after: bytes, size: int = 8 * MIB - 1024) -> bytes:
    return before + item * ((size - len(before) - len(after)) // len(item)) + item[:-1] + after


async def wide(url: str, dice: random.Random) -> str:
    """Bodies of as many items as there is room for."""
    items = [b"[],", b"{},", b"1,", b"1e9,", b'"a",', b"[[]],", b'{"":0},']
    frames = [
        (b'{"prompt":"x","history":[', b"]}"),
        (b'{"prompt":"x","history":[[', b"]]}"),
        (b'{"prompt":[', b"]}"),
        (b'{"messages":[', b"]}"),
        (b'{"messages":[{"role":"user","content":[', b"]}]}"),
        (b'{"prompt":"x","stop":[', b"]}"),
        (b'{"prompt":"x","chat_template_kwargs":{"a":[', b"]}}"),
        (b'{"prompt":"x","', b'":1}'),
    ]
    before, after = dice.choice(frames)
    body = filled(before, dice.choice(items), after)
    return await ask(url, post(dice.choice(["/", CHAT, TEXT]), body))


def calls_of(arguments: str, count: int = 1) -> dict[str, Any]:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call] * count}


async def conversations(url: str, dice: random.Random) -> str:
    """Messages that are dear to read or to render, and prompts that are dear to score."""
    asks: list[Any] = [{"role": "user", "content": "x"}]
    bodies: list[tuple[str, Any]] = [
        (CHAT, {"messages": [calls_of('{"a":[' + "[]," * 2_500_000 + "[]]}")]}),
        (CHAT, {"messages": [calls_of("{}", 120)] * 60}),
        (CHAT, {"messages": [{"role": "system", "content": "a" * 1900}] * 4000}),
        (CHAT, {"messages": asks, "chat_template_kwargs": {"messages": [[[{}] * 900] * 3]}}),
        (TEXT, {"prompt": ["a b c " * 300] * 64, "echo": True, "logprobs": 20, "n": 2}),
    ]
    path, body = dice.choice(bodies)
    return await leave(url, post(path, body), 2)


async def tools(url: str, dice: random.Random) -> str:
    hard = [
        {"x": {"type": "integer", "multipleOf": 3_000_017}},
        {"x": {"type": "string", "pattern": "^(a{1000}){1000}$"}},
        {f"x{n}": {"enum": [f"{n}{m}" for m in range(90)]} for n in range(50)},
    ]
    parameters = {"type": "object", "properties": dice.choice(hard)}
    functions = [{"name": f"f{n}", "parameters": parameters} for n in range(dice.choice([1, 128]))]
    asked = [{"type": "function", "function": function} for function in functions]
    messages = [{"role": "user", "content": "x"}]
    return await leave(url, post(CHAT, {"messages": messages, "max_tokens": 5, "tools": asked}), 1)


async def lengthy(url: str, dice: random.Random) -> str:
    """Texts of megabytes, whose senders do not wait for long."""
    text = dice.choice(["7", "word ", "茶", "\n", "a<|im_end|>"])
    text *= (3900 * 1024) // len(text.encode())
    turns = [["a b c " * 300, "d e f " * 300]] * 1000
    bodies = [
        {"prompt": text, "truncate": True},
        {"prompt": "x", "history": turns, "truncate": True},
        {"prompt": text},
        {"prompt": "x", "system": text},
        {"prompt": "x", "model": text},
    ]
    return await leave(url, post(dice.choice(["/", "/tokenize"]), dice.choice(bodies)), 1)


def story(length: int, stream: bool) -> dict[str, Any]:
    return {"prompt": "Tell a story.", "max_length": length, "stream": stream}


async def pipelined(url: str, dice: random.Random) -> str:
    looks = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    behind = dice.choice([looks, b"G", post("/", {"prompt": "x"})])
    return await leave(url, post("/", story(1500, dice.random() < 0.5)) + behind, 0.3)


async def cancels(url: str, dice: random.Random) -> str:
    """A storm of those who leave at any moment, once their connection is there."""
    async with connected(url) as (reader, writer):
        writer.write(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(post("/", story(400, dice.random() < 0.5)))
            await asyncio.sleep(dice.uniform(0, 0.1))
    return "left"


async def wordy(url: str, dice: random.Random) -> str:
    """Answers of which each token is kilobytes."""
    body = {"prompt": "x", "n": 16, "max_tokens": 300, "logprobs": 5}
    return await leave(url, post(TEXT, body | {"stream": dice.random() < 0.5}), 3)


async def queue(url: str, dice: random.Random) -> str:
    """Many that wait, with prompts that begin alike."""
    body = {"prompt": "one and the same " * 40 + str(dice.random()), "max_tokens": 1}
    return await ask(url, post(TEXT, body))


async def paths(url: str, dice: random.Random) -> str:
    path = dice.choice(["/chat/assets/" + "a" * 256, "/chat/%00", "/" + "x" * 60_000, "/chat/../x"])
    return await ask(url, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


async def upgrades(url: str, dice: random.Random) -> str:
    upgrade = dice.choice(["h2c", "\th2c", "TLS/1.2", "websocket"])
    headers = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    sent = post("/", story(1, False), headers)
    async with connected(url) as (reader, writer):
        writer.write(sent[:60])
        await asyncio.sleep(0.02)
        writer.write(sent[60:])
        return await told(reader)


async def half_closed(url: str, dice: random.Random) -> str:
    async with connected(url) as (reader, writer):
        writer.write(post("/", story(4, dice.random() < 0.5)))
        writer.write_eof()
        return await told(reader)


async def encodings(url: str, dice: random.Random) -> str:
    headers = f"Content-Encoding: {dice.choice(['gzip', 'br', 'zstd', 'x' * 50_000])}\r\n"
    return await ask(url, post("/", b"\x1f\x8b" + dice.randbytes(1000), headers))


async def slow_bodies(url: str, dice: random.Random) -> str:
    """Four megabytes, bit by bit."""
    async with connected(url) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (4 * MIB))
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for _ in range(64):
                    writer.write(b" " * 65_536)
                    await writer.drain()
                    await asyncio.sleep(dice.uniform(0, 1))
                    if reader._buffer:  # type: ignore[attr-defined]
                        break
        return await told(reader)


async def slow_headers(url: str, dice: random.Random) -> str:
    async with connected(url) as (reader, writer):
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                writer.write(b"POST / HTTP/1.1\r\nX-Long: " + b"x" * dice.choice([1, 60_000]))
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(1)
        return "closed"


async def streams(url: str, dice: random.Random) -> str:
    """One of a thousand streams, wholly read."""
    async with connected(url) as (reader, writer):
        writer.write(post("/", story(4, True), "Connection: close\r\n"))
        status = await told(reader)
        with suppress(ConnectionError):
            await reader.read()
        return status


async def deaf(url: str, dice: random.Random) -> str:
    """Streams that nobody reads."""
    messages = [{"role": "user", "content": "Tell a story."}]
    body = {"messages": messages, "max_tokens": 300, "stream": True, "logprobs": True}
    return await leave(url, post(CHAT, body | {"top_logprobs": 20}), 5)


async def resets(url: str, dice: random.Random) -> str:
    """Connections that are reset at once, with or without a request."""
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    peer = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.write(dice.choice([b"", b"GET", post("/", story(100, True))]))
    await asyncio.sleep(dice.uniform(0, 0.05))
    writer.transport.abort()
    return "reset"


async def chunks(url: str, dice: random.Random) -> str:
    """Bodies of which each byte is a chunk, some with an extension."""
    each = dice.choice([b"1\r\nx\r\n", b"1;a=bcdefg\r\nx\r\n"])
    begin = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return await ask(url, begin + each * 60_000 + b"0\r\n\r\n")


async def headers(url: str, dice: random.Random) -> str:
    bomb = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 13_000 + b"\r\n"
    return await ask(url, bomb * dice.choice([1, 4]))


async def long_prompts(url: str, dice: random.Random) -> str:
    """One request of eight long prompts."""
    prompts = [[dice.randrange(100, 20_000) for _ in range(2000)] for _ in range(8)]
    return await leave(url, post(TEXT, {"prompt": prompts, "max_tokens": 1}), 10)


async def renderer(url: str, dice: random.Random) -> str:
    """Texts that the page's renderer takes long for, whose senders mostly go."""
    sent = post("/chat/render", {"text": "![[" * 15_000})
    return await (ask(url, sent) if dice.random() < 0.2 else leave(url, sent, 0.2))


async def wording(url: str, dice: random.Random) -> str:
    """Logprobs of prompts, which take long to be worded."""
    prompts = [[5 + n] * 2000 for n in range(8)]
    return await ask(
        url, post(TEXT, {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 20})
    )


async def definitions(url: str, dice: random.Random) -> str:
    """Definitions that refer to each other in many ways."""
    count = dice.choice([30, 60])
    defs = {
        f"d{i}": {
            "type": "object",
            "properties": {f"p{j}": {"$ref": f"#/$defs/d{(7 * i + j) % count}"} for j in range(12)},
        }
        for i in range(count)
    }
    return await ask(url, schema_of({"$defs": defs, "$ref": "#/$defs/d0"}))


Attack = Callable[[str, random.Random], Awaitable[str]]
# How many hostile callers there are of each kind, alone and in a siege.
ATTACKS: dict[str, tuple[Attack, int, int]] = {
    "trailers": (trailers, 4, 1),
    "schemas": (schemas, 6, 2),
    "wide": (wide, 4, 1),
    "lengthy": (lengthy, 8, 2),
    "conversations": (conversations, 4, 1),
    "tools": (tools, 4, 1),
    "pipelined": (pipelined, 8, 1),
    "queue": (queue, 250, 8),
    "paths": (paths, 4, 1),
    "upgrades": (upgrades, 4, 1),
    "wordy": (wordy, 2, 1),
    "half_closed": (half_closed, 4, 1),
    "encodings": (encodings, 4, 1),
    "slow_bodies": (slow_bodies, 1000, 100),
    "slow_headers": (slow_headers, 1000, 100),
    "streams": (streams, 1000, 8),
    "cancels": (cancels, 32, 4),
    "deaf": (deaf, 16, 2),
    "resets": (resets, 16, 2),
    "chunks": (chunks, 10, 1),
    "headers": (headers, 20, 2),
    "long_prompts": (long_prompts, 2, 1),
    "renderer": (renderer, 20, 2),
    "wording": (wording, 6, 1),
    "definitions": (definitions, 4, 1),
}


async def attack(url: str, counts: dict[str, int], seconds: float) -> Counter[str]:
    """So many hostile callers of each kind for so long; how their attempts ended."""
    ends: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    async def one(name: str, number: int) -> None:
        dice = random.Random(f"{name} {number}")
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    ends[f"{name} {await ATTACKS[name][0](url, dice)}"] += 1
            except TimeoutError:
                ends[f"{name} unfinished"] += 1
            except OSError:
                ends[f"{name} not connected"] += 1
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.005)

    await asyncio.gather(*(one(name, n) for name, count in counts.items() for n in range(count)))
    return ends


def attack_in_process(pipe: Pipe, url: str, counts: dict[str, int], seconds: float) -> None:
    pipe.send("ready")  # after its imports, which take the machine's time too
    before = time.process_time()
    ends = asyncio.run(attack(url, counts, seconds))
    pipe.send((ends, (time.process_time() - before) / seconds))


# ---- What is seen meanwhile -------------------------------------------------


@dataclass
class Seen:
    """What honest callers got, how long /health took, and the server's memory, in a while."""

    answers: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    pieces: int = 0  # of the answers, after each one's first
    seconds: float = 0.0  # that these took
    health: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    hostile_cores: float = 0.0  # of the machine that hostile callers used, on average

    @property
    def rate(self) -> float:
        """Pieces a second of a stream that has begun."""
        return self.pieces / self.seconds if self.seconds else 0.0

    @property
    def peak(self) -> int:
        return max(self.memory)

    @property
    def failures(self) -> int:
        """Attempts that ended with a 5xx other than 503."""
        ends = ((end.rpartition(" ")[2], times) for end, times in self.ends.items())
        return sum(times for end, times in ends if end.startswith("5") and end != "503")


HONEST_TOKENS = 48


def question(number: int) -> dict[str, Any]:
    prompt = f"Count slowly from {number} on, and say what you think of each number."
    return {"prompt": prompt, "max_length": HONEST_TOKENS, "temperature": 0, "stream": True}


async def answer_to(client: aiohttp.ClientSession, number: int) -> tuple[int, str, list[float]]:
    """The status of an honest question, the text of its answer, and when each piece came."""
    async with client.post("/", json=question(number)) as response:
        if response.status != 200:
            return response.status, await response.text(), []
        text, times, last = "", [], b""
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            last = line
            event = {} if line == b"data: [DONE]\n" else json.loads(line[6:])
            if event.get("delta"):
                text += event["delta"]
                times.append(time.perf_counter())
        if last != b"data: [DONE]\n":
            return 0, f"a stream that ends with {last!r}", []
        return 200, text, times


async def honest(url: str, number: int, texts: dict[int, str], deadline: float, seen: Seen) -> None:
    """Ask the same again and again, until the deadline; a refusal is asked again a second later."""
    async with session(url, 120) as client:
        while time.monotonic() < deadline:
            try:
                status, text, times = await answer_to(client, number)
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                seen.lost.append(repr(error))
                continue
            if status in (429, 503):
                seen.refused += 1
                await asyncio.sleep(1)
            elif status != 200:
                seen.lost.append(f"{status}: {text[:200]}")
            elif texts.setdefault(number, text) != text:
                seen.altered.append(f"{text!r} and not {texts[number]!r}")
            else:
                seen.answers += 1
                seen.pieces += len(times[1:])
                seen.seconds += times[-1] - times[0] if times else 0.0


async def watch_health(url: str, deadline: float, seen: Seen) -> None:
    async with session(url, 120) as client:
        while time.monotonic() < deadline:
            started = time.perf_counter()
            with suppress(aiohttp.ClientError, TimeoutError):
                async with client.get("/health", headers={"Connection": "close"}) as response:
                    await response.read()
            seen.health.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)


def memory_of(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


async def watch_memory(process: psutil.Process, deadline: float, seen: Seen) -> None:
    while time.monotonic() < deadline:
        seen.memory.append(memory_of(process))
        await asyncio.sleep(0.02)


async def watch(
    url: str, process: psutil.Process, texts: dict[int, str], callers: int, seconds: float,
    counts: dict[str, int],
) -> Seen:  # fmt: skip
    """What is seen for so long, while hostile callers are about; `texts` is what must be said."""
    seen = Seen()
    mine, theirs = get_context("spawn").Pipe()
    hostile = get_context("spawn").Process(
        target=attack_in_process, args=(theirs, url, counts, seconds), daemon=True
    )
    if counts:
        hostile.start()
        await asyncio.to_thread(mine.recv)
    deadline = time.monotonic() + seconds
    everyone = [honest(url, number, texts, deadline, seen) for number in range(callers)]
    await asyncio.gather(
        *everyone, watch_health(url, deadline, seen), watch_memory(process, deadline, seen)
    )
    if counts:
        seen.ends, seen.hostile_cores = await asyncio.to_thread(mine.recv)
        hostile.join()
    return seen


def health_told(seen: Seen) -> str:
    parts = [quantile(seen.health, part) * 1000 for part in (0.5, 0.99)]
    return f"{parts[0]:.0f}, {parts[1]:.0f} and {max(seen.health) * 1000:.0f} ms"
