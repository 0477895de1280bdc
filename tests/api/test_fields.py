"""A request means what it says: each field of the peers' is honoured, ignored, or refused.

The tables name fields of OpenAI, vLLM, SGLang, llama.cpp, transformers, TGI, Ollama and
OpenRouter, and what becomes of them here.
"""

import json

import httpx
import pytest

import api
from engine import ChatModel, InvalidInput, StartError
from serving import chat, classic, completions, request_model
from tests.conftest import byte_tokenizer, chat_model, ready, serve

HELLO = [{"role": "user", "content": "hi"}]
BODIES = {
    classic.ChatRequest: {"prompt": "hi"},
    chat.ChatCompletionRequest: {"messages": HELLO},
    completions.CompletionRequest: {"prompt": "hi"},
}
CALLS = tuple(BODIES)
CHAT, CHAT_COMPLETION, COMPLETION = CALLS
TOOLS = [{"type": "function", "function": {"name": "f"}}]
PATHS = ("/", "/v1/chat/completions", "/v1/completions")

# Every call has them.
HONOURED = {
    "model": "test",
    "stream": True,
    "max_length": 5,
    "max_new_tokens": 5,
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "n_predict": 5,
    "do_sample": False,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "repeat_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "seed": 5,
    "random_seed": 5,
    "stop": "x",
    "stop_strings": ["x"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "min_tokens": 2,
    "min_new_tokens": 2,
    "logit_bias": {"5": 1},
}
# Some have them; elsewhere they are refused, unless the second value is sent.
HONOURED_BY = {
    "history": ([["a", "b"]], [], {CHAT}),
    "system": ("x", None, {CHAT}),
    "truncate": (True, False, {CHAT}),
    "messages": (HELLO, None, {CHAT_COMPLETION}),
    "prompt": ("x", None, {CHAT, COMPLETION}),
    "n": (2, 1, {CHAT_COMPLETION, COMPLETION}),
    "logprobs": (True, False, {CHAT_COMPLETION, COMPLETION}),
    "top_logprobs": (2, 0, {CHAT_COMPLETION}),
    "response_format": ({"type": "json_object"}, {"type": "text"}, {CHAT_COMPLETION}),
    "chat_template_kwargs": ({"a": 1}, {}, {CHAT, CHAT_COMPLETION}),
    "continue_final_message": (True, False, {CHAT_COMPLETION}),
    "add_generation_prompt": (False, True, {CHAT_COMPLETION}),
    "prediction": ({"type": "content", "content": "x"}, None, {CHAT_COMPLETION}),
    "echo": (True, False, {COMPLETION}),
    "suffix": ("x", "", {COMPLETION}),
    "tools": (TOOLS, [], {CHAT_COMPLETION}),
    "tool_choice": ("required", "auto", {CHAT_COMPLETION}),
    "reasoning_budget": (5, None, {CHAT_COMPLETION}),
}
# One has them, and for the others they cannot change an answer.
IGNORED_BY_OTHERS = {"parallel_tool_calls": {CHAT_COMPLETION}}
IGNORED = [
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "priority", "request_id", "rid", "cache_prompt",
    "id_slot", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
    "xtc_threshold", "mirostat_tau", "mirostat_eta", "adaptive_decay", "use_cache",
    "low_memory", "pad_token_id", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "keep_alive",
]  # fmt: skip
# What asks for something is refused, what asks for nothing is not.
REFUSED_UNLESS = {
    "adaptive_target": (0.5, -1),
    "background": (True, False),
    "bad_words": (["x"], []),
    "bad_words_ids": ([[5]], []),
    "begin_suppress_tokens": ([5], []),
    "best_of": (2, 1),
    "decoder_input_details": (True, False),
    "details": (True, False),
    "detokenize": (False, True),
    "diversity_penalty": (0.5, 0),
    "documents": ([{"text": "x"}], []),
    "dry_multiplier": (0.8, 0.0),
    "dynatemp_exponent": (2, 1),
    "dynatemp_range": (0.5, 0),
    "early_stopping": (True, False),
    "encoder_no_repeat_ngram_size": (3, 0),
    "encoder_repetition_penalty": (1.2, 1.0),
    "epsilon_cutoff": (0.1, 0),
    "eta_cutoff": (0.1, 0),
    "function_call": ({"name": "f"}, "none"),
    "functions": ([{"name": "f"}], []),
    "grammar": ('root ::= "x"', ""),
    "grammar_lazy": (True, False),
    "grammar_triggers": ([{"type": 0}], []),
    "guidance_scale": (1.5, 1),
    "image_data": ([{"id": 1}], []),
    "include": (["x"], []),
    "include_reasoning": (False, True),
    "include_stop_str_in_output": (True, False),
    "json_schema": ({"type": "object"}, {}),
    "length_penalty": (0.5, 1.0),
    "logits_processors": (["x"], []),
    "lora": ([{"id": 0}], []),
    "min_keep": (3, 0),
    "min_length": (3, 0),
    "mirostat": (2, 0),
    "mm_processor_kwargs": ({"a": 1}, {}),
    "modalities": (["audio"], ["text"]),
    "n_discard": (1, 0),
    "n_indent": (2, 0),
    "n_keep": (5, 0),
    "n_probs": (3, 0),
    "no_repeat_ngram_size": (3, 0),
    "num_beam_groups": (2, 1),
    "num_beams": (2, 1),
    "num_return_sequences": (2, 1),
    "output_attentions": (True, False),
    "output_hidden_states": (True, False),
    "output_logits": (True, False),
    "output_scores": (True, False),
    "parameters": ({"temperature": 0}, {}),
    "penalize_nl": (True, False),
    "penalty_alpha": (0.6, 0),
    "plugins": ([{"id": "web"}], []),
    "post_sampling_probs": (True, False),
    "preserved_tokens": (["x"], []),
    "raw_mode": (True, False),
    "reasoning_format": ("none", "auto"),
    "remove_invalid_values": (True, False),
    "renormalize_logits": (True, False),
    "repeat_last_n": (64, -1),
    "response_fields": (["content"], []),
    "return_dict_in_generate": (True, False),
    "return_full_text": (True, False),
    "return_hidden_states": (True, False),
    "return_progress": (True, False),
    "return_token_ids": (True, False),
    "return_tokens": (True, False),
    "return_tokens_as_token_ids": (True, False),
    "safe_prompt": (True, False),
    "samplers": (["top_k"], []),
    "separate_reasoning": (False, True),
    "sequence_bias": ([[[5], 1.0]], []),
    "skip_special_tokens": (False, True),
    "spaces_between_special_tokens": (False, True),
    "suppress_tokens": ([5], []),
    "t_max_predict_ms": (100, 0),
    "tfs_z": (0.5, 1.0),
    "thinking_forced_open": (True, False),
    "timings_per_token": (True, False),
    "token_healing": (True, False),
    "top_a": (0.2, 0),
    "top_n_sigma": (1.0, -1),
    "top_n_tokens": (5, 0),
    "transforms": (["middle-out"], []),
    "truncation": ("auto", "disabled"),
    "typ_p": (0.5, 1.0),
    "typical_p": (0.5, 1.0),
    "use_beam_search": (True, False),
    "verbosity": ("loud", "medium"),
    "watermark": (True, False),
    "xtc_probability": (0.5, 0.0),
}
REFUSED = [
    "tool_prompt",
    "adapter_id", "add_special_tokens", "allowed_token_ids", "assistant_early_exit",
    "assistant_lookbehind", "audio", "best_of_n", "bos_token_id", "cache_config",
    "cache_implementation", "cache_salt", "chat_format", "chat_template", "compile_config",
    "constraints", "context", "conversation", "custom_logit_processor", "custom_params",
    "decoder_start_token_id", "disable_compile", "dola_layers", "dola_decoding", "ebnf",
    "enable_thinking", "eos_token_id", "exponential_decay_length_penalty", "extra_body",
    "force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "format",
    "generation_config", "guided_choice", "guided_decoding_backend", "guided_grammar",
    "guided_json", "guided_regex", "guided_whitespace_pattern", "guideline", "images", "input",
    "input_embeds", "input_extra", "input_ids", "input_prefix", "input_suffix", "inputs",
    "instructions", "is_assistant", "kv_transfer_params", "logprob_start_len", "lora_path",
    "max_output_tokens", "max_thinking", "max_time", "max_tool_calls", "model_kwargs", "models",
    "n_cmpl", "no_stop_trim", "num_ctx", "num_gpu", "num_predict", "num_thread", "options",
    "prefill", "prompt_embeds", "prompt_logprobs", "prompt_template", "provider",
    "raw", "reasoning", "reasoning_effort", "regex", "return_logprob",
    "route", "sampling_params", "session_params", "stop_regex", "stream_reasoning",
    "stop_sequences", "structural_tag", "structured_outputs", "target_lookbehind", "template",
    "temprature", "text", "think", "thinking", "thinking_budget", "thinking_token_budget",
    "top_k_return_sequences", "top_h", "truncate_prompt_tokens", "vllm_xargs",
    "watermarking_config", "web_search_options", "xml", "zero_shot",
]  # fmt: skip


def refusal_of(call: type[request_model.SamplingFields], name: str, value: object) -> str | None:
    """Of which field a call says that it does not have it."""
    try:
        call.model_validate(BODIES[call] | {name: value})
    except InvalidInput as error:
        return error.argument if name in str(error) else f"unnamed: {error}"
    return None


def test_the_tables_name_more_than_two_hundred_fields():
    names = [*(*HONOURED, *HONOURED_BY, *IGNORED, *IGNORED_BY_OTHERS), *(*REFUSED_UNLESS, *REFUSED)]
    assert len(names) == len(set(names)) > 200


def test_every_field_of_the_calls_is_in_the_tables():
    """And none is honoured that they say is not."""
    for call in CALLS:
        by_some = {name for name, (_, _, calls) in HONOURED_BY.items() if call in calls}
        by_some |= {name for name, calls in IGNORED_BY_OTHERS.items() if call in calls}
        extra = {"stream_options"} & call.names().keys()
        assert set(call.names()) == set(HONOURED) | by_some | extra


@pytest.mark.parametrize("name", HONOURED)
def test_honoured_field_changes_the_request(name):
    for call in CALLS:
        plain = call.model_validate(BODIES[call])
        changed = call.model_validate(BODIES[call] | {name: HONOURED[name]})
        assert changed != plain
        assert name in ("model", "stream") or changed.overrides() != plain.overrides()


@pytest.mark.parametrize("name", HONOURED_BY)
def test_field_of_some_calls_is_refused_by_the_others(name):
    asks, nothing, calls = HONOURED_BY[name]
    for call in set(CALLS) - calls:
        assert refusal_of(call, name, asks) == name
        assert refusal_of(call, name, nothing) is None


@pytest.mark.parametrize("name", [*IGNORED, *IGNORED_BY_OTHERS])
def test_field_that_cannot_change_an_answer_is_ignored(name):
    for call in set(CALLS) - IGNORED_BY_OTHERS.get(name, set()):
        plain = call.model_validate(BODIES[call])
        for value in ("x", 5, True, {"a": "b"}, ["a"]):
            assert call.model_validate(BODIES[call] | {name: value}) == plain


@pytest.mark.parametrize("name", REFUSED_UNLESS)
def test_value_that_asks_for_nothing_is_accepted(name):
    asks, nothing = REFUSED_UNLESS[name]
    for call in CALLS:
        assert refusal_of(call, name, asks) == name
        assert refusal_of(call, name, nothing) is None
        assert refusal_of(call, name, None) is None


@pytest.mark.parametrize("name", REFUSED)
def test_other_field_is_refused_by_its_name(name):
    for call in CALLS:
        for value in ("x", 1, 0, True, False, [1]):
            assert refusal_of(call, name, value) == name
        assert refusal_of(call, name, None) is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("max_token", "did you mean 'max_tokens'?"),
        ("topk", "did you mean 'top_k'?"),
        ("enable_thinking", "chat_template_kwargs"),
        ("x" * 100_000, "x" * 64 + "… is not"),
        ("\ud800", "? is not supported"),
    ],
)
def test_a_refusal_says_what_to_send_instead(name, remedy):
    for call in CALLS:
        with pytest.raises(InvalidInput) as refusal:
            call.model_validate(BODIES[call] | {name: 1})
        assert remedy in str(refusal.value)
        assert len(str(refusal.value)) < 200


