"""Old names and shapes stop at the schema; what it does not honour it refuses."""

import time
from contextlib import suppress

import pytest
from pydantic import ValidationError

from engine import InvalidInput
from engine.sampling_params import SamplingParams
from engine.sequence import Delta
from serving import chat, classic, completions, fields, parts, request_model, tokens


def test_the_old_names_mean_new_tokens():
    for name in request_model.LENGTH_NAMES:
        request = classic.ChatRequest.model_validate({"prompt": "x", name: 7})
        assert request.overrides() == {"max_new_tokens": 7}


def test_a_null_beside_a_length_is_no_length():
    """Whichever name is looked for first."""
    for null in request_model.LENGTH_NAMES:
        for name in set(request_model.LENGTH_NAMES) - {null}:
            request = classic.ChatRequest.model_validate({"prompt": "x", null: None, name: 5})
            assert request.overrides() == {"max_new_tokens": 5}


def test_only_what_was_given_overrides():
    assert classic.ChatRequest(prompt="x").overrides() == {}
    body = {"prompt": "x", "temperature": 0, "top_k": 0, "top_p": 0.0, "seed": None}
    request = classic.ChatRequest.model_validate(body)
    assert request.overrides() == {"temperature": 0, "top_k": 0, "top_p": 0.0}


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (classic.ChatRequest, {"prompt": "x", "history": [[]] * 1000}),
        (classic.ChatRequest, {"prompt": "x", "history": [[1] * 1000]}),
        (classic.ChatRequest, {"prompt": "x", "history": [[1, 1]] * 1000}),
        (classic.ChatRequest, {"prompt": "x", "stop": [1] * 1000}),
        (classic.ChatRequest, {"prompt": "x", "stop": ["x" * 257] * 16}),
        (classic.ChatRequest, {"prompt": "x", "stop": ["\ud800"] * 16}),
        (completions.CompletionRequest, {"prompt": [[1, "a"] * 1000]}),
        (completions.CompletionRequest, {"prompt": ["a"] * 1000}),
        (chat.ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (chat.ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
        (classic.ChatRequest, {"prompt": "x", "history": [{}] * 1000}),
        (chat.ChatCompletionRequest, {"messages": [1] * 1000}),
    ],
)
def test_of_many_mistakes_the_first_is_looked_for(schema, body):
    """A body has room for millions, and each would be made into an object."""
    with pytest.raises(ValidationError) as refusal:
        schema.model_validate(body)
    assert refusal.value.error_count() <= 2  # of one item


TURN = {"role": "user", "content": "a"}
ENOUGH = {
    classic.ChatRequest: {"prompt": "x"},
    chat.ChatCompletionRequest: {"messages": [TURN]},
    completions.CompletionRequest: {"prompt": "x"},
    tokens.TokenizeRequest: {"prompt": "x"},
    tokens.DetokenizeRequest: {"tokens": [1]},
}


@pytest.mark.parametrize(
    ("schema", "field", "turn"),
    [
        (classic.ChatRequest, "history", ["a", "b"]),
        (classic.ChatRequest, "history", TURN),
        (chat.ChatCompletionRequest, "messages", TURN),
    ],
)
def test_of_turns_there_may_be_so_many(schema, field, turn):
    """Each costs far more in a template than its bytes in a body."""
    schema.model_validate({**ENOUGH[schema], field: [turn] * fields.MAX_TURNS})
    with pytest.raises(ValidationError) as refusal:
        schema.model_validate({**ENOUGH[schema], field: [turn] * 300_000})
    told = request_model.validation_error(refusal.value)
    assert str(told) == f"{field} must have at most 4096 items, not 300000"
    assert told.argument == field


def test_millions_of_ids_are_checked_soon():
    """The event loop waits while they are."""
    started = time.thread_time()
    for ids in ([1] * 4_000_000, [*[1] * 4_000_000, -1]):
        with suppress(ValidationError):
            completions.CompletionRequest.model_validate({"prompt": ids})
    assert time.thread_time() - started < 1


