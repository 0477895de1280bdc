"""How a model writes calls of tools is learnt from its chat template.

The templates are those of the models that they are named after in what they write for calls and
results, in our words.
"""

import pytest

from engine.prompt.families import FAMILIES
from engine.prompt.tokenizer import ChatTokenizer
from engine.tools.format import COMMON, ToolFormat
from engine.tools.xml_calls import TaggedArguments
from tests.conftest import TEMPLATE, byte_tokenizer

LIST = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
# The turns but for the assistant's calls, which stand in the middle.
BEFORE = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|>result: {{ m.content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}"
)
AFTER = (
    "{% endif %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EACH = "{% for c in m.tool_calls %}"
ARGUMENTS = "{{ c.function.arguments | tojson }}"
HERMES = (
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
)

CALLS = {
    "Qwen2.5, Qwen3, Hermes": (
        EACH
        + "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
        + HERMES
        + "{% endfor %}",
        ToolFormat(
            '<tool_call>\n{"name": "',
            '", "arguments": ',
            "}\n</tool_call>",
            '}\n</tool_call>\n<tool_call>\n{"name": "',
        ),
    ),
    "Llama 3.1": (
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
        "{{ m.tool_calls[0].function.arguments | tojson }}}",
        ToolFormat('{"name": "', '", "parameters": ', "}"),
    ),
    "Mistral Nemo, with ids": (
        "[TOOL_CALLS][" + EACH + '{"name": "{{ c.function.name }}", "arguments": '
        '{{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]",
        ToolFormat(
            '[TOOL_CALLS][{"name": "', '", "arguments": ', "}]", '}, {"name": "'
        ),
    ),
    "Devstral": (
        EACH + "[TOOL_CALLS]{{ c.function.name }}[ARGS]" + ARGUMENTS + "{% endfor %}",
        ToolFormat("[TOOL_CALLS]", "[ARGS]", "", "[TOOL_CALLS]"),
    ),
    "DeepSeek V3, with arguments as text": (
        "<｜calls｜>" + EACH + "<｜call｜>function<｜sep｜>{{ c.function.name }}\n```json\n"
        "{{ '' + c.function.arguments }}\n```<｜/call｜>{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% endfor %}<｜/calls｜>",
        ToolFormat(
            "<｜calls｜><｜call｜>function<｜sep｜>",
            "\n```json\n",
            "\n```<｜/call｜><｜/calls｜>",
            "\n```<｜/call｜>\n<｜call｜>function<｜sep｜>",
            arguments_as_text=True,
        ),
    ),
    "Kimi K2, with the number of a call": (
        "<|calls|>" + EACH + "<|call|>functions.{{ c.function.name }}:{{ loop.index0 }}<|args|>"
        "{{ c.function.arguments | tojson }}<|/call|>{% endfor %}<|/calls|>",
        ToolFormat("<|calls|><|call|>functions.", ":0<|args|>", "<|/call|><|/calls|>"),
    ),
    "Nemotron Nano 2": (
        "<TOOLCALL>[" + EACH + '{"name": "{{ c.function.name }}", "arguments": '
        "{{ c.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]"
        "</TOOLCALL>",
        ToolFormat('<TOOLCALL>[{"name": "', '", "arguments": ', "}]</TOOLCALL>", '}, {"name": "'),
    ),
}  # fmt: skip
ITEMS = "{% for k, v in c.function.arguments.items() %}"
VALUE = "{{ v if v is string else v | tojson }}"
CALLS |= {
    "Qwen3-Coder, Qwen 3.5": (
        EACH + "{{ '\n' }}<tool_call>\n<function={{ c.function.name }}>\n"
        + ITEMS + "<parameter={{ k }}>\n" + VALUE + "\n</parameter>\n{% endfor %}</function>\n"
        "</tool_call>{% endfor %}",
        ToolFormat(
            "<tool_call>\n<function=",
            ">\n",
            "</function>\n</tool_call>",
            "</function>\n</tool_call>\n<tool_call>\n<function=",
            arguments=TaggedArguments("<parameter=", ">\n", "\n</parameter>\n"),
        ),
    ),
    "GLM-4.5": (
        EACH + "{{ '\n' }}<tool_call>{{ c.function.name }}\n" + ITEMS
        + "<arg_key>{{ k }}</arg_key>\n<arg_value>" + VALUE + "</arg_value>\n{% endfor %}"
        "</tool_call>{% endfor %}",
        ToolFormat(
            "<tool_call>",
            "\n",
            "</tool_call>",
            "</tool_call>\n<tool_call>",
            arguments=TaggedArguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
        ),
    ),
    "MiniMax M2, in one block": (
        "<calls>\n" + EACH + '<invoke name="{{ c.function.name }}">\n' + ITEMS
        + '<parameter name="{{ k }}">' + VALUE + "</parameter>\n{% endfor %}</invoke>\n"
        "{% endfor %}</calls>",
        ToolFormat(
            '<calls>\n<invoke name="',
            '">\n',
            "</invoke>\n</calls>",
            '</invoke>\n<invoke name="',
            arguments=TaggedArguments('<parameter name="', '">', "</parameter>\n"),
        ),
    ),
}  # fmt: skip
NO_FORMATS = {
    "tags that tell a value's type, as DeepSeek V3.2": (
        "<calls>" + EACH + '<invoke name="{{ c.function.name }}">' + ITEMS
        + '<parameter name="{{ k }}" string="{{ "true" if v is string else "false" }}">' + VALUE
        + "</parameter>{% endfor %}</invoke>{% endfor %}</calls>"
    ),
    "Python, as LFM2": (
        "<|calls|>[" + EACH + "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
        "{{ k }}={{ v }}{% endfor %}){% endfor %}]<|/calls|>"
    ),
    "an id before the arguments, as one of Mistral's": (
        EACH + "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}"
    ),
    "nothing in front": EACH + "{{ c.function.name }}" + ARGUMENTS + "{% endfor %}",
    "words in front": (
        EACH + "to={{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    ),
}  # fmt: skip


def learnt(template: str) -> ToolFormat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer).tools.form


@pytest.mark.parametrize("model", CALLS)
def test_format_is_learnt_from_the_chat_template(model):
    calls, form = CALLS[model]
    assert learnt(LIST + BEFORE + calls + AFTER) == form


@pytest.mark.parametrize("model", NO_FORMATS)
def test_template_that_writes_calls_otherwise_gets_the_common_format(model, caplog):
    assert learnt(LIST + BEFORE + NO_FORMATS[model] + AFTER) == COMMON
    assert "a way that is not known here" in caplog.text


def test_template_that_knows_no_calls_gets_the_common_format():
    assert learnt(TEMPLATE) == COMMON


def test_template_that_leaves_results_out_gets_the_common_format():
    calls, _ = CALLS["Llama 3.1"]
    assert learnt((LIST + BEFORE + calls + AFTER).replace("{{ m.content }}", "", 1)) == COMMON


def test_template_that_does_not_list_the_tools_is_found_out():
    calls, form = CALLS["Devstral"]
    found = learnt(BEFORE + calls + AFTER)
    assert not found.lists_tools
    assert (found.head, found.middle, found.tail) == (form.head, form.middle, form.tail)


def test_template_without_a_system_role_is_found_out():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    assert not learnt(refusing + TEMPLATE).takes_system
    assert learnt(TEMPLATE).takes_system


def test_turns_that_differ_within_a_tag_are_cut_at_the_tag():
    """A plain answer stands between tags that begin and end as those of a call do."""
    calls = BEFORE.replace(
        "{{ m.content }}{% if m.tool_calls %}", "{% if m.tool_calls %}<|START_ACTION|>["
    )
    calls += EACH + '{"n": "{{ c.function.name }}", "a": {{ c.function.arguments | tojson }}}'
    calls += "{% endfor %}]<|END_ACTION|>{% else %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>"
    form = learnt(LIST + calls + AFTER)
    assert form.head == '<|START_ACTION|>[{"n": "'
    assert form.tail == "}]<|END_ACTION|>"


def test_trigger_is_what_no_text_has_by_chance():
    triggers = [form.trigger for _, form in CALLS.values()]
    assert triggers == [
        "<tool_call>",
        "",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]",
        "<｜calls｜>",
        "<|calls|>",
        "<TOOLCALL>",
        "<tool_call>",
        "<tool_call>",
        "<calls>",
    ]


def test_what_ends_an_answer_ends_its_calls():
    form = ToolFormat("<a>", "<b>", "</a><end>more", "</a><end><a>")
    cut = form.ending_with(["<end>", "<other>"])
    assert (cut.tail, cut.between) == ("</a>", None)
    assert form.ending_with(["<other>"]) == form


def test_internlm2_has_the_format_that_it_was_trained_on():
    """As its repository states it, in chat_format.md."""
    form = next(family.tools for family in FAMILIES if family.name == "internlm2")
    call = {"function": {"name": "get", "arguments": {"city": "上海"}}}
    assert form.spell([call]) == (
        '<|action_start|><|plugin|>\n{"name": "get", "parameters": {"city": "上海"}}<|action_end|>'
    )
