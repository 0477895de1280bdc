"""A prompt is prepared: its length, its turns."""

import threading

import pytest

from engine.errors import ContextTooLong
from engine.prompt.families import Message


def turns(*lengths: int) -> list[Message]:
    """A conversation whose turns have so many characters, each a token, in each message."""
    roles = ("user", "assistant")
    return [{"role": role, "content": "x" * n} for n in lengths for role in roles][:-1]


def test_default_length_is_cut_to_the_context(make, runner):
    model = make(runner, context_length=100)
    prompt = model.prepare(turns(50), {}, False)
    assert prompt.params.max_new_tokens == 100 - len(prompt.ids)


def test_length_that_does_not_fit_is_refused_with_both_numbers(make, runner):
    model = make(runner, context_length=100)
    with pytest.raises(ContextTooLong, match=r"100 tokens.*53 tokens.*48") as refusal:
        model.prepare(turns(50), {"max_new_tokens": 48}, False)
    assert refusal.value.argument == "max_new_tokens"
    with pytest.raises(ContextTooLong) as refusal:
        model.prepare(turns(100), {}, False)
    assert refusal.value.argument == "prompt"


def test_truncate_drops_as_few_old_turns_as_it_can(make, runner):
    model = make(runner, context_length=100)
    messages = [{"role": "system", "content": "s"}, *turns(10, 10, 10, 10)]
    for answer, dropped in ((12, 0), (13, 1), (36, 1), (60, 2), (84, 3)):
        prompt = model.prepare(messages, {"max_new_tokens": answer}, True)
        assert prompt.dropped_turns == dropped, answer
        assert model.tokenizer.special["<|system|>"] in prompt.ids
    with pytest.raises(ContextTooLong):
        model.prepare(messages, {"max_new_tokens": 90}, True)


def test_truncate_keeps_what_fits_beside_a_default_length(make, runner):
    model = make(runner, context_length=200)
    prompt = model.prepare(turns(10, 10, 10), {}, True)
    assert (prompt.dropped_turns, prompt.params.max_new_tokens) == (0, 200 - len(prompt.ids))


def test_prepare_is_thread_safe(make, runner):
    model = make(runner)
    expected = model.prepare(turns(50), {}, False).ids
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.extend(model.prepare(turns(50), {}, False).ids for _ in range(50))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 400
