"""Our server and others over HTTP on one card, one after the other, as together they may not fit.

Started by card.py, with what it found out of the card as JSON. Imports nothing heavy, as the
process that watches /health begins with the same imports.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import benchmark  # noqa: E402


def chat_api(given: dict[str, Any]) -> Any:
    flags = ["--device-map", given["device"], "--max-batch", max(given["most"], key=int)]
    return benchmark.ours("chat-api", given["folder"], *flags, "--no-chat-page")


def transformers_serve(given: dict[str, Any], batching: bool) -> Any:
    return benchmark.transformers_serve(given["folder"], given["device"], batching)


SERVERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "chat-api": chat_api,
    "transformers serve --continuous-batching": partial(transformers_serve, batching=True),
    "transformers serve": partial(transformers_serve, batching=False),
    "one at a time": lambda given: benchmark.one_at_a_time(given["folder"], given["device"]),
}
ONE_BY_ONE = ("transformers serve", "one at a time")


def rows(name: str, given: dict[str, Any]) -> Iterator[str]:
    with SERVERS[name](given) as server:
        server.load(1, 1, 8, 0)
        for clients, most in given["most"].items():
            if int(clients) > 1 and name in ONE_BY_ONE:
                continue  # they take one after the other: minutes, and nothing new
            with benchmark.watched_health(server.url) as health:
                first = 1000 * int(clients)
                outcome = server.load(int(clients), int(clients), given["tokens"], first)
            seen = benchmark.figures(outcome)
            yield (
                f"| {name} | {clients} | {seen['tokens/s']:.1f} | {seen['tokens/s'] / most:.0%}"
                f" | {seen['first p50']:.3f} s | {seen['later p50']:.4f} s | {max(health):.3f} s |"
            )


def main() -> None:
    given = json.loads(sys.argv[1])
    benchmark.prompt = lambda number: " ".join(
        f"w{2 + (number * 131 + n) % 1900}" for n in range(given["prompt"])
    )
    print(f"{given['prompt']} tokens in, {given['tokens']} out, greedy.\n")
    print(
        "| server | clients | tokens/s | of the bound | first p50 | later p50 | longest /health |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in SERVERS:
        try:
            for row in rows(name, given):
                print(row, flush=True)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a rival's fault is no reason to end
            print(f"| {name} | - | {repr(error)[:100]} | | | | |", flush=True)


if __name__ == "__main__":
    main()
