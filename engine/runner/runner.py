"""The model and its KV cache: from tokens to logits."""

import logging
from collections import Counter
from importlib.util import find_spec
from itertools import product
from typing import Any

import psutil
import torch
from accelerate.utils import convert_file_size_to_int

from engine.attention.forward_batch import LayerRows, Pool, Step, Way
from engine.attention.in_place import flash_attention
from engine.attention.interface import use_packed_attention
from engine.checkpoint.attention_probe import attention_windows
from engine.checkpoint.model_config import context_length
from engine.errors import StartError
from engine.layers.cpu_layer import CpuLayer, can_be_one_call
from engine.layers.freed_memory import return_freed_memory
from engine.layers.fused_layer import fuse_layers, replace
from engine.layers.quantized import largest_unpacked
from engine.layers.weight_format import computes_exactly
from engine.runner.cpu_threads import FreeCores
from engine.runner.cuda_graph import DecodeGraph
from engine.sequence import Span, Work

log = logging.getLogger("chat")


def input_device(model: Any) -> torch.device:
    """The device for token ids: the embedding's, or where accelerate moves it to compute."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if device is None else device)


def why_not_in_place(layers: list[LayerRows]) -> str | None:
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


def are_latents(layers: list[LayerRows]) -> bool:
    """Whether all layers cache MLA's latents, and no kernel of others' reads them."""
    return all(x.keys is x.values and x.scoring.window is None for x in layers)


def why_not_latents(layers: list[LayerRows]) -> str | None:
    """Why our kernel cannot read MLA's latents in place; None if it can."""
    for keys in (layer.keys for layer in layers):
        if keys.device.type != "cuda":
            return f"layers on {keys.device}"
        if keys.dtype not in (torch.bfloat16, torch.float16):
            return f"our kernel does not do {keys.dtype}"
    return None if find_spec("triton") else "there is no Triton for our kernel"


def padded_size(total: int) -> int:
    """The number of tokens to pad a step to, one of a few dozen sizes."""
    if total <= 16:
        return total
    return total + -total % (8 if total <= 64 else 32)


def prepare_model(model: Any) -> None:
    """Make a model's layers ready for packed steps.

    Raises StartError for a model that cannot be batched this way.
    """
    if model.config._attn_implementation == "packed":
        return  # they are, by another runner
    for module in model.modules():
        # Up to its original length, to which context_length holds it, dynamic rope is constant;
        # its check for longer sequences would synchronise with the GPU in every step.
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"
    windows = attention_windows(model, context_length(model.config), input_device(model))
    for module, window in windows.items():
        module.attention_window = window
    use_packed_attention(model)


def create_runner(model: Any, cache_memory: str = "auto", max_rows: int = 2**31 - 1) -> "Runner":
    """A runner with as many rows as the memory for the KV cache holds, at most `max_rows`.

    Raises StartError if the model cannot be batched this way, or the memory is too small.
    """
    prepare_model(model)
    # A few tokens make each layer create its rows, which shows what a row costs on which device.
    trial = Runner(model, 8)
    make_faster(trial)
    rows = min(max_rows, affordable_rows(trial, cache_memory))
    if rows < 64:
        raise StartError(f"the KV cache holds only {rows} tokens; raise --cache-memory")
    runner = Runner(model, rows)
    runner.fallback_reason = why_not_in_place(trial.pool.layers)
    if runner.fallback_reason is None:
        runner.way = "in place"
    elif are_latents(trial.pool.layers):
        runner.fallback_reason = why_not_latents(trial.pool.layers)
        if runner.fallback_reason is None:
            runner.way = "latents"
    return runner


def make_faster(trial: "Runner") -> None:
    """Let a model's layers take fewer and larger operations, where they compute the same."""

    def run() -> torch.Tensor:
        return trial.forward([(Span([*range(7)]), 7)])

    run()  # says of a model that cannot be batched why
    if trial.device.type == "cpu":
        fuse_layers(trial.model, run)
        replace(trial.model, can_be_one_call, lambda module, _: CpuLayer(module), run)
    elif not trial.split and trial.model.dtype in (torch.bfloat16, torch.float16):
        try:
            from engine.layers.cuda_layer import fuse_on_gpu

            fuse_on_gpu(trial.model, run)
        except Exception as error:  # whatever a compiler for this GPU may raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            log.warning("layers take more kernels than they need: %s", reason)
        torch.cuda.empty_cache()


def affordable_rows(trial: "Runner", cache_memory: str) -> int:
    """Rows that the memory budget holds, on the device where it holds the fewest."""
    costs: Counter[torch.device] = Counter()
    for layer in trial.pool.layers:
        costs[layer.keys.device] += layer.row_bytes
    return min(
        cache_budget(cache_memory, device, largest_unpacked(trial.model, device)) // cost
        for device, cost in costs.items()
    )


