"""What a generation_config.json wishes: honoured, or said in the start log."""

import asyncio
import logging
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from engine.errors import StartError
from engine.loading import load
from engine.model import ChatModel
from engine.prompt.generation_defaults import checkpoint_defaults, known_ends, log_wishes
from tests.conftest import byte_tokenizer, tiny_llama

USER = [{"role": "user", "content": "hi"}]


def wishing(folder, **wishes: object) -> ChatModel:
    model = tiny_llama()
    torch.nn.init.normal_(model.lm_head.weight)  # so that no token is nearly as likely as the first
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=256, **wishes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load(folder, dtype="float32", cache_memory="1MiB")


async def said_of(model: ChatModel, given: dict[str, object]) -> list[int]:
    prompt = model.prepare(USER, {"logprobs": 0, **given})
    return [delta.token.id async for delta in model.answer(prompt) if delta.token]


def likeliest(folder) -> int:
    """What an unbidden model says first."""
    model = wishing(folder)
    first = asyncio.run(said_of(model, {"max_new_tokens": 1}))[0]
    model.close()
    return first


@pytest.mark.parametrize("wish", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids"])
def test_tokens_never_to_be_said_are_those_of_generate(tmp_path, wish):
    first = likeliest(tmp_path)
    listed = [[first]] if wish == "bad_words_ids" else [first]
    model = wishing(tmp_path, **{wish: listed})
    ours = asyncio.run(said_of(model, {"max_new_tokens": 6, "logit_bias": ((first, 5.0),)}))
    plain = asyncio.run(said_of(model, {"max_new_tokens": 6}))
    model.close()
    assert ours[0] != first
    ids = torch.tensor([model.encode(USER)])
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "pad_token_id": 0}
    assert own.generate(ids, **more)[0, ids.shape[1] :].tolist() == plain


def test_stop_strings_hold_beside_those_of_a_request(tmp_path):
    first = likeliest(tmp_path)
    model = wishing(tmp_path, stop_strings=["never", byte_tokenizer().decode([first])])

    async def text(given: dict[str, object]) -> str:
        prompt = model.prepare(USER, {"max_new_tokens": 6, **given})
        return "".join([delta.text async for delta in model.answer(prompt)])

    assert [asyncio.run(text({"stop": stop})) for stop in ((), ("other",))] == ["", ""]
    model.close()


def test_least_length_bends_to_a_shorter_one_that_is_asked(tmp_path):
    model = wishing(tmp_path, min_new_tokens=5)
    assert model.prepare(USER, {"max_new_tokens": 9}).params.min_tokens == 5
    assert model.prepare(USER, {"max_new_tokens": 2}).params.min_tokens == 2
    model.close()


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"forced_eos_token_id": 256}, "forced_eos_token_id 256"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"),
        ({"bad_words_ids": [[1], [2, 3]]}, r"bad_words_ids \[\[2, 3\]\]"),
        ({"sequence_bias": [[[1], 2.0]]}, "sequence_bias"),
        ({"num_beams": 4}, "num_beams 4"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wish_that_is_not_done_is_in_the_log(caplog, wish, told):
    log_wishes(GenerationConfig(**wish))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert re.search(told, caplog.text)


def test_wish_for_nothing_is_not_in_the_log(caplog):
    log_wishes(GenerationConfig())
    log_wishes(GenerationConfig(num_beams=1, typical_p=1.0, no_repeat_ngram_size=0))
    assert not caplog.records


@pytest.mark.parametrize("wish", [{"suppress_tokens": "all"}, {"begin_suppress_tokens": [1.5]}])
def test_list_that_is_none_is_named(wish):
    with pytest.raises(StartError, match=f"{next(iter(wish))} .*no list of token ids"):
        checkpoint_defaults(GenerationConfig(**wish))


def test_ids_out_of_the_vocabulary_are_not_banned():
    wished = GenerationConfig(suppress_tokens=[-1, 5, 300])
    assert checkpoint_defaults(wished, vocabulary=260).suppress_tokens == (5,)


def test_ends_that_cannot_be_said_are_refused_only_if_all_are(caplog):
    assert known_ends({1, 2}, 3) == {1, 2}
    assert not caplog.records
    assert known_ends({2, 3}, 3) == {2}
    assert "3 ends an answer, and the last token of the model is 2" in caplog.text
    with pytest.raises(StartError, match="correct eos_token_id"):
        known_ends({3}, 3)
    assert known_ends(set(), 3) == set()
