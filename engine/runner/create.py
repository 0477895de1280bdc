"""How a model is made ready for packed steps, and its runner made as large as memory allows."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from engine.attention.in_place import flash_attention
from engine.attention.interface import use_packed_attention
from engine.attention.kv_pool import LayerKVCache
from engine.blame import first_line
from engine.checkpoint.attention_probe import probe_layers
from engine.checkpoint.model_config import context_length
from engine.errors import StartError
from engine.kernels.cpu import why_missing
from engine.layers.cpu_layer import CpuLayer, can_be_one_call
from engine.layers.cpu_model import CpuModel, looks_whole
from engine.layers.fused_layer import fuse_layers
from engine.layers.gated_delta import PackedDelta, can_be_packed
from engine.layers.named_adapters import Updates, attach
from engine.layers.recurrent import use_state_groups
from engine.layers.replacing import replace
from engine.runner.cache_budget import affordable_rows, affordable_slots
from engine.runner.runner import Runner, input_device
from engine.sequence import KVSpan

log = logging.getLogger("chat")

# Most states of finished prompts that are kept.
_MAX_STATES = 64


def why_not_in_place(layers: list[LayerKVCache]) -> str | None:
    """Why FlashAttention cannot read these keys and values in place; None if it can."""
    if flash_attention is None or "seqused_k" not in str(flash_attention.default._schema):
        return f"torch {torch.__version__} has no FlashAttention for it"
    if not all(layer.scoring.is_plain for layer in layers):
        return "FlashAttention does not do soft caps or sinks"
    for keys, values in ((layer.keys, layer.values) for layer in layers):
        if keys.device.type != "cuda":
            return f"layers on {keys.device}"
        if torch.cuda.get_device_capability(keys.device) < (8, 0):
            return f"{torch.cuda.get_device_name(keys.device)} is older than Ampere"
        if keys.dtype not in (torch.bfloat16, torch.float16):
            return f"FlashAttention does not do {keys.dtype}"
        if keys is values:
            return "FlashAttention does not do latents"
        if keys.shape != values.shape or keys.shape[2] % 8 or keys.shape[2] > 256:
            return f"FlashAttention does not do keys {keys.shape[2]} wide, values {values.shape[2]}"
    return None


def _are_latents(layers: list[LayerKVCache]) -> bool:
    """Whether all layers cache MLA's latents, and no kernel of others' reads them."""
    return all(x.keys is x.values and x.scoring.window is None for x in layers)


def _why_not_latents(layers: list[LayerKVCache]) -> str | None:
    """Why our kernel cannot read MLA's latents in place; None if it can."""
    for keys in (layer.keys for layer in layers):
        if keys.device.type != "cuda":
            return f"layers on {keys.device}"
        if keys.dtype not in (torch.bfloat16, torch.float16):
            return f"our kernel does not do {keys.dtype}"
    return None if find_spec("triton") else "there is no Triton for our kernel"


def prepare_model(model: Any) -> None:
    """Make a model's layers ready for packed steps.

    Raises StartError for a model that cannot be batched this way.
    """
    if hasattr(model, "state_modules"):
        return  # they are, by another runner
    for module in model.modules():
        # Up to its original length, to which context_length holds it, dynamic rope is constant;
        # its check for longer sequences would synchronise with the GPU in every step.
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"
    windows, trial = probe_layers(model, context_length(model.config), input_device(model))
    for module, window in windows.items():
        module.attention_window = window
    model.attention_layers = sorted(trial.layers)
    model.state_modules = [*trial.states.modules]
    model.whole = None  # by make_faster, if it is one call
    use_state_groups(model.state_modules)
    if windows:
        use_packed_attention(model)


def create_runner(
    model: Any,
    cache_memory: str = "auto",
    max_rows: int = 2**31 - 1,
    max_batch: int = 64,
    adapters: Sequence[Updates] = (),
) -> Runner:
    """A runner with as many rows as the memory for the KV cache holds, at most `max_rows`.

    The adapters' numbers in spans are their places among `adapters`, counted from 1.

    Raises StartError if the model cannot be batched this way, or the memory is too small.
    """
    prepare_model(model)
    # A few tokens make each layer create its rows, which shows what a row costs on which device.
    trial = Runner(model, 8, 3)
    make_faster(trial)
    current = attach(model, adapters)
    slots = affordable_slots(trial, cache_memory, 2 * max_batch + 1 + _MAX_STATES)
    if slots < 5:
        raise StartError(f"the cache holds the states of {slots} texts; raise --cache-memory")
    rows = min(max_rows, affordable_rows(trial, cache_memory, slots))
    if rows < 64:
        raise StartError(f"the KV cache holds only {rows} tokens; raise --cache-memory")
    runner = Runner(model, rows, slots)
    runner.current, runner.num_adapters = current, len(adapters)
    runner.fallback_reason = why_not_in_place(trial.pool.layers)
    if not trial.pool.layers:
        runner.fallback_reason = "no layer computes attention"
    if runner.fallback_reason is None:
        runner.backend = "in place"
    elif trial.pool.layers and _are_latents(trial.pool.layers):
        runner.fallback_reason = _why_not_latents(trial.pool.layers)
        if runner.fallback_reason is None:
            runner.backend = "latents"
    return runner


def make_faster(trial: Runner) -> None:
    """Let a model's layers take fewer and larger operations, where they compute the same."""

    def run() -> torch.Tensor:
        return trial.forward([(KVSpan([*range(7)]), 7)])

    run()  # says of a model that cannot be batched why
    if trial.device.type == "cpu":
        fuse_layers(trial.model, run)
        if why_missing() is None:
            replace(trial.model, can_be_packed, lambda module, _: PackedDelta(module), run)
        replace(trial.model, can_be_one_call, lambda module, _: CpuLayer(module), run)
        _make_whole(trial)
    elif not trial.split and trial.model.dtype in (torch.bfloat16, torch.float16):
        try:
            from engine.layers.cuda_layer import fuse_on_gpu

            fuse_on_gpu(trial.model, run)
        except Exception as error:  # noqa: BLE001 - whatever a compiler for this GPU may raise
            reason = first_line(error)
            log.warning("layers take more kernels than they need: %s", reason)
        torch.cuda.empty_cache()


def _make_whole(trial: Runner) -> None:
    """Let a step of a model be one call, where it gives the same logits."""
    trial.model.whole = None
    if looks_whole(trial.model):
        ids = trial.model.get_input_embeddings().weight.shape[0]
        spans = [KVSpan([7 * n % ids for n in range(5)]), KVSpan([3, 1, 2], 5)]
        work = [(span, len(span.tokens)) for span in spans]
        wanted = trial.forward(work)
        trial.model.whole = CpuModel(trial.model)
        if not torch.equal(trial.forward(work), wanted):
            trial.model.whole = None
