"""The server under load and abuse: each mode prints what it measured, and which promise broke.

    python benchmarks/soak.py MODE [--minutes 5]

    rush      512 streams at once: answered, or told to come back
    soak      calls of every kind, cancels, hang-ups: nothing grows
    leaks     64 callers, 64 secrets: each hears its own alone, and what it would hear with nobody
              else there
    faults    hang-ups at every stage, slow readers, slow senders
    siege     hostile callers of every kind for two minutes, beside eight honest ones
    trial     the same of one kind, or of each by itself: --kind NAME

Each starts `python api.py` and talks to it over sockets; what it measures of the server comes
from /health, /metrics and its process. It ends with 1 if a promise was broken.
"""

import argparse
import asyncio
import json
import random
import socket
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import benchmark
import psutil
import siege
from benchmark import DEMO, Server, ours, session
from prometheus_client.parser import text_string_to_metric_families

MIB = 2**20
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


class Report:
    """What was measured, line by line, and the promises that did not hold."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def say(self, line: str) -> None:
        print(line, flush=True)

    def promise(self, kept: object, words: str) -> None:
        if not kept:
            self.broken.append(words)
            self.say(f"BROKEN: {words}")


# ---- What the server says of itself -----------------------------------------


@dataclass(frozen=True)
class State:
    """A moment of the server: its own numbers, and its process's."""

    numbers: dict[str, float]
    memory: float
    threads: int
    files: int

    def __getitem__(self, name: str) -> float:
        return self.numbers[f"chat_{name}"]

    @property
    def kept(self) -> tuple[float, ...]:
        """What must be as before once all is over. Threads may also be fewer.

        Not the rows that the last request leaves in the cache: where a stop string ends it, a step
        more or less has been computed by then. Whether all are free is for `emptied` to see.
        """
        return self["num_requests_running"], self["num_requests_waiting"], self.files


def process_of(url: str) -> psutil.Process:
    """The process that listens there: this one, or a child of it."""
    me, port = psutil.Process(), int(url.rpartition(":")[2])
    for process in [*me.children(), me]:
        listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        if any(c.laddr.port == port for c in listening):
            return process
    raise SystemExit(f"nobody listens on port {port} here")


async def state_of(url: str) -> State:
    """Of an own connection, so that its file is always among those that are counted."""
    async with session(url) as client, client.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        samples = [sample for family in families for sample in family.samples]
        process = process_of(url)
        return State(
            {sample.name: sample.value for sample in samples if not sample.labels},
            process.memory_info().rss,
            process.num_threads(),
            process.num_fds(),
        )


async def health_of(url: str) -> dict[str, Any]:
    async with session(url) as client, client.get("/health") as response:
        return await response.json()


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 60) -> float:
    """Seconds until it holds; infinite if it never does."""
    started = time.perf_counter()
    while not await holds():
        if time.perf_counter() - started > seconds:
            return float("inf")
        await asyncio.sleep(0.01)
    return time.perf_counter() - started


async def idle(url: str) -> bool:
    health = await health_of(url)
    return health["running"] == health["waiting"] == 0


# ---- Rush -------------------------------------------------------------------


def rush(report: Report, server: Server, count: int = 512, tokens: int = 8) -> None:
    """Everyone at once, with short answers."""
    rushed = benchmark.rush(server, count, tokens, deadline=600)
    report.say(str(rushed))
    ends = rushed.ends
    promised = ends["served"] + ends["429, with"]
    report.promise(promised == count, "all are served, or told when to come back")
    p99 = benchmark.quantile(rushed.health, 0.99)
    report.promise(p99 < 0.25, f"/health answers within 250 ms in 99 of 100 times, not {p99:.3f} s")
    settled = asyncio.run(until(lambda: idle(server.url), 5))
    report.promise(settled < 5, "nobody runs or waits afterwards")


# ---- Soak -------------------------------------------------------------------

WORDS = ["sea", "fox", "bread", "winter", "map", "river", "moon", "雨", "茶", "naïve", "🙂", "door"]
PASTS = [[[f"Tell me about {a}.", f"{a} and {b} go well. " * 3]] for a, b in pairwise(WORDS)]
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "glad": {"type": "boolean"}},
    "required": ["age", "glad"],
    "additionalProperties": False,
}


def words(dice: random.Random, most: int) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(1, most)))