def cache_budget(setting: str, device: torch.device, needed: int = 0) -> int:
    """Bytes for the KV cache on a device: auto, a fraction of the free memory, or a size.

    `needed` bytes are not free, as a step unpacks weights into them.
    """
    on_card = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_card else psutil.virtual_memory().available
    free = max(0, free - needed)
    if setting == "auto" and on_card:
        # The rest is for activations and CUDA graphs.
        return int(min(0.85 * free, max(free / 2, free - 2**30)))
    if setting == "auto":
        return min(2**31, free // 2)
    try:
        return int(free * float(setting))
    except ValueError:
        return int(convert_file_size_to_int(setting))


class Runner:
    """Computes logits with a prepared model, over the spans of its pool; knows no requests."""

    def __init__(self, model: Any, rows: int):
        self.model = model
        self.device = input_device(model)
        self.split = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        # For every new shape in half precision oneDNN allocates memory that it never frees, and the
        # room of unpacked weights beside it is not used again.
        self.pads = self.device.type == "cpu" and not computes_exactly(model)
        self.sizes: set[int] = set()  # of steps so far, where they are padded
        self.num_layers = model.config.get_text_config().num_hidden_layers
        self.pool = Pool(self.num_layers, rows)
        # The token id in each row, for penalties; and the span that pads a step.
        self.ids = torch.zeros(rows + 1, dtype=torch.long, device=self.device)
        self.idle = Span([0], rows, 1)
        self.way: Way = self.fallback_way
        self.fallback_reason: str | None = None  # why attention is not in place
        self.graphs: list[DecodeGraph] = []
        self.cores = FreeCores() if self.device.type == "cpu" else None
        self.difference = 0.0  # from the plain forward pass, as self_check measured it

    @property
    def fallback_way(self) -> Way:
        """How decode reads the cache where FlashAttention cannot."""
        return "sliced" if self.device.type == "cpu" else "copied"

    @property
    def one_call(self) -> bool:
        """Whether each layer is one call of our kernels for CPUs."""
        return sum(type(x) is CpuLayer for x in self.model.modules()) == self.num_layers

    @property
    def rows(self) -> int:
        """How many tokens the pool holds."""
        return self.pool.rows

    @torch.inference_mode()
    def forward(self, work: Work) -> torch.Tensor:
        """Compute the work; return float32 logits [wanted tokens, vocabulary].

        Wanted is each span's last token, or all of the computed ones if it has `all_logits`.
        """
        if self.cores:
            self.cores.settle()
        total = sum(new for _, new in work)
        wanted = sum(new if span.all_logits else 1 for span, new in work)
        graph = self._fitting_graph(work) if total == len(work) else None
        size = total
        if graph:
            size = graph.size
        elif self.pads:
            size = padded_size(total)
        step = Step([*work, *[(self.idle, 1)] * (size - total)], self.way)
        logits = graph(step) if graph else self.compute(step, wanted)
        if self.pads and size not in self.sizes:
            self.sizes.add(size)
            return_freed_memory()
        return logits[:wanted]

    def compute(self, step: Step, wanted: int | None = None) -> torch.Tensor:
        """A step's logits: of the first `wanted` of its wanted tokens, or of all."""
        step.pool = self.pool
        here = step.on(self.device)
        self.ids.index_copy_(0, here.write, here.ids)
        # On a split model accelerate's root hook would move a tensor to the first device, not ints.
        kept = step.wanted[:wanted].tolist() if self.split else here.wanted[:wanted]
        before = step.attended
        out = self.model(
            input_ids=here.ids[None],
            position_ids=here.positions[None],
            use_cache=False,
            step=step,
            logits_to_keep=kept,
        )
        if step.attended - before != self.num_layers:
            raise StartError("the model's attention cannot be reached")
        return out.logits[0].float()

    @torch.inference_mode()
    def capture_graphs(self, max_batch: int, context: int) -> None:
        """Capture decode steps as CUDA graphs, for a few batch sizes and length limits each."""
        if self.fallback_reason or self.way == self.fallback_way or self.split:
            return
        sizes = sorted({*(2**n for n in range(11) if 2**n < max_batch), max_batch})
        lengths = sorted({*(2048 * 4**n for n in range(6) if 2048 * 4**n < context), context})
        if self.way == "latents":  # its kernel divides its work by the lengths themselves
            lengths = [context]
        log.info("capturing CUDA graphs for decode steps of up to %d sequences", max_batch)
        memory = torch.cuda.graph_pool_handle()
        failed: dict[int, Exception] = {}
        # Largest first: the others then fit into its memory.
        for size, longest in reversed([*product(sizes, lengths)]):
            try:
                self.graphs.insert(0, self._decode_graph(size, longest, memory))
            except Exception as error:  # not every model's code can be captured
                failed[size] = error
        if failed:
            smallest = min(failed)
            why = failed[smallest]
            log.warning("steps of %d sequences or more are no CUDA graphs: %s", smallest, why)

    def fall_back(self, reason: str) -> None:
        """Do without FlashAttention from now on, because reading in place went wrong."""
        log.warning("attention in place is not used: %s", reason)
        self.way, self.fallback_reason, self.graphs = self.fallback_way, reason, []

    def check_device(self) -> None:
        """Raise if the device no longer computes, as after some CUDA errors."""
        torch.zeros(1, device=self.device).item()

    @torch.inference_mode()
    def copy(self, span: Span, start: int, count: int) -> None:
        """Copy the first `count` rows of a span to the rows from `start` on."""
        self.pool.copy(span.start, start, count)
        ids = torch.tensor(span.tokens[:count]).to(self.device, non_blocking=True)
        self.ids[start : start + count] = ids

    def _fitting_graph(self, work: Work) -> DecodeGraph | None:
        longest = max(span.num_cached + new for span, new in work)
        fitting = (g for g in self.graphs if g.size >= len(work) and g.longest >= longest)
        return next(fitting, None)

    def _decode_graph(self, size: int, longest: int, memory: Any) -> DecodeGraph:
        step = Step([(self.idle, 1)] * size, self.way).on(self.device)
        return DecodeGraph(step, longest, self.compute, self.device, memory)
