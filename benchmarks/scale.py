"""Two servers behind Ray Serve on this machine, and what becomes of those who talk to them.

    python benchmarks/scale.py conversation   first text of each turn, with X-Session-Id and without
    python benchmarks/scale.py kill           steady load, and one of the servers is killed
    python benchmarks/scale.py redeploy       steady load, and new servers take both places

The model is the demo, with one core for each server. `kill` and `redeploy` end with an error
where an answer was cut off that need not have been.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from benchmark import details, free_port

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = {
    "CLUSTER_GPUS": "0",
    "CLUSTER_MIN_REPLICAS": "2",
    "CLUSTER_MAX_REPLICAS": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else the servers give way to everything else on the machine.
    "RAY_worker_niceness": "0",
    # Else Ray writes one into the home folder.
    "RAY_AUTH_TOKEN": uuid.uuid4().hex,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks"))),
}


# ---- The servers


SAID = "x" * 200


def scripted(settings: Any) -> Any:
    """A model that says its process's number and then some, a character each hundredth of a second.

    Its engine dies of one prompt.
    """
    from engine.prompt.tokenizer import ChatTokenizer
    from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model

    tokenizer = byte_tokenizer()
    runner = ScriptedRunner(tokenizer, f"{os.getpid():8}{SAID}")
    runner.pause = 0.01
    runner.poison = ChatTokenizer(tokenizer).encode([{"role": "user", "content": "poison"}])
    runner.failure = RuntimeError("the device failed")
    runner.check_device = partial(next, iter(()))
    limits = {"max_batch": settings.max_batch, "max_waiting": settings.max_waiting}
    return chat_model(runner, tokenizer, **limits)


def drive(port: int, folder: str, script: bool) -> None:
    """Deploy at each line of the standard input, until it ends."""
    import ray
    from ray import serve

    import api
    from deploy import cluster

    # Ray writes what it has to say to the standard output too.
    answers, sys.stdout = sys.stdout, sys.stderr
    ray.init(
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings, sizes = api.read_settings(["--no-chat-page"]), cluster.ClusterSettings()
    for line in sys.stdin:
        if line == "deploy\n":
            serve.run(cluster.build(settings, sizes, scripted) if script else cluster.app)
        (app,) = serve.status().applications.values()
        print(app.deployments["chat"].replica_states.get("RUNNING", 0), file=answers, flush=True)
    serve.shutdown()


class Cluster:
    """The driver's process, and the address that it serves at."""

    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.url = process, f"http://127.0.0.1:{port}"

    def deploy(self) -> None:
        """Start two servers; where two are, let new ones take their places."""
        assert self.tell("deploy") == 2

    def running(self) -> int:
        """How many servers Serve takes for running."""
        return self.tell("count")

    def tell(self, word: str) -> int:
        assert self.process.stdin
        assert self.process.stdout
        print(word, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def servers(self) -> set[int]:
        """The numbers of the servers' processes."""
        found = set()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error, IndexError):
                if child.cmdline()[0].startswith("ray::ServeReplica:"):
                    found.add(child.pid)
        return found

    def both_answer(self) -> bool:
        """Whether there are two scripted servers that answer."""
        found = self.servers()
        answers = ask_all(self.url, *[""] * 4, max_length=8)
        return len(found) == 2 and {answer.server for answer in answers} == found

    def homes(self) -> dict[int, str]:
        """A conversation's name for each server that is its home."""
        found: dict[int, str] = {}
        names = (uuid.uuid4().hex for _ in range(40))
        while len(found) < 2:
            answer = ask(self.url, name := next(names), max_length=8)
            found.setdefault(answer.server, name)
        return found

    def health(self, name: str) -> dict[str, Any]:
        """What the server at which this conversation is at home says of itself."""
        return httpx.get(f"{self.url}/health", headers={"X-Session-Id": name}).json()


@dataclass
class Answer:
    """What came of one request."""

    status: int = 0
    retry_after: int = 0
    first: float = 0.0  # seconds until its first text
    text: str = ""
    whole: bool = False
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def server(self) -> int:
        return int(self.text[:8])


def ask(
    url: str, name: str = "", prompt: str = "x", begun: threading.Event | None = None, **body: Any
) -> Answer:
    """Ask for a stream, as a part of the conversation of that name, and read what comes."""
    answer, headers = Answer(), {"X-Session-Id": name} if name else {}
    started = time.perf_counter()
    body |= {"prompt": prompt, "stream": True}
    with (
        suppress(httpx.TransportError),
        httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response,
    ):
        answer.status = response.status_code
        answer.retry_after = int(response.headers.get("retry-after", 0))
        for line in filter(None, response.iter_lines()):
            event = line.removeprefix("data: ")
            if event == "[DONE]":
                answer.whole = True
            elif event.startswith("{"):
                answer.text += json.loads(event).get("delta", "")
                answer.error = json.loads(event).get("error", {})
                answer.first = answer.first or time.perf_counter() - started
                if begun:
                    begun.set()
    return answer


