"""What bounds a prompt: the model's context, and the token ids that it knows."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import ContextTooLong, InvalidInput
from engine.sampling_params import SamplingParams
from engine.sequence import Prompt


@dataclass(frozen=True)
class PromptBounds:
    """Lengths in tokens: of the context, of a prompt in it, and of the vocabulary."""

    context_length: int
    prompt_length: int
    vocabulary: int

    def fit(
        self, ids: list[int], defaults: SamplingParams, given: dict[str, Any], whole_context: bool
    ) -> Prompt:
        """The prompt with the parameters that were given, and a length of answer that fits.

        Raises ContextTooLong if none does, InvalidInput for ids or lengths that cannot be.
        """
        params = _with_given(defaults, given)
        asked = "max_new_tokens" in given
        most = params.max_new_tokens if asked or not whole_context else self.context_length
        room = self.context_length - len(ids)
        wanted = most if asked else 1
        if room < wanted or len(ids) > self.prompt_length:
            raise ContextTooLong(
                f"{self._limit}. The prompt has {len(ids)} tokens and the answer may have {wanted};"
                " shorten the prompt or the history, or ask for a shorter answer",
                argument="max_new_tokens" if 0 < room < wanted else "prompt",
                num_tokens=len(ids),
                most=min(self.prompt_length, self.context_length),
            )
        self.check_ids(ids, "prompt")
        self.check_ids([i for i, _ in params.logit_bias], "logit_bias")
        self.check_ids(params.stop_token_ids, "stop_token_ids")
        params = replace(params, max_new_tokens=min(room, most))
        if "min_tokens" not in given:  # the checkpoint's own bends to what is asked
            params = replace(params, min_tokens=min(params.min_tokens, params.max_new_tokens))
        if params.min_tokens > params.max_new_tokens:
            raise InvalidInput(
                f"the answer is to have at least {params.min_tokens} tokens, but it has room for"
                f" {params.max_new_tokens}; ask for fewer",
                "min_tokens",
            )
        return Prompt(ids, params, not asked)

    def check_ids(self, ids: Iterable[int], argument: str) -> None:
        """Raise InvalidInput for a token id that the model does not know."""
        highest = max(ids, default=0)
        if highest >= self.vocabulary:
            raise InvalidInput(
                f"{argument} has a token id of {highest}; the last is {self.vocabulary - 1}",
                argument,
            )

    @property
    def _limit(self) -> str:
        # In OpenAI's words, by which clients know that a shorter prompt would do.
        limit = f"This model's maximum context length is {self.context_length} tokens"
        if self.prompt_length < self.context_length:
            return f"{limit}, {self.prompt_length} of them for the prompt"
        return limit


def _with_given(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """A request's sampling; its stop strings come to those of the checkpoint."""
    stop = dict.fromkeys((*defaults.stop, *given.get("stop", ())))
    return replace(defaults, **given | {"stop": tuple(stop)})
