"""How a runner computes attention, in words."""

from collections import Counter

from engine.runner.runner import Runner


def attention_summary(runner: Runner) -> str:
    """How attention is computed, and how far it reaches."""
    scorings = [layer.scoring for layer in runner.pool.layers]
    windows = Counter(scoring.window for scoring in scorings if scoring.window is not None)
    reach = [f"; {n} of {len(scorings)} layers see {size:,} tokens" for size, n in windows.items()]
    return _kernel_summary(runner) + "".join(reach)


def _kernel_summary(runner: Runner) -> str:
    if runner.fallback_reason:
        kernel = "our kernels" if runner.one_call else "sdpa"
        how = "the rows in place" if runner.backend == "sliced" else "copied rows"
        return f"{kernel} over {how} ({runner.fallback_reason})"
    sizes = sorted({recorded.size for recorded in runner.graphs})
    graphs = f"CUDA graphs for {', '.join(map(str, sizes)) or 'no'} sequences"
    kernel = "FlashAttention" if runner.backend == "in place" else "a kernel of ours for latents"
    return f"{kernel} in place, {graphs}"


def context_summary(runner: Runner, context: int) -> str:
    """How much text the cache holds, of one request and of all."""
    summary = f"{context:,} tokens; KV cache: {runner.rows:,} tokens"
    if pool := runner.states:
        size = pool.slot_bytes / 2**20
        summary += f"; states: {pool.slots} of {size:.1f} MiB, for {pool.most_sequences} requests"
    return summary


def why_no_drafts(runner: Runner, speculate: str) -> str | None:
    """Why sequences get no drafts, in words; None if they do.

    By itself only where a row's numbers are the same to the last bit in any step: there a draft
    changes no token.
    """
    if speculate == "off":
        return "off"
    if runner.states:
        return "off, as layers keep a state"
    if speculate == "auto" and not runner.same_bits:
        return "off, as a draft could change the rounding of its step"
    return None
