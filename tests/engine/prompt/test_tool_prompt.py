"""Tools, calls and results reach the prompt, and nothing in them becomes a special token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prompt.families import family_of
from engine.prompt.named_templates import Templates
from engine.prompt.tokenizer import ChatTokenizer
from tests.conftest import TEMPLATE, byte_tokenizer
from tests.tool_caller import tool_tokenizer

SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
INTERNLM2 = [
    *("<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"),
    *("<|plugin|>", "<|action_start|>", "<|action_end|>"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "what",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "a", "type": "function", "function": {"name": "get", "arguments": {"city": "上海"}}}
ASKED = [{"role": "user", "content": "hi"}]
ROUND = [
    *ASKED,
    {"role": "assistant", "content": "so", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
]


def by_template() -> ChatTokenizer:
    return ChatTokenizer(tool_tokenizer())


def by_common_format(template: str = TEMPLATE) -> ChatTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


def by_family() -> ChatTokenizer:
    tokenizer = byte_tokenizer(INTERNLM2)
    tokenizer.chat_template = None
    return ChatTokenizer(tokenizer, family_of("internlm2", tokenizer))


def prompt(text: ChatTokenizer, messages: list, tools: list | None = None) -> str:
    return text.backend.decode(text.encode(messages, tools=tools or []), skip_special_tokens=False)


def test_chat_template_lists_tools_calls_and_results():
    said = prompt(by_template(), ROUND, [TOOL])
    assert said.startswith('<|system|>{"type": "function", "function": {"name": "get"')
    assert (
        '<|assistant|>so\n<tool_call>\n{"name": "get", "arguments": {"city": "上海"}}\n</tool_call>'
        "<|end|><|user|><tool_response>sunny</tool_response><|end|><|assistant|>"
    ) in said


def test_common_format_tells_of_tools_in_the_system_text():
    said = prompt(by_common_format(), [{"role": "system", "content": "Be kind."}, *ROUND], [TOOL])
    assert said.startswith("<|system|>Be kind.\n\nYou may call functions")
    assert '{"name": "get", "description": "what", "parameters": {"type": "object"' in said
    assert said.count("<|system|>") == 1
    assert said.endswith(
        '<|user|>hi<|end|><|assistant|>so\n<tool_call>\n{"name": "get", "arguments": {"city":'
        ' "上海"}}\n</tool_call><|end|><|user|><tool_response>\nsunny\n</tool_response><|end|>'
        "<|assistant|>"
    )
    assert prompt(by_common_format(), ASKED, [TOOL]).startswith("<|system|>You may call functions")


def test_tools_stand_before_the_first_message_where_there_is_no_system_role():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    said = prompt(by_common_format(refusing + TEMPLATE), ASKED, [TOOL])
    assert said.startswith("<|user|>You may call functions")
    assert said.endswith("\n\nhi<|end|><|assistant|>")


def test_internlm2_is_told_in_the_turns_that_it_was_trained_on():
    said = prompt(by_family(), [{"role": "system", "content": "Be kind."}, *ROUND], [TOOL])
    assert said.startswith(
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>system name=<|plugin|>\n"
        '[{"name": "get", "description": "what"'
    )
    assert said.endswith(
        '<|im_start|>assistant\nso<|action_start|><|plugin|>\n{"name": "get", "parameters":'
        ' {"city": "上海"}}<|action_end|><|im_end|>\n<|im_start|>environment name=<|plugin|>\n'
        "sunny<|im_end|>\n<|im_start|>assistant\n"
    )


def test_internlm2_without_its_tokens_for_calls_gets_the_common_format():
    tokenizer = byte_tokenizer(INTERNLM2[:5])
    text = ChatTokenizer(tokenizer, family_of("internlm2", tokenizer))
    assert "<tool_call>" in prompt(text, ROUND, [TOOL])
    assert "plugin" not in prompt(text, ROUND, [TOOL])


def test_arguments_are_text_for_a_template_that_takes_no_objects():
    template = tool_tokenizer().chat_template.replace(
        "{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"
    )
    text = by_common_format(template)
    assert text.tools.form.arguments_as_text
    assert '"arguments": {"city": "上海"}}' in prompt(text, ROUND)


def test_results_are_in_the_order_of_their_calls():
    calls = [CALL, CALL | {"id": "b"}]
    results = [
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
    ]
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    for text in (by_template(), by_common_format(), by_family()):
        said = prompt(text, messages)
        assert said.index("first") < said.index("second")
    # In the common format they are one turn of the user's, as roles may have to alternate.
    assert prompt(by_common_format(), messages).count("<|user|>") == 2


def test_result_has_the_name_of_its_tool():
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['name'] }}")
    text = by_common_format(tool_tokenizer().chat_template)
    text.templates = Templates(template, template)
    assert "sunnyget" in prompt(text, ROUND)


PIECES = st.sampled_from(
    [*SPECIAL, *INTERNLM2, "<tool_call>", '"', "{", "\\", "\n", "x", "é", "上"]
)
TEXTS = st.lists(PIECES, max_size=4).map("".join)


@pytest.mark.parametrize("make", [by_template, by_common_format, by_family])
def test_no_text_of_tools_calls_and_results_becomes_a_special_token(make):
    text = make()
    specials = set(text.special.values())

    def marks(word: str) -> list[int]:
        """The special tokens of a prompt that has a text wherever a caller may put one."""
        schema = {"type": "object", "properties": {word: {"enum": [word]}}, "description": word}
        function = {"name": "get", "description": word, "parameters": schema}
        call = CALL | {"id": word, "function": {"name": "get", "arguments": {word: [word]}}}
        messages = [
            {"role": "user", "content": word},
            {"role": "assistant", "content": word, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": word, "content": word},
        ]
        ids = text.encode(messages, tools=[{"type": "function", "function": function}])
        return [i for i in ids if i in specials]

    honest = marks("x")

    @given(TEXTS)
    def check(word: str) -> None:
        assert marks(word) == honest

    check()