def ask_all(url: str, *names: str, **body: Any) -> list[Answer]:
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: ask(url, name, **body), names))


@contextmanager
def started(*flags: str, **variables: str) -> Iterator[Cluster]:
    """A cluster on this machine, without servers yet; its log is shown if it does not end well."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        command = [sys.executable, __file__, "drive", "--port", str(port), "--folder", folder]
        environment, pipe = os.environ | VARIABLES | variables, subprocess.PIPE
        with (
            open(f"{folder}/driver.log", "w+") as log,
            subprocess.Popen(
                [*command, *flags],
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=pipe,
                stdout=pipe,
                stderr=log,
            ) as process,
        ):
            try:
                yield Cluster(process, port)
                process.stdin.close()
                process.wait(60)
            finally:
                process.kill()
                if process.wait():
                    log.seek(0)
                    sys.stderr.write(log.read())


# ---- The measurements


def conversation(cluster: Cluster, repeats: int, turns: int = 10) -> None:
    """The same conversations with a name and without, by turns."""
    seconds: dict[bool, list[list[float]]] = {True: [], False: []}
    for _ in range(repeats):
        for named in (True, False):
            name, history, firsts = uuid.uuid4().hex, [], []
            for number in range(1, turns + 1):
                asked = f"go on with the story, now with {details(number)}."
                question = f"In conversation {name}, {asked}"
                body = {"history": history, "max_length": 64, "temperature": 0}
                answer = ask(cluster.url, name if named else "", question, **body)
                assert answer.whole
                history.append([question, answer.text])
                firsts.append(answer.first)
            seconds[named].append(firsts)
    print("| turn | with X-Session-Id: median | longest | without: median | longest |")
    print("| --- | --- | --- | --- | --- |")
    for label, chosen in [(str(n + 1), [n]) for n in range(turns)] + [("2 on", range(1, turns))]:
        cells = []
        for runs in seconds.values():
            firsts = [run[turn] for run in runs for turn in chosen]
            cells += [f"{statistics.median(firsts):.2f} s", f"{max(firsts):.2f} s"]
        print(f"| {label} | {' | '.join(cells)} |")


@contextmanager
def load(cluster: Cluster, clients: int) -> Iterator[list[Answer]]:
    """Clients that ask again once they are answered, or when they were told to come back."""
    answers: list[Answer] = []
    stop = threading.Event()

    def client(number: int) -> None:
        name = uuid.uuid4().hex if number % 2 else ""
        while not stop.is_set():
            prompt = f"Write a long story, number {len(answers)}."
            answers.append(answer := ask(cluster.url, name, prompt, max_length=64))
            stop.wait(answer.retry_after)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        try:
            yield answers
        finally:
            stop.set()
    for ended in running:
        ended.result()


def told(answers: list[Answer]) -> str:
    """How they ended, and how long the unluckiest waited."""
    ends = Counter(
        "whole" if a.whole else f"status {a.status}" if a.status != 200 else "broken off"
        for a in answers
    )
    longest = max(a.first for a in answers if a.whole)
    return (
        f"{len(answers)} requests: {', '.join(f'{n} {end}' for end, n in ends.items())};"
        f" the longest wait for a first text was {longest:.1f} s"
    )


def lost(answers: list[Answer]) -> int:
    return sum(not (answer.whole or answer.retry_after) for answer in answers)


def kill(cluster: Cluster, clients: int, seconds: float) -> bool:
    """Kill a server a third of the way through; whether only its own answers broke off."""
    with load(cluster, clients) as answers:
        time.sleep(seconds / 3)
        old, begun = cluster.servers(), time.monotonic()
        os.kill(victim := min(old), signal.SIGKILL)
        while len(cluster.servers()) < 2 or cluster.running() < 2:
            time.sleep(0.2)
        took = time.monotonic() - begun
        print(f"two servers again {took:.1f} s after one was killed, of {clients} clients")
        time.sleep(max(0.0, seconds * 2 / 3 - took))
    print(told(answers))
    return victim not in cluster.servers() and lost(answers) <= clients


def redeploy(cluster: Cluster, clients: int, seconds: float) -> bool:
    """Replace both servers a third of the way through; whether nothing was lost."""
    with load(cluster, clients) as answers:
        time.sleep(seconds / 3)
        old, begun = cluster.servers(), time.monotonic()
        cluster.deploy()
        took = time.monotonic() - begun
        print(f"both servers were replaced within {took:.1f} s")
        time.sleep(max(0.0, seconds * 2 / 3 - took))
    print(told(answers))
    return not old & cluster.servers() and not lost(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["conversation", "kill", "redeploy", "drive"])
    parser.add_argument("--seconds", type=float, default=60, help="how long there is load")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="conversations of each kind")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--script", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "drive":
        return drive(options.port, options.folder, options.script)
    with started() as cluster:
        cluster.deploy()
        if options.what == "conversation":
            conversation(cluster, options.repeats)
        elif not globals()[options.what](cluster, options.clients, options.seconds):
            sys.exit("an answer was broken off that need not have been")


if __name__ == "__main__":
    main()
