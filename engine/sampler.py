"""From a step's logits to each sequence's next token, for the whole batch at once."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from engine.guide import Guide
from engine.runner import to_device
from engine.sequence import Sequence, Token

# Tokens that are ranked at first; few requests ever need more.
NUM_CANDIDATES = 128


def column(seqs: list[Sequence], knob: str, like: torch.Tensor) -> torch.Tensor:
    """One knob of every sequence, [sequences, 1]; a temperature is never 0 in float32."""
    values = to_device([[getattr(seq.sampling, knob)] for seq in seqs], like.device)
    return values.clamp(min=1e-30) if knob == "temperature" else values


def pick(
    seqs: list[Sequence],
    logits: torch.Tensor,
    pool_ids: torch.Tensor,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[int]:
    """Sample the next token of every sequence, as transformers' logits processors would.

    Modifies logits, float32 [sequences, vocabulary]; pool_ids has the token id in each row of the
    pool. Synchronises with a GPU once, at the end, after calling `meanwhile`.
    """
    sound = logits.amax(-1).isfinite()
    if any(seq.sampling.repetition_penalty != 1 for seq in seqs):
        apply_repetition_penalty(seqs, logits, pool_ids)
    if any(seq.sampling.presence_penalty or seq.sampling.frequency_penalty for seq in seqs):
        apply_openai_penalties(seqs, logits, pool_ids)
    warm = [row for row, seq in enumerate(seqs) if seq.sampling.temperature]
    free = [row for row in warm if not seqs[row].sampling.top_k and seqs[row].sampling.top_p >= 1]
    tokens, deeper = logits.argmax(-1), torch.zeros_like(sound)
    # Rows to draw, and among how many candidates; 0 stands for all, unranked.
    todo = [(free, 0), (sorted({*warm} - {*free}), NUM_CANDIDATES)]
    while True:
        for rows, depth in todo:
            if rows:
                there, some = to_device(rows, logits.device), [seqs[row] for row in rows]
                theirs = logits if len(rows) == len(seqs) else logits.index_select(0, there)
                numbers = to_device([[seq.draw] for seq in some], logits.device, torch.float64)
                draw = partial(draw_from_top, depth=depth) if depth else draw_unranked
                tokens[there], deeper[there] = draw(some, theirs, numbers)
        meanwhile()
        picked, again, right = torch.stack([tokens, deeper.long(), sound.long()]).tolist()
        if not all(right):
            raise ArithmeticError("the model's logits are not finite; try another --dtype")
        if not any(again):
            return picked
        todo = [([row for row, yes in enumerate(again) if yes], 8 * depth)]


def token_ids_from(
    seqs: list[Sequence], first: list[int], logits: torch.Tensor, pool_ids: torch.Tensor
) -> torch.Tensor:
    """The token ids of sequences from index `first` on, [sequences, longest].

    Shorter ones are padded with their last token.
    """
    begins = [seq.start + n for seq, n in zip(seqs, first, strict=True)]
    lasts = [seq.start + len(seq.tokens) - 1 for seq in seqs]
    starts, ends = to_device([begins, lasts], logits.device).unsqueeze(2)
    most = max(last - begin for begin, last in zip(begins, lasts, strict=True))
    longest = torch.arange(most + 1, device=logits.device)
    return pool_ids[(starts + longest).minimum(ends)]


def apply_repetition_penalty(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> None:
    """transformers' repetition penalty, on the tokens of prompt and answer."""
    seen = token_ids_from(seqs, [0] * len(seqs), logits, pool_ids)
    penalty = column(seqs, "repetition_penalty", logits)
    scores = logits.gather(1, seen)
    logits.scatter_(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def apply_openai_penalties(
    seqs: list[Sequence], logits: torch.Tensor, pool_ids: torch.Tensor
) -> None:
    """OpenAI's presence and frequency penalties on the answers' tokens, as in its API guide."""
    said = token_ids_from(seqs, [seq.num_prompt for seq in seqs], logits, pool_ids)
    count = to_device([[seq.num_completion] for seq in seqs], logits.device)
    counted = torch.arange(said.shape[1], device=logits.device) < count
    times = torch.zeros_like(logits).scatter_add_(1, said, counted.to(logits))
    logits -= column(seqs, "frequency_penalty", logits) * times
    logits -= column(seqs, "presence_penalty", logits) * (times > 0)


# Tokens [sequences], and which of them need to be drawn again among more candidates.
Drawn = tuple[torch.Tensor, torch.Tensor]


def draw_unranked(seqs: list[Sequence], logits: torch.Tensor, draws: torch.Tensor) -> Drawn:
    """Sample where neither top-k nor top-p is on, so that nothing needs ranking."""
    scores = (logits - logits.amax(-1, True)) / column(seqs, "temperature", logits)
    mass = scores.exp()
    mass *= mass >= column(seqs, "min_p", logits)
    tokens = inverse_transform(mass, draws)[:, 0]
    return tokens, torch.zeros_like(tokens, dtype=torch.bool)


def inverse_transform(mass: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: where draws [sequences, 1] from [0, 1) fall in the mass.

    The mass, [sequences, tokens], need not sum to 1.
    """
    reached = mass.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(reached, draws * reached[:, -1:], right=True)
    return place.clamp(max=mass.shape[1] - 1)


def draw_from_top(
    seqs: list[Sequence], logits: torch.Tensor, draws: torch.Tensor, depth: int
) -> Drawn:
    """Sample from logits [sequences, vocabulary] with draws [sequences, 1] from [0, 1).

    Ranks only the `depth` likeliest tokens, as sorting the whole vocabulary would take longer than
    all the rest; a sequence whose top-p reaches deeper needs to be drawn again.
    """
    temperature, top_k, top_p, min_p = (
        column(seqs, knob, logits) for knob in ("temperature", "top_k", "top_p", "min_p")
    )
    width = logits.shape[1]
    depth = min(width, max(depth, *(seq.sampling.top_k for seq in seqs)))
    ranked, ids = logits.topk(depth)
    top = ranked[:, :1]
    # At most 0, so that no temperature can overflow it.
    ranked = (ranked - top) / temperature
    lowest = ranked.gather(1, top_k.clamp(1, depth) - 1)
    ranked = ranked.masked_fill((top_k > 0) & (ranked < lowest), -torch.inf)
    rivals = ranked.logsumexp(-1, True)
    if not all(seq.sampling.top_k for seq in seqs):
        everyone = ((logits - top) / temperature).logsumexp(-1, True)
        rivals = torch.where(top_k > 0, rivals, everyone)
    mass = (ranked - rivals).exp()
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    keep = ((before < top_p) | (top_p >= 1)) & (mass >= min_p * mass[:, :1])
    keep[:, 0] = True
    tokens = ids.gather(1, inverse_transform(mass * keep, draws))[:, 0]
    return tokens, keep[:, -1] & (top_k[:, 0] == 0) & (depth < width)


def apply_guide(guide: Guide, logits: torch.Tensor) -> None:
    """Mask one sequence's logits [vocabulary] by its guide. Raises InvalidInput if it fails."""
    allowed = torch.from_numpy(guide.allowed()[: len(logits)])
    ruled_out = F.pad(~allowed, (0, len(logits) - len(allowed)), value=True)
    logits.masked_fill_(ruled_out.to(logits.device, non_blocking=True), -torch.inf)


@torch.inference_mode()
def pick_tokens(
    seqs: list[Sequence],
    logits: torch.Tensor,
    pool_ids: torch.Tensor,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Token]:
    """`pick` under the sequences' guides, and logprobs for those that ask for them.

    Logprobs are the model's own, before temperature and penalties.
    """
    told = [row for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    own = logits.index_select(0, to_device(told, logits.device, torch.long)).log_softmax(-1)
    for row, seq in enumerate(seqs):
        if seq.guide:
            apply_guide(seq.guide, logits[row])
    tokens = [Token(i) for i in pick(seqs, logits, pool_ids, meanwhile)]
    if told:
        most = max(seqs[row].sampling.logprobs or 0 for row in told)
        picked = to_device([[tokens[row].id] for row in told], own.device)
        logprobs = own.gather(1, picked)[:, 0].tolist()
        values, ids = (x.tolist() for x in own.topk(most))
        for n, row in enumerate(told):
            top_logprobs = tuple(zip(ids[n], values[n], strict=True))[: seqs[row].sampling.logprobs]
            tokens[row] = Token(tokens[row].id, logprobs[n], top_logprobs)
    return tokens
