"""How a chat model is loaded, checked and started."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from engine.checkpoint.checkpoint import (
    as_start_error,
    chat_tokenizer,
    check_gpus,
    check_versions,
    device_summary,
    load_model,
)
from engine.checkpoint.model_config import context_length
from engine.checkpoint.named_adapter import NamedAdapters
from engine.kernels.kept import kept
from engine.layers.autotune import choose_weight_format, measure_forms
from engine.layers.freed_memory import return_freed_memory
from engine.layers.quantized import num_parameters
from engine.layers.weight_format import computes_exactly
from engine.model import ChatModel
from engine.prompt.generation_defaults import (
    checkpoint_defaults,
    known_ends,
    log_wishes,
    states_length,
)
from engine.prompt.tokenizer import ChatTokenizer
from engine.runner.cpu_threads import cores_settled_behind
from engine.runner.runner import Runner
from engine.runner.self_check import start_runner
from engine.runner.step_costs import row_costs, step_costs
from engine.runner.summary import attention_summary, context_summary, why_no_drafts
from engine.scheduling.engine import Engine
from engine.scheduling.speculation import Speculation

P = ParamSpec("P")
T = TypeVar("T")


def _measured(
    runner: Runner, facts: dict[str, str], prefill_chunk: int, speculate: str, anew: bool
) -> dict[str, Any]:
    """What the engine is told of its steps' cost; adds to the facts whether there are drafts.

    Where attention has masks or scores as large as chunk times context, steps have few tokens of
    prompts, for their memory.
    """
    most = min(prefill_chunk, context_length(runner.model.config))
    if runner.backend not in ("in place", "latents"):
        most = min(most, 512)
    why_off = why_no_drafts(runner, speculate)
    facts["speculation"] = why_off or "on, with what an answer repeats as drafts"
    of = _identity(runner.model), _form_of(facts), runner.rows, runner.num_adapters, runner.backend
    costs = _kept_costs("steps", (of, most), partial(step_costs, runner, most), anew)
    if why_off:
        return {"costs": costs}
    rows = _kept_costs("rows", of, partial(row_costs, runner), anew)
    return {"costs": costs, "speculation": Speculation(rows)}


def _kept_costs(
    what: str, of: Any, measure: Callable[[], Mapping[int, float]], anew: bool
) -> dict[int, float]:
    """Seconds by tokens, as measured now or at an earlier start."""
    return {int(size): cost for size, cost in kept(what, of, measure, anew).items()}


def _identity(model: Any) -> tuple[Any, ...]:
    """What a model's speed depends on: its configuration, and what its tensors are."""
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    tensors = [(name, x.shape, x.dtype, x.device) for name, x in model.named_parameters()]
    return type(model).__name__, sorted(config.items()), tensors


def _facts_of(text: ChatTokenizer, engine: Engine, context: int) -> dict[str, str]:
    """What a developer asks of a loaded model."""
    runner = engine.runner
    exact = computes_exactly(runner.model)
    beside = "the model's own forward pass" if exact else "those of each sequence alone"
    return {
        "prompt": text.family.name if text.family else "its own chat template",
        "devices": device_summary(runner.model),
        "context": context_summary(runner, context),
        "end ids": f"{sorted(engine.end_ids)}",
        "step": f"up to {engine.scheduler.budget.most} tokens of prompts",
        "attention": attention_summary(runner),
        "self-check": f"relative error {runner.difference:.1e} of a batch's logits, against"
        f" {beside}",
    }


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
            except BaseException as error:  # noqa: BLE001 - raised where the future is awaited
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
    speculate: str = "off",
    timeout: float = 600.0,
    name: str = "",
    measure_anew: bool = False,
) -> ChatModel:
    """Load and check the checkpoint in a folder, and start its engine; takes seconds to minutes.

    `dtype` is auto (the checkpoint's) or a torch dtype's name; `device_map` auto, a device, or a
    JSON map of module to device; `quantize` none, 8bit or 4bit; `base` the folder of an adapter's
    model; `adapters` folders by the names of requests; `chat_template` Jinja, not the model's own;
    `cache_memory` auto, a size or a fraction; `speculate` auto, on or off; `timeout` in seconds;
    `measure_anew` what is kept of an earlier start. Raises StartError.
    """
    _check_machine(device_map)
    form = {"dtype": dtype, "device_map": device_map, "quantize": quantize}
    named = NamedAdapters(adapters, name or _name_of(Path(folder)))
    limits = {"max_batch": max_batch, "max_waiting": max_waiting, "prefill_chunk": prefill_chunk}
    with as_start_error(folder):
        model, text, ends = _read_model(folder, chat_template, base=base, **form)
        named.fit(model, text, own_templates=chat_template is None)
        facts = _settled_weights(model, named.name + named.told, dtype, measure_anew)
        runner = start_runner(model, cache_memory, max_batch, named.updates)
        costs = _measured(runner, facts, prefill_chunk, speculate, measure_anew)
        engine = Engine(runner, text.plain, ends, reuse=reuse, timeout=timeout, **costs | limits)
        return _chat_model(named, text, engine, facts)


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


def _settled_weights(model: Any, name: str, dtype: str, anew: bool) -> dict[str, str]:
    """Settle the form of a model's weights, and say what they are."""
    kind, size = type(model).__name__, f"{num_parameters(model):,} parameters"

    def measure(model: Any) -> dict[Any, list[float]]:
        return dict(kept("forms", _identity(model), partial(measure_forms, model), anew))

    weights = choose_weight_format(model, dtype, measure)
    return_freed_memory()  # of what was tried
    return {"model": f"{name}, {kind}, {size}", "weights": weights}


def _form_of(facts: dict[str, str]) -> str:
    """The form of the weights, without how it was chosen."""
    return facts["weights"].partition(" (")[0]


def _chat_model(
    named: NamedAdapters, text: ChatTokenizer, engine: Engine, facts: dict[str, str]
) -> ChatModel:
    """A loaded model under a name, with what its configuration says of its lengths."""
    runner = engine.runner
    model = runner.model
    context = min(context_length(model.config), runner.rows)
    weights, speculation = _form_of(facts), facts["speculation"]
    return ChatModel(
        name=named.name,
        tokenizer=text,
        adapters=named.texts,
        adapter_ends=named.ends,
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
            "context": context_summary(runner, context),
        }
        | ({} if speculation == "off" else {"speculation": speculation}),
    )
