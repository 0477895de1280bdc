"""The model and its KV cache: from tokens to logits."""

import logging
from itertools import product
from typing import Any

import torch

from engine.attention.forward_batch import AttentionBackend, ForwardBatch
from engine.attention.kv_pool import KVCache
from engine.attention.state_pool import StatePool, state_groups
from engine.blame import first_line
from engine.checkpoint.model_config import cache_argument
from engine.errors import StartError
from engine.layers.cpu_layer import CpuLayer
from engine.layers.cpu_linear import CpuLinear
from engine.layers.freed_memory import return_freed_memory
from engine.layers.lora import Current
from engine.layers.recurrent import StateCache
from engine.layers.weight_format import computes_exactly
from engine.runner.cpu_threads import FreeCores
from engine.runner.cuda_graph import DecodeGraph
from engine.sequence import KVSpan, ScheduledBatch

log = logging.getLogger("chat")


def input_device(model: Any) -> torch.device:
    """The device for token ids: the embedding's, or where accelerate moves it to compute."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if device is None else device)


def padded_size(total: int) -> int:
    """The number of tokens to pad a step to, one of a few dozen sizes."""
    if total <= 16:
        return total
    return total + -total % (8 if total <= 64 else 32)


class Runner:
    """Computes logits with a prepared model, over the spans of its pool; knows no requests."""

    def __init__(self, model: Any, rows: int, slots: int = 33):
        self.model = model
        self.state_modules = model.state_modules
        self.states = StatePool(slots) if self.state_modules else None
        self.device = input_device(model)
        self.split = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        # For every new shape in half precision oneDNN allocates memory that it never frees, and the
        # room of unpacked weights beside it is not used again.
        self.pads = self.device.type == "cpu" and not computes_exactly(model)
        self.sizes: set[int] = set()  # of steps so far, where they are padded
        self.num_layers = model.config.get_text_config().num_hidden_layers
        self.pool = KVCache(model.attention_layers, rows)
        # The token id in each row, for penalties; and the span that pads a step.
        self.ids = torch.zeros(rows + 1, dtype=torch.long, device=self.device)
        self.idle = KVSpan([0], rows, 1)
        self.backend: AttentionBackend = self.fallback_backend
        self.fallback_reason: str | None = None  # why attention is not in place
        self.graphs: list[DecodeGraph] = []
        self.cores = FreeCores() if self.device.type == "cpu" else None
        self.difference = 0.0  # from the plain forward pass, as self_check measured it
        self.num_adapters = 0
        self.current = Current()

    @property
    def fallback_backend(self) -> AttentionBackend:
        """How decode reads the cache where FlashAttention cannot."""
        return "sliced" if self.device.type == "cpu" else "copied"

    @property
    def one_call(self) -> bool:
        """Whether each layer is one call of our kernels for CPUs."""
        return sum(type(x) is CpuLayer for x in self.model.modules()) == self.num_layers

    @property
    def same_bits(self) -> bool:
        """Whether a token's logits are the same to the last bit whatever else is in its step."""
        return self.one_call and isinstance(self.model.get_output_embeddings(), CpuLinear)

    @property
    def rows(self) -> int:
        """How many tokens the pool holds."""
        return self.pool.rows

    @torch.inference_mode()
    def forward(self, work: ScheduledBatch) -> torch.Tensor:
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
        step = ForwardBatch([*work, *[(self.idle, 1)] * (size - total)], self.backend)
        if self.states:
            for span, _ in work:
                self.states.tidy(span)
            groups = state_groups(self.states, step.work, self.idle)
            step.states = StateCache(self.states, groups, size)
        logits = graph(step) if graph else self.compute(step, wanted)
        if self.pads and size not in self.sizes:
            self.sizes.add(size)
            return_freed_memory()
        return logits[:wanted]

    def compute(self, step: ForwardBatch, wanted: int | None = None) -> torch.Tensor:
        """A step's logits: of the first `wanted` of its wanted tokens, or of all."""
        step.pool = self.pool
        here = step.on(self.device)
        self.ids.index_copy_(0, here.write, here.ids)
        if self.model.whole:
            whole: torch.Tensor = self.model.whole.logits(here, here.wanted[:wanted])
            return whole
        # On a split model accelerate's root hook would move a tensor to the first device, not ints.
        kept = step.wanted[:wanted].tolist() if self.split else here.wanted[:wanted]
        before = step.attended
        given = {cache_argument(self.model): step.states} if self.states else {}
        with self.current.computing(step):
            out = self.model(
                input_ids=here.ids[None],
                position_ids=here.positions[None],
                use_cache=False,
                step=step,
                logits_to_keep=kept,
                **given,
            )
        if step.attended - before != len(self.pool.layers):
            raise StartError("the model's attention cannot be reached")
        if self.states and step.states.calls != len(self.state_modules):
            raise StartError("the model's layers with a state cannot be reached")
        return out.logits[0].float()

    @torch.inference_mode()
    def capture_graphs(self, max_batch: int, context: int) -> None:
        """Capture decode steps as CUDA graphs, for a few batch sizes and length limits each."""
        if (
            self.fallback_reason
            or self.backend == self.fallback_backend
            or self.split
            or self.states
        ):
            return
        sizes = sorted({*(2**n for n in range(11) if 2**n < max_batch), max_batch})
        lengths = sorted({*(2048 * 4**n for n in range(6) if 2048 * 4**n < context), context})
        if self.backend == "latents":  # its kernel divides its work by the lengths themselves
            lengths = [context]
        log.info("capturing CUDA graphs for decode steps of up to %d sequences", max_batch)
        memory = torch.cuda.graph_pool_handle()
        failed: dict[tuple[int, int], Exception] = {}
        # Largest first: the others then fit into its memory.
        kinds = [False, True] if self.num_adapters else [False]
        for size, longest, adapted in reversed([*product(sizes, lengths, kinds)]):
            try:
                self.graphs.insert(0, self._decode_graph(size, longest, adapted, memory))
            except Exception as error:  # noqa: BLE001 - not every model's code can be captured
                failed[size, longest] = error
        if failed:
            told = ", ".join(f"{size} up to {longest} tokens" for size, longest in sorted(failed))
            why = first_line(failed[min(failed)])
            log.warning("some decode steps are no CUDA graphs (sequences: %s): %s", told, why)

    def fall_back(self, reason: str) -> None:
        """Do without FlashAttention from now on, because reading in place went wrong."""
        log.warning("attention in place is not used: %s", reason)
        self.backend, self.fallback_reason, self.graphs = self.fallback_backend, reason, []

    def check_device(self) -> None:
        """Raise if the device no longer computes, as after some CUDA errors."""
        torch.zeros(1, device=self.device).item()

    @torch.inference_mode()
    def copy(self, span: KVSpan, start: int, count: int) -> None:
        """Copy the first `count` rows of a span to the rows from `start` on."""
        self.pool.copy(span.start, start, count)
        ids = torch.tensor(span.tokens[:count]).to(self.device, non_blocking=True)
        self.ids[start : start + count] = ids

    def forget(self, spans: list[KVSpan]) -> None:
        """Free the states of spans that are done with."""
        if self.states:
            for span in spans:
                self.states.drop(span)

    def _fitting_graph(self, work: ScheduledBatch) -> DecodeGraph | None:
        longest = max(span.num_computed_tokens + new for span, new in work)
        adapted = any(span.adapter for span, _ in work)
        fitting = (g for g in self.graphs if g.size >= len(work) and g.longest >= longest)
        return next((g for g in fitting if g.adapted == adapted), None)

    def _decode_graph(self, size: int, longest: int, adapted: bool, memory: Any) -> DecodeGraph:
        step = ForwardBatch([(self.idle, 1)] * size, self.backend).on(self.device)
        if adapted:  # whose tokens are none's at first
            step.adapters = torch.zeros_like(step.ids)
        return DecodeGraph(step, longest, self.compute, self.device, memory)
