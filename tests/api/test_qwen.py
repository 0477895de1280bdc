"""Qwen 3.5 over HTTP: thoughts, tools and turns by its chat template's rules, from the cache too.

The template is in our words; with CHAT_TEST_DATA, its own is tried likewise, which is at
templates/Qwen3.5-4B.jinja there.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from engine.runner.runner import Runner
from tests.conftest import byte_tokenizer, chat_model, ready, serve
from tests.engine.states import prepared

# A system text only at the beginning; thoughts only behind the last question, where they stand even
# if they are empty; results of tools as a user's turn.
TEMPLATE = r"""
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if ns.last < 0 %}{{ raise_exception('Nobody asks.') }}{% endif %}
{%- if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}
{%- if messages[0].role == 'system' %}{{ '\n\n' + messages[0].content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- if not loop.first %}{{ raise_exception('A system text stands at the beginning.') }}{% endif %}
{%- elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content | trim + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}
{%- set said = (m.content or '') | trim %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' }}
{%- endif %}
{{- said }}
{%- for c in m.tool_calls or [] %}
{{- ('\n\n' if said and loop.first else '' if loop.first else '\n') }}
{{- '<tool_call>\n<function=' + c.function.name + '>\n' }}
{%- for k, v in c.function.arguments.items() %}
{{- '<parameter=' + k + '>\n' }}{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}
{%- endif %}"""

REAL = Path(os.environ.get("CHAT_TEST_DATA", "/nowhere")) / "templates" / "Qwen3.5-4B.jinja"
TEMPLATES = {"ours": TEMPLATE}
if REAL.is_file():
    TEMPLATES["real"] = REAL.read_text(encoding="utf-8")

# What a prompt ends with, and the next turn does not repeat: a token a byte but for these.
ENDS = {True: len("<assistant\n<\n"), False: len("<assistant\n<\n\n<\n\n")}
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo", "Lima"]},
                    "days": {"enum": [1, 2, 14]},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]


def load(template: str, reuse: bool):
    tokenizer = byte_tokenizer(["<|im_end|>", "<|im_start|>"])
    tokenizer.add_tokens(["<think>", "</think>"])  # which are no special ones
    tokenizer.chat_template = template
    runner = Runner(prepared("qwen3_5_text"), 6000, 77)
    return chat_model(runner, tokenizer, context_length=4096, reuse=reuse)


@pytest.fixture(scope="module", params=TEMPLATES)
def servers(request):
    """One that reuses what it has computed, and one that does not."""
    with ExitStack() as stack:
        template = TEMPLATES[request.param]
        yield [
            ready(stack.enter_context(serve(lambda _, reuse=reuse: load(template, reuse))))
            for reuse in (True, False)
        ]


def ask(url: str, messages: list, **fields) -> dict:
    fields = {"temperature": 0, "max_tokens": 4, "messages": messages} | fields
    answer = httpx.post(f"{url}/v1/chat/completions", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def message_of(answer: dict) -> dict:
    return answer["choices"][0]["message"]


def cached(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.mark.slow
@pytest.mark.parametrize("thinks", [True, False])
def test_second_turns_hit(servers, thinks):
    """All of them, whatever the first one's length, though its thoughts are left out."""
    fields = {} if thinks else NO_THOUGHTS
    for length in range(40, 56):
        first = [{"role": "system", "content": f"{thinks}"}, user("x" * length)]
        answer = ask(servers[0], first, **fields)
        assert ("reasoning_content" in message_of(answer)) == thinks
        turn = [*first, message_of(answer) | {"content": "so"}, user("and?")]
        again = ask(servers[0], turn, **fields)
        assert cached(again) == answer["usage"]["prompt_tokens"] - ENDS[thinks]
    assert message_of(again) == message_of(ask(servers[1], turn, **fields))


@pytest.mark.slow
def test_calls_from_the_cache_are_the_same(servers):
    """Through a loop of calls and results, whose thoughts are repeated, and a question more."""
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    fields |= {"reasoning_budget": 5, "max_tokens": 200}
    messages = [user("Is it windy?")]
    least = 0
    for turn in range(3):
        answer, alone = (ask(url, messages, **fields) for url in servers)
        calls = [message_of(each)["tool_calls"][0]["function"] for each in (answer, alone)]
        assert calls[0] == calls[1]
        assert message_of(answer)["reasoning_content"] == message_of(alone)["reasoning_content"]
        assert cached(answer) >= least
        assert cached(alone) == 0
        least = answer["usage"]["prompt_tokens"] - ENDS[True]
        call = message_of(answer)["tool_calls"][0]["id"]
        result = {"role": "tool", "tool_call_id": call, "content": f"{turn} m/s"}
        messages += [message_of(answer), result]


def test_system_turn_in_the_midst_is_told(servers):
    turns = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    told = [*turns, {"role": "system", "content": "Be brief."}]
    joined = [*turns[:2], user("c\n\nBe brief.")]
    assert message_of(ask(servers[1], told)) == message_of(ask(servers[1], joined))
