"""All that is worth knowing of a CUDA card, in some eight minutes; nothing is downloaded.

    python benchmarks/gpu/card.py               checks, steps, and servers side by side
    python benchmarks/gpu/card.py --only steps  one part of it: checks, mla, bits, steps or servers
    python benchmarks/gpu/card.py --device cpu  a tiny model without a card, to see that this works

The model has Llama-3-8B's shape, or with --tiny a small one, and random weights. The bounds are
what this very card does: how fast it copies, so how often it could read the weights, and how fast
it multiplies.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from engine.attention.forward_batch import ForwardBatch  # noqa: E402
from engine.attention.in_place import flash_attention  # noqa: E402
from engine.attention.interface import keep_latent  # noqa: E402
from engine.checkpoint.quantizer import quantize_layers  # noqa: E402
from engine.layers.autotune import choose_weight_format  # noqa: E402
from engine.runner.runner import Runner  # noqa: E402
from engine.runner.self_check import start_runner  # noqa: E402
from engine.runner.summary import attention_summary  # noqa: E402
from engine.sampling_params import SamplingParams  # noqa: E402
from engine.scheduling.sampler import sample_tokens  # noqa: E402
from engine.sequence import KVSpan, ScheduledBatch, Sequence  # noqa: E402

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2000,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
              "rope_theta": 500000.0}  # fmt: skip
# Four of the 27 layers, at the width of the whole.
DEEPSEEK = {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
            "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            "vocab_size": 102400}  # fmt: skip
TINY_DEEPSEEK = DEEPSEEK | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                            "moe_intermediate_size": 32, "n_routed_experts": 8,
                            "vocab_size": 2000}  # fmt: skip


def made(kind: type, config: object, device: torch.device) -> object:
    """A model with random weights, made where it will be."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def made_quantised(kind: type, config: object, bits: int, device: torch.device) -> object:
    """The same in fewer bits, which never were 16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    quantize_layers(model, bits)
    model.to_empty(device=device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.fill_(3e-4 if bits == 8 else 0.05)
        elif not parameter.is_floating_point():
            parameter.random_(*((-127, 128) if bits == 8 else (0, 256)))
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02)
    return model


def llama_config(options: argparse.Namespace) -> LlamaConfig:
    shape = TINY if options.tiny else LLAMA_3_8B
    return LlamaConfig(**shape, max_position_embeddings=8192, eos_token_id=0)


def llama(options: argparse.Namespace) -> object:
    return made(LlamaForCausalLM, llama_config(options), options.device)


def save_checkpoint(model: object, folder: Path) -> None:
    """The model with a tokenizer in which w7 is a word of one token."""
    size = model.config.vocab_size
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w1 {% endfor %}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Measuring --------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """The mean of so many, one after the other, after three that do not count."""
    for _ in range(3):
        work()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


class Bounds:
    """What the card could do at best."""

    def __init__(self, model: object, device: torch.device):
        size = 2**30 if device.type == "cuda" else 2**26
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        # A copy reads and writes.
        self.bandwidth = 2 * size / seconds_of(lambda: target.copy_(source), device)
        side = 8192 if device.type == "cuda" else 512
        a = torch.randn(side, side, device=device).to(torch.bfloat16)
        self.flops = 2 * side**3 / seconds_of(lambda: a @ a, device)
        read = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
        self.weights = sum(p.numel() * p.element_size() for p in read)
        self.operations = 2 * sum(p.numel() for p in read)

    def rate(self, clients: int) -> float:
        """Tokens a second of so many sequences, if only weights and products took time."""
        step = max(self.weights / self.bandwidth, clients * self.operations / self.flops)
        return clients / step

    def __str__(self) -> str:
        return (
            f"It copies {self.bandwidth / 1e9:,.0f} GB/s, multiplies {self.flops / 1e12:,.0f}"
            f" TFLOP/s; the weights that a token reads are {self.weights / 1e9:.1f} GB."
        )


def decode_work(batch: int, length: int) -> list[tuple[KVSpan, int]]:
    return [(KVSpan([5] * (length + 1), n * (length + 1), length + 1, length), 1)
            for n in range(batch)]  # fmt: skip


def busy_share(work: Callable[[], object], device: torch.device) -> float:
    """The part of the time in which the card computes something; no number without a card."""
    if device.type != "cuda":
        return float("nan")
    work()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        for _ in range(10):
            work()
        wait(device)
        took = time.perf_counter() - started
    kernels = (e for e in seen.key_averages() if e.device_type == DeviceType.CUDA)
    return sum(e.self_device_time_total for e in kernels) / 1e6 / took


# ---- The parts --------------------------------------------------------------


def steps(model: object, options: argparse.Namespace) -> None:
    """What a step takes: captured or not, in place or gathered; and the share of the bound."""
    device, bounds = options.device, Bounds(model, options.device)
    print(f"\n{bounds}\n")
    started = time.perf_counter()
    runner = start_runner(model, options.cache, max(options.clients))
    print(f"Checked and captured in {time.perf_counter() - started:.1f} s: packed and plain logits"
          f" differ by {runner.difference:.1e}; {attention_summary(runner)}.\n")  # fmt: skip
    captured, backend = runner.graphs, runner.backend
    for layer in runner.pool.layers:  # some numbers, as nothing was computed for the steps below
        for x in (layer.keys, layer.values):
            x.normal_()
    print("| sequences | of tokens | CUDA graph | eager | gathered | with a pick | busy"
          " | of the bound |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in options.clients:
        for length in (256, 4000):
            if batch * (length + 1) > runner.rows:
                continue
            work = decode_work(batch, length)
            seqs = [
                Sequence(
                    span.tokens, span.start, span.room, span.num_computed_tokens,
                    params=SamplingParams(512, 0.05, 0, 0.9),
                )
                for span, _ in work
            ]  # fmt: skip

            def forward(work: ScheduledBatch = work) -> torch.Tensor:
                return runner.forward(work)

            def picked(work: ScheduledBatch = work, seqs: list[Sequence] = seqs) -> object:
                return sample_tokens(seqs, runner.forward(work), runner.ids)

            whole, share = seconds_of(picked, device), busy_share(picked, device)
            captured_took = seconds_of(forward, device)
            runner.graphs = []
            eager = seconds_of(forward, device)
            runner.backend = "copied"
            gathered = seconds_of(forward, device, 5)
            runner.graphs, runner.backend = captured, backend
            bound = batch / bounds.rate(batch)
            cells = [f"{1e3 * x:.2f} ms" for x in (captured_took, eager, gathered, whole)]
            cells += [f"{share:.0%}", f"{bound / whole:.0%}"]
            print(f"| {batch} | {length} | {' | '.join(cells)} |", flush=True)
    chunk = [(KVSpan([5] * 512, 0, 512), 512)]
    took = seconds_of(lambda: runner.forward(chunk), device, 5)
    rate = bounds.operations * 512 / took / bounds.flops
    print(f"\nA chunk of 512 tokens takes {1e3 * took:.1f} ms, {rate:.0%} of the products' rate.")
    if device.type == "cuda":
        for batch in {min(options.clients), max(options.clients)}:
            print_profile(runner, batch)
    if runner.backend == "in place" and device.type == "cuda":
        kernels(model, device)


def print_profile(runner: Runner, batch: int) -> None:
    """What the card does in a decode step of sequences of 256 tokens."""
    work = decode_work(batch, 256)
    runner.forward(work)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(10):
            runner.forward(work)
        wait(runner.device)
    kernels = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels)
    print(f"\nA step of {batch}: {total / 1e4:.2f} ms on the card, of which\n")
    print("| share | us | calls | kernel |")
    print("| --- | --- | --- | --- |")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:10]:
        took = e.self_device_time_total
        print(f"| {took / total:.1%} | {took / 10:.0f} | {e.count / 10:.0f} | {e.key[:90]} |")


def kernels(model: object, device: torch.device) -> None:
    """What the kernel makes of a limit far above the lengths, and of a causal mask at one token."""
    config = model.config
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    print("\n| kernel over spans, one token each | limit as long | limit 131,072 | causal |")
    print("| --- | --- | --- | --- |")
    for batch, length in ((1, 300), (1, 8000), (16, 300), (16, 4000)):
        keys = torch.randn(batch * length, kv, width, device=device).to(torch.bfloat16)
        query = torch.randn(batch, heads, width, device=device).to(torch.bfloat16)
        work = [(KVSpan([5] * length, n * length, length, length - 1), 1) for n in range(batch)]
        (group,) = ForwardBatch(work, "in place").on(device).groups
        cells = []
        for limit, causal in ((length, False), (131_072, False), (length, True)):
            attend = partial(
                flash_attention, query, keys, keys, group.cu_seq_q, group.cu_seq_k, 1, limit,
                0.0, causal, False, seqused_k=group.seqused_k,
            )  # fmt: skip
            cells.append(f"{1e6 * seconds_of(attend, device, 100):.0f} us")
        print(f"| {batch} of {length} | {' | '.join(cells)} |")


def mla(options: argparse.Namespace) -> None:
    """DeepSeek's layers: latents read in place, from copies, or expanded."""
    device = options.device
    shape = TINY_DEEPSEEK if options.tiny else DEEPSEEK
    config = DeepseekV2Config(**shape, max_position_embeddings=8192)
    model = made(DeepseekV2ForCausalLM, config, device)
    runner = start_runner(model, options.cache)
    print(f"\nDeepSeek-V2-Lite's width, {config.num_hidden_layers} layers; packed steps differ by"
          f" {runner.difference:.1e}; {attention_summary(runner)}.\n")  # fmt: skip
    attentions = [m for m in model.modules() if getattr(m, "expand_kv", None) is keep_latent]
    captured, backend = runner.graphs, runner.backend
    print("| step | CUDA graph | eager | copied | expanded |")
    print("| --- | --- | --- | --- | --- |")
    for name, work in {
        "1 token, 1,000 before it": decode_work(1, 1000),
        "16 tokens, 1,000 before each": decode_work(16, 1000),
        "64 tokens, 250 before each": decode_work(64, 250),
        "a chunk of 512": [(KVSpan([5] * 512, 0, 512), 512)],
    }.items():
        forward = partial(runner.forward, work)
        took = [seconds_of(forward, device, 5)]
        runner.graphs = []
        took.append(seconds_of(forward, device, 5))
        runner.backend = "copied"
        took.append(seconds_of(forward, device, 5))
        runner.graphs, runner.backend = captured, backend
        for module in attentions:
            del module.expand_kv
        expanded = Runner(model, runner.rows)
        took.append(seconds_of(partial(expanded.forward, work), device, 5))
        del expanded
        for module in attentions:
            module.expand_kv = keep_latent
        print(f"| {name} | {' | '.join(f'{1e3 * x:.2f} ms' for x in took)} |", flush=True)
    if device.type == "cuda":
        print_profile(runner, 1)


