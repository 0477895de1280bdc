"""/v1/completions: the caller writes the whole prompt, and may want it scored."""

import httpx
import openai
import pytest
import torch

from engine.runner.create import create_runner
from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model, ready, serve, tiny_llama

TEXT = "/v1/completions"
INFILL = ["<|end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|assistant|>", "<|user|>"]


@pytest.fixture(scope="module")
def scorer(tokenizer):
    """A live server on a tiny model with random weights, and the same model again."""
    with serve(lambda settings: chat_model(create_runner(tiny_llama(), "4MiB"), tokenizer)) as url:
        yield ready(url), tiny_llama()


def ask(url: str, **fields: object) -> dict:
    response = httpx.post(url + TEXT, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(url: str, **fields: object) -> dict:
    response = httpx.post(url + TEXT, json=fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def log_softmax(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


# ---- A prompt that is repeated and scored


def test_echo_repeats_the_prompt(server):
    assert ask(server, prompt="abc ", echo=True)["choices"][0]["text"] == "abc hello"
    answer = ask(server, prompt="abc ", echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "abc "
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 4


def test_echo_of_token_ids_is_their_text(server, tokenizer):
    ids = tokenizer.encode("abc<|end|>", add_special_tokens=False)
    assert ask(server, prompt=ids, echo=True)["choices"][0]["text"] == "abc<|end|>hello"


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_scores_of_a_prompt_are_the_models_own(scorer, tokenizer, max_tokens):
    url, model = scorer
    ids = tokenizer.encode("What is it?", add_special_tokens=False)
    how = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0}
    answer = ask(url, prompt=ids, ignore_eos=True, **how)
    logprobs = answer["choices"][0]["logprobs"]
    lengths = {len(logprobs[name]) for name in logprobs}
    assert lengths == {len(ids) + max_tokens}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    wanted = log_softmax(model, ids)
    chosen = [float(row[i]) for row, i in zip(wanted, ids[1:], strict=False)]
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(chosen, abs=1e-3)
    for row, likeliest in zip(wanted, logprobs["top_logprobs"][1:], strict=False):
        assert max(likeliest.values()) == pytest.approx(float(row.max()), abs=1e-3)
    assert answer["usage"]["completion_tokens"] == max_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_tokens_fit_the_text(scorer, tokenizer, stream):
    """Of a character that takes several tokens too."""
    url, _ = scorer
    (x,) = tokenizer.encode("x", add_special_tokens=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="test",
            prompt="a你b",
            echo=True,
            logprobs=1,
            max_tokens=3,
            logit_bias={str(x): 100},
            stream=stream,
        )
        parts = [part.choices[0] for part in (answer if stream else [answer])]
    assert "".join(part.text for part in parts) == "a你bxxx"
    told = [part.logprobs for part in parts if part.logprobs]
    assert [at for each in told for at in each.text_offset] == [0, 1, 1, 1, 2, 3, 4, 5]
    assert [p is None for each in told for p in each.token_logprobs] == [True] + [False] * 7


def test_a_scored_prompt_has_a_first_token_of_its_own_in_each_answer(scorer):
    url, _ = scorer
    answer = ask(url, prompt="ab", echo=True, logprobs=0, n=2, max_tokens=1, ignore_eos=True)
    for choice in answer["choices"]:
        assert choice["text"].startswith("ab")
        assert choice["logprobs"]["tokens"][:2] == ["a", "b"]
        assert len(choice["logprobs"]["tokens"]) == 3
        assert choice["logprobs"]["token_logprobs"][0] is None


def test_up_to_twenty_logprobs(scorer):
    url, _ = scorer
    answer = ask(url, prompt="x", logprobs=20, max_tokens=1, ignore_eos=True)
    (likeliest,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    # Parts of characters, which this tokenizer has by the hundred, are all spelled alike.
    assert 5 < len(likeliest) <= 20
    assert likeliest == dict(sorted(likeliest.items(), key=lambda item: -item[1]))


def test_logprobs_false_asks_for_none(server):
    assert ask(server, prompt="x", logprobs=False)["choices"][0]["logprobs"] is None


# ---- Several prompts


@pytest.mark.parametrize("as_ids", [False, True])
def test_answers_to_several_prompts_are_those_to_each(scorer, tokenizer, as_ids):
    url, _ = scorer
    prompts = ["ab", "what?", "xyz " * 5]
    if as_ids:
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in prompts]
    how = {"max_tokens": 6, "temperature": 1.5, "seed": 3, "n": 2, "ignore_eos": True}
    several = ask(url, prompt=prompts, **how)
    alone = [ask(url, prompt=prompt, **how) for prompt in prompts]
    assert [choice["index"] for choice in several["choices"]] == list(range(6))
    texts = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert [choice["text"] for choice in several["choices"]] == texts
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert several["usage"][name] == sum(answer["usage"][name] for answer in alone)


def test_several_prompts_stream_by_turns(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        texts = ["", "", ""]
        for chunk in client.completions.create(
            model="test", prompt=["a", "b", "c"], stream=True, echo=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["ahello", "bhello", "chello"]


def test_several_prompts_are_one_batch(server, runner):
    ask(server, prompt=["a", "b", "c", "d"])
    assert max(map(len, runner.steps)) == 4


def test_several_prompts_need_one_place_in_the_queue(runner, tokenizer):
    with serve(lambda settings: chat_model(runner, tokenizer, max_waiting=1)) as url:
        assert len(ask(ready(url), prompt=["a"] * 64)["choices"]) == 64


def test_every_one_of_several_prompts_is_checked(server, runner):
    assert refusal(server, prompt=["a", ""])["param"] == "prompt"
    assert refusal(server, prompt=["a", "x" * 600])["code"] == "context_length_exceeded"
    assert refusal(server, prompt=[[1], [260]])["param"] == "prompt"
    assert refusal(server, prompt=["a"] * 64, n=3)["param"] == "n"
    assert not runner.steps


# ---- What is missing in a text


@pytest.fixture
def coder():
    """A live server whose model can fill in, and what it is given."""
    tokenizer = byte_tokenizer(INFILL)
    runner = ScriptedRunner(tokenizer)
    runner.vocabulary = len(tokenizer)
    with serve(lambda settings: chat_model(runner, tokenizer)) as url:
        yield ready(url), runner, tokenizer


def test_suffix_asks_for_what_is_missing(coder):
    url, runner, tokenizer = coder
    answer = ask(url, prompt="def f(<|end|>", suffix="):")
    assert answer["choices"][0]["text"] == "hello"
    wanted = "<fim_prefix>def f(<|end|><fim_suffix>):<fim_middle>"
    assert tokenizer.decode(runner.prompts[-1]) == wanted
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in runner.prompts[-1]


def test_any_special_token_ends_what_is_filled_in(coder):
    url, runner, _ = coder
    runner.say = "ab<|user|>cd"
    assert ask(url, prompt="x", suffix="y")["choices"][0]["text"] == "ab"


def test_empty_suffix_asks_for_the_end_or_for_nothing(coder, server, runner, tokenizer):
    url, coding, other = coder
    ask(url, prompt="x", suffix="")
    assert other.decode(coding.prompts[-1]) == "<fim_prefix>x<fim_suffix><fim_middle>"
    ask(server, prompt="x", suffix="")
    assert tokenizer.decode(runner.prompts[-1]) == "x"


def test_suffix_is_refused_by_a_model_that_cannot_fill_in(server):
    error = refusal(server, prompt="x", suffix="y")
    assert error["param"] == "suffix"
    assert "cannot fill in" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "y", "prompt": [1]}, "suffix"),
        ({"suffix": "y", "echo": True}, "echo"),
        ({"suffix": 1}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_bad_field_is_refused_by_its_name(server, fields, param):
    assert refusal(server, **{"prompt": "x"} | fields)["param"] == param
