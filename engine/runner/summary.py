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
