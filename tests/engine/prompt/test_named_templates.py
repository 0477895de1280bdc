"""Checkpoints with several chat templates: one for conversations, another for tools."""

import json

import pytest
from transformers import AutoTokenizer

from engine.errors import StartError
from engine.prompt.named_templates import templates_of
from engine.prompt.tokenizer import ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer
from tests.conftest import TEMPLATE, byte_tokenizer
from tests.tool_caller import tool_tokenizer

TOOLS = tool_tokenizer().chat_template
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {}},
    },
}
USER = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}


def listed(folder):
    file = folder / "tokenizer_config.json"
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TOOLS}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    (folder / "chat_template.jinja").unlink()


def beside(folder):
    place = folder / "additional_chat_templates"
    place.mkdir()
    (place / "tool_use.jinja").write_text("\ufeff" + TOOLS)


@pytest.mark.parametrize("layout", [listed, beside])
def test_template_for_tools_is_the_one_that_transformers_takes(tmp_path, layout):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    layout(tmp_path)
    text = ChatTokenizer(load_tokenizer(tmp_path))
    own = AutoTokenizer.from_pretrained(tmp_path)
    for tools in ([], [TOOL]):
        wanted = own.apply_chat_template(
            USER, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        got = text.backend.decode(text.encode(USER, tools=tools), skip_special_tokens=False)
        assert got == wanted.removeprefix("\ufeff")
    assert text.tools.form.native
    with_calls = [*USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert text.encode(with_calls) == ChatTokenizer(tool_tokenizer()).encode(with_calls)


def test_single_template_by_any_name_is_for_all():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"chatml": TEMPLATE}
    assert templates_of(tokenizer) == (TEMPLATE, TEMPLATE)


def test_several_templates_without_a_default_are_refused_by_name():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"rag": TEMPLATE, "tool_use": TOOLS}
    with pytest.raises(StartError, match="templates rag, tool_use and none called default"):
        ChatTokenizer(tokenizer)
