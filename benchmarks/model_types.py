"""Which of transformers' causal language models the engine runs, and what becomes of the others.

    python benchmarks/model_types.py                   every one: minutes on two CPU cores
    python benchmarks/model_types.py llama gemma2      some, by their model_type
    python benchmarks/model_types.py --table           as docs/models.md has it

Each is built with a few tiny layers of random weights, saved, and loaded as a user's checkpoint is,
in float32. Whatever bounds what a token sees (windows, chunks, sparse attention) is made so short
that it is felt: once within the short texts by which the engine checks itself at the start, and
once beyond them. A model that runs must give the logits and the greedy answers of transformers'
own code; one that does not must be refused in one sentence. Anything else is a fault.
Each is tried in a process of its own, which ends no other.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import engine
from engine.checkpoint.checkpoint import load_model
from engine.checkpoint.model_config import load_config
from engine.kernels.cpu import why_missing
from engine.layers.autotune import measure_forms
from engine.layers.weight_format import PACKED, WeightFormat, convert
from engine.runner.create import create_runner
from engine.sequence import KVSpan

VOCABULARY = 260
CONTEXT = 256
# What a token sees: less than the engine's own check at the start has tokens, and more.
BOUNDS = (5, 40)

# A configuration's sizes, by the first pattern that its name matches.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size(_per_layer_input)?|padded_vocab_size", VOCABULARY),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx", CONTEXT),
    (r"sliding_window|attention_chunk_size|index_topk|window_size|attention_window_size", 0),
    (r"sliding_window_size|local_attention|dsa_topk|block_size|swa_window_size", 0),
    (r"kv_lora_rank|mamba_n_heads|linear_num_value_heads|mamba_num_heads", 16),
    (r"q_lora_rank|qk_nope_head_dim|v_head_dim|head_dim|global_head_dim|swa_head_dim", 16),
    (r"swa_v_head_dim|kv_channels|attention_head_dim|index_head_dim|d_kv", 16),
    (r"linear_(key|value)_head_dim|linear_head_dim|linear_num_(key_)?heads", 8),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", 2),
    (r"(\w+_)?num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads", 4),
    (r"index_n_heads|num_global_key_value_heads", 2),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers", 4),
    (r"first_k_dense_replace|num_dense_layers|num_shared_experts|n_shared_experts", 1),
    (r"n_group|topk_group|num_nextn_predict_layers", 1),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts|moe_k|moe_top_k|experts_per_token", 2),
    (r"hidden_size(_global)?|d_model|n_embd|embed_dim|n_embed|embedding_size|dim", 64),
    (r"word_embed_proj_dim", 64),
    (r"(\w+_)?intermediate_size|ffn_dim|(en|de)coder_ffn_dim|d_ff|ffn_hidden_size|n_inner", 64),
    (r"hidden_size_per_layer_input|expert_ffn_hidden_size|moe_hidden_size", 32),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_head|mamba_head_dim|mamba_d_conv", 16),
]
# Where sizes alone make no model, or not all of one.
WITH_HEADS = {"head_dim": 16, "num_key_value_heads": 2}
WINDOWS_FROM_THE_THIRD_LAYER = {"use_sliding_window": True, "max_window_layers": 2}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
SHARED_KEYS = {
    "num_kv_shared_layers": 2,
    "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "nemotron_h": {"time_step_min": 1e-9},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "kimi_linear": {"n_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "time_step_min": 1e-9,
    },
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts_per_token": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": WITH_HEADS,
    "hunyuan_v1_moe": WITH_HEADS,
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "ministral": WITH_HEADS,
    "nemotron": WITH_HEADS,
    "qwen2": WINDOWS_FROM_THE_THIRD_LAYER,
    "qwen2_moe": WINDOWS_FROM_THE_THIRD_LAYER,
    "qwen3": WINDOWS_FROM_THE_THIRD_LAYER,
    "qwen3_moe": WINDOWS_FROM_THE_THIRD_LAYER,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
}
# What a configuration cannot be made without.
NO_LAYER_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
GIVEN = {"gemma4_assistant": {"text_config": NO_LAYER_INPUTS}}


def size_of(name: str, default: Any, bound: int) -> int | None:
    """A setting's size in a tiny configuration; None if it stays as it is."""
    value = default.to_dict()[name]
    sizes = [size for pattern, size in SIZES if re.fullmatch(pattern, name)]
    if isinstance(value, bool) or not isinstance(value, int | None) or not sizes:
        return None
    if sizes[0] == 0:
        return bound
    if value is None:
        return None
    shares = vars(default).get("num_attention_heads") != value
    return 4 if name == "num_key_value_heads" and not shares else sizes[0]


