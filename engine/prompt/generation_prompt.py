"""What a chat template puts behind a conversation, where the answer will stand."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from engine.errors import InvalidInput

# Characters of the variables for which it is remembered.
_MAX_VARIABLES = 4096
_QUESTION = [{"role": "user", "content": "?"}]


class GenerationPrompt:
    """Knows where a prompt ends that the next turn repeats.

    That turn has the answer in place of the generation prompt, and may have it written otherwise:
    Qwen's begins an answer's thoughts, which its template leaves out of earlier answers. What is
    added depends on the template's variables alone, and is found by rendering a question with and
    without it, by `render(messages, add_generation_prompt=..., **variables)`; `encode` makes token
    ids of a rendered text.
    """

    def __init__(self, render: Callable[..., str], encode: Callable[[str], list[int]]):
        self._render, self._encode = render, encode
        self._ids = lru_cache(64)(self._find)

    def num_before(self, ids: list[int], variables: Mapping[str, Any]) -> int | None:
        """How many of a prompt's tokens stand before it; None if it is not at their end."""
        key = json.dumps(variables, sort_keys=True)
        added = self._ids(key) if len(key) < _MAX_VARIABLES else []
        return len(ids) - len(added) if added and ids[-len(added) :] == added else None

    def _find(self, variables: str) -> list[int]:
        """Its ids; none if the template has none, or refuses the question."""
        given = json.loads(variables)
        try:
            whole = self._render(_QUESTION, add_generation_prompt=True, **given)
            before = self._render(_QUESTION, add_generation_prompt=False, **given)
        except InvalidInput:
            return []
        return self._encode(whole[len(before) :]) if whole.startswith(before) else []
