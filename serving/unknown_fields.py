"""What a field means that a call does not have: nothing, or a refusal that names it.

A request means what it says. A field that would change the answer is honoured (it is declared in
schemas.py) or refused. Ignored is only what cannot change an answer, and accepted are values of
other servers' fields that ask for nothing. Whatever is in no table here is refused, so a new
sampling parameter of somebody's cannot slip by.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from engine import InvalidInput

# They name the caller, or how the work is done; the answer is the same with and without them.
IGNORED = frozenset({
    # OpenAI
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "parallel_tool_calls", "stream_options",
    # vLLM and SGLang
    "priority", "request_id", "rid",
    # llama.cpp; the later ones only matter with values of others that are refused
    "cache_prompt", "id_slot", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "xtc_threshold", "mirostat_tau", "mirostat_eta", "adaptive_decay",
    # transformers
    "use_cache", "low_memory", "pad_token_id", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    # Ollama
    "keep_alive",
})  # fmt: skip

# The values that ask for nothing, beside null, of fields that would change an answer.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    # vLLM and SGLang
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "chat_template_kwargs": ({},),
    "history": ([],),
    "tool_prompt": (),
    "truncate": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "chat_template": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structured_outputs": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "ebnf": (),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # llama.cpp
    "adaptive_target": (-1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "dynatemp_exponent": (1,),
    "grammar": ("",),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "image_data": ([],),
    "json_schema": ({},),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "penalize_nl": (False,),
    "post_sampling_probs": (False,),
    "preserved_tokens": ([],),
    "reasoning_format": ("auto", "deepseek"),
    "repeat_last_n": (-1,),
    "response_fields": ([],),
    "return_progress": (False,),
    "return_tokens": (False,),
    "samplers": ([],),
    "t_max_predict_ms": (0, -1),
    "tfs_z": (1,),
    "thinking_forced_open": (False,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1, 0),
    "typ_p": (1,),
    "xtc_probability": (0,),
    # transformers
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "return_dict_in_generate": (False,),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "typical_p": (1,),
    # TGI, OpenRouter and others
    "adapter_id": (),
    "decoder_input_details": (False,),
    "details": (False,),
    "parameters": ({},),
    "plugins": ([],),
    "raw_mode": (False,),
    "return_full_text": (False,),
    "safe_prompt": (False,),
    "top_a": (0,),
    "top_n_tokens": (0,),
    "transforms": ([],),
    "watermark": (False,),
}

# Wishes of style that only OpenAI's own models were trained to: the answer does without them, and
# the client is told so.
_REPORTED = {"verbosity": ("low", "high")}

# Where the way to ask for it is another, and no misspelling.
_REMEDIES = {
    "messages": "call /v1/chat/completions, or send prompt",
    "prompt": "send messages",
    "inputs": "send prompt",
    "enable_thinking": 'send "chat_template_kwargs": {"enable_thinking": …}',
    "thinking": 'send "chat_template_kwargs", as the model\'s chat template has it',
    "reasoning_effort": 'send "chat_template_kwargs", as the model\'s chat template has it',
    "guided_json": 'call /v1/chat/completions with "response_format"',
    "structured_outputs": 'call /v1/chat/completions with "response_format"',
    "json_schema": 'call /v1/chat/completions with "response_format"',
    "response_format": "call /v1/chat/completions",
    "tools": "call /v1/chat/completions",
    "tool_choice": "call /v1/chat/completions",
    "functions": "call /v1/chat/completions with tools",
    "function_call": "call /v1/chat/completions with tool_choice",
    "num_return_sequences": "call /v1/chat/completions with n",
    "max_output_tokens": "send max_tokens",
    "num_predict": "send max_tokens",
    "bad_words": "send logit_bias",
}
# A name is shown and compared no further.
MAX_NAME = 64


_MAX_IGNORED = 64  # different ones in a body


@dataclass
class IgnoredFields:
    """The fields of a body that wish for what the answer does without, by their names.

    Where the client asks for strict handling (RFC 7240), such a wish is refused instead.
    """

    strict: bool = False
    names: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return name in self.names

    def add(self, name: str) -> None:
        """Note a field. Raises InvalidInput in strict handling, or if there are very many."""
        if name in self.names:
            return
        shown = printable(name)
        if self.strict:
            raise InvalidInput(
                f"{shown} is not supported, and Prefer: handling=strict asks to be told; leave it"
                " out",
                shown.partition(".")[0],
            )
        if len(self.names) == _MAX_IGNORED:
            raise InvalidInput(f"there are more than {_MAX_IGNORED} unknown fields", shown)
        self.names.append(name)


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field that the call does not have may be left out without changing the answer."""
    if value is None or name in IGNORED:
        return True
    # True is no 1, and False no 0.
    neutral = (each for each in NEUTRAL.get(name, ()) if _is_bool(each) is _is_bool(value))
    return any(value == each for each in neutral)


def is_reported(name: str, value: Any) -> bool:
    """Whether a field wishes for what is left out and told, instead of being refused."""
    return value in _REPORTED.get(name, ())


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def printable(name: str) -> str:
    """A name as an error may show it, in which half a surrogate pair could not be encoded."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= MAX_NAME else name[:MAX_NAME] + "…"


def refusal_of(name: str, honoured: Collection[str]) -> InvalidInput:
    """What to say of a field that a call does not have, and does have `honoured` instead of."""
    shown = printable(name)
    if remedy := _REMEDIES.get(name):
        return InvalidInput(f"{shown} is not supported by this call; {remedy}", shown)
    if name not in NEUTRAL:
        near = get_close_matches(name[:MAX_NAME], honoured, n=1, cutoff=0.75)
        if near:
            return InvalidInput(f"there is no field {shown!r}; did you mean {near[0]!r}?", shown)
    return InvalidInput(f"{shown} is not supported by this call; leave it out", shown)
