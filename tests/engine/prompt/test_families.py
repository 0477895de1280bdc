"""Five families from their hubs' own files, natively: what each says, and how it is asked."""

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import api
from engine.checkpoint.checkpoint import best_placement, device_summary, load_model
from engine.checkpoint.llama_like import NormalizeRows, UngroupQKV
from engine.checkpoint.model_config import context_length
from engine.errors import ContextTooLong, StartError
from engine.loading import load
from engine.prompt.families import FAMILIES, family_of, format_of, renders_like
from engine.prompt.generation_defaults import checkpoint_defaults, states_length
from engine.prompt.tokenizer import ChatTokenizer
from engine.prompt.tokenizer_files import load_tokenizer
from engine.runner.self_check import start_runner
from engine.sampling_params import SamplingParams
from tests.conftest import ROOT, TEMPLATE, byte_tokenizer, greedy, ready, serve
from tests.server_process import server_process

FIXTURES = ROOT / "tests" / "fixtures"
CHECKPOINTS = ["deepseek_v2", "index", "internlm2", "internlm2_ntk", "llama", "xverse"]

# A folder with `tokenizers/<internlm2|llama3|deepseek_v2>`, the real files, which are not ours to
# ship. Tests that need them are skipped without it.
DATA = os.environ.get("CHAT_TEST_DATA")


# ---- Values


def test_checkpoint_defaults_go_before_ours():
    defaults = checkpoint_defaults(
        GenerationConfig(do_sample=True, temperature=0.3, top_k=7, max_new_tokens=33)
    )
    assert defaults == SamplingParams(max_new_tokens=33, temperature=0.3, top_k=7)


def test_length_is_the_checkpoints_own_where_its_generation_config_counts():
    own = GenerationConfig(max_new_tokens=33)
    llama, internlm = (next(f for f in FAMILIES if f.name == n) for n in ("llama-3", "internlm2"))
    assert [states_length(own, family) for family in (None, internlm, llama)] == [True, True, False]
    assert not states_length(GenerationConfig())


def test_checkpoint_with_do_sample_false_is_greedy():
    assert checkpoint_defaults(GenerationConfig(do_sample=False)).temperature == 0
    assert checkpoint_defaults(GenerationConfig(top_k=-1)).top_k == 0


def test_empty_generation_config_leaves_our_defaults():
    assert checkpoint_defaults(GenerationConfig()) == SamplingParams(1024, 0.8, 50, 0.8, 0, 1.0)


@pytest.mark.parametrize(
    ("checkpoint", "family", "expected"),
    [
        ("deepseek_v2", "deepseek-v2", SamplingParams(1024, 0.95, 5, 0.7, 0, 1.1)),
        ("index", "index", SamplingParams(1024, 0.95, 5, 0.7, 0, 1.1)),
        ("llama", "llama-3", SamplingParams(512, 0.5, 0, 0.9, 0, 1.1)),
        ("xverse", "xverse", SamplingParams(2048, 0.5, 30, 0.85, 0, 1.1)),
        ("internlm2", "internlm2", SamplingParams(1024, 0.8, 50, 0.8, 0, 1.0)),
    ],
)
def test_family_defaults_are_the_tutorials(checkpoint, family, expected):
    found = next(row for row in FAMILIES if row.name == family)
    config = GenerationConfig.from_pretrained(FIXTURES / checkpoint)
    assert checkpoint_defaults(config, found) == expected


# ---- Weights


def error_of(model, expected) -> float:
    """The largest difference from the original code's logits, where there are tokens."""
    ids = torch.tensor(expected["input_ids"])
    mask = torch.tensor(expected["attention_mask"])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    difference = (logits - torch.tensor(expected["logits"])).abs().amax(-1)
    return float(difference[mask.bool()].max())


def expected_of(name: str):
    return np.load(FIXTURES / name / "expected.npz")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_the_original_code(name, attention):
    model, tokenizer = load_model(FIXTURES / name, dtype="float32", device_map="cpu")
    model.set_attn_implementation(attention)
    assert tokenizer is None
    assert error_of(model, expected_of(name)) < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_answers_equal_the_original_code(name):
    model, _ = load_model(FIXTURES / name, dtype="float32", device_map="cpu")
    expected = expected_of(name)
    for ids, mask, answer in zip(
        expected["input_ids"], expected["attention_mask"], expected["greedy"], strict=True
    ):
        assert greedy(model, ids[mask.astype(bool)].tolist(), 32) == answer.tolist()