# Seconds within which a client that leaves must be forgotten.
SOON = 2.0
EMPTYING = 60.0  # seconds in which a request for the whole cache must be answered

Ask = tuple[str, Any]  # a path, and the body to post there; bytes as they are, None for a GET


def short(dice: random.Random) -> Ask:
    body = {"prompt": words(dice, 20), "max_length": dice.randint(1, 8)}
    return "/", body | {"stream": dice.random() < 0.5}


def long(dice: random.Random) -> Ask:
    return "/", {"prompt": words(dice, 10), "max_length": 48, "stream": True, "temperature": 0}


def with_past(dice: random.Random) -> Ask:
    past = dice.choice(PASTS) * dice.randint(1, 3)
    if dice.random() < 0.5:
        roles = ("user", "assistant")
        past = [
            {"role": r, "content": c} for turn in past for r, c in zip(roles, turn, strict=True)
        ]
    return "/", {"prompt": words(dice, 5), "history": past, "max_length": 8, "truncate": True}


def chat(dice: random.Random) -> Ask:
    messages = [{"role": "system", "content": "Be brief."}]
    messages.append({"role": "user", "content": words(dice, 30)})
    body = {"messages": messages, "max_tokens": 8, "stream": dice.random() < 0.5}
    return CHAT, body | {"seed": dice.randrange(9), "stop": ["."], "frequency_penalty": 0.5}


def several(dice: random.Random) -> Ask:
    messages = [{"role": "user", "content": words(dice, 40)}]
    body = {"messages": messages, "max_tokens": 6, "n": dice.randint(2, 4)}
    return CHAT, body | {"logprobs": True, "top_logprobs": 3, "stream": dice.random() < 0.5}


def schema(dice: random.Random) -> Ask:
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    messages = [{"role": "user", "content": f"How old is {words(dice, 3)}? Answer in JSON."}]
    return CHAT, {"messages": messages, "max_tokens": 48, "response_format": shape}


def tokens(dice: random.Random) -> Ask:
    ids = [dice.randrange(5, 200) for _ in range(dice.randint(1, 120))]
    return TEXT, {"prompt": ids, "max_tokens": 4, "logprobs": 2, "user": "soak"}


def bad(dice: random.Random) -> Ask:
    bodies: list[Any] = [
        b'{"prompt": "x"',
        b"\xff\xfe{}",
        [],
        {"prompt": ""},
        {"prompt": "x", "temperature": "hot"},
        {"prompt": "x", "history": [["a"]]},
        {"prompt": "x " * 20_000},
        {"prompt": "x", "tools": [{}]},
    ]
    return "/", dice.choice(bodies)


def looks(dice: random.Random) -> Ask:
    return dice.choice(["/", "/health", "/metrics", "/docs", "/v1/models"]), None


@dataclass(frozen=True)
class Kind:
    """A kind of call: what is asked, which statuses may come, and when its caller hangs up."""

    ask: Callable[[random.Random], Ask]
    weight: int
    statuses: tuple[int, ...] = (200, 429)
    leaves: str = ""


KINDS = [
    Kind(short, 4),
    Kind(long, 2),
    Kind(with_past, 4),
    Kind(chat, 3),
    Kind(several, 2),
    Kind(schema, 2),
    Kind(tokens, 3),
    Kind(bad, 4, statuses=(400,)),
    Kind(looks, 3, statuses=(200,)),
    Kind(long, 3, leaves="mid-stream"),
    Kind(with_past, 3, leaves="soon"),
]