def test_half_a_character_is_looked_for_soon():
    started = time.thread_time()
    assert classic.ChatRequest(prompt="你" * 8_000_000)
    assert time.thread_time() - started < 0.4


@pytest.mark.parametrize(
    ("schema", "field", "value"),
    [
        (classic.ChatRequest, "logit_bias", {str(i): 1 for i in range(301)}),
        (classic.ChatRequest, "stop_token_ids", [1] * 257),
        (classic.ChatRequest, "chat_template_kwargs", {"a": "x" * 2**14}),
        (completions.CompletionRequest, "prompt", ["a"] * 65),
        (tokens.TokenizeRequest, "prompt", "x" * (2**20 + 1)),
        (tokens.DetokenizeRequest, "tokens", [1] * (2**20 + 1)),
        (
            chat.ChatCompletionRequest,
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}],
        ),
    ],
)
def test_every_list_and_text_has_a_limit(schema, field, value):
    with pytest.raises(ValidationError) as refusal:
        schema.model_validate({**ENOUGH[schema], field: value})
    assert refusal.value.error_count() == 1
    told = request_model.validation_error(refusal.value)
    assert told.argument == field
    assert "at most" in str(told)


def test_a_sign_of_life_does_not_undo_an_ending():
    choice = parts.Choice(0)
    choice.add(Delta("hi", finish_reason="length", prompt_tokens=3, completion_tokens=2))
    choice.add(Delta(""))
    assert (choice.text, choice.finish_reason) == ("hi", "length")
    assert parts.usage_of([choice])["completion_tokens"] == 2


@pytest.mark.parametrize("stop", ["END", ["END"]])
def test_a_stop_is_one_text_or_several(stop):
    assert classic.ChatRequest(prompt="x", stop=stop).overrides() == {"stop": ("END",)}


@pytest.mark.parametrize("history", [None, []])
def test_no_history_is_a_first_turn(history):
    request = classic.ChatRequest(prompt="x", history=history)
    assert request.messages() == [{"role": "user", "content": "x"}]
    assert request.with_answer("y") == [["x", "y"]]


def test_pairs_come_back_as_pairs():
    request = classic.ChatRequest(prompt="c", history=[["a", "b"]])
    assert request.messages() == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert request.with_answer("d") == [["a", "b"], ["c", "d"]]


def test_messages_come_back_as_messages():
    past = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    request = classic.ChatRequest.model_validate({"prompt": "c", "history": past})
    assert request.messages() == [*past, {"role": "user", "content": "c"}]
    assert request.with_answer("d") == [
        *past,
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_a_system_text_comes_first():
    request = classic.ChatRequest(prompt="x", history=[["a", "b"]], system="be brief")
    assert request.messages()[0] == {"role": "system", "content": "be brief"}


def test_two_system_texts_are_refused():
    body = {"prompt": "x", "system": "s", "history": [{"role": "system", "content": "t"}]}
    with pytest.raises(InvalidInput, match="system"):
        classic.ChatRequest.model_validate(body)


def test_every_sampling_parameter_can_be_asked_for():
    """A parameter is declared twice, here and in SamplingParams, and the two agree."""
    own = {"suppress_tokens", "begin_suppress_tokens"}  # a checkpoint's own wishes
    parameters = set(SamplingParams.__dataclass_fields__) - {"logprobs", "prompt_logprobs"} - own
    # How much is told of an answer is each call's own matter, as whether it streams is.
    others = {"model", "stream", "do_sample"}
    assert parameters == set(request_model.SamplingFields.model_fields) - others


@pytest.mark.parametrize("history", ["ab", ["ab"], [["a"]], [["a", "b", "c"]], [["a", 1]], {}])
def test_a_history_of_another_shape_is_refused(history):
    with pytest.raises(ValidationError):
        classic.ChatRequest.model_validate({"prompt": "x", "history": history})