def test_true_is_no_one_and_false_no_zero():
    assert refusal_of(CHAT, "n", True) == "n"
    assert refusal_of(CHAT, "top_logprobs", False) == "top_logprobs"
    assert refusal_of(CHAT, "logprobs", 0) == "logprobs"


# ---- Names and values that others define


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {}),
        ({"max_tokens": -1}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"n_predict": 7}, {"max_new_tokens": 7}),
        ({"max_tokens": 7, "max_completion_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_tokens": None, "max_completion_tokens": 7}, {"max_new_tokens": 7}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": ((5, -100.0), (7, 1.5))}),
        ({"logit_bias": {}}, {"logit_bias": ()}),
        ({"stop_token_ids": [3, 5]}, {"stop_token_ids": (3, 5)}),
    ],
)
def test_synonyms_and_sentinels(call, sent, meant):
    assert call.model_validate(BODIES[call] | sent).overrides() == meant


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 7, "max_completion_tokens": 8}, "max_completion_tokens"),
        ({"repeat_penalty": 1.5, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"do_sample": True, "temperature": 0}, "do_sample"),
        ({"n_predict": 0}, "n_predict"),
    ],
)
def test_contradictions_are_refused(call, body, param):
    with pytest.raises(InvalidInput) as refusal:
        call.model_validate(BODIES[call] | body)
    assert refusal.value.argument == param