def bits(options: argparse.Namespace) -> None:
    """Llama's shape in 16, 8 and 4 bits, and all of DeepSeek's in 8 on 24 GB: memory and speed."""
    device = options.device
    shape = TINY_DEEPSEEK if options.tiny else DEEPSEEK | {"num_hidden_layers": 27}
    deepseek = DeepseekV2Config(**shape, max_position_embeddings=8192)
    llamas = llama_config(options)
    print("| model | bits | weights | step of 1 | of 16 | chunk of 512 | peak | CUDA graphs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    widths = [16, 8, 4] if find_spec("bitsandbytes") else [16, 8]
    cases = [("Llama-3-8B", LlamaForCausalLM, llamas, n) for n in widths]
    cases.append(("DeepSeek-V2-Lite", DeepseekV2ForCausalLM, deepseek, 16))
    cases.append(("DeepSeek-V2-Lite on 24 GB", DeepseekV2ForCausalLM, deepseek, 8))
    for name, kind, shared, width in cases:
        config = deepcopy(shared)  # a runner changes its model's
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            if "24 GB" in name:
                whole = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / whole), device)
        model = (
            made(kind, config, device)
            if width == 16
            else made_quantised(kind, config, width, device)
        )
        said = choose_weight_format(model)
        runner = start_runner(model, "64MiB" if options.tiny else "2GiB")
        works = [decode_work(1, 250), decode_work(16, 250), [(KVSpan([5] * 512, 0, 512), 512)]]
        took = [seconds_of(partial(runner.forward, work), device, 5) for work in works]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        times = " | ".join(f"{1e3 * seconds:.2f} ms" for seconds in took)
        sizes = sorted({graph.size for graph in runner.graphs})
        print(
            f"| {name} | {width} | {said} | {times} | {peak / 2**30:.1f} GiB | {sizes} |",
            flush=True,
        )
        del model, runner
        gc.collect()


