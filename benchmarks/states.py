"""Time a layer of the gated delta rule on this CPU: our kernel against the model's own mixer.

    python benchmarks/states.py                         a layer of Qwen3.5-0.8B's size
    python benchmarks/states.py --heads 32 --threads 2  of the 4B's

Random weights, in bfloat16 by our kernels' products. Both compute the same packed steps in turns,
in one process, so their ratio holds on a busy machine too. A line each: the step, the best of some
runs of each in milliseconds, and how many times as fast ours is.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from engine.attention.state_pool import StatePool, state_groups
from engine.layers.cpu_linear import CpuLinear
from engine.layers.gated_delta import PackedDelta
from engine.layers.recurrent import InGroups, StateCache
from engine.sequence import KVSpan

IDLE = KVSpan([0], 10**6, 1)
STEPS = ((1, 0), (16, 0), (0, 512), (16, 256))  # sequences in decode, tokens of a prompt


def layer(width: int, heads: int) -> Qwen3_5GatedDeltaNet:
    """A layer of random weights, whose products are our kernels'."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=260,
        hidden_size=width,
        num_hidden_layers=2,
        linear_num_key_heads=16,
        linear_num_value_heads=heads,
    )
    made = Qwen3_5GatedDeltaNet(config, 0).eval()
    for name, module in [*made.named_children()]:
        if type(module) is torch.nn.Linear:
            setattr(made, name, CpuLinear(module.weight.detach().bfloat16()))
    return made


@torch.inference_mode()
def step_of(module: torch.nn.Module, width: int, decoding: int, chunk: int) -> Callable[[], object]:
    """A step that can be computed again and again, as states are never changed."""
    pool = StatePool(2 * decoding + 3)
    spans = [KVSpan([0] * 2) for _ in range(decoding)]
    for span in spans:
        cache = StateCache(pool, state_groups(pool, [(span, 1)], IDLE), 1)
        module.forward(torch.randn(1, 1, width), cache_params=cache)
        span.num_computed_tokens = 1
    work = [*((span, 1) for span in spans), *([(KVSpan([0] * chunk), chunk)] if chunk else [])]
    x = torch.randn(1, decoding + chunk, width)

    def compute() -> object:
        cache = StateCache(pool, state_groups(pool, work, IDLE), decoding + chunk)
        return module.forward(x, cache_params=cache)

    return compute


def best_of(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """The shortest time of each, in milliseconds, called in turns."""
    best = [float("inf")] * len(functions)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best[-1] == float("inf"):
        for n, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            best[n] = min(best[n], 1000 * (time.perf_counter() - begin))
    return best


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16, help="of values; those of keys are 16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="for each step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    own = layer(options.width, options.heads)
    packed = PackedDelta(layer(options.width, options.heads))
    own.forward = InGroups(own.forward)
    with torch.inference_mode():
        for decoding, chunk in STEPS:
            steps = [step_of(x, options.width, decoding, chunk) for x in (packed, own)]
            ours, theirs = best_of(steps, options.seconds)
            name = f"{decoding} in decode, a chunk of {chunk}"
            print(f"{name:30} {ours:8.2f} {theirs:8.2f} {theirs / ours:6.1f} x", flush=True)


if __name__ == "__main__":
    main()
