"""How many replicas do so many users need? A queueing simulation: seconds to run, and no card.

    python benchmarks/simulate.py                              the demo model on two CPU cores
    python benchmarks/simulate.py --rates 1:60 16:700 64:1500  yours: clients, and the tokens a
                                                               second that benchmark.py printed

A user asks, gets an answer, thinks, and asks again, always at the replica that has the
conversation in its cache. A replica computes one token for each answer in its batch at each step,
and holds them up while it reads a new prompt; who finds the batch full waits in line. It carries
as many users as see the first token soon enough (--first) and the rest fast enough (--speed).
"""

import argparse
import math

import numpy as np

SECONDS = 1200  # of a replica's time, of which the first quarter is left out: it begins empty
CPU = ["1:24.1", "16:264", "64:473"]  # the second run in docs/benchmarks.md, through HTTP


def simulate(users: int, options: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds to the first token and tokens a second after it, each as nineteen in twenty see it
    or better, and how many answers are in the batch on average."""
    rng = np.random.default_rng(0)
    clients, rates = np.array([pair.split(":") for pair in options.rates], float).T
    steps = np.interp(np.arange(clients[-1] + 1), clients, clients / rates)
    asked = rng.exponential(options.think, users)  # when each asks, or asked
    begun = np.zeros(users)  # when the first token came
    length, left = np.zeros(users, int), np.zeros(users, int)
    now, work, firsts, speeds = 0.0, 0.0, [0.0], [math.inf]
    while now < SECONDS:
        running = np.flatnonzero(left)
        waiting = np.flatnonzero((left == 0) & (asked <= now))
        if not len(running) + len(waiting):
            now = asked.min()
            continue
        new = waiting[np.argsort(asked[waiting])][: len(steps) - 1 - len(running)]
        length[new] = left[new] = rng.geometric(1 / options.answer, len(new))
        batch = np.concatenate([running, new])
        seconds = steps[len(batch)] + options.read * len(new)
        now, work = now + seconds, work + seconds * len(batch)
        begun[new] = now
        left[batch] -= 1
        for user in batch[left[batch] == 0]:
            if asked[user] > SECONDS / 4 and length[user] > 1:
                firsts.append(begun[user] - asked[user])
                speeds.append((length[user] - 1) / (now - begun[user]))
            asked[user] = now + rng.exponential(options.think)
    return np.percentile(firsts, 95), np.percentile(speeds, 5), work / now


def most_users(options: argparse.Namespace) -> int:
    """The most that one replica carries, by doubling and then by halving."""

    def fine(users: int) -> bool:
        first, speed, _ = simulate(users, options)
        return first <= options.first and speed >= options.speed

    low, high = 0, 1
    while fine(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fine(middle) else (low, middle)
    return low


def fullest(users: int, replicas: int) -> int:
    """How many the fullest replica has where a hash deals out the conversations, nearly always."""
    mean = users / replicas
    return math.ceil(mean + 2 * math.sqrt(mean * (1 - 1 / replicas)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", nargs="+", default=CPU, help="clients:tokens/s, rising")
    parser.add_argument("--read", type=float, default=0.2, help="seconds to read a new prompt")
    parser.add_argument("--think", type=float, default=30, help="mean seconds between answers")
    parser.add_argument("--answer", type=int, default=200, help="mean tokens of an answer")
    parser.add_argument("--first", type=float, default=2, help="most seconds to the first token")
    parser.add_argument("--speed", type=float, default=5, help="least tokens a second after it")
    parser.add_argument("--users", type=int, nargs="+", default=[10, 1000, 100_000])
    options = parser.parse_args()
    if not (most := most_users(options)):
        parser.error("not even one user is served as fast as that")
    print(f"One replica carries {most} users.\n")
    print("| users | replicas | users of the fullest | first token, p95 | tokens/s, p5 | answers |")
    print("| --- | --- | --- | --- | --- | --- |")
    for users in options.users:
        replicas = next((n for n in range(1, users) if fullest(users, n) <= most), users)
        share = fullest(users, replicas)
        first, speed, answers = simulate(share, options)
        seen = f"{first:.2f} s | {speed:.1f} | {answers:.0f}"
        print(f"| {users:,} | {replicas:,} | {share} | {seen} |")


if __name__ == "__main__":
    main()