async def events_until_done(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The events of a stream; the last is None if it ended as it must."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield None if line == b"data: [DONE]\n" else json.loads(line[6:])


async def end_of_call(client: aiohttp.ClientSession, kind: Kind, dice: random.Random) -> str:
    """Make a call of a kind and say how it ended; "wrong" begins what must not be."""
    path, body = kind.ask(dice)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    method, sent = ("GET", None) if body is None else ("POST", sent)
    left = dice.randint(1, 8) if kind.leaves == "mid-stream" else 0
    async with client.request(method, path, data=sent) as response:
        if response.status not in kind.statuses:
            return f"wrong: {response.status} to {kind.ask.__name__}, {await response.text()}"
        if response.content_type == "text/event-stream":
            last: Any = {}
            async for event in events_until_done(response):
                last, left = event, left - 1
                if left == 0:
                    response.close()
                    return "left"
            return "200" if last is None else f"wrong: a stream that ends with {last}"
        text = await response.text()
    if kind.ask is schema and response.status == 200:
        choice = json.loads(text)["choices"][0]
        said = choice["message"]["content"]
        if choice["finish_reason"] == "stop" and {*json.loads(said)} != {*PERSON["required"]}:
            return f"wrong: JSON of another schema, {said}"
    return str(response.status)


async def crowd(url: str, stop: asyncio.Event, ends: Counter[str], clients: int, seed: int) -> None:
    """Callers of every kind, until told to stop; each then ends what it began."""

    async def one(client: aiohttp.ClientSession, dice: random.Random) -> None:
        while not stop.is_set():
            kind = dice.choices(KINDS, [kind.weight for kind in KINDS])[0]
            patience = dice.uniform(0.001, 0.3) if kind.leaves == "soon" else 400
            try:
                async with asyncio.timeout(patience):
                    ends[await end_of_call(client, kind, dice)] += 1
            except TimeoutError:
                ends["left" if kind.leaves else "wrong: no end within 400 s"] += 1
            except aiohttp.ClientError as error:
                ends[f"wrong: {error!r}"] += 1

    async with session(url) as client:
        await asyncio.gather(*(one(client, random.Random(seed + i)) for i in range(clients)))


@asynccontextmanager
async def crowded(url: str, ends: Counter[str], clients: int, seed: int) -> AsyncIterator[None]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd(url, stop, ends, clients, seed))
        try:
            yield
        finally:
            stop.set()


async def whole_cache(url: str) -> tuple[int, int]:
    """Rows of the cache, and the most that one request may ask for."""
    async with session(url) as client, client.get("/v1/models") as response:
        most = (await response.json())["data"][0]["max_model_len"]
    return int((await state_of(url))["cache_tokens"]), most


async def emptied(url: str) -> State | None:
    """The server's state after a request for which all rows must be free; None if they are not.

    What is kept of other requests gives way to it, so that afterwards only it is kept.
    """
    _, most = await whole_cache(url)
    body = {"prompt": [*range(40, 60)], "max_tokens": most - 20, "temperature": 0}
    body["stop"] = [" ", "e", "a", "\n"]
    async with session(url, EMPTYING) as client:
        try:
            async with client.post(TEXT, json=body) as response:
                if response.status != 200:
                    return None
        except TimeoutError:
            return None
    await until(lambda: idle(url), 5)
    return await state_of(url)


async def grow_to_the_full(url: str) -> None:
    """Let the server take all the memory that its cache ever will, and all its threads."""
    rows, most = await whole_cache(url)
    if rows != most:
        raise SystemExit(f"one request may take {most} of {rows} rows; use a smaller cache")
    body = {"prompt": [7 + i % 50 for i in range(most - 1)], "max_tokens": 1}
    async with session(url) as client:
        async with client.post(TEXT, json=body, raise_for_status=True):
            pass
        # Each thread has a long text to encode, so that none is free for the next.
        too_long = {"prompt": "word " * 200_000}
        for refusal in await asyncio.gather(*(client.post("/", json=too_long) for _ in range(40))):
            refusal.close()


HEAD = "| minute | calls | left | refused | tokens | memory | threads | files | run | wait | rows |"


