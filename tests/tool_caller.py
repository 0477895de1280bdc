"""A model that calls tools, without weights: guided decoding makes valid calls of its few wishes.

`PYTHONPATH=. python tests/tool_caller.py` serves it and prints the address. To a question with
tools it answers with a short call of the one whose name is first in the alphabet, and to a result
with the text "done".
"""

import sys
import time
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerFast

from engine.sequence import KVSpan, Sequence
from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model, serve

# A format that is learnt: Qwen's and Hermes', in few words.
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tool_tokenizer(special: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", *special])
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """Its template shows what it is given of thoughts, and names their markers."""
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = (
        "{% if enable_thinking is defined and not enable_thinking %}(no){% endif %}"
        "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
        "{% for m in messages %}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
        "{% endfor %}" + TOOL_TEMPLATE + "{# <think> </think> #}"
    )
    return tokenizer


class ToolCaller(ScriptedRunner):
    """Writes `begin`, and then always the likeliest token that its guide allows.

    By `wishes`, from the likeliest on. After a result, or without a guide, it says `say`, as far as
    its guide allows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        begin: str = "<tool_call>",
        say: str = "done",
        wishes: str = '"}],0',
    ):
        super().__init__(tokenizer, say)
        self.vocabulary = len(tokenizer)
        self.begin = begin
        ids = [256, *tokenizer.encode(wishes, add_special_tokens=False)]
        self.likely = torch.full((self.vocabulary,), -5.0)
        self.likely[ids] = torch.arange(len(ids), 0, -1).float()

    def forward(self, work: list[tuple[KVSpan, int]]) -> torch.Tensor:
        logits = super().forward(work)
        begin = self.tokenizer.encode(self.begin, add_special_tokens=False)
        for row, (seq, _) in zip(logits, work, strict=True):
            if not isinstance(seq, Sequence) or not seq.guide:
                continue
            if self.has_result(seq):
                torch.maximum(row, self.likely, out=row)
                continue
            said = len(seq.tokens) - seq.num_prompt
            row[:] = self.likely
            if said < len(begin):
                row[begin[said]] = 50.0
        return logits

    def has_result(self, seq: Sequence) -> bool:
        """Whether the last message is a tool's."""
        text = self.tokenizer.decode(seq.tokens[: seq.num_prompt])
        return text.endswith("</tool_response><|end|><|assistant|>")


if __name__ == "__main__":
    text = tool_tokenizer()
    caller = ToolCaller(text)
    with serve(lambda _: chat_model(caller, text, 4096)) as url:
        sys.stdout.write(f"{url}/v1\n")
        sys.stdout.flush()
        while True:
            time.sleep(3600)
