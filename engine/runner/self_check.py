"""A runner whose batches were compared with the model alone, before anybody is answered."""

from collections.abc import Sequence
from typing import Any

import torch

from engine.blame import first_line, is_out_of_memory, owner_of
from engine.checkpoint.model_config import context_length, not_supported
from engine.errors import StartError
from engine.layers.named_adapters import Updates
from engine.layers.weight_format import computes_exactly, tolerance_of
from engine.relative_error import relative_error
from engine.runner.create import create_runner
from engine.runner.runner import Runner, input_device
from engine.sequence import KVSpan


def probes(model: Any) -> tuple[list[int], list[int]]:
    """Two short sequences of common tokens: with rare ones, rounding dominates the logits."""
    middle = model.config.get_text_config().vocab_size // 3
    return list(range(middle, middle + 12)), list(range(middle + 12, middle + 19))


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The model's own logits for a sequence alone, [tokens, vocabulary]."""
    ids_there = torch.tensor([ids], device=input_device(model))
    return model(input_ids=ids_there, use_cache=False).logits[0]


def self_check(runner: Runner, alone: list[torch.Tensor], adapter: int = 0) -> float:
    """The relative error of packed and chunked steps against the probes' reference logits.

    The first probe has the adapter, the second none. Raises StartError if it is too large: such a
    model would read its neighbours' tokens.
    """
    first, second = probes(runner.model)
    spans = [KVSpan(first, 0, adapter=adapter), KVSpan(second, 13)]
    errors: list[float] = []
    for news in ((4, 5), (7, 1), (1, 1)):
        logits = runner.forward(list(zip(spans, news, strict=True)))
        for span, new, row, plain in zip(spans, news, logits, alone, strict=True):
            span.num_computed_tokens += new
            errors.append(relative_error(row, plain[span.num_computed_tokens - 1].to(row)))
    runner.forget(spans)
    # By itself max would pass over the NaN that broken weights give.
    worst = max(errors, key=lambda error: (error != error, error))
    # A wrong answer is far off. Both sides have the same weights, so fewer bits allow no more.
    _check_error(runner.model, worst, tolerance_of(runner.model))
    return worst


def _check_error(model: Any, error: float, most: float) -> None:
    """Raise StartError for logits that are too far off, or are no numbers."""
    if error != error:
        raise StartError(
            "the model's logits are NaN; try another --dtype, or download the model again"
        )
    if not error < most:
        raise StartError(
            f"this model does not batch: the logits of {type(model).__name__} come out"
            f" {error:.0%} off; take another model"
        )


@torch.inference_mode()
def _logits_alone(model: Any, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    """The probes' logits by the model's layers as they are now, each sequence alone.

    In half precision these are what batches are held against: two right ways to compute a model
    differ by more than two batches of one may. Raises StartError if they are not near the wanted.
    """
    runner = Runner(model, 16, slots=5)
    spans = [KVSpan(ids, 0, all_logits=True) for ids in probes(model)]
    found = [runner.forward([(span, len(span.tokens))]) for span in spans]
    for logits, own in zip(found, wanted, strict=True):
        _check_error(model, relative_error(logits, own.to(logits)), 2 * tolerance_of(model))
    return found


def _check_batches(runner: Runner, alone: list[torch.Tensor]) -> None:
    """Note the largest relative error of a batch's logits, those of adapters beside none included.

    An adapter's are held against its own, of the probe alone. Raises StartError if one is large.
    """
    runner.difference = self_check(runner, alone)
    ids, _ = probes(runner.model)
    for number in range(1, runner.num_adapters + 1):
        own = runner.forward([(KVSpan(ids, 0, all_logits=True, adapter=number), len(ids))])
        runner.difference = max(runner.difference, self_check(runner, [own, alone[1]], number))


def start_runner(
    model: Any, cache_memory: str = "auto", max_batch: int = 64, adapters: Sequence[Updates] = ()
) -> Runner:
    """A runner whose logits were checked against the model's own. Raises StartError otherwise."""
    try:
        alone = [reference_logits(model, ids) for ids in probes(model)]
        most = max_batch * context_length(model.config)
        runner = create_runner(model, cache_memory, most, max_batch, adapters)
    except Exception as error:
        # A model's own code may raise anything for what is none of its customs.
        if is_out_of_memory(error) or owner_of(error.__traceback__) != "transformers":
            raise
        raise not_supported(
            model.config, f"its code fails in a batch: {first_line(error)}"
        ) from error
    if not computes_exactly(model):
        alone = _logits_alone(model, alone)
    runner.capture_graphs(max_batch, min(context_length(model.config), runner.rows))
    try:
        _check_batches(runner, alone)
    except Exception as error:  # whatever a kernel raises
        if runner.backend == runner.fallback_backend:
            raise
        runner.fall_back(str(error))
        _check_batches(runner, alone)
    return runner