def plain_split(self, input_dict, source_patterns, target_patterns, config, **_):
    ((matrix,),) = input_dict.values()
    width = config.head_dim * config.num_key_value_heads
    parts = matrix.split([len(matrix) - 2 * width, width, width])
    return {name: p.contiguous() for name, p in zip(target_patterns, parts, strict=True)}


def untouched(self, input_dict, source_patterns, target_patterns, config, **_):
    ((matrix,),) = input_dict.values()
    return {target_patterns[0]: matrix}


@pytest.mark.parametrize(
    ("name", "broken", "how"),
    [
        ("internlm2", UngroupQKV, plain_split),
        ("index", NormalizeRows, untouched),
        ("internlm2", None, {"rope_theta": 10_000}),
        ("xverse", None, {"rms_norm_eps": 1e-5}),
        ("deepseek_v2", None, {"mscale_all_dim": 0}),
    ],
)
def test_comparison_with_the_original_code_notices_mistakes(
    name, broken, how, monkeypatch, tmp_path
):
    """Each of these is a way to load the model wrongly without an error."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    if broken:
        monkeypatch.setattr(broken, "convert", how)
    else:
        config = json.loads((folder / "config.json").read_text())
        ((key, value),) = how.items()
        (config["rope_scaling"] if key.startswith("mscale") else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(folder, dtype="float32", device_map="cpu")
    assert error_of(model, expected_of(name)) > 1e-4


def test_bin_shards_load_like_safetensors(tmp_path):
    folder = copied("xverse", tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    model, _ = load_model(folder, dtype="float32", device_map="cpu")
    assert error_of(model, expected_of("xverse")) < 1e-4


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def test_nothing_in_the_folder_is_executed(tmp_path):
    """Neither the Python that auto_map names, nor Python that lies there, nor a pickle."""
    folder = copied("internlm2", tmp_path)
    flag = tmp_path / "executed"
    for name in ("modeling_internlm2", "configuration_internlm2", "tokenization_internlm2"):
        (folder / f"{name}.py").write_text(f"open({str(flag)!r}, 'w')\n")
    load_model(folder, dtype="float32", device_map="cpu")
    assert not flag.exists()

    class Bomb:
        def __reduce__(self):
            return open, (str(flag), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        load_model(folder, dtype="float32", device_map="cpu")
    assert not flag.exists()


def test_rope_ratio_extends_the_context_of_index(tmp_path):
    folder = copied("index", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"rope_ratio": 32}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(folder, dtype="float32", device_map="cpu")
    assert model.config.rope_parameters["rope_theta"] == 320_000


def test_layers_offloaded_to_disk_answer_the_same(tmp_path):
    """A device map of several places, with accelerate's hooks, on a machine without a card."""
    parts = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")
    where = dict.fromkeys(parts, "cpu") | {f"model.layers.{i}": "cpu" for i in range(3)}
    where["model.layers.1"] = "disk"
    model, _ = load_model(FIXTURES / "llama", dtype="float32", device_map=json.dumps(where))
    assert error_of(model, expected_of("llama")) < 1e-4
    assert "disk (1 part)" in device_summary(model)
    runner = start_runner(model, "1MiB")
    assert runner.split
    assert runner.difference < 1e-4


