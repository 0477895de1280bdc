"""POST /v1/completions: https://platform.openai.com/docs/api-reference/completions/create."""

import codecs
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator

from engine import ChatModel, Delta, InvalidInput, Prompt, Token
from serving.fields import Text, parse_prompts
from serving.openai_shared import OpenAIReply, OpenAIRequest, bytes_of
from serving.parts import Choice

_MAX_ANSWERS = 128  # to all of a request's prompts


class CompletionRequest(OpenAIRequest):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(
            parse_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
        ),
    ]
    suffix: Text | None = Field(None, description="fill in what is missing between the two")
    echo: bool | None = Field(None, description="repeat the prompt before the answer")
    logprobs: Annotated[
        int | None, BeforeValidator(lambda value: None if value is False else value)
    ] = Field(None, ge=0, le=20)

    def check(self) -> None:
        super().check()
        if len(self.prompt) * self.num_answers > _MAX_ANSWERS:
            raise InvalidInput(f"n for each prompt makes more than {_MAX_ANSWERS} answers", "n")
        if self.suffix and self.echo:
            raise InvalidInput("echo cannot go with suffix; leave one of them out", "echo")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise InvalidInput("suffix needs prompt to be a text", "suffix")

    @property
    def may_be_empty(self) -> bool:
        return bool(self.echo)

    def overrides(self) -> dict[str, Any]:
        given = super().overrides()
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = self.logprobs
        return given

    def tokenize(self, model: ChatModel) -> list[Prompt]:
        given = self.overrides()
        return [self._prompt(model, text, given) for text in self.prompt]

    def _prompt(self, model: ChatModel, text: str | list[int], given: dict[str, Any]) -> Prompt:
        # An empty suffix asks a model that fills in for the end of a text, and others for nothing.
        wanted = self.suffix or (self.suffix == "" and model.can_infill and not self.echo)
        if wanted and isinstance(text, str):
            return model.prepare_infill(text, self.suffix or "", given)
        return model.prepare_text(text, given)


class _TokenTexts:
    """Where each token of a text begins in it, by characters."""

    def __init__(self, model: ChatModel):
        self.model = model
        self.at = 0
        # Of parts of characters; what never becomes one is no text of an answer either.
        self.decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add_prompt(self, tokens: list[int], text: str) -> list[int]:
        """The tokens of a prompt; returns where each begins in its text.

        The text may lack what its tokens have: a BOS, or a space in front.
        """
        begins = []
        for token in tokens:
            begins.append(self.at)
            spelled = self._spelled(token)
            if not text.startswith(spelled, self.at):
                spelled = spelled.lstrip(" ")
            if text.startswith(spelled, self.at):
                self.at += len(spelled)
        self.at = len(text)
        self.decoder.reset()
        return begins

    def add(self, token: int) -> int:
        """The next token of the answer; returns where it begins."""
        begin = self.at
        self.at += len(self._spelled(token))
        return begin

    def _spelled(self, token: int) -> str:
        """The text that is complete with a token."""
        return self.decoder.decode(bytes_of(self.model, token) or b"")


def _name_of(model: ChatModel, token: int) -> str:
    """A token's text, or that of its bytes if it is part of a character, as OpenAI spelled them."""
    text = model.tokenizer.spell(token)
    known = bytes_of(model, token) if "\ufffd" in text else None
    return text if known is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)


class CompletionReply(OpenAIReply):
    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, model: ChatModel, body: CompletionRequest, prompts: list[Prompt]):
        super().__init__(model, body, prompts)
        self.body, self.prompts, self.n = body, prompts, body.num_answers
        self.places = [_TokenTexts(model) for _ in range(len(prompts) * self.n)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        return self._choice(choice, choice.text, choice.tokens)

    def part(self, delta: Delta, choice: Choice) -> dict[str, Any]:
        return self._choice(choice, delta.text, [delta.token] if delta.token else [])

    def _choice(self, choice: Choice, text: str, tokens: list[Token]) -> dict[str, Any]:
        """A choice with a text and its tokens; with echo, the prompt before those of the first."""
        echoed = ""
        offsets: list[int] = []
        places = self.places[choice.index]
        added = tokens
        if self.body.echo and not choice.started:
            echoed = self._echoed(choice)
            scored = self._scored_prompt(choice)
            offsets = places.add_prompt([token.id for token in scored], echoed)
            tokens = [*scored, *tokens]
        choice.started = True
        offsets += [places.add(token.id) for token in added]
        logprobs = self._logprobs(tokens, offsets) if tokens else None
        return {"index": choice.index, "text": echoed + text, "logprobs": logprobs}

    def _echoed(self, choice: Choice) -> str:
        given = self.body.prompt[choice.index // self.n]
        return given if isinstance(given, str) else self.model.decode(given)

    def _scored_prompt(self, choice: Choice) -> list[Token]:
        """The prompt's tokens; the first has no logprob, as nothing stands before it."""
        if self.body.logprobs is None:
            return []
        return [Token(self.prompts[choice.index // self.n].ids[0]), *choice.prompt_logprobs]

    def _logprobs(self, tokens: list[Token], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [_name_of(self.model, token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        told: dict[str, float] = {}
        for i, logprob in token.top_logprobs:
            # Of tokens that are spelled alike the likeliest is told.
            told.setdefault(_name_of(self.model, i), logprob)
        return told
