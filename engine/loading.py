"""How a chat model is loaded, checked and started."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch

from engine.blame import first_line, is_out_of_memory, owner_of
from engine.checkpoint.checkpoint import (
    as_start_error,
    chat_tokenizer,
    check_gpus,
    check_versions,
    device_summary,
    load_model,
)
from engine.checkpoint.model_config import context_length, not_supported
from engine.checkpoint.named_adapter import NamedAdapters
from engine.errors import StartError
from engine.layers.autotune import choose_weight_format
from engine.layers.freed_memory import return_freed_memory
from engine.layers.named_adapters import Updates
from engine.layers.quantized import num_parameters
from engine.layers.weight_format import computes_exactly, tolerance_of
from engine.model import ChatModel
from engine.prompt.generation_defaults import (
    checkpoint_defaults,
    known_ends,
    log_wishes,
    states_length,
)
from engine.prompt.tokenizer import ChatTokenizer
from engine.relative_error import relative_error
from engine.runner.cpu_threads import cores_settled_behind
from engine.runner.create import create_runner
from engine.runner.runner import Runner, input_device
from engine.runner.step_costs import step_costs
from engine.runner.summary import attention_summary
from engine.scheduling.engine import Engine
from engine.sequence import KVSpan

P = ParamSpec("P")
T = TypeVar("T")


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


def _measured_costs(runner: Runner, prefill_chunk: int) -> dict[int, float]:
    """What steps cost, of as many tokens as a step may compute of prompts.

    Where attention has masks or scores as large as chunk times context, few, for their memory.
    """
    most = min(prefill_chunk, context_length(runner.model.config))
    return step_costs(runner, most if runner.backend in ("in place", "latents") else min(most, 512))


def _facts_of(text: ChatTokenizer, engine: Engine, context: int) -> dict[str, str]:
    """What a developer asks of a loaded model."""
    runner = engine.runner
    exact = computes_exactly(runner.model)
    beside = "the model's own forward pass" if exact else "those of each sequence alone"
    return {
        "prompt": text.family.name if text.family else "its own chat template",
        "devices": device_summary(runner.model),
        "context": _context_summary(runner, context),
        "end ids": f"{sorted(engine.end_ids)}",
        "step": f"up to {engine.scheduler.budget.most} tokens of prompts",
        "attention": attention_summary(runner),
        "self-check": f"relative error {runner.difference:.1e} of a batch's logits, against"
        f" {beside}",
    }


def _context_summary(runner: Runner, context: int) -> str:
    summary = f"{context:,} tokens; KV cache: {runner.rows:,} tokens"
    if pool := runner.states:
        size = pool.slot_bytes / 2**20
        summary += f"; states: {pool.slots} of {size:.1f} MiB, for {pool.most_sequences} requests"
    return summary


def _in_thread_of_its_own(function: Callable[P, T]) -> Callable[P, T]:
    """Call a function in a thread that ends with it.

    OpenMP keeps threads for each thread that has computed something. As soon as they are more than
    the CPU's cores they no longer wait for the next operation but sleep, and waking them takes as
    long as a small operation does. So none may be left but the engine's.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name=function.__name__, daemon=True).start()
        return result.result()

    return call


def _check_machine(device_map: str) -> None:
    """Raise StartError if the libraries or the card cannot do what loading asks of them."""
    check_versions()
    check_gpus(device_map)


@_in_thread_of_its_own
def load(
    folder: Path | str,
    *,
    dtype: str = "auto",
    device_map: str = "auto",
    quantize: str = "none",
    base: Path | str | None = None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    chat_template: str | None = None,
    cache_memory: str = "auto",
    max_batch: int = 64,
    max_waiting: int = 256,
    prefill_chunk: int = 4096,
    reuse: bool = True,
    timeout: float = 600.0,
    name: str = "",
) -> ChatModel:
    """Load and check the checkpoint in a folder, and start its engine; takes seconds to minutes.

    `dtype` is auto (the checkpoint's) or a torch dtype's name; `device_map` auto, a device, or a
    JSON map of module to device; `quantize` none, 8bit or 4bit; `base` the folder of an adapter's
    model; `adapters` folders by the names of requests; `chat_template` Jinja, not the model's own;
    `cache_memory` auto, a size or a fraction; `timeout` in seconds. Raises StartError.
    """
    _check_machine(device_map)
    form = {"dtype": dtype, "device_map": device_map, "quantize": quantize}
    named = NamedAdapters(adapters, name or _name_of(Path(folder)))
    limits = {"max_batch": max_batch, "max_waiting": max_waiting, "prefill_chunk": prefill_chunk}
    with as_start_error(folder):
        model, text, ends = _read_model(folder, chat_template, base=base, **form)
        named.fit(model, text, own_templates=chat_template is None)
        runner, facts = _settled_runner(model, named, dtype, cache_memory, max_batch)
        costs = _measured_costs(runner, prefill_chunk)
        engine = Engine(
            runner, text.plain, ends, reuse=reuse, timeout=timeout, costs=costs, **limits
        )
        return replace(_chat_model(named.name, text, engine, facts), adapters=named.texts)


def _name_of(path: Path) -> str:
    """What a model is called: as its folder, or as its GGUF file without the ending."""
    path = path.absolute()
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def _read_model(
    folder: Path | str, chat_template: str | None, **form: Any
) -> tuple[Any, ChatTokenizer, set[int]]:
    """A checkpoint's model, its tokenizer for chats, and the ids that end an answer."""
    with cores_settled_behind():
        model, tokenizer = load_model(folder, **form)
        text = chat_tokenizer(model, tokenizer, chat_template)
        log_wishes(model.generation_config, text.family)
        return model, text, known_ends(text.end_ids(model.generation_config), _vocabulary_of(model))


def _vocabulary_of(model: Any) -> int:
    """How many token ids a model has an embedding for."""
    return len(model.get_input_embeddings().weight)


def _settled_runner(
    model: Any, named: NamedAdapters, dtype: str, cache_memory: str, max_batch: int
) -> tuple[Runner, dict[str, str]]:
    """A runner of a model in its settled form, with its adapters; and what its weights are."""
    facts = _settled_weights(model, named.name + named.told, dtype)
    return start_runner(model, cache_memory, max_batch, named.updates), facts


def _settled_weights(model: Any, name: str, dtype: str) -> dict[str, str]:
    """Settle the form of a model's weights, and say what they are."""
    kind, size = type(model).__name__, f"{num_parameters(model):,} parameters"
    weights = choose_weight_format(model, dtype)
    return_freed_memory()  # of what was tried
    return {"model": f"{name}, {kind}, {size}", "weights": weights}


def _chat_model(name: str, text: ChatTokenizer, engine: Engine, facts: dict[str, str]) -> ChatModel:
    """A loaded model under a name, with what its configuration says of its lengths."""
    runner = engine.runner
    model = runner.model
    context = min(context_length(model.config), runner.rows)
    weights = facts["weights"].partition(" (")[0]
    return ChatModel(
        name=name,
        tokenizer=text,
        engine=engine,
        defaults=checkpoint_defaults(model.generation_config, text.family, _vocabulary_of(model)),
        states_length=states_length(model.generation_config, text.family),
        context_length=context,
        prompt_length=min(context, getattr(model.config, "max_tokenizer_truncation", context)),
        vocabulary=_vocabulary_of(model),
        offloaded=getattr(model, "offloaded", None),
        facts=facts | _facts_of(text, engine, context),
        summary={
            "model": f"{facts['model']}, {weights}, on {device_summary(model)}",
            "context": _context_summary(runner, context),
        },
    )
