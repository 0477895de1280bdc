"""POST /tokenize and /detokenize: token ids of a text or messages, and back, as in vLLM."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from engine import ChatModel, InvalidInput
from serving.conversation import Conversation, Turns
from serving.fields import MAX_TEXT, TextToCount
from serving.request_model import InstantRequest

MAX_TOKENS = 2**18


class TokenizeRequest(Conversation, InstantRequest):
    """A text or messages to count, as in vLLM."""

    field_names: ClassVar[dict[str, str]] = {"template_kwargs": "chat_template_kwargs"}

    prompt: TextToCount | None = None
    messages: Turns | None = None
    add_special_tokens: bool | None = Field(None, description="whether BOS goes before a text")
    return_token_strs: bool | None = Field(None, description="tell the tokens' texts too")

    def check(self) -> None:
        super().check()
        if (self.prompt is None) is (self.messages is None):
            raise InvalidInput("send prompt or messages, one of the two", "prompt")
        if self.messages and self.add_special_tokens:
            raise InvalidInput(
                "add_special_tokens is for prompt; a chat template sets its own",
                "add_special_tokens",
            )
        if self.messages and sum(len(m.content) for m in self.messages) > MAX_TEXT:
            raise InvalidInput(f"messages must have at most {MAX_TEXT} characters", "messages")
        if self.messages is None and self.field_of_conversation():
            name = self.field_of_conversation()
            raise InvalidInput(f"{name} is for messages", name)

    def field_of(self, argument: str | None) -> str | None:
        return super().field_of("messages" if argument == "prompt" and self.messages else argument)

    def field_of_conversation(self) -> str | None:
        """A field that is given and only has a meaning beside messages."""
        return next((name for name in Conversation.model_fields if self._asks(name)), None)

    def _asks(self, name: str) -> bool:
        return name != "model" and getattr(self, name) not in (None, {}, [], False)

    def result(self, model: ChatModel) -> dict[str, Any]:
        """The response. Raises InvalidInput where the model's format refuses the messages."""
        if self.messages:
            ids = model.encode(
                [message.as_turn() for message in self.messages],
                self.chat_template_kwargs,
                continue_final=self.continues(self.messages),
                tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            )
        else:
            ids = model.tokenizer.encode_text(
                self.prompt or "", begin=self.add_special_tokens is not False
            )
        texts = (
            [model.tokenizer.backend.id_to_token(i) for i in ids]
            if self.return_token_strs
            else None
        )
        size = {"count": len(ids), "max_model_len": model.context_length}
        return {**size, "tokens": ids, "token_strs": texts}


class DetokenizeRequest(InstantRequest):
    """Token ids to spell, as in vLLM."""

    tokens: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS, fail_fast=True)
    ]

    def result(self, model: ChatModel) -> dict[str, Any]:
        """The response. Raises InvalidInput for an id that the model does not have."""
        return {"prompt": model.decode(self.tokens)}


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str