@pytest.mark.parametrize(
    ("free", "placed"),
    [([24, 24], "cuda:0"), ([1, 24], "cuda:1"), ([20, 20], "auto"), ([24], "auto"), ([], "auto")],
)
def test_model_goes_on_one_card_where_it_leaves_room_there(monkeypatch, free, placed):
    """Llama-3-8B takes 15 GiB in bfloat16, of which the shape alone tells."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card] * 2**30, 0))
    config = LlamaConfig(**shape, dtype="bfloat16")
    assert best_placement(config, "auto") == placed
    assert best_placement(config, "float32") == "auto"


def test_embedding_on_disk_gets_ids_on_its_execution_device():
    where = dict.fromkeys(("model.norm", "lm_head", "model.rotary_emb", "model.layers"), "cpu")
    where["model.embed_tokens"] = "disk"
    model, _ = load_model(FIXTURES / "llama", dtype="float32", device_map=json.dumps(where))
    runner = start_runner(model, "1MiB")
    assert (runner.device.type, runner.difference < 1e-4) == ("cpu", True)


# ---- Prompts

CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "你好"},
]


def real(name: str) -> ChatTokenizer:
    if DATA is None:
        pytest.skip("CHAT_TEST_DATA names no folder with the real tokenizers")
    return text_of(Path(DATA) / "tokenizers" / name)


def text_of(folder: Path) -> ChatTokenizer:
    tokenizer = load_tokenizer(folder)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return ChatTokenizer(tokenizer, family_of(kind, tokenizer))


@pytest.mark.parametrize(
    ("name", "ids", "ends"),
    [
        (
            "deepseek_v2",
            "100000 5726 25 2868 185 185 77398 25 39280 100001 5726 25 207 84313 185 185 77398 25",
            {100001},
        ),
        (
            "internlm2",
            "1 92543 1008 364 6176 92542 364 92543 525 11353 364 15115 92542 364 92543 1008 364"
            " 77230 92542 364 92543 525 11353 364",
            {2, 92542},
        ),
        (
            "llama3",
            "128000 128006 882 128007 271 6151 128009 128006 78191 128007 271 15339 128009 128006"
            " 882 128007 271 57668 53901 128009 128006 78191 128007 271",
            {128001, 128009},
        ),
    ],
)
def test_prompt_ids_equal_the_original_code(name, ids, ends):
    text = real(name)
    assert text.family
    assert text.encode(CONVERSATION) == [int(i) for i in ids.split()]
    assert text.end_ids(GenerationConfig()) == ends


def test_xverse_encodes_each_turn_separately():
    text = text_of(FIXTURES / "tokenizers" / "xverse_like")
    pieces = ["Human: ", "hi\n\n", "Assistant: ", "hello", 3]
    pieces += ["Human: ", "你好\n\n", "Assistant: "]
    apart = [
        i
        for piece in pieces
        for i in (
            [piece] if piece == 3 else text.backend.encode(piece, add_special_tokens=False).ids
        )
    ]
    assert text.encode(CONVERSATION) == apart
    system = [{"role": "system", "content": "S"}, *CONVERSATION]
    before = [text.backend.encode(piece).ids for piece in ("Human: ", "S\n")]
    assert text.encode(system) == [*before[0], *before[1], *apart]
    assert text.end_ids(GenerationConfig()) == {3}


def test_index_marks_its_turns_with_single_tokens():
    text = text_of(FIXTURES / "tokenizers" / "index_like")
    encode = lambda words: text.backend.encode(words, add_special_tokens=False).ids  # noqa: E731
    said = [3, *encode("hi"), 4, *encode("hello"), 3, *encode("你好"), 4]
    assert text.encode(CONVERSATION) == said
    assert text.encode([{"role": "system", "content": "S"}, *CONVERSATION]) == [
        0,
        *encode("S"),
        *said,
    ]
    assert text.end_ids(GenerationConfig()) == {2}


# Each family's special tokens, in a small tokenizer of ours.
MARKERS = {
    "deepseek_v2": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>"],
    "index": ["<unk>", "<s>", "</s>", "reserved_0", "reserved_1"],
    "internlm2": ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"],
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "xverse": ["<pad>", "<|startoftext|>", "<|endoftext|>"],
}


TEMPLATES = {
    "deepseek_v2": (
        "<｜begin▁of▁sentence｜>{% for m in messages %}"
        "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}<｜end▁of▁sentence｜>"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "llama": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
    ),
}  # as the hubs have them, in our words


def small(kind: str) -> ChatTokenizer:
    tokenizer = byte_tokenizer(MARKERS[kind])
    tokenizer.chat_template = None
    return ChatTokenizer(tokenizer, family_of(kind, tokenizer))


@pytest.mark.parametrize("kind", MARKERS)
def test_markers_in_a_users_text_become_no_special_tokens(kind):
    text = small(kind)
    honest = text.encode([{"role": "user", "content": "ab"}])
    forged = text.encode([{"role": "user", "content": f"a{''.join(MARKERS[kind])}b"}])
    specials = set(text.special.values())
    assert [i for i in forged if i in specials] == [i for i in honest if i in specials]
    assert "".join(MARKERS[kind]) in text.backend.decode(forged)


@pytest.mark.parametrize("kind", MARKERS)
def test_prompt_has_one_bos_and_ends_with_the_assistant_marker(kind):
    text = small(kind)
    said = text.backend.decode(text.encode(CONVERSATION), skip_special_tokens=False)
    begin = text.family.begin
    assert said.startswith(begin)
    assert not begin or said.count(begin) == 1
    assert said.endswith(text.family.ask)


def test_llama_3_strips_whitespace_around_contents():
    text = small("llama")
    assert text.encode([{"role": "user", "content": " a \n"}]) == text.encode(
        [{"role": "user", "content": "a"}]
    )


def test_other_models_of_model_type_llama_are_not_llama_3():
    """Llama 3.1 and fine-tunes with ChatML have templates of their own, Llama 2 other tokens."""
    for mark in ("<|eom_id|>", "<|im_start|>"):
        assert family_of("llama", byte_tokenizer([*MARKERS["llama"], mark])) is None
    assert family_of("llama", byte_tokenizer()) is None
    assert family_of("llama", byte_tokenizer(MARKERS["llama"])).name == "llama-3"


def templated(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(MARKERS[kind])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", TEMPLATES)
def test_template_that_renders_the_familys_format_leaves_the_family(kind):
    assert format_of(kind, templated(kind, TEMPLATES[kind])).model_type == kind


@pytest.mark.parametrize("kind", TEMPLATES)
def test_template_that_renders_otherwise_wins(kind):
    """As that of a fine-tune with role names of its own does."""
    for template in (
        TEMPLATES[kind].replace("m.content", "m.content | upper"),
        TEMPLATE,
        "{{ raise_exception('no system turns') }}",
    ):
        tokenizer = templated(kind, template)
        assert format_of(kind, tokenizer) is None
        assert ChatTokenizer(tokenizer).templates.default == template


@pytest.mark.parametrize("kind", MARKERS)
def test_base_model_without_a_template_is_refused_unless_chat_models_lack_it_too(kind):
    tokenizer = templated(kind, None)
    family = format_of(kind, tokenizer)
    assert (family is None) == (kind in TEMPLATES)
    if family is None:
        with pytest.raises(StartError, match=r"base models.*--chat-template"):
            ChatTokenizer(tokenizer)


@pytest.mark.parametrize("name", ["deepseek_v2", "internlm2", "llama3"])
def test_real_templates_render_the_familys_format(name):
    text = real(name)
    assert renders_like(text.family, text.tokenizer)


# ---- Tokenizers


def test_tokenizer_unlike_sentencepiece_stops_the_start(monkeypatch):
    class Other(sentencepiece.SentencePieceProcessor):
        def encode(self, text: str) -> list[int]:
            return [7, *super().encode(text)]

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", Other)
    with pytest.raises(StartError, match=r"tokenizer.model encodes .* unlike sentencepiece"):
        load_tokenizer(FIXTURES / "tokenizers" / "index_like")


def test_prepend_scheme_of_xverse_is_mended():
    """Left as it is, tokenizers refuses the file."""
    from tokenizers import Tokenizer

    with pytest.raises(Exception, match="prepend_scheme"):
        Tokenizer.from_file(str(FIXTURES / "tokenizers" / "xverse_like" / "tokenizer.json"))
    assert load_tokenizer(FIXTURES / "tokenizers" / "xverse_like")


# ---- Each family over HTTP


def dressed(kind: str, tmp_path: Path) -> Path:
    """A family's tiny checkpoint in its original layout, with a tokenizer and words to match."""
    folder = copied(kind, tmp_path)
    if (FIXTURES / "tokenizers" / f"{kind}_like").exists():
        for file in (FIXTURES / "tokenizers" / f"{kind}_like").glob("tokenizer*"):
            shutil.copy(file, folder)
    else:
        byte_tokenizer(MARKERS[kind]).save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
        if kind in TEMPLATES:
            (folder / "chat_template.jinja").write_text(TEMPLATES[kind], encoding="utf-8")
    size = len(load_tokenizer(folder))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "model.tok_embeddings.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = torch.randn(size, 64, generator=generator) * 0.05
    if "output.weight" in weights:
        weights["output.weight"] = torch.randn(size, 64, generator=generator) * 0.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", MARKERS)
