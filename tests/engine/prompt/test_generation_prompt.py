"""Where a prompt ends that the next turn repeats."""

import pytest

from engine.prompt.tokenizer import ChatTokenizer
from tests.conftest import byte_tokenizer

# As Qwen's: an answer begins with its thoughts, which are left out of earlier answers.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>"
    "{% if quick is defined and quick %}</think>{% endif %}{% endif %}"
)
QUESTION = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>so"}


def text_with(template: str) -> ChatTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


@pytest.mark.parametrize("variables", [{}, {"quick": True}])
def test_stable_part_begins_the_next_turn(variables):
    text = text_with(THINKING)
    ids = text.encode([QUESTION], variables)
    stable = text.generation_prompt.num_before(ids, variables)
    assert len(ids) - stable == (16 if variables else 8)
    turn = text.encode([QUESTION, ANSWER, QUESTION], variables)
    assert turn[:stable] == ids[:stable]
    assert turn[: len(ids)] != ids


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",  # none
        "{% if add_generation_prompt %}Answer: {% endif %}{{ messages[0]['content'] }}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ messages[0]['content'][0] }}{% endif %}",
        "{% if messages[0]['content'] == '?' %}{{ raise_exception('no') }}{% endif %}a",
    ],
    ids=["none", "in front", "varies", "refuses"],
)
def test_end_that_is_not_the_same_is_unknown(template):
    text = text_with(template)
    assert text.generation_prompt.num_before(text.encode([QUESTION]), {}) is None


def test_variables_are_remembered_only_if_short():
    text = text_with(THINKING)
    ids = text.encode([QUESTION])
    assert text.generation_prompt.num_before(ids, {"quick": "x" * 100_000}) is None