def ask(server: str, path: str, **fields: object) -> httpx.Response:
    body = {"messages": HELLO} if "chat" in path else {"prompt": "hi"}
    return httpx.post(server + path, json=body | fields)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    body = response.json()
    if "response" in body:
        return body["response"]
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", PATHS)
def test_without_a_limit_an_answer_may_fill_the_context(server, runner, path):
    ask(server, path, max_tokens=-1)
    assert runner.samplings[-1].max_new_tokens == 512 - len(runner.prompts[-1])


@pytest.mark.parametrize("path", PATHS)
def test_logit_bias_moves_the_tokens(server, tokenizer, path):
    e, u = tokenizer.encode("eu", add_special_tokens=False)
    biases = {str(e): -100, str(u): 60}
    assert text_of(ask(server, path, logit_bias=biases, temperature=0)) == "hullo"


@pytest.mark.parametrize("path", PATHS)
def test_ignore_eos_goes_on_to_the_length(server, path):
    assert text_of(ask(server, path, ignore_eos=True, max_tokens=9)).startswith("hello")
    usage = ask(server, path, ignore_eos=True, max_tokens=9).json()["usage"]
    assert usage["completion_tokens"] == 9


@pytest.mark.parametrize("path", PATHS)
def test_min_tokens_holds_back_the_end(server, path):
    usage = ask(server, path, min_tokens=8, max_tokens=9).json()["usage"]
    assert usage["completion_tokens"] >= 8