def servers(options: argparse.Namespace) -> None:
    """rivals.py, once this process has left the card."""
    with tempfile.TemporaryDirectory() as folder:
        most = left_on_disk(Path(folder), options)
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
        given = {"folder": folder, "device": str(options.device), "most": most}
        given |= {"prompt": options.prompt, "tokens": options.tokens}
        subprocess.run([sys.executable, str(HERE / "rivals.py"), json.dumps(given)], check=False)


def left_on_disk(folder: Path, options: argparse.Namespace) -> dict[int, float]:
    """Save the model, which is gone afterwards; the most tokens a second of so many clients."""
    model = llama(options)
    save_checkpoint(model, folder)
    bounds = Bounds(model, options.device)
    return {clients: bounds.rate(clients) for clients in options.clients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parts = ["checks", "mla", "bits", "steps", "servers"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=128, help="tokens in, of servers")
    parser.add_argument("--tokens", type=int, default=256, help="tokens out, of servers")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA card; --device cpu tries this out without one")
    if len(options.only) > 1:
        # Each in a process of its own, so that one that fails takes no other with it.
        started = time.monotonic()
        rest = sys.argv[1:]
        for part in options.only:
            subprocess.run([sys.executable, __file__, *rest, "--only", part], check=False)
        return print(f"\n{(time.monotonic() - started) / 60:.1f} minutes.")
    options.tiny |= options.device.type == "cpu"
    options.cache = "64MiB" if options.tiny else "0.7"
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "the CPU"
    (part,) = options.only
    print(f"\n# {part}: {name}, torch {torch.__version__}\n", flush=True)
    if part == "checks":
        sys.exit(
            subprocess.call([sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu")])
        )
    with torch.inference_mode():
        if part == "mla":
            return mla(options)
        if part == "bits":
            return bits(options)
        if part == "steps":
            return steps(llama(options), options)
    servers(options)


if __name__ == "__main__":
    main()
