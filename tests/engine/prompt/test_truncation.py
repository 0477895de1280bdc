"""The fewest turns are dropped, and little is tokenized to find them."""

import random

import pytest

from engine.prompt.truncation import drop_turns, first_that_fits, turns_to_drop


@pytest.mark.parametrize("most", [0, 1, 2, 7, 20])
def test_first_that_fits_is_found_from_any_guess(most):
    for guess in range(most + 1):
        for first in range(most + 1):
            fits = [n >= first for n in range(most)]
            assert first_that_fits(most, guess, fits.__getitem__) == first


def conversation(lengths: list[int]) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "s"}]
    for length in lengths:
        turns.append({"role": "user", "content": "u" * length})
        turns.append({"role": "assistant", "content": "a" * length})
    return [*turns, {"role": "user", "content": "q"}]


class Counting:
    """A character is a token, and each message takes `overhead` more."""

    def __init__(self, overhead: int):
        self.overhead, self.spent = overhead, 0

    def num_tokens(self, text: str) -> int:
        self.spent += len(text)
        return len(text)

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        length = sum(len(m["content"]) + self.overhead for m in messages)
        self.spent += length
        return [0] * length


@pytest.mark.parametrize("overhead", [0, 1, 30])
def test_fewest_turns_are_dropped(overhead):
    chance = random.Random(overhead)
    for _ in range(100):
        messages = conversation([chance.randrange(40) for _ in range(chance.randrange(30))])
        turns = sum(m["role"] == "user" for m in messages)
        room = chance.randrange(400)
        counting = Counting(overhead)
        dropped = turns_to_drop(messages, room, counting.num_tokens, counting.encode)
        fitting = [n for n in range(turns) if len(counting.encode(drop_turns(messages, n))) <= room]
        assert dropped == (fitting[0] if fitting else turns - 1)


def test_long_history_is_not_tokenized_again_and_again():
    messages = conversation([500] * 2000)
    counting = Counting(5)
    assert turns_to_drop(messages, 8000, counting.num_tokens, counting.encode) == 2000 - 7
    assert counting.spent < 8 * 8000
