"""An answer on its way: from the engine's thread, token by token, to text on an event loop."""

import asyncio
import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

from engine.errors import EngineError, StepFailed
from engine.scheduling.detokenizer import Detokenizer
from engine.sequence import Delta, FinishReason, Sequence, Token
from engine.tools.grammar import Thoughts

log = logging.getLogger("chat")

# Seconds between the Deltas that keep an idle stream's connection alive.
HEARTBEAT = 15.0


class Outbox:
    """Where the engine's thread puts what the event loop of one request takes out."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event | EngineError | None] = asyncio.Queue()


@dataclass(eq=False, kw_only=True)
class StreamedSequence(Sequence):
    """A sequence whose tokens go to a stream."""

    outbox: Outbox
    index: int = 0
    deadline: float = math.inf  # by time.monotonic()


class Event(NamedTuple):
    """What a step brought an answer: its next token, or none where only the prompt is scored."""

    answer: StreamedSequence
    token: Token | None
    finish_reason: FinishReason | None


# What is sent of an answer at once.
Item = tuple[StreamedSequence, Event | EngineError]


class OutputProcessor:
    """Makes Deltas of an answer's tokens, on the event loop."""

    def __init__(
        self,
        answer: StreamedSequence,
        tokenizer: Tokenizer,
        context: list[int],
        shown_special_ids: Collection[int] = (),
        thoughts: Thoughts | None = None,
    ):
        self.answer, self.num_tokens, self.ended = answer, 0, False
        stop = answer.params.stop
        self.detokenizer = Detokenizer(tokenizer, stop, context, shown_special_ids, thoughts)

    def take(self, event: Event) -> Delta | None:
        """The Delta for the next token, None if there is nothing to tell.

        A stop string in the text ends the answer. Raises StepFailed if the text cannot be made.
        """
        if self.ended:  # by a stop string, before the engine knew
            return None
        try:
            return self._delta(event)
        except Exception as error:
            raise failed(self.answer, error) from error

    def _delta(self, event: Event) -> Delta | None:
        token, reason = event.token, event.finish_reason
        text = ""
        if token:
            self.num_tokens += 1
        if token and reason == "stop":
            token = None  # the end itself is no part of the answer
        if token:
            text = self.detokenizer.push(token.id)
        if self.detokenizer.stopped:
            reason = "stop"
            self.answer.done = True
        if reason:
            self.ended = True
            text += self.detokenizer.flush()
        if token and token.logprob is None:
            token = None
        first = self.num_tokens <= 1
        scores = tuple(self.answer.prompt_scores) if first else ()
        if not (text or token or reason or scores):
            return None
        return Delta(
            text,
            self.answer.index,
            reason,
            token,
            prompt_tokens=self.answer.num_prompt,
            completion_tokens=self.num_tokens,
            cached_tokens=self.answer.num_reused,
            queue_time=self.answer.admitted - self.answer.arrived,
            stop_string=self.detokenizer.stop_string,
            prompt_logprobs=scores,
            accepted_prediction_tokens=self.answer.accepted_prediction_tokens,
            rejected_prediction_tokens=self.answer.rejected_prediction_tokens,
        )


def failed(seq: Sequence, error: Exception) -> EngineError:
    """What to tell of an error that a sequence caused; logged, unless it is the request's own."""
    if isinstance(error, EngineError):
        return error
    log.error("a request of %d tokens failed", len(seq.tokens), exc_info=error)
    return StepFailed("the model failed on this request; try again")


async def heartbeat(outbox: Outbox) -> None:
    """Put nothing into the outbox now and then, until cancelled."""
    while True:
        await asyncio.sleep(HEARTBEAT)
        outbox.queue.put_nowait(None)


def deliver(items: list[Item]) -> None:
    """Put items into their outboxes, on the event loop."""
    for answer, item in items:
        answer.outbox.queue.put_nowait(item)
