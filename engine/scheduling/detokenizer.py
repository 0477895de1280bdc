"""Token ids become text again, as they come."""

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engine.tools.grammar import Thoughts


def _partial(text: str, words: tuple[str, ...]) -> int:
    """How many characters at the end of a text may begin one of these words, and more follow."""
    most = max(map(len, words), default=0)
    ends = (text[at:] for at in range(max(0, len(text) - most), len(text)))
    return next((len(end) for end in ends if any(word.startswith(end) for word in words)), 0)


class Detokenizer:
    """Incremental detokenizer of one answer: whole characters only, and never a stop string.

    `context_ids` are the last ids of a text that the answer continues. Many tokenizers leave out
    the space at the beginning of a text, and an answer that continues one does not begin it.
    `shown_special_ids` are the special tokens that are text here too, in which no stop string is
    looked for; without any, special tokens are left out. Nor is one looked for in `thoughts`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        context_ids: Sequence[int] = (),
        shown_special_ids: Collection[int] = (),
        thoughts: Thoughts | None = None,
    ):
        self.tokenizer, self.stop, self.shown_special_ids = (tokenizer, stop, shown_special_ids)
        # Until what is said begins; without a stop string that does not matter.
        self._thoughts = thoughts if stop else None
        self._is_inside = bool(thoughts and thoughts.begun)
        self.stop_string: str | None = None  # that was found
        self._shown: list[int] = []
        self._pending: list[int] = []
        self._stream = self._decode_stream()
        self._held = ""
        for token in context_ids:
            self._decode(token)

    def push(self, token: int) -> str:
        """Add the next id; return the text that can be sent now, often none or one word."""
        text = self._decode(token)
        if token in self.shown_special_ids:
            return self.flush() + text
        self._held += text
        return self._thought() + self._said()

    def _thought(self) -> str:
        """What belongs to a thought of what is held, or may do so."""
        thoughts = self._thoughts
        if thoughts is None:
            return ""
        begun = self._held.lstrip()
        if not self._is_inside and thoughts.opening.startswith(begun[: len(thoughts.opening)]):
            self._is_inside = begun.startswith(thoughts.opening)
            if not self._is_inside:
                return ""
        if not self._is_inside:
            self._thoughts = None
            return ""
        end = self._held.find(thoughts.closing)
        if end < 0:
            return self._release(len(self._held) - _partial(self._held, (thoughts.closing,)))
        self._thoughts = None
        return self._release(end + len(thoughts.closing))

    def _said(self) -> str:
        """What can be sent of the text that is held, which is no thought."""
        if self._thoughts is not None:
            return ""
        starts = [(at, stop) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if starts:
            at, self.stop_string = min(starts)
            self._held = self._held[:at]
            return self.flush()
        return self._release(len(self._held) - _partial(self._held, self.stop))

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    def flush(self) -> str:
        """The text held back, once no more ids come."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        ready, self._held = self._held[:count], self._held[count:]
        return ready

    def _decode_stream(self) -> DecodeStream:
        return DecodeStream(skip_special_tokens=not self.shown_special_ids)

    def _decode(self, token: int) -> str:
        try:
            text = self._stream.step(self.tokenizer, token)
        except Exception:  # noqa: BLE001 - tokenizers raises no narrower one
            # Invalid UTF-8, which a model may sample at a high temperature, is dropped. What was
            # shown last stays in front: without it, the next word would lose its space.
            self._pending = []
            self._stream = self._decode_stream()
            for shown in self._shown:
                self._stream.step(self.tokenizer, shown)
            text = self._stream.step(self.tokenizer, token)
        self._pending.append(token)
        if text:
            self._shown, self._pending = self._pending, []
        return text or ""