def shrunk(default: Any, bound: int) -> dict[str, Any]:
    """The arguments for a tiny configuration like a default one."""
    changed: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        inner = vars(default).get(name)
        if isinstance(inner, transformers.PreTrainedConfig):
            changed[name] = shrunk(inner, bound)
        elif (size := size_of(name, default, bound)) is not None:
            changed[name] = size
        elif name.endswith("layer_types") and value:
            kinds = list(dict.fromkeys(value))
            changed[name] = None if kinds == ["full_attention"] else (kinds * 4)[:4]
    if "qk_rope_head_dim" in changed and "head_dim" in changed:
        changed["head_dim"] = changed["qk_rope_head_dim"]
    known = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    known["is_decoder"] = True
    changed |= {name: known[name] for name in known if name in vars(default)}
    return changed | CHANGES.get(default.model_type, {})


def tiny_config(kind: str, bound: int) -> Any:
    """A configuration of a model_type, of a few thousand weights."""
    of_kind = CONFIG_MAPPING[kind]
    return of_kind(**shrunk(of_kind(**GIVEN.get(kind, {})), bound))


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of words that are their own ids."""
    backend = Tokenizer(models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2", pad_token="0")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return tokenizer


def texts() -> list[list[int]]:
    """Some prompts, two of which begin alike."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in (100, 61, 17)]
    return [*made, [*made[0][:70], 9, 8, 7]]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers' own `generate` says."""
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return said[0, len(prompt) :].tolist()


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy_without_cache(model: Any, prompt: list[int], count: int) -> list[int]:
    """The same, each token by a forward pass over all before it."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def largest_error(runner: Any, plain: list[torch.Tensor]) -> float:
    """The largest relative error of any token's logits, of two texts computed in pieces."""
    spans = [KVSpan(texts()[0], 0, all_logits=True), KVSpan(texts()[1], 110, all_logits=True)]
    worst = 0.0
    while any(span.pending for span in spans):
        news = [min(span.pending, new) for span, new in zip(spans, (1, 31), strict=True)]
        if spans[0].num_computed_tokens < 47:
            news[0] = 47
        work = [(span, new) for span, new in zip(spans, news, strict=True) if new]
        logits = runner.forward(work)
        for span, new in work:
            wanted = plain[spans.index(span)][span.num_computed_tokens :][:new]
            span.num_computed_tokens += new
            error = (logits[:new] - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            logits = logits[new:]
            worst = max(worst, float(error.max()))
    return worst


async def answers(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What the engine says to prompts that come together."""

    async def answer(prompt: list[int]) -> list[int]:
        given = {"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True}
        given |= {"repetition_penalty": 1.0, "logprobs": 0}
        deltas = model.answer(model.prepare_text(prompt, given))
        return [delta.token.id async for delta in deltas if delta.token]

    return await asyncio.gather(*map(answer, prompts))


def compare(folder: Path, plain: Any) -> str:
    """Serve a checkpoint, and say in what it differs from transformers' own model."""
    model = engine.load(
        folder, dtype="float32", device_map="cpu", cache_memory="8MiB", prefill_chunk=24
    )
    try:
        runner = model.engine.runner
        wanted = [logits_of(plain, ids) for ids in texts()[:2]]
        if not (error := largest_error(runner, wanted)) < 1e-3:
            return f"WRONG logits, by {error:.0%}"
        alone = [greedy(plain, prompt, 12) for prompt in texts()]
        if alone != [greedy_without_cache(plain, prompt, 12) for prompt in texts()]:
            return "NOT COMPARED: its own `generate` differs from its own forward pass"
        for prompts in (texts(), texts(), texts()[:1]):  # the second time from the prefix cache
            if asyncio.run(answers(model, prompts, 12)) != alone[: len(prompts)]:
                return "WRONG answers"
        layers = [layer.scoring for layer in runner.pool.layers]
    finally:
        model.close()
    parts = [("states", runner.states is not None)]
    parts.append(("a window", any(layer.window for layer in layers)))
    parts.append(("soft caps", any(layer.softcap for layer in layers)))
    parts.append(("sinks", any(layer.sinks is not None for layer in layers)))
    return "runs" + "".join(f", {name}" for name, has in parts if has)


def compare_forms(folder: Path) -> str | None:
    """What is wrong with the forms for a CPU without bfloat16; None if nothing is."""
    for form in PACKED:
        if form == "our kernels" and why_missing():
            continue
        if wrong := compare_form(folder, form):
            return wrong
    return None


def compare_form(folder: Path, form: WeightFormat) -> str | None:
    """The same of one form."""
    plain, _ = load_model(folder, dtype="bfloat16", device_map="cpu")
    model, _ = load_model(folder, dtype="bfloat16", device_map="cpu")
    measure_forms(model)  # as at each start: no kind of layer may end it
    convert(model, form)
    wanted = logits_of(plain.float(), texts()[0])
    alone = [logits_of(model, ids) for ids in texts()[:2]]
    error = float((alone[0] - wanted).norm() / wanted.norm())
    if not error < 0.05:
        return f"WRONG in {form}, by {error:.0%}"
    error = largest_error(create_runner(model, "8MiB"), alone)
    return None if error < 1e-3 else f"WRONG in a batch of {form}, by {error:.0%}"


def why_refused(kind: str) -> str | None:
    """Why a model is refused by its configuration alone, as it is by default."""
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(TypeError, ValueError):
        CONFIG_MAPPING[kind](**GIVEN.get(kind, {})).save_pretrained(name)
        try:
            load_config(Path(name))
        except engine.StartError as error:
            return str(error)
    return None


def tried(kind: str, bound: int) -> str:
    """What becomes of one model."""
    torch.manual_seed(0)
    try:
        if refused := why_refused(kind):
            return f"refused: {refused}"
        config = tiny_config(kind, bound)
        plain = AutoModelForCausalLM.from_config(config).float().eval()
        logits_of(plain, texts()[2])
    except Exception as error:  # noqa: BLE001 - a row of the table
        return f"NOT BUILT: {type(error).__name__}: {error}"
    with tempfile.TemporaryDirectory() as name:
        plain.save_pretrained(name)
        words().save_pretrained(name)
        try:
            said = compare(Path(name), plain)
            if said.startswith("runs"):
                said = compare_forms(Path(name)) or said
            return said
        except engine.StartError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - a row of the table
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"FAULT: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"


def child(kind: str, bound: int, out: Connection, loud: bool) -> None:
    if not loud:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    torch.set_num_threads(1)
    out.send(tried(kind, bound))


def in_a_child(kind: str, bound: int, seconds: float, loud: bool = False) -> str:
    """What becomes of one model, in a process that may take so long."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(kind, bound, theirs, loud))
    process.start()
    theirs.close()
    said = "FAULT: took too long"
    with contextlib.suppress(EOFError):
        if ours.poll(seconds):
            said = "FAULT: the process died"
            said = ours.recv()
    process.kill()
    process.join()
    return said


def outcome(kind: str, options: argparse.Namespace) -> str:
    """What becomes of one model, whatever bounds what its tokens see."""
    each = [in_a_child(kind, bound, options.timeout, options.loud) for bound in options.bounds]
    return " | ".join(dict.fromkeys(each))


def reason_of(said: str) -> str:
    """Why a model is refused, without its name."""
    said = re.sub(r"^refused: (\S+ is not supported: )?|; take another model$", "", said)
    said = re.sub(r"the logits of \w+ come out \d+% off", "its logits come out wrong", said)
    return re.sub(r"its \d+ layers", "its layers", said)


def table_of(results: dict[str, str]) -> str:
    """The results as docs/models.md has them."""
    runs = {kind: said for kind, said in results.items() if said.startswith("runs")}
    refused: dict[str, list[str]] = {}
    for kind, said in results.items():
        if said.startswith("refused"):
            refused.setdefault(reason_of(said), []).append(f"`{kind}`")
    number = sum(map(len, refused.values()))
    lines = [
        f"transformers {transformers.__version__} has {len(results)} types of causal language"
        f" models: {len(runs)} run and {number} are refused.",
        "",
        "| runs | class | beyond plain attention |",
        "| --- | --- | --- |",
    ]
    for kind, said in runs.items():
        beyond = said.removeprefix("runs").removeprefix(", ")
        lines.append(f"| `{kind}` | `{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}` | {beyond} |")
    lines += ["", "| refused, because | types |", "| --- | --- |"]
    for reason, kinds in sorted(refused.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason} | {', '.join(kinds)} |")
    others = {kind: said for kind, said in results.items() if kind not in runs}
    others = {kind: said for kind, said in others.items() if not said.startswith("refused")}
    if others:
        lines += ["", "| neither | what happens |", "| --- | --- |"]
        lines += [f"| `{kind}` | {said.splitlines()[0]} |" for kind, said in others.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--bounds", type=int, nargs="*", default=BOUNDS)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a model")
    parser.add_argument("--loud", action="store_true", help="show what the libraries print")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--table", action="store_true", help="in Markdown, once all are done")
    options = parser.parse_args()
    results: dict[str, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        each = pool.map(lambda kind: outcome(kind, options), options.kinds)
        for kind, said in zip(options.kinds, each, strict=True):
            results[kind] = said
            print(f"{kind:28} {said}", file=sys.stderr if options.table else sys.stdout, flush=True)
    if options.table:
        print(table_of(results))


if __name__ == "__main__":
    main()
