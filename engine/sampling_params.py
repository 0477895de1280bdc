"""How to pick tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens, in transformers' names and meanings; temperature 0 is greedy."""

    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_k: int = 50  # 0: off
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    # OpenAI's: subtracted from the logit of a token in the answer, once and per occurrence.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many top tokens to report beside each; None: no logprobs
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    # Added to the logits of these token ids before anything else.
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # no end of the answer before so many tokens
    ignore_eos: bool = False  # only the length ends the answer
    stop_token_ids: tuple[int, ...] = ()  # further ids that end the answer
    suppress_tokens: tuple[int, ...] = ()  # ids that are never said
    begin_suppress_tokens: tuple[int, ...] = ()  # ids that no answer begins with