def row(name: object, ends: Counter[str], state: State) -> str:
    cells = [
        f"{name}", f"{ends.total()}", f"{ends['left']}", f"{ends['429']}",
        f"{state['generation_tokens_total']:.0f}", f"{state.memory / MIB:.1f} MiB",
        f"{state.threads}", f"{state.files}", f"{state['num_requests_running']:.0f}",
        f"{state['num_requests_waiting']:.0f}", f"{state['cache_tokens_used']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


async def soak(
    report: Report, url: str, minutes: int, minute: float = 60, clients: int = 24
) -> list[State]:
    """Mixed calls for so many minutes; a test has shorter ones. Returns each one's state."""
    await grow_to_the_full(url)
    ends: Counter[str] = Counter()
    async with crowded(url, ends, clients, seed=1):
        await asyncio.sleep(minute / 2)
    before = await emptied(url)
    report.promise(before, "a request for the whole cache finds it free after the warm-up")
    if not before:
        return []
    report.say(f"{HEAD}\n|{' --- |' * 11}")
    report.say(row("warm", ends, before))
    states = []
    async with crowded(url, ends, clients, seed=1000):
        for number in range(1, minutes + 1):
            await asyncio.sleep(minute)
            states.append(await state_of(url))
            report.say(row(number, ends, states[-1]))
    report.promise(await until(lambda: idle(url), 5) < 5, "nobody runs or waits at the end")
    after = await emptied(url)
    report.promise(after, "a request for the whole cache finds it free at the end")
    if after:

        async def back() -> bool:
            state = await state_of(url)
            return state.kept == before.kept and state.threads <= before.threads

        await until(back, 5)
        after = await state_of(url)
        report.say(row("end", ends, after))
        report.promise(after.kept == before.kept, f"{before.kept} is {after.kept} at the end")
        threads = f"{before.threads} threads are {after.threads} at the end"
        report.promise(after.threads <= before.threads, threads)
    grown = states[-1].memory / states[min(1, minutes - 1)].memory - 1
    report.say(f"memory from minute 2 to the last: {grown:+.1%}")
    report.promise(grown < 0.05, f"memory grows by less than 5 %, not {grown:.1%}")
    for end, times in ends.items():
        report.promise(not end.startswith("wrong"), f"{times} times {end[:300]}")
    return states


# ---- Leaks ------------------------------------------------------------------


@dataclass
class Caller:
    """Someone with a secret: in the prompt, or in the history."""

    number: int
    secret: str
    alone: Any = None
    told: int = 0

    @property
    def body(self) -> dict[str, Any]:
        """What even a small model answers with the secret, more often than not."""
        if self.number % 2:
            turns = [
                ("system", "You repeat code words, and say nothing else."),
                ("user", f"Repeat this code word: {self.secret}"),
                ("assistant", f"The code word is {self.secret}."),
                ("user", "Say the code word again."),
            ]
        else:
            said = ["apple-1111", "house-2222", self.secret]
            pairs = [(("user", f"Say {word}"), ("assistant", word)) for word in said]
            turns = [turn for pair in pairs for turn in pair][:-1]
        messages = [{"role": role, "content": content} for role, content in turns]
        asked = {"messages": messages, "max_tokens": 16, "temperature": 0, "logprobs": True}
        return asked | {"stream": self.number % 4 < 2}


def callers(count: int) -> list[Caller]:
    dice = random.Random(5)

    def secret() -> str:
        letters = "".join(dice.choices(string.ascii_lowercase, k=6))
        return f"{letters}-{dice.randrange(1000, 10_000)}"

    return [Caller(number, secret()) for number in range(count)]


async def heard(client: aiohttp.ClientSession, caller: Caller, most: int = 10**6) -> list[str]:
    """The tokens of the answer, or the first of them, if the caller then hangs up."""
    async with client.post(CHAT, json=caller.body) as response:
        if response.status == 429:
            return []
        if not caller.body["stream"]:
            choice = (await response.json())["choices"][0]
            return [token["token"] for token in choice["logprobs"]["content"]]
        said: list[str] = []
        async for event in benchmark.events(response):
            logprobs = event["choices"][0].get("logprobs")
            said += [token["token"] for token in logprobs["content"]] if logprobs else []
            if len(said) >= most:
                response.close()
                break
        return said


@dataclass
class Heard:
    """What a crowd heard, by how it was meant."""

    answers: int = 0
    left: int = 0
    own: int = 0
    others: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def take(self, caller: Caller, said: list[str], whole: bool, known: set[str]) -> None:
        text = "".join(said)
        alone = caller.alone if whole else caller.alone[: len(said)]
        self.answers += whole
        self.left += not whole
        self.own += caller.secret[:6] in text
        # Half a secret tells who it belongs to.
        foreign = {secret for secret in known - {caller.secret} if secret[:6] in text}
        self.others += [f"{caller.secret} heard {other}" for other in foreign]
        if said != alone:
            self.different.append(f"{caller.number}: {text!r} and not {''.join(alone)!r}")


async def learn_alone(url: str, everyone: list[Caller]) -> None:
    """Ask for each one by itself: on a server that reuses nothing, it depends on nobody else."""
    async with session(url) as client:
        for caller in everyone:
            caller.alone = await heard(client, caller)


# Answers that each caller with a secret hears to their end, and the seconds that a slow machine
# has for that beyond those that were asked for.
LEAST_ANSWERS = 2
EXTRA_SECONDS = 120


async def crowd_with_secrets(url: str, everyone: list[Caller], seconds: float) -> Heard:
    result, known = Heard(), {caller.secret for caller in everyone}
    deadline = time.monotonic() + seconds

    async def one(client: aiohttp.ClientSession, caller: Caller) -> None:
        dice = random.Random(caller.number)
        answered = 0
        while time.monotonic() < deadline + EXTRA_SECONDS * (answered < LEAST_ANSWERS):
            leaves = caller.body["stream"] and dice.random() < 0.3
            most = dice.randint(1, len(caller.alone) - 1) if leaves and len(caller.alone) > 1 else 0
            said = await heard(client, caller, most or 10**6)
            if said:
                result.take(caller, said, not most, known)
                answered += not most

    async with session(url) as client:
        await asyncio.gather(*(one(client, caller) for caller in everyone))
    return result


def leaks(
    report: Report, alone: Server, server: Server, seconds: float, count: int = 64, own: float = 0
) -> Heard:
    """Everyone alone on one server, then all at once on another, for so many seconds.

    `own` is the share of answers that must repeat their caller's own secret: where none does,
    none could have told another's.
    """
    everyone = callers(count)
    asyncio.run(learn_alone(alone.url, everyone))
    before = asyncio.run(state_of(server.url))
    result = asyncio.run(crowd_with_secrets(server.url, everyone, seconds))
    reused = asyncio.run(state_of(server.url))
    hits = "prefix_cache_hits_total"
    report.say(
        f"{server.name}: {result.answers} answers and {result.left} begun ones,"
        f" {result.own} with the caller's own secret, {len(result.others)} with another's,"
        f" {len(result.different)} other than alone;"
        f" {reused[hits] - before[hits]:.0f} prompt tokens were reused"
    )
    report.promise(result.answers >= count, "everyone is answered")
    report.promise(result.own >= own * result.answers, "callers are told their own secrets")
    report.promise(reused[hits] > before[hits], "something is reused")
    for found, words_ in ((result.others, "no secret is told"), (result.different, "as alone")):
        report.promise(not found, f"{words_}: {len(found)} times, first {found[:1]}")
    return result


# ---- Faults -----------------------------------------------------------------

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def request_of(path: str, body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def story(length: int, stream: bool = True) -> bytes:
    return request_of("/", {"prompt": "Tell a story.", "max_length": length, "stream": stream})


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """A bare connection, which is cut at the end, whatever is under way."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def count_of(url: str, name: str, wanted: int) -> bool:
    return (await health_of(url))[name] == wanted


async def reached(url: str, name: str, wanted: int = 1) -> None:
    if await until(lambda: count_of(url, name, wanted), 20) > 20:
        raise SystemExit(f"{wanted} {name} was never seen; the stage is not what it should be")


async def unanswered(reader: asyncio.StreamReader) -> None:
    """Make sure that the server has said nothing yet."""
    with suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            said = await reader.read(100)
            raise SystemExit(f"the stage is over: {said!r}")


async def half_a_body(url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(story(8)[:-10])
    await asyncio.sleep(0.2)
    await unanswered(reader)


async def prefill(url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    _, most = await whole_cache(url)
    ids = random.Random(time.monotonic()).choices(range(40, 200), k=most - 20)
    writer.write(request_of(TEXT, {"prompt": ids, "stream": True}))
    await reached(url, "running")
    await unanswered(reader)


async def mid_stream(url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(story(400))
    for _ in range(3):
        await reader.readuntil(b"data: ")


async def whole(url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(story(400, stream=False))
    await reached(url, "running")
    await unanswered(reader)


async def last_token(url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Its whole answer is there, and the stream's end is not read."""
    writer.write(story(5))
    await reader.readuntil(b'"finish_reason"')


STAGES = [half_a_body, prefill, mid_stream, whole, *[last_token] * 5]


async def settled(url: str, files: int) -> bool:
    return await idle(url) and (await state_of(url)).files <= files


async def hang_ups(report: Report, url: str, batch: int) -> None:
    """Leave at each stage; the server forgets the caller within two seconds."""
    await until(lambda: idle(url))
    files = (await state_of(url)).files
    for stage in STAGES:
        async with connected(url) as connection:
            await stage(url, *connection)
        seconds = await until(lambda: settled(url, files), 5 * SOON)
        report.say(f"hang-up, {stage.__name__.replace('_', ' ')}: forgotten in {seconds:.2f} s")
        report.promise(seconds < SOON, f"{stage.__name__} is forgotten within {SOON:g} s")
    async with AsyncExitStack() as stack:
        for _ in range(batch):
            connection = await stack.enter_async_context(connected(url))
            await mid_stream(url, *connection)
        for stream in (True, False):
            async with connected(url) as (reader, writer):
                writer.write(story(400, stream))
                await reached(url, "waiting")
                await unanswered(reader)
            seconds = await until(lambda: count_of(url, "waiting", 0), 5 * SOON)
            running = (await health_of(url))["running"]
            report.say(f"hang-up, waiting: forgotten in {seconds:.2f} s, {running} run on")
            report.promise(seconds < SOON, f"who waits is forgotten within {SOON:g} s")
            report.promise(running == batch, "those who run are left in peace")
    seconds = await until(lambda: settled(url, files), 5 * SOON)
    report.say(f"hang-up, all {batch} at once: forgotten in {seconds:.2f} s")
    report.promise(seconds < SOON, f"all at once are forgotten within {SOON:g} s")


def wordy(length: int) -> dict[str, Any]:
    """An answer whose every token is two thousand bytes on the wire."""
    messages = [{"role": "user", "content": "Tell a story."}]
    body = {"messages": messages, "max_tokens": length, "stream": True, "temperature": 0}
    return body | {"logprobs": True, "top_logprobs": 20}


@contextmanager
def deaf(url: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that asks and never reads; the machine keeps little for it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(request_of(CHAT, body))
        yield client


async def seconds_of(url: str, length: int) -> float:
    """What an answer takes whose stream is read."""
    started, count = time.perf_counter(), 0
    async with session(url) as client, client.post(CHAT, json=wordy(length)) as response:
        async for event in benchmark.events(response):
            count += bool(event["choices"][0]["logprobs"])
    if count != length:
        raise SystemExit(f"the answer has {count} tokens and not {length}")
    return time.perf_counter() - started


async def slow_readers(
    report: Report, url: str, length: int, peers: int = 8, rounds: int = 3
) -> list[State]:
    """Clients that stop reading; returns the server's states once each round has left."""
    await seconds_of(url, length)
    files, states = (await state_of(url)).files, []
    for number in range(1, rounds + 1):
        with_readers = max(
            await asyncio.gather(*(seconds_of(url, length) for _ in range(peers + 1)))
        )
        before = await state_of(url)
        async with AsyncExitStack() as stack:
            for _ in range(peers):
                stack.enter_context(deaf(url, wordy(length)))
            with_deaf = await seconds_of(url, length)
            ended = await until(lambda: idle(url), 5)
            during = await state_of(url)
        left = await until(lambda: settled(url, files), 5 * SOON)
        states.append(await state_of(url))
        each = (during.memory - before.memory) / peers / MIB
        report.say(
            f"{peers} stop reading, round {number}: an answer beside them takes"
            f" {with_deaf / with_readers:.2f} times what it takes beside {peers} that read; all"
            f" ran to their end, the last {ended:.2f} s after it; the server holds {each:.1f} MiB"
            f" for each, {during.files - before.files} connections; they leave, forgotten in"
            f" {left:.2f} s; memory {states[-1].memory / MIB:.1f} MiB"
        )
        report.promise(with_deaf < 1.5 * with_readers, "others do not wait for a slow reader")
        report.promise(ended < 5, "a slow reader does not hold up its answer's end")
        report.promise(during.files >= before.files + peers, "the slow readers were there")
        report.promise(left < SOON, f"a slow reader that leaves is forgotten within {SOON:g} s")
    grown = states[-1].memory / states[0].memory - 1
    report.promise(grown < 0.05, f"slow readers that left leave no memory behind, not {grown:.1%}")
    return states


async def call_seconds(url: str) -> float:
    """The median of five short answers."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        async with session(url) as client:
            body = {"prompt": "hi", "max_length": 4}
            async with client.post("/", json=body, raise_for_status=True):
                seconds.append(time.perf_counter() - started)
    return sorted(seconds)[2]


async def slow_senders(report: Report, url: str, count: int = 100, seconds: float = 20) -> None:
    """Connections that send a byte a second of a header, or stop in the midst of a body."""
    before, files = await call_seconds(url), (await state_of(url)).files
    async with AsyncExitStack() as stack:
        joined = [await stack.enter_async_context(connected(url)) for _ in range(count)]
        for number, (_, writer) in enumerate(joined):
            writer.write(story(8)[:-10] if number % 4 == 0 else b"POST / HTTP/1.1\r\nX-Long: ")
        calls: list[float] = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for number, (_, writer) in enumerate(joined):
                writer.write(b"x" if number % 4 else b"")
            calls.append(await call_seconds(url))
            await asyncio.sleep(1)
        held = (await state_of(url)).files - files
    left = await until(lambda: settled(url, files), 5 * SOON)
    middle = sorted(calls)[len(calls) // 2]
    slower = middle / before
    report.say(
        f"{count} slow senders for {seconds:.0f} s: a short answer takes {slower:.2f} times as"
        f" long, at worst {max(calls) / before:.2f}; {held} are still connected at the end; they"
        f" leave, forgotten in {left:.2f} s"
    )
    # A few milliseconds may well become three times as many when a machine is busy.
    report.promise(middle < max(3 * before, 0.5), "others are served while slow senders are there")
    report.promise(left < SOON, f"slow senders that leave are forgotten within {SOON:g} s")


# ---- A siege ----------------------------------------------------------------


async def besieged(
    report: Report, url: str, counts: dict[str, int], seconds: float, callers: int
) -> tuple[siege.Seen, siege.Seen, int]:
    """What is seen before hostile callers come and while they are there, and the memory after."""
    process, texts = process_of(url), {}
    async with session(url) as client:
        for number in range(callers):
            _, texts[number], _ = await siege.answer_to(client, number)
    before = await siege.watch(url, process, texts, callers, seconds / 4, {})
    during = await siege.watch(url, process, texts, callers, seconds, counts)
    settled = await until(lambda: idle(url), 30)
    report.promise(settled < 30, f"nobody runs or waits after {', '.join(counts)}")
    again = await siege.watch(url, process, texts, callers, 1, {})
    found = [*before.altered, *during.altered, *again.altered]
    report.promise(not found, f"no honest answer is altered: {len(found)} times, {found[:1]}")
    lost = [*during.lost, *again.lost]
    report.promise(not lost, f"no honest answer is lost: {len(lost)} times, first {lost[:1]}")
    report.promise(not during.failures, f"{during.failures} times a 5xx that is no 503")
    return before, during, siege.memory_of(process)


def ends_told(seen: siege.Seen) -> str:
    return ", ".join(f"{times} {end}" for end, times in sorted(seen.ends.items()))


TRIAL_HEAD = (
    "| kind | how its attempts ended | memory over before | /health p50, p99, worst |"
    " honest rate kept | cores that the callers took | honest answers, refusals |"
)


def trial(report: Report, url: str, name: str, seconds: float) -> None:
    """Hostile callers of one kind, beside one honest one; a row of the table."""
    counts = {name: siege.ATTACKS[name][1]}
    before, during, _ = asyncio.run(besieged(report, url, counts, seconds, callers=1))
    more = (during.peak - before.peak) / MIB
    cells = [
        name, ends_told(during).replace(f" {name}", ""), f"{more:+.0f} MiB",
        siege.health_told(during), f"{during.rate / max(before.rate, 0.01):.2f}",
        f"{during.hostile_cores:.2f}", f"{during.answers}, {during.refused}",
    ]  # fmt: skip
    report.say(f"| {' | '.join(cells)} |")
    report.promise(more < 256, f"{name} costs at most 256 MiB, not {more:.0f}")
    p99 = benchmark.quantile(during.health, 0.99)
    report.promise(p99 < 0.25, f"/health answers within 250 ms beside {name}, not {p99:.3f} s")


def lay_siege(report: Report, url: str, seconds: float = 120, callers: int = 8) -> None:
    """Hostile callers of every kind at once."""
    counts = {name: some for name, (_, _, some) in siege.ATTACKS.items()}
    before, during, after = asyncio.run(besieged(report, url, counts, seconds, callers))
    # What is kept for the next time is kept once: another short siege must add nothing.
    again = asyncio.run(besieged(report, url, counts, seconds / 4, callers))[2]
    report.say(
        f"{callers} honest callers before: {before.answers} answers, each at {before.rate:.1f}"
        f" pieces a second, /health (p50, p99, worst) {siege.health_told(before)}"
    )
    report.say(
        f"and in the siege: {during.answers} answers, each at {during.rate:.1f} pieces a second,"
        f" {during.refused} refusals, {len(during.lost)} lost, {len(during.altered)} altered,"
        f" /health {siege.health_told(during)}"
    )
    report.say(
        f"memory before {before.peak / MIB:.0f} MiB, at most {during.peak / MIB:.0f}, after"
        f" {after / MIB:.0f}, after another siege {again / MIB:.0f}"
    )
    report.say(f"how the attempts ended: {ends_told(during)}")
    grown = again / after - 1
    report.promise(grown < 0.05, f"a siege leaves no memory behind, not {grown:.1%}")
    p99 = benchmark.quantile(during.health, 0.99)
    report.promise(p99 < 0.25, f"/health answers within 250 ms in 99 of 100 times, not {p99:.3f} s")


# ---- The modes --------------------------------------------------------------


def save_tiny(folder: str) -> str:
    """The tests' tiny model of random weights, as a checkpoint with a long context."""
    sys.path.insert(0, str(benchmark.ROOT))
    from tests.conftest import byte_tokenizer, tiny_llama

    tiny_llama(max_position_embeddings=16_384).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run_rush(report: Report, _: argparse.Namespace) -> None:
    with ours("demo", str(DEMO)) as server:
        rush(report, server)


def run_soak(report: Report, options: argparse.Namespace) -> None:
    # So few rows that one request can ask for all, and so few places that there is a queue. In
    # bfloat16 the process keeps some megabytes for each new size of a step, and so always grows.
    small = "--cache-memory", "64MiB", "--max-batch", "8", "--dtype", "float32"
    with ours("demo", str(DEMO), *small) as server:
        asyncio.run(soak(report, server.url, options.minutes))


def run_leaks(report: Report, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, model, own in (("demo", str(DEMO), 0.5), ("tiny", save_tiny(folder), 0)):
            exact = ours(name, model, "--dtype", "float32")
            with ours("alone", model, "--dtype", "float32", "--no-reuse") as alone, exact as server:
                leaks(report, alone, server, options.minutes * 30, own=own)


def run_faults(report: Report, _: argparse.Namespace) -> None:
    small = "--cache-memory", "64MiB", "--max-batch", "2", "--prefill-chunk", "64"
    with ours("demo", str(DEMO), *small) as server:
        asyncio.run(hang_ups(report, server.url, batch=2))
    with tempfile.TemporaryDirectory() as folder, ours("tiny", save_tiny(folder)) as server:
        asyncio.run(slow_readers(report, server.url, length=2000))
        asyncio.run(slow_senders(report, server.url))


# The memory of a cache is taken when it is first filled, and would count as the attack's.
SMALL_CACHE = "--dtype", "float32", "--cache-memory", "64MiB"


def run_siege(report: Report, options: argparse.Namespace) -> None:
    with ours("demo", str(DEMO), *SMALL_CACHE) as server:
        lay_siege(report, server.url, options.seconds)


def run_trial(report: Report, options: argparse.Namespace) -> None:
    names = [options.kind] if options.kind else [*siege.ATTACKS]
    report.say(f"{TRIAL_HEAD}\n|{' --- |' * 7}")
    with ours("demo", str(DEMO), *SMALL_CACHE) as server:
        for name in names:
            trial(report, server.url, name, options.seconds / 6)


MODES = {
    "rush": run_rush,
    "soak": run_soak,
    "leaks": run_leaks,
    "faults": run_faults,
    "siege": run_siege,
    "trial": run_trial,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--minutes", type=int, default=5, help="of soak and leaks (5)")
    parser.add_argument("--seconds", type=float, default=120, help="of siege, six trials (120)")
    parser.add_argument("--kind", choices=siege.ATTACKS, help="of hostile callers, for trial")
    options = parser.parse_args()
    report = Report()
    MODES[options.mode](report, options)
    if report.broken:
        sys.exit(f"{len(report.broken)} promises are broken.")
    report.say("every promise is kept")


if __name__ == "__main__":
    main()
