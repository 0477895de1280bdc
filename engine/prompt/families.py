"""What differs between models, as data: prompt formats, and the tutorials' sampling defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidInput
from engine.prompt.named_templates import templates_of
from engine.prompt.template_renderer import render_template
from engine.sampling_params import SamplingParams
from engine.tools.format import ToolFormat

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

# In a format, it separates what the original code tokenizes separately. A Unicode noncharacter,
# reserved for a program's own use, so that no vocabulary and no text has it.
PIECE_BREAK = "\ufdd2"

# A role and a content, a text. An assistant's may have "tool_calls", in OpenAI's shape but with the
# arguments as an object, and a tool's has the "tool_call_id" of the one that it answers.
Message = dict[str, Any]


_DEFAULTS = SamplingParams()


@dataclass(frozen=True)
class Family:
    """The prompt format of a kind of model, with {} for a message's content, and its defaults."""

    name: str
    model_type: str
    markers: tuple[str, ...]  # the special tokens of the format
    turns: dict[str, str]
    begin: str = ""
    ask: str = ""  # the generation prompt
    ends: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()  # tokens that only other models of this model_type have
    strip: bool = False
    defaults: SamplingParams = _DEFAULTS
    ignores_generation_config: bool = False  # as the tutorial's program did
    # Whether the chat model's files may be without a chat template. Where they always had one,
    # a checkpoint without is the base model.
    without_template: bool = False
    tools: ToolFormat | None = None  # how calls of tools are written; `turns` has their roles then

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        contents = [m["content"].strip() if self.strip else m["content"] for m in messages]
        turns = [self.turns[m["role"]].format(c) for m, c in zip(messages, contents, strict=True)]
        return self.begin + "".join(turns) + (self.ask if add_generation_prompt else "")


_ROLES = ("system", "user", "assistant")
_TUTORIAL = SamplingParams(1024, 0.95, 5, 0.7, repetition_penalty=1.1)

# The formats are those of each model's original code.
FAMILIES = (
    Family(
        "deepseek-v2",
        "deepseek_v2",
        markers=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        turns={
            "system": "{}\n\n",
            "user": "User: {}\n\n",
            "assistant": "Assistant: {}<｜end▁of▁sentence｜>",
        },
        begin="<｜begin▁of▁sentence｜>",
        ask="Assistant:",
        ends=("<｜end▁of▁sentence｜>",),
        defaults=_TUTORIAL,
        ignores_generation_config=True,
    ),
    Family(
        "index",
        "index",
        markers=("<unk>", "reserved_0", "reserved_1"),
        turns={"system": "<unk>{}", "user": "reserved_0{}", "assistant": "reserved_1{}"},
        ask="reserved_1",
        ends=("</s>",),
        without_template=True,
        defaults=_TUTORIAL,
        ignores_generation_config=True,
    ),
    Family(
        "llama-3",
        "llama",
        markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        turns={r: f"<|start_header_id|>{r}<|end_header_id|>\n\n{{}}<|eot_id|>" for r in _ROLES},
        begin="<|begin_of_text|>",
        ask="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        # Llama 3.1 and later, and fine-tunes with ChatML, have templates of their own.
        absent=("<|eom_id|>", "<|im_start|>"),
        strip=True,
        defaults=SamplingParams(512, 0.5, 0, 0.9, repetition_penalty=1.1),
        ignores_generation_config=True,
    ),
    Family(
        "xverse",
        "xverse",
        markers=("<|endoftext|>",),
        turns={
            "system": f"Human: {PIECE_BREAK}{{}}\n{PIECE_BREAK}",
            "user": f"Human: {PIECE_BREAK}{{}}\n\n{PIECE_BREAK}",
            "assistant": f"Assistant: {PIECE_BREAK}{{}}<|endoftext|>",
        },
        ask="Assistant: ",
        ends=("<|endoftext|>",),
        without_template=True,
        defaults=SamplingParams(2048, 0.5, 30, 0.85, repetition_penalty=1.1),
    ),
    Family(
        "internlm2",
        "internlm2",
        markers=("<s>", "<|im_start|>", "<|im_end|>"),
        turns={
            **{role: f"<|im_start|>{role}\n{{}}<|im_end|>\n" for role in _ROLES},
            "tools": "<|im_start|>system name=<|plugin|>\n{}<|im_end|>\n",
            "tool": "<|im_start|>environment name=<|plugin|>\n{}<|im_end|>\n",
        },
        begin="<s>",
        ask="<|im_start|>assistant\n",
        ends=("</s>", "<|im_end|>"),
        without_template=True,
        tools=ToolFormat(
            '<|action_start|><|plugin|>\n{"name": "', '", "parameters": ', "}<|action_end|>"
        ),
    ),
)

# A conversation by which formats are compared, with spaces that some of them strip.
_PROBE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": " hello "},
    {"role": "user", "content": "你好"},
]


def family_of(model_type: str, tokenizer: PreTrainedTokenizerFast) -> Family | None:
    """The family of a checkpoint: of the many models called llama, only some have its tokens."""
    has = tokenizer.backend_tokenizer.token_to_id
    for family in FAMILIES:
        known = all(has(marker) is not None for marker in (*family.markers, *family.ends))
        other = any(has(token) is not None for token in family.absent)
        if family.model_type == model_type and known and not other:
            return family
    return None


def format_of(model_type: str, tokenizer: PreTrainedTokenizerFast) -> Family | None:
    """The family in whose format a checkpoint is prompted; None where its own chat template is.

    Fine-tunes keep the vocabulary and the model_type, so a template that renders otherwise than the
    family's format is right. The templates that came with the five families' own models, in every
    revision that we know, render the same.
    """
    family = family_of(model_type, tokenizer)
    if family is None or (tokenizer.chat_template is None and family.without_template):
        return family
    return family if renders_like(family, tokenizer) else None


def renders_like(family: Family, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer's chat template makes of a conversation what the family's format does."""
    templates = templates_of(tokenizer)
    if templates is None:
        return False
    given = tokenizer.special_tokens_map | {"add_generation_prompt": True}
    try:
        rendered = render_template(templates.default, _PROBE, given)
    except InvalidInput:
        return False
    return rendered == family.render(_PROBE, add_generation_prompt=True).replace(PIECE_BREAK, "")
