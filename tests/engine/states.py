"""Tiny models whose layers keep a state, engines for them, and whether a slot is lost."""

from copy import deepcopy
from functools import cache

import model_types
import torch
from transformers import AutoModelForCausalLM

from engine.runner.runner import Runner
from engine.runner.self_check import start_runner
from engine.sampling_params import SamplingParams
from engine.scheduling.engine import Engine
from tests.conftest import greedy


@cache
def plain_model(kind: str):
    """A model of a type as transformers has it: a few thousand random weights, float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(model_types.tiny_config(kind, 40)).float().eval()


@cache
def prepared(kind: str):
    """The same, as the engine computes it."""
    return start_runner(deepcopy(plain_model(kind)), "64MiB", 6).model


@cache
def alone(kind: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """What `generate` says to a prompt by itself."""
    return greedy(plain_model(kind), list(prompt), count)


def engine_for(kind: str, rows: int = 1200, slots: int = 77, **settings) -> Engine:
    runner = Runner(prepared(kind), rows, slots)
    settings = {"max_batch": 6, "prefill_chunk": 24} | settings
    return Engine(runner, model_types.words().backend_tokenizer, {2}, **settings)


def texts(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 260, (n,), generator=generator).tolist() for n in lengths]


async def tokens(engine: Engine, prompt: list[int], count: int = 12, n: int = 1, **options):
    """The ids of each of n greedy answers, and how many of the prompt's tokens were cached."""
    params = SamplingParams(
        max_new_tokens=count, temperature=0.0, repetition_penalty=1.0, logprobs=0, ignore_eos=True
    )
    answers: list[list[int]] = [[] for _ in range(n)]
    cached = 0
    async for delta in engine.stream(prompt, params, n, **options):
        if delta.token:
            answers[delta.index].append(delta.token.id)
        cached = max(cached, delta.cached_tokens)
    return answers, cached


def check_slots(engine: Engine) -> None:
    """Each slot is held as often as it is counted, or free; what is found is there."""
    cache = engine.cache
    pool = cache.states.pool
    held = [0] * pool.slots
    held[pool.idle] += 1
    spans = [*cache.kept, *engine.scheduler.running, *engine.scheduler.waiting]
    for span in spans:
        for slot in span.states.values():
            held[slot] += 1
    assert held == pool.users
    assert sorted(pool.free) == [slot for slot, users in enumerate(held) if not users]
    for span, positions in cache.states.index.keys.items():
        assert span in spans
        assert positions.keys() <= span.states.keys()