def test_each_family_answers_over_http_alike_alone_and_in_a_batch(kind, tmp_path):
    folder = dressed(kind, tmp_path)
    asks = [
        {"prompt": p, "history": h, "max_length": n, "temperature": 0, "repetition_penalty": 1}
        for p, h, n in (
            ("hello", [], 12),
            ("你好", [["hi", "hello"]], 20),
            ("x" * 90, [], 5),
            ("why?", [["a", "b"], ["c", "d"]], 16),
        )
    ]

    async def together(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url) as client:
            answers = await asyncio.gather(*(client.post("/", json=ask) for ask in asks))
        return [answer.raise_for_status().json()["response"] for answer in answers]

    options = {"model": str(folder), "dtype": "float32", "cache_memory": "64MiB"}
    with serve(api.load_served, **options) as url:
        alone = [httpx.post(ready(url), json=ask).json()["response"] for ask in asks]
        assert asyncio.run(together(url)) == alone
    assert any(alone)


def test_checkpoint_of_no_family_uses_its_own_template(tmp_path):
    """As the demo model does; and --chat-template goes before it."""
    folder = dressed("llama", tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(StartError, match="--chat-template"):
        load(folder)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    model = load(folder, chat_template=file.read_text(encoding="utf-8"))
    model.engine.close()
    prompt = model.prepare([{"role": "user", "content": "x"}], {}, False)
    assert model.tokenizer.backend.decode(prompt.ids) == "[x]"


def test_prompt_limit_of_xverse_is_shorter_than_its_context(tmp_path):
    model = load(dressed("xverse", tmp_path))
    model.engine.close()
    assert (model.context_length, model.prompt_length) == (8192, 6144)
    with pytest.raises(ContextTooLong, match="6144"):
        model.prepare([{"role": "user", "content": "1" * 6500}], {}, False)


def test_check_option_reports_model_prompt_and_answer(tmp_path):
    model = load(dressed("internlm2", tmp_path))
    said = api.check_model(model)
    model.engine.close()
    for words in ("internlm2ForCausalLM", "bfloat16", "parameters", "cpu", "32,768 tokens"):
        assert words in said
    assert "<|im_start|>user\\nhi<|im_end|>" in said
    assert "eight tokens" in said


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("kind", MARKERS)
def test_check_option_reports_each_family_in_each_width(kind, quantize, tmp_path):
    """Without a word from a library."""
    folder = dressed(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    # The checkpoint's own ids are beyond the small tokenizer's.
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--model", str(folder), "--quantize", quantize, "--device-map", "cpu"]
    with server_process(api.load_served, "--check", *flags) as process:
        assert process.wait(120) == 0
        lines = process.said().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model: "))
    assert [line for line in lines[:start] if " INFO " not in line] == []
    report = dict(re.split(r": +", line, maxsplit=1) for line in lines[start:])
    assert list(report)[1] == "weights"
    assert "prompt" in report
    widths = {
        "none": r"(bfloat16( by our kernels)?|fp16 weights|float32), ",
        "8bit": "in 8 bits, ",
        "4bit": "in 4 bits, ",
    }
    assert re.match(widths[quantize] + r"\d+ [KM]iB \(", report["weights"])
    assert float(report["self-check"].split()[2]) < 0.1
    assert len(report["its ids"].split()) > 5
    assert report["eight tokens"] != "''"


def row(kind: str) -> str:
    """The row for a family, from what is measured here."""
    model, _ = load_model(FIXTURES / kind, dtype="float32", device_map="cpu")
    family = next(row for row in FAMILIES if row.model_type == kind)
    errors = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        errors.append(error_of(model, expected_of(kind)))
    bound = next(bound for bound in ("3e-5", "1e-4") if max(errors) < float(bound))
    classes = [kind.__name__ for kind in type(model).__mro__]
    native = next(name for name in classes if name in ("LlamaForCausalLM", "DeepseekV2ForCausalLM"))
    model.set_attn_implementation("sdpa")
    packed = start_runner(model, "1MiB").difference
    assert packed < 1e-4
    ends = ", ".join(f"`{end}`" for end in family.ends).replace("|", r"\|")
    context = f"{context_length(model.config):,}"
    return f"| {family.name} | `{native}` | < {bound} | equal | {ends} | {context} |"


def test_table_of_families_in_how_it_works_md_is_measured():
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8").splitlines()
    rows = [row(kind) for kind in ("deepseek_v2", "index", "llama", "xverse", "internlm2")]
    missing = [line for line in rows if line not in page]
    assert not missing, "\n".join(rows)
