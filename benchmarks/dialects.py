"""What each API costs of the server's processor for a token that it streams.

    python benchmarks/dialects.py [--tokens 500] [--repeats 5]

Beside the pretended card of host.py, so that all is our own work: the step, the text, the event and
the socket. The APIs are asked in turns, one stream at a time; the medians are compared. Where less
than an event a token comes, the machine was busy, and tokens shared one.
"""

import argparse
import statistics
import sys

import psutil
import requests
from benchmark import ROOT, free_port, started

TURN = [{"role": "user", "content": "hi"}]
# Of each API, a body and the name of its length.
BODIES = {
    "/": ({"prompt": "hi"}, "max_new_tokens"),
    "/v1/completions": ({"prompt": "hi"}, "max_tokens"),
    "/v1/chat/completions": ({"messages": TURN}, "max_tokens"),
    "/v1/responses": ({"input": TURN, "store": False}, "max_output_tokens"),
    "/v1/messages": ({"messages": TURN}, "max_tokens"),
}


def stream(url: str, path: str, tokens: int) -> tuple[int, int]:
    """Ask for a stream of so many tokens; how many events and bytes it has."""
    body, length = BODIES[path]
    answer = requests.post(url + path, json=body | {"stream": True, length: tokens}, stream=True)
    answer.raise_for_status()
    text = answer.content
    return text.count(b"data: "), len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=500, help="tokens an answer")
    parser.add_argument("--step", type=float, default=3, help="the card's milliseconds a step")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    port = free_port()
    host = str(ROOT / "benchmarks" / "host.py")
    command = [sys.executable, host, "--serve", str(port), "--step", str(options.step)]
    with started("a pretended card", command, port) as server:
        process = psutil.Process(server.process.pid)
        taken: dict[str, list[float]] = {path: [] for path in BODIES}
        size: dict[str, tuple[int, int]] = {}
        for turn in range(options.repeats + 1):
            for path, times in taken.items():
                before = process.cpu_times()
                size[path] = stream(server.url, path, options.tokens)
                after = process.cpu_times()
                if turn:  # the first one warms up
                    times.append(after.user + after.system - before.user - before.system)
    medians = {path: statistics.median(times) for path, times in taken.items()}
    print("| API | processor time a token | beside chat's | events a token | bytes a token |")
    print("| --- | --- | --- | --- | --- |")
    for path, seconds in medians.items():
        share = seconds / medians["/v1/chat/completions"]
        each = 1e6 * seconds / options.tokens
        events, num_bytes = (count / options.tokens for count in size[path])
        print(f"| `{path}` | {each:.0f} µs | {share:.2f} × | {events:.2f} | {num_bytes:.0f} |")


if __name__ == "__main__":
    main()
