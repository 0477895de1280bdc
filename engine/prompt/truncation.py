"""Which of the oldest turns of a conversation are left out, so that the rest fits."""

from bisect import bisect_left
from collections.abc import Callable

from engine.prompt.families import Message


def _turn_starts(messages: list[Message]) -> list[int]:
    """Where each turn begins: at a message of the user."""
    return [i for i, message in enumerate(messages) if message["role"] == "user"]


def drop_turns(messages: list[Message], count: int) -> list[Message]:
    """The messages without the oldest `count` turns; a system text before them stays."""
    if not count:
        return messages
    starts = _turn_starts(messages)
    return messages[: starts[0]] + messages[starts[count] :]


def turns_to_drop(
    messages: list[Message],
    room: int,
    num_tokens: Callable[[str], float],
    encode: Callable[[list[Message]], list[int] | None],
) -> int:
    """The fewest of the oldest turns to drop so that the rest has at most `room` tokens.

    `num_tokens` counts a text's tokens; `encode` returns the ids of a prompt, None if they are too
    many. Each turn is tokenized once at most, and a few prompts of about the right length: a
    search over whole prompts would tokenize a long history again and again.
    """

    def fits(dropped: int) -> bool:
        ids = encode(drop_turns(messages, dropped))
        return ids is not None and len(ids) <= room

    most = max(0, len(_turn_starts(messages)) - 1)
    return first_that_fits(most, min(most, _estimate(messages, room, num_tokens)), fits)


def _estimate(messages: list[Message], room: int, num_tokens: Callable[[str], float]) -> int:
    """How many turns to drop by the texts alone, without what the prompt format adds."""
    starts = _turn_starts(messages)
    total = 0.0
    for i in reversed(range(len(messages))):
        total += num_tokens(messages[i]["content"])
        if total > room:
            return bisect_left(starts, i + 1)
    return 0


def first_that_fits(most: int, guess: int, fits: Callable[[int], bool]) -> int:
    """The first number below `most` that fits, else `most`; found in growing steps from a guess.

    `fits` is false up to some number and true from there on.
    """
    low, high, step = 0, guess, 1
    if guess < most and not fits(guess):
        low, high = guess + 1, guess + 1
        while high < most and not fits(high):
            low, high, step = high + 1, min(most, high + step), 2 * step
    else:
        while (lower := guess - step) >= 0 and fits(lower):
            high, step = lower, 2 * step
        low = max(0, lower + 1)
    return bisect_left(range(most), True, low, high, key=fits)
