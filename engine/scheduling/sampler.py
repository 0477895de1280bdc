"""From a step's logits to each sequence's next token, for the whole batch at once."""

from typing import Any

import torch
import torch.nn.functional as F

from engine.errors import EngineError
from engine.guided.guide import Guide
from engine.sequence import Sequence, Token

# Tokens that are ranked at first; few requests ever need more.
NUM_CANDIDATES = 128
# No temperature above 0 is 0 in float32.
_MIN_TEMPERATURE = 1e-30


@torch.inference_mode()
def sample_tokens(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> list[Token | EngineError]:
    """Sample the next token of every sequence, with logprobs for those that ask for them.

    A sequence whose guide fails has an error in place of its token, and the others theirs.

    Modifies logits, float32 [sequences, vocabulary]; pool_ids has the token id in each row of the
    pool. Logprobs are the model's own, before biases, penalties and temperature. Raises
    ArithmeticError if a sequence's logits are not finite.
    """
    with_logprobs = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
    own = logits[with_logprobs].log_softmax(-1) if with_logprobs else None
    is_finite = logits.amax(-1).isfinite()
    failures = _restrict(seqs, logits)
    ids = _sample(seqs, logits, pool_ids, is_finite)
    tokens: list[Token | EngineError] = [Token(i) for i in ids]
    if own is not None:
        chosen = [ids[row] for row in with_logprobs]
        counts = [seqs[row].params.logprobs or 0 for row in with_logprobs]
        for row, token in zip(with_logprobs, _scored(own, chosen, counts), strict=True):
            tokens[row] = token
    for row, error in failures.items():
        tokens[row] = error
    return tokens


@torch.inference_mode()
def score_prompt(seq: Sequence, logits: torch.Tensor) -> None:
    """Note the logprobs of the prompt's tokens that follow those just computed.

    Takes the logits of the tokens from `num_computed_tokens` on, [tokens, vocabulary].
    """
    following = seq.tokens[seq.num_computed_tokens + 1 : seq.num_prompt][: len(logits)]
    own = logits[: len(following)].log_softmax(-1)
    counts = [seq.params.prompt_logprobs or 0] * len(following)
    # A step that failed is computed again.
    seq.prompt_scores[seq.num_computed_tokens :] = _scored(own, following, counts)


def _scored(logprobs: torch.Tensor, ids: list[int], counts: list[int]) -> list[Token]:
    """Tokens with their logprobs and those of the `counts` likeliest, [tokens, vocabulary]."""
    if not ids:
        return []
    own = logprobs.gather(1, _to_device([[i] for i in ids], logprobs.device))[:, 0].tolist()
    values, likeliest = logprobs.topk(max(counts))
    rows = zip(ids, own, likeliest.tolist(), values.tolist(), counts, strict=True)
    return [
        Token(token, logprob, tuple(zip(top, top_values, strict=True))[:count])
        for token, logprob, top, top_values, count in rows
    ]


def _restrict(seqs: list[Sequence], logits: torch.Tensor) -> dict[int, EngineError]:
    """Apply what is said of single tokens: biases, those banned, a guide.

    Returns the errors of those whose guides failed, by their rows.
    """
    failures: dict[int, EngineError] = {}
    for row, seq in enumerate(seqs):
        if seq.params.logit_bias:
            ids, biases = zip(*seq.params.logit_bias, strict=True)
            logits[row].index_add_(
                0, _to_device(ids, logits.device), _to_device(biases, logits.device, logits.dtype)
            )
        if banned := seq.banned:
            logits[row, sorted(banned)] = -torch.inf
        if seq.budget and seq.budget.next_id is not None:
            logits[row] = -torch.inf
            logits[row, seq.budget.next_id] = 0.0
        elif seq.guide:
            try:
                apply_guide(seq.guide, logits[row])
            except EngineError as error:
                failures[row] = error
    return failures


def apply_guide(guide: Guide, logits: torch.Tensor) -> None:
    """Mask one sequence's logits [vocabulary] by its guide. Raises InvalidInput if it fails."""
    token_mask = torch.from_numpy(guide.token_mask()[: len(logits)])
    ruled_out = F.pad(~token_mask, (0, len(logits) - len(token_mask)), value=True)
    logits.masked_fill_(ruled_out.to(logits.device, non_blocking=True), -torch.inf)


def _sample(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor, is_finite: torch.Tensor
) -> list[int]:
    """The next token ids, as transformers' logits processors would have them.

    Synchronises with a GPU once, or twice where a sequence's top-p reaches beyond the candidates.
    """
    if any(seq.params.repetition_penalty != 1 for seq in seqs):
        _apply_repetition_penalty(seqs, logits, pool_ids)
    if any(seq.params.presence_penalty or seq.params.frequency_penalty for seq in seqs):
        _apply_openai_penalties(seqs, logits, pool_ids)
    tokens = logits.argmax(-1)
    beyond = torch.zeros_like(is_finite)
    sampled = [row for row, seq in enumerate(seqs) if seq.params.temperature]
    unfiltered = [row for row in sampled if _is_unfiltered(seqs[row])]
    ranked = [row for row in sampled if not _is_unfiltered(seqs[row])]
    if unfiltered:
        drawn = _draw_unranked([seqs[row] for row in unfiltered], _rows_of(logits, unfiltered))
        put(tokens, unfiltered, drawn)
    if ranked:
        some = [seqs[row] for row in ranked]
        drawn, deep = draw_ranked(some, _rows_of(logits, ranked), NUM_CANDIDATES)
        put(tokens, ranked, drawn)
        put(beyond, ranked, deep)
    chosen, deeper, right = torch.stack([tokens, beyond.long(), is_finite.long()]).tolist()
    if not all(right):
        raise ArithmeticError("the model's logits are not finite; try another --dtype")
    if any(deeper):
        again = [row for row, wanted in enumerate(deeper) if wanted]
        some = [seqs[row] for row in again]
        exact, _ = draw_ranked(some, _rows_of(logits, again), logits.shape[1])
        for row, token in zip(again, exact.tolist(), strict=True):
            chosen[row] = token
    return chosen


def _is_unfiltered(seq: Sequence) -> bool:
    """Whether neither top-k nor top-p is on, so that nothing needs ranking."""
    return not seq.params.top_k and seq.params.top_p >= 1


def _to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the values on a device, without synchronising with it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _rows_of(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows in order; no copy if they are all, as they mostly are."""
    return logits if len(rows) == len(logits) else logits[_to_device(rows, logits.device)]


def put(target: torch.Tensor, rows: list[int], values: torch.Tensor) -> None:
    """The reverse of it, for a target with a number in each row."""
    if len(rows) == len(target):
        target.copy_(values)
    else:
        target[_to_device(rows, target.device)] = values


def _columns(seqs: list[Sequence], parameters: list[str], like: torch.Tensor) -> Any:
    """Parameters of every sequence, float32 [sequences, 1] each, copied to a GPU at once."""
    values = [[float(getattr(seq.params, name)) for name in parameters] for seq in seqs]
    return _to_device(values, like.device, torch.float32).split(1, dim=1)


def _token_ids_from(
    seqs: list[Sequence], first: list[int], logits: torch.Tensor, pool_ids: torch.Tensor
) -> torch.Tensor:
    """The token ids of sequences from index `first` on, [sequences, longest].

    Shorter ones are padded with their last token.
    """
    begins = [seq.start + n for seq, n in zip(seqs, first, strict=True)]
    lasts = [seq.start + len(seq.tokens) - 1 for seq in seqs]
    starts, ends = _to_device([begins, lasts], logits.device).unsqueeze(2)
    most = max(last - begin for begin, last in zip(begins, lasts, strict=True))
    longest = torch.arange(most + 1, device=logits.device)
    return pool_ids[(starts + longest).minimum(ends)]


def _apply_repetition_penalty(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> None:
    """transformers' repetition penalty, on the tokens of prompt and answer."""
    seen = _token_ids_from(seqs, [0] * len(seqs), logits, pool_ids)
    (penalty,) = _columns(seqs, ["repetition_penalty"], logits)
    scores = logits.gather(1, seen)
    logits.scatter_(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def _apply_openai_penalties(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> None:
    """OpenAI's presence and frequency penalties on the answers' tokens, as in its API guide."""
    said = _token_ids_from(seqs, [seq.num_prompt for seq in seqs], logits, pool_ids)
    count = _to_device([[seq.num_completion] for seq in seqs], logits.device)
    counted = torch.arange(said.shape[1], device=logits.device) < count
    times = torch.zeros_like(logits).scatter_add_(1, said, counted.to(logits))
    frequency, presence = _columns(seqs, ["frequency_penalty", "presence_penalty"], logits)
    logits -= frequency * times
    logits -= presence * (times > 0)


def _draw_unranked(seqs: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
    """Sample tokens [sequences] where neither top-k nor top-p is on."""
    temperature, min_p = _columns(seqs, ["temperature", "min_p"], logits)
    scores = (logits - logits.amax(-1, True)) / temperature.clamp(min=_MIN_TEMPERATURE)
    mass = scores.exp()
    mass *= mass >= min_p
    return _inverse_transform(mass, _draws_of(seqs, logits.device))[:, 0]


def _draws_of(seqs: list[Sequence], device: torch.device) -> torch.Tensor:
    """Each sequence's random number from [0, 1) for its next token, [sequences, 1]."""
    return _to_device([[seq.draw] for seq in seqs], device, torch.float64)


def _inverse_transform(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: where draws [sequences, 1] from [0, 1) fall in the mass.

    The mass, [sequences, tokens], need not sum to 1.
    """
    reached = mass.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(reached, draws * reached[:, -1:], right=True)
    return place.clamp(max=mass.shape[1] - 1)


def draw_ranked(
    seqs: list[Sequence], logits: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from the `depth` likeliest tokens of logits [sequences, vocabulary].

    Sorting the whole vocabulary would take longer than all the rest. Returns the tokens
    [sequences], and which sequences' top-p reaches deeper and need to be drawn among all tokens.
    """
    parameters = _columns(seqs, ["temperature", "top_k", "top_p", "min_p"], logits)
    temperature, top_k, top_p, min_p = parameters
    temperature, top_k = temperature.clamp(min=_MIN_TEMPERATURE), top_k.long()
    width = logits.shape[1]
    depth = min(width, max(depth, *(seq.params.top_k for seq in seqs)))
    ranked, ids = logits.topk(depth)
    top = ranked[:, :1]
    # At most 0, so that no temperature can overflow it.
    ranked = (ranked - top) / temperature
    lowest = ranked.gather(1, top_k.clamp(1, depth) - 1)
    ranked = ranked.masked_fill((top_k > 0) & (ranked < lowest), -torch.inf)
    rivals = ranked.logsumexp(-1, True)
    if not all(seq.params.top_k for seq in seqs):
        everyone = ((logits - top) / temperature).logsumexp(-1, True)
        rivals = torch.where(top_k > 0, rivals, everyone)
    mass = (ranked - rivals).exp()
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    keep = ((before < top_p) | (top_p >= 1)) & (mass >= min_p * mass[:, :1])
    keep[:, 0] = True
    tokens = ids.gather(1, _inverse_transform(mass * keep, _draws_of(seqs, logits.device)))[:, 0]
    return tokens, keep[:, -1] & (top_k[:, 0] == 0) & (depth < width)
