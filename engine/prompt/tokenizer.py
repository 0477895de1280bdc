"""Messages become token ids, by the family's format or the checkpoint's own chat template.

Nothing that a user writes in a chat can become a special token.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from inspect import signature
from math import inf
from typing import TYPE_CHECKING, Any

from engine.errors import ContextTooLong, InvalidInput, StartError
from engine.prompt.families import PIECE_BREAK, Family, Message
from engine.prompt.generation_prompt import GenerationPrompt
from engine.prompt.named_templates import Templates, needs_tools, templates_of
from engine.prompt.special_tokens import SpecialTokens, token_ids
from engine.prompt.template_renderer import render_template
from engine.prompt.token_bound import MIN_CHARS, TokenBound
from engine.prompt.tool_prompt import ToolPrompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

# Between which of them a model thinks aloud, where its chat template knows them.
_THINKING_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

# Whose turns every template repeats; of the assistant's, some leave the thoughts out.
_ASKING = ("system", "user")

# Before the text, between it and the suffix, and after both, for models that can fill in what is
# missing between: DeepSeek-Coder; Qwen2.5-Coder and CodeGemma; StarCoder and Granite; Code Llama.
INFILL_MARKERS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class ChatTokenizer:
    """Turns messages into token ids; raises InvalidInput where a chat template refuses them.

    Where `most_tokens` is set, a text that surely has more is refused before it is tokenized.

    Thread-safe: unlike transformers' own wrapper, it never modifies its tokenizers. `special` are
    the special tokens' ids by their text; `templates` are the chat templates, empty where the
    family's format is used; `thinking_markers` are the words between which the model thinks aloud,
    or None; `tools` is how the model is told of tools.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", family: Family | None = None):
        templates = templates_of(tokenizer)
        if family is None and templates is None:
            raise StartError(
                "the checkpoint has no chat template, as base models have none; take the chat model"
                " (often called Instruct or Chat), or pass its template with --chat-template FILE"
            )
        self.tokenizer, self.family = tokenizer, family
        self.templates = Templates("", "") if family or templates is None else templates
        known = "".join(self.templates)
        self.thinking_markers = next((p for p in _THINKING_MARKERS if p[1] in known), None)
        markers = (*family.markers, *family.ends) if family else ()
        infill = [word for words in INFILL_MARKERS for word in words]
        self._special = SpecialTokens(
            tokenizer.backend_tokenizer, (*markers, *infill), self.thinking_markers or ()
        )
        self.special = self._special.ids
        self.backend, self.plain = self._special.backend, self._special.plain
        self._begin = self._begin_ids()
        self._before = token_ids(self.plain, "a")
        self.most_tokens: int | None = None
        self.tools = ToolPrompt(family, self.special, self._render)
        self.generation_prompt = GenerationPrompt(self._render, self._ids)
        # Of an answer with logprobs the same tokens are spelled over and over.
        self.spell = lru_cache(2**16)(self._spell)

    def encode(
        self,
        messages: list[Message],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        continue_final: bool = False,
        tools: Sequence[Any] = (),
    ) -> list[int]:
        """The prompt's token ids, with the generation prompt.

        `tools` are what the answer may call, as in OpenAI's API.
        `template_kwargs` are variables for the chat template, such as Qwen's `enable_thinking`.
        With `continue_final` the last message, the assistant's, is left open for the answer to
        go on from it. Raises InvalidInput where the model's format does not allow for them,
        ContextTooLong or TemplateTooCostly where they are too much for it.
        """
        # A template puts all that is said into a prompt, which may take the square of its length.
        self.check_length("".join(m["content"].strip() for m in messages if m["role"] in _ASKING))
        given = self._special.quote(self._checked(template_kwargs or {}))
        quoted, listed = self.tools.arrange(
            self._special.quote(messages), self._special.quote(tools)
        )
        given |= listed
        if continue_final:
            text = self._render_open(quoted, given)
        else:
            text = self._render(quoted, add_generation_prompt=True, **given)
        self.check_length(text)
        return self._ids(text)

    def encode_text(self, text: str, begin: bool = True) -> list[int]:
        """The ids of a raw prompt, in which special tokens count.

        With `begin`, BOS goes in front if the model has one and the text does not begin with it.
        The text may be longer than any prompt; who wants one calls `check_length` first.
        """
        ids = token_ids(self.backend, text)
        return ids if not begin or ids[: len(self._begin)] == self._begin else self._begin + ids

    def encode_infill(self, prefix: str, suffix: str) -> list[int]:
        """The ids that ask for what is missing between two texts; special tokens in them are text.

        An answer ends with any special token: the models differ in which they say. Raises
        InvalidInput if the model has no tokens for it.
        """
        trained = (words for words in INFILL_MARKERS if self.special.keys() >= set(words))
        markers = next(trained, None)
        if markers is None:
            raise InvalidInput(
                "this model cannot fill in the middle of a text; leave suffix out", "suffix"
            )
        self.check_length(prefix + suffix)
        begin, between, end = map(self._special.name, markers)
        return self._begin + token_ids(self.plain, f"{begin}{prefix}{between}{suffix}{end}")

    def shown(self, text: str) -> str:
        """A text of the format as `plain` decodes it: special tokens by their secret names."""
        return self._special.pattern.sub(lambda found: self._special.name(found[0]), text)

    def num_tokens(self, text: str) -> float:
        """How many tokens a text has by itself; infinity where it is not worth counting."""
        try:
            self.check_length(text)
        except ContextTooLong:
            return inf
        return len(token_ids(self.plain, text))

    def thinks(self, ids: list[int]) -> bool:
        """Whether a prompt ends with the marker that opens a thought: the answer begins in it."""
        if self.thinking_markers is None:
            return False
        end = self.backend.decode(ids[-8:], skip_special_tokens=False)
        return end.rstrip().endswith(self.thinking_markers[0])

    def end_ids(self, config: "GenerationConfig") -> set[int]:
        """Every id that ends an answer: the checkpoint's eos, and the template's end of turn."""
        listed = config.eos_token_id
        ends = {*(listed if isinstance(listed, list) else [listed])}
        if self.family:
            ends |= {self.special[word] for word in self.family.ends}
        else:
            answer = self._special.placeholder
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
            after = self._render(turn).partition(answer)[2].lstrip()
            closing = self._special.pattern.match(after)
            ends |= {self.tokenizer.eos_token_id, self.special.get(closing[0]) if closing else None}
        return {i for i in ends if i is not None}

    def check_length(self, text: str) -> None:
        """Raise ContextTooLong if a prompt surely has more than `most_tokens`."""
        if self.most_tokens is None or len(text) < MIN_CHARS:
            return
        if self._bound.exceeds(self._special.bare(text), self.most_tokens):
            raise ContextTooLong(
                f"This model's maximum context length is {self.most_tokens} tokens. The prompt"
                " has many more; shorten the prompt or the history",
                "prompt",
                most=self.most_tokens,
            )

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self.backend, self.special)

    def _spell(self, token: int) -> str:
        """A token as the text that it adds to an answer, a leading space included."""
        decode = partial(self.backend.decode, skip_special_tokens=False)
        return decode([*self._before, token]).removeprefix(decode(self._before))

    def _ids(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        pieces = text.split(PIECE_BREAK)
        return [i for piece in pieces if piece for i in self._special.encode(piece)]

    def _begin_ids(self) -> list[int]:
        """What stands before every text: BOS, or nothing."""
        if self.family:
            return [self.special[self.family.begin]] if self.family.begin else []
        bare, whole = token_ids(self.backend, "a"), token_ids(self.backend, "a", True)
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def _checked(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The variables for the chat template, if it reads them all and none is the server's."""
        own = {"self", "messages", *signature(self.tokenizer.apply_chat_template).parameters}
        own |= self.tokenizer.special_tokens_map.keys()
        for name in given:
            known = re.search(rf"\b{re.escape(name)}\b", "\n".join(self.templates))
            if name in own or not known:
                reason = "the server sets it" if name in own else "the model's format has none"
                raise InvalidInput(
                    f"the chat template cannot be given {name!r} ({reason}); leave it out",
                    "template_kwargs",
                )
        return given

    def _render(self, messages: list[Message], **given: Any) -> str:
        if self.family:
            return self.family.render(messages, **given)
        for_tools = needs_tools(messages, given.get("tools"))
        template = self.templates.tools if for_tools else self.templates.default
        return render_template(template, messages, self.tokenizer.special_tokens_map | given)

    def _render_open(self, messages: list[Message], given: Mapping[str, Any]) -> str:
        """The prompt up to where the last message ends."""
        *earlier, last = messages
        if last["role"] != "assistant":
            raise InvalidInput("only a last message of the assistant can be continued", "messages")
        end = self._special.placeholder
        text = self._render([*earlier, last | {"content": last["content"] + end}], **given)
        before, found, _ = text.rpartition(end)
        if not found:
            raise InvalidInput(
                "the model's chat template leaves the last message out, so it cannot be continued",
                "messages",
            )
        return before
