"""Token ids become text again, as they come."""

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Incremental detokenizer of one answer: whole characters only, and never a stop string.

    `context_ids` are the last ids of a text that the answer continues. Many tokenizers leave out
    the space at the beginning of a text, and an answer that continues one does not begin it.
    `shown_ids` are the special tokens that are text here too, in which no stop string is looked
    for; without any, special tokens are left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        context_ids: Sequence[int] = (),
        shown_ids: Collection[int] = (),
    ):
        self.tokenizer, self.stop, self.shown_ids = tokenizer, stop, shown_ids
        self.stop_string: str | None = None  # that was found
        self._most, self._firsts = max(map(len, stop), default=0), {s[0] for s in stop}
        self._shown: list[int] = []
        self._pending: list[int] = []
        self._stream = self._decode_stream()
        self._held = ""
        for token in context_ids:
            self._decode(token)

    def push(self, token: int) -> str:
        """Add the next id; return the text that can be sent now, often none or one word."""
        text = self._decode(token)
        if token in self.shown_ids:
            return self.flush() + text
        self._held += text
        starts = [(at, stop) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if starts:
            at, self.stop_string = min(starts)
            self._held = self._held[:at]
            return self.flush()
        return self._release(len(self._held) - self._partial_stop())

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    def flush(self) -> str:
        """The text held back, once no more ids come."""
        return self._release(len(self._held))

    def _partial_stop(self) -> int:
        """How many characters at the end may begin a stop string."""
        last = range(max(0, len(self._held) - self._most), len(self._held))
        ends = (self._held[at:] for at in last if self._held[at] in self._firsts)
        return next((len(end) for end in ends if any(s.startswith(end) for s in self.stop)), 0)

    def _release(self, count: int) -> str:
        ready, self._held = self._held[:count], self._held[count:]
        return ready

    def _decode_stream(self) -> DecodeStream:
        return DecodeStream(skip_special_tokens=not self.shown_ids)

    def _decode(self, token: int) -> str:
        try:
            text = self._stream.step(self.tokenizer, token)
        except Exception:
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