@pytest.mark.parametrize("path", PATHS)
def test_stop_token_ids_end_the_answer(server, tokenizer, path):
    ids = tokenizer.encode("o", add_special_tokens=False)
    assert text_of(ask(server, path, stop_token_ids=ids)) == "hell"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"260": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": -101}}, "logit_bias"),
        ({"stop_token_ids": [260]}, "stop_token_ids"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_new_tokens": 6, "max_tokens": 5}, "min_new_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_bad_restriction_is_refused_by_its_name(server, runner, path, fields, param):
    response = ask(server, path, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not runner.steps


def test_a_model_of_another_name_is_refused_everywhere(server):
    for path in PATHS:
        assert ask(server, path, model="other").status_code == 404
        assert ask(server, path, model="test").status_code == 200


# ---- Variables of the chat template

THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}{% endif %}"
)


@pytest.fixture
def switchable():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    return tokenizer


@pytest.mark.parametrize("path", PATHS[:2])
def test_template_variables_reach_the_template(runner, switchable, path):
    with serve(lambda settings: chat_model(runner, switchable)) as url:
        ask(ready(url), path, chat_template_kwargs={"enable_thinking": False})
        ask(url, path, chat_template_kwargs={"enable_thinking": True})
        ends = [switchable.decode(ids[-1:]) for ids in runner.prompts]
        assert ends == ["!", "<|assistant|>"]
        for given in ({"no_such": 1}, {"messages": []}, {"add_generation_prompt": False}):
            refused = ask(url, path, chat_template_kwargs=given)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "chat_template_kwargs"


def test_template_variables_of_the_server_hold_where_a_request_sets_none(runner, switchable):
    def load(settings: api.Settings) -> ChatModel:
        return api.with_template_kwargs(
            chat_model(runner, switchable), json.loads(settings.chat_template_kwargs)
        )

    with serve(load, chat_template_kwargs='{"enable_thinking": false}') as url:
        ask(ready(url), "/")
        ask(url, "/v1/chat/completions", chat_template_kwargs={"enable_thinking": True})
        assert [switchable.decode(ids[-1:]) for ids in runner.prompts] == ["!", "<|assistant|>"]


def test_template_variables_that_the_template_lacks_are_told_at_start(runner, switchable):
    with pytest.raises(StartError, match=r"--chat-template-kwargs.*'no_such'"):
        api.with_template_kwargs(chat_model(runner, switchable), {"no_such": 1})


@pytest.mark.parametrize("given", ["x", "[1]", '{"a":', "false"])
def test_template_variables_that_are_no_object_are_refused(given):
    with pytest.raises(SystemExit, match="--chat-template-kwargs: must be a JSON object"):
        api.read_settings(["--chat-template-kwargs", given])
