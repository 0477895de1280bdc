"""One step of the model, and the tokens that it brings.

A sequence that decodes may have a draft: its tokens are computed behind the last one, and each row
is sampled in order, as long as the token before it was the draft's. So every token is sampled by
the logits and with the state that it would have without a draft.
"""

import logging

import torch

from engine.errors import EngineError
from engine.runner.runner import Runner
from engine.scheduling.output import Event, Item, StreamedSequence, failed
from engine.scheduling.sampler import sample_tokens, score_prompt
from engine.scheduling.scheduler import Scheduler
from engine.sequence import KVSpan, Sequence, Token

log = logging.getLogger("chat")

_Work = list[tuple[StreamedSequence, int]]
_Rows = dict[StreamedSequence, int]  # of logits, or a count
_Outcomes = dict[StreamedSequence, Token | EngineError | None]  # None where only scores are wanted


def _with_draft(seq: Sequence) -> KVSpan:
    """What the model computes of a sequence: its tokens, and those of its draft."""
    if not seq.draft:
        return seq
    tokens = [*seq.tokens, *seq.draft]
    return KVSpan(tokens, seq.start, seq.room, seq.num_computed_tokens, True, seq.adapter)


class Stepper:
    """Computes steps, on the engine's thread."""

    def __init__(self, runner: Runner, scheduler: Scheduler[StreamedSequence]):
        self.runner, self.scheduler = runner, scheduler

    def compute(self, work: _Work) -> list[Item]:
        """What a step brings those whose prompts are through: tokens, or none if none is wanted.

        If a step fails, it is computed without drafts, and then its halves are retried, so that
        only the sequences at fault fail.
        """
        if not work:
            return []
        self.scheduler.cache.free_slots(work)
        try:
            logits = self.runner.forward([(_with_draft(seq), new) for seq, new in work])
            rows = self._rows_of(work, logits)
            first = self._sample(rows, logits)
        except Exception as error:  # noqa: BLE001 - costs its requests alone
            if len(work) == 1 and not work[0][0].draft:
                self.runner.check_device()
                return [_fail(work[0][0], failed(work[0][0], error))]
            log.warning("a step of %d requests failed; retrying in parts", len(work))
        else:
            right, items = self._verify(rows, first, logits)
            self.scheduler.advance(work, right)
            return items
        if any(seq.draft for seq, _ in work):
            return self.compute([_without_draft(*item) for item in work])
        half = len(work) // 2
        return self.compute(work[:half]) + self.compute(work[half:])

    def _rows_of(self, work: _Work, logits: torch.Tensor) -> _Rows:
        """The row of the logits of each sequence's last token, where that is computed."""
        rows: _Rows = {}
        end = 0
        for answer, new in work:
            end += new if answer.all_logits or answer.draft else 1
            if answer.all_logits:
                score_prompt(answer, logits[end - new : end])
            drafted = len(answer.draft)
            if answer.pending == new - drafted:
                rows[answer] = end - 1 - drafted
        return rows

    def _sample(self, rows: _Rows, logits: torch.Tensor) -> _Outcomes:
        """The next token of each sequence by its row of the logits."""
        # Of an answer without tokens only the prompt's scores are wanted.
        asked = [answer for answer in rows if answer.params.max_new_tokens]
        outcomes: _Outcomes = dict.fromkeys(rows)
        if asked:
            if len(asked) < len(logits):
                wanted = torch.tensor([rows[answer] for answer in asked])
                logits = logits.index_select(0, wanted.to(logits.device, non_blocking=True))
            tokens = sample_tokens([*asked], logits, self.runner.ids)
            outcomes.update(zip(asked, tokens, strict=True))
        return outcomes

    def _verify(
        self, rows: _Rows, outcomes: _Outcomes, logits: torch.Tensor
    ) -> tuple[_Rows, list[Item]]:
        """Append what was sampled, and sample on while that is what the drafts say.

        Returns how many tokens of each draft were right, and what the step brought.
        """
        right = dict.fromkeys(rows, 0)
        items = [_take(*outcome) for outcome in outcomes.items()]
        going = [answer for answer in rows if _is_right(answer, 0)]
        while going:
            outcomes = self._sample_on({seq: rows[seq] + right[seq] + 1 for seq in going}, logits)
            for answer, outcome in outcomes.items():
                items.append(_take(answer, outcome))
                right[answer] += 1
            going = [answer for answer in outcomes if _is_right(answer, right[answer])]
        return right, items

    def _sample_on(self, rows: _Rows, logits: torch.Tensor) -> _Outcomes:
        """The same of rows of drafts; without those that fail, which the next step then finds."""
        try:
            outcomes = self._sample(rows, logits)
        except Exception:  # noqa: BLE001 - as its first rows, where each fails alone
            return {}
        return {seq: x for seq, x in outcomes.items() if not isinstance(x, EngineError)}


def _is_right(answer: StreamedSequence, number: int) -> bool:
    """Whether a sequence goes on, and its last token is that of its draft."""
    if answer.done or number == len(answer.draft):
        return False
    return answer.tokens[-1] == answer.draft[number]


def _without_draft(answer: StreamedSequence, new: int) -> tuple[StreamedSequence, int]:
    """The work on a sequence, its draft given up."""
    new -= len(answer.draft)
    answer.draft = []
    return answer, new


def _take(answer: StreamedSequence, outcome: Token | EngineError | None) -> Item:
    """Append a token, and tell of it."""
    if isinstance(outcome, EngineError):
        return _fail(answer, outcome)
    if outcome:
        answer.append(outcome.id)
    else:
        answer.done = True
        answer.finish_reason = "length"
    return answer, Event(answer, outcome, answer.finish_reason)


def _fail(answer: StreamedSequence, error: EngineError) -> Item:
    """End an answer with an error."""
    answer.done = answer.spoilt = True
    return answer, error
