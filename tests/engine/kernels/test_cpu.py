"""Our kernels for CPUs: what they compute, to the last bit, and where they are not to be had."""

import importlib.util
import os
import platform
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, GraniteConfig, MistralConfig, Qwen2Config, Qwen3Config

from engine.kernels import cpu as cpu_kernels
from engine.kernels.cpu import outcome, why_missing
from engine.layers.block_packing import unpack_blocks
from engine.layers.cpu_layer import CpuLayer
from engine.layers.cpu_linear import CpuLinear
from engine.layers.cpu_model import CpuModel
from engine.layers.merged import RMSNorm
from engine.layers.quantized import BLOCK, unpack
from engine.layers.quantized import pack as quantize
from engine.layers.weight_format import convert
from engine.runner.self_check import start_runner
from engine.sequence import KVSpan
from tests.conftest import tiny_llama
from tests.engine.alone import needs_bitsandbytes, needs_kernels
from tests.engine.layers.test_merged import check_norm, model_of

# Torch's names for a CPU's instructions; the last is what there is on every processor.
SETS = ["AVX512", "AVX2", "DEFAULT"]
# Of blocks: the bits, the columns of one, the type of factors, and whether there are offsets.
IN_BLOCKS = {
    "4 bits in blocks": (4, 32, torch.float16, True),
    "4 bits in blocks, float32": (4, 64, torch.float32, True),
    "8 bits in blocks": (8, 32, torch.float16, False),
    "8 bits in blocks with offsets": (8, 16, torch.float32, True),
}
KINDS = [
    "bfloat16",
    "float16",
    "8 bits",
    pytest.param("4 bits", marks=needs_bitsandbytes),
    *IN_BLOCKS,
]


@pytest.fixture(params=SETS)
def compiled_for(request, monkeypatch):
    """The kernels as they are on such a CPU, if this one can do it."""
    here = torch.backends.cpu.get_cpu_capability()
    if request.param != "DEFAULT" and request.param not in (here, here.replace("512", "2")):
        pytest.skip(f"this CPU has {here}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    if request.param == "DEFAULT":
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    outcome.cache_clear()
    yield request.param
    outcome.cache_clear()


def linear_of(kind: str, out_features: int, in_features: int):
    """A layer, and its weights and bias as they are."""
    weight = torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if out_features % 2 else None
    if kind in IN_BLOCKS:
        return in_blocks(out_features, in_features, bias, *IN_BLOCKS[kind])
    if kind in ("8 bits", "4 bits"):
        packed, scale = quantize(weight, 8 if kind == "8 bits" else 4)
        return CpuLinear.of_packed(packed, scale, bias), unpack(packed, scale, torch.float32), bias
    weight = weight.to(getattr(torch, kind))
    return CpuLinear(weight, bias), weight.float(), bias


def in_blocks(
    out_features: int, in_features: int, bias, bits: int, block: int, dtype, shifted: bool
):
    """A layer as a checkpoint has packed it, and its weights and bias."""
    shape = out_features, in_features
    values = torch.randint(0, 16, shape) if bits == 4 else torch.randint(-128, 128, shape)
    packed = values.to(torch.int8)
    if bits == 4:
        packed = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8)
    scale = (torch.rand(out_features, in_features // block) / 100).to(dtype)
    offset = torch.randn(out_features, in_features // block).to(dtype) if shifted else None
    layer = CpuLinear.of_packed(packed, scale, bias, offset=offset)
    return layer, unpack_blocks(packed, scale, offset), bias


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_weights_and_of_each_row_alone(compiled_for, kind):
    torch.manual_seed(0)
    for out_features, in_features in ((1, 1), (33, 7), (64, 576), (300, 129), (75, 128)):
        block = IN_BLOCKS[kind][1] if kind in IN_BLOCKS else BLOCK if kind == "4 bits" else 1
        if in_features % block:
            continue
        layer, weight, bias = linear_of(kind, out_features, in_features)
        if kind in IN_BLOCKS:
            torch.testing.assert_close(layer.weight, weight, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(layer.weight, weight)
        for count in (1, 2, 3, 5, 6, 7, 12, 13, 16, 97, 200):
            x = torch.randn(1, count, in_features)
            found = layer(x)
            wanted = torch.nn.functional.linear(x, weight, bias)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
            for row in (0, count // 2, count - 1):
                assert torch.equal(layer(x[0, row]), found[0, row])


@needs_kernels
def test_columns_in_another_order(compiled_for):
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (70, 64), dtype=torch.uint8)
    scale, offset = torch.rand(70, 4), torch.randn(70, 4)
    order = torch.randperm(128)
    layer = CpuLinear.of_packed(packed, scale, offset=offset, order=order)
    x = torch.randn(100, 128)
    wanted = torch.nn.functional.linear(x[:, order], unpack_blocks(packed, scale, offset))
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(layer(x[:n]), layer(x)[:n]) for n in (1, 2, 7))


@pytest.fixture
def threads():
    """Sets how many threads compute."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernels
def test_a_row_is_the_same_by_any_number_of_threads(threads):
    layer, _, _ = linear_of("bfloat16", 300, 129)
    x = torch.randn(7, 129)
    found = []
    for number in (1, 2, 3, 16):
        threads(number)
        found.append(layer(x))
    assert all(torch.equal(found[0], other) for other in found)


@needs_kernels
def test_half_precision_in_is_half_precision_out():
    layer, weight, _ = linear_of("8 bits", 64, 32)
    x = torch.randn(3, 32).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), (x.float() @ weight.T).bfloat16())


@needs_kernels
def test_memory_is_that_of_the_weights():
    assert CpuLinear(torch.ones(64, 513).bfloat16()).packed_bytes == 64 * 513 * 2
    for bits, size in ((8, 64 * 512 + 4 * 64), (4, 64 * 256 + 4 * 64 * 512 // BLOCK)):
        if bits == 8 or importlib.util.find_spec("bitsandbytes"):
            assert CpuLinear.of_packed(*quantize(torch.randn(64, 512), bits)).packed_bytes == size


@needs_kernels
def test_norm_is_of_the_mean_square_and_of_each_row_alone(compiled_for):
    check_norm(99)
    assert RMSNorm(torch.nn.Parameter(torch.ones(8)), 1e-5).kernel is not None


WHOLE = [
    pytest.param(lambda: tiny_llama(head_dim=16).bfloat16(), id="llama"),
    pytest.param(lambda: model_of(Qwen2Config), id="biases"),
    pytest.param(lambda: model_of(Qwen3Config), id="norms of each head"),
    pytest.param(lambda: model_of(Qwen2Config, num_key_value_heads=4), id="a key head for each"),
    pytest.param(lambda: model_of(Qwen2Config, head_dim=80), id="heads of five vectors"),
    pytest.param(lambda: model_of(MistralConfig, sliding_window=5), id="a sliding window"),
    pytest.param(lambda: model_of(MistralConfig, sliding_window=70), id="a window of two blocks"),
]


def runner_of(model):
    model = model()
    convert(model, "our kernels")
    return start_runner(model, "64MiB", 16)  # compares it with the model's own


@needs_kernels
@pytest.mark.parametrize("model", WHOLE)
def test_layer_is_one_call_and_says_the_same(compiled_for, model):
    runner = runner_of(model)
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}
    assert isinstance(runner.model.whole, CpuModel)
    assert runner.difference < 2e-5


@needs_kernels
def test_model_that_does_more_is_no_call():
    scaled = {"logits_scaling": 2.0, "residual_multiplier": 1.0}
    runner = runner_of(lambda: model_of(GraniteConfig, **scaled))
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}
    assert runner.model.whole is None
    assert runner.difference < 2e-5


@needs_kernels
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: model_of(Gemma2Config), id="norms on both sides"),
        pytest.param(lambda: model_of(Qwen2Config, head_dim=24), id="heads of half a vector"),
        pytest.param(lambda: model_of(Qwen2Config, intermediate_size=40), id="a narrow MLP"),
        pytest.param(lambda: model_of(Qwen2Config, hidden_act="gelu"), id="another activation"),
    ],
)
def test_layer_of_another_kind_is_no_call(model):
    runner = runner_of(model)
    assert CpuLayer not in {type(module) for module in runner.model.modules()}
    assert runner.difference < 1e-4


@needs_kernels
def test_layer_whose_weights_no_kernel_reads_is_no_call():
    model = tiny_llama(head_dim=16).bfloat16()
    model.model.layers[1].mlp.down_proj.float()
    convert(model, "our kernels")
    start_runner(model, "64MiB")
    assert [type(x) is CpuLayer for x in model.model.layers] == [True, False]


@needs_kernels
def test_layers_of_other_sizes_have_room_of_their_own():
    def model():
        model = tiny_llama(head_dim=16)
        wide = tiny_llama(head_dim=16, intermediate_size=960).model.layers[1].mlp
        model.model.layers[1].mlp = wide
        return model.bfloat16()

    runner = runner_of(model)
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}
    assert runner.difference < 2e-5


@needs_kernels
def test_large_keys_are_cached_as_they_are():
    def model():
        model = tiny_llama(head_dim=16)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight *= 1e6
        return model.bfloat16()

    runner = runner_of(model)
    assert {type(layer) for layer in runner.model.model.layers} == {CpuLayer}
    assert runner.pool.layers[0].keys.abs().max() > 60_000


@needs_kernels
@pytest.mark.parametrize("model", WHOLE)
def test_a_token_has_the_same_bits_whatever_else_is_in_the_step(model, threads):
    """Alone and among others, in chunks of any size, by any number of threads."""
    runner = runner_of(model)
    runner.cores = None  # which would choose the threads
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in (150, 41, 70, 3)]

    def logits(text: list[int], start: int, *chunks: int) -> list[torch.Tensor]:
        threads(1 + len(chunks) % 3)
        span = KVSpan(text, start, all_logits=True)
        found = []
        for new in chunks:
            found.extend(runner.forward([(span, new)]))
            span.num_computed_tokens += new
        return found

    alone = [logits(text, 0, len(text)) for text in texts]
    for text, wanted in zip(texts, alone, strict=True):
        for chunks in ([1] * len(text), [2, len(text) - 2], [len(text) // 2, -(-len(text) // 2)]):
            found = logits(text, 5, *chunks)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    spans = [KVSpan(text, 160 * n) for n, text in enumerate(texts)]
    for news in ((40, 1, 69, 1), (1, 39, 1, 1), (48, 1, 0, 1), (1, 0, 0, 0)):
        work = [(span, new) for span, new in zip(spans, news, strict=True) if new]
        for (span, new), row in zip(work, runner.forward(work), strict=True):
            span.num_computed_tokens += new
            assert torch.equal(row, alone[spans.index(span)][span.num_computed_tokens - 1])


@needs_kernels
def test_what_is_no_number_does_not_reach_a_neighbour():
    runner = runner_of(WHOLE[0].values[0])
    broken, sound = KVSpan([7] * 20, 0), KVSpan([9] * 20, 20)
    (wanted,) = runner.forward([(sound, 20)])
    weight = runner.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[7] = torch.nan
    found = runner.forward([(broken, 20), (sound, 20)])
    assert not found[0].isfinite().any()
    assert torch.equal(found[1], wanted)


def missing_because() -> str:
    outcome.cache_clear()
    try:
        return str(why_missing())
    finally:
        outcome.cache_clear()


def test_without_a_compiler_the_reason_names_one(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert missing_because() == ("there is no C++ compiler; install one, as by `apt install g++`")


def test_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo no such option >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    assert missing_because() == "broken: no such option"
    assert [path.name for path in (tmp_path / "chat-api").iterdir()] == []


def test_compiler_that_fails_is_asked_once(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/calls\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    outcome.cache_clear()
    try:
        assert [why_missing() for _ in range(3)] == ["broken: exit 1"] * 3
    finally:
        outcome.cache_clear()
    assert (tmp_path / "calls").read_text() == "asked\n"


def test_compiler_that_hangs_is_given_up(monkeypatch, tmp_path):
    compiler = tmp_path / "hanging"
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpu_kernels, "COMPILE_TIMEOUT_S", 0.2)
    assert "timed out" in missing_because()


def test_compiler_that_cannot_be_read_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    assert missing_because() == "No closing quotation"


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("content", [b"", b"no library", None])
def test_broken_library_is_compiled_again(monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert missing_because() == "None"
    (library,) = (tmp_path / "chat-api").iterdir()
    library.unlink()
    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    library.write_bytes(other.read_bytes() if content is None else content)
    assert missing_because() == "None"
    assert library.read_bytes().count(b"decoder_layer")


def test_compiler_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    assert "gone" in missing_because()


def test_processor_without_wide_vectors_has_none(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert missing_because() == "there are none for this CPU's instructions (DEFAULT)"


@pytest.mark.slow
@needs_kernels
def test_library_is_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert missing_because() == "None"
    (library,) = (tmp_path / "chat-api").iterdir()
    when = library.stat().st_mtime_ns
    assert missing_because() == "None"
    assert [*(tmp_path / "chat-api").iterdir()] == [library]
    assert library.stat().st_mtime_ns == when


@pytest.mark.slow
@needs_kernels
def test_change_in_any_file_names_another_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources = cpu_kernels.source_files()
    assert len(sources) > 5
    for change in ({}, {"products.h": sources["products.h"] + b"// more"}):
        monkeypatch.setattr(cpu_kernels, "source_files", lambda change=change: sources | change)
        assert missing_because() == "None"
    assert len([*(tmp_path / "chat-api").iterdir()]) == 2


@pytest.mark.slow
@needs_kernels
def test_without_a_folder_to_keep_it_in_the_library_is_compiled_each_time(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert missing_because() == "None"


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.slow
@pytest.mark.parametrize("open_one", ["folder", "file", "above"])
def test_library_that_others_may_have_written_is_not_loaded(
    monkeypatch, tmp_path, caplog, open_one
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    cpu_kernels.library()
    (kept,) = (cache / "chat-api").iterdir()
    assert mode_of(kept.parent) == mode_of(kept) == 0o700
    place = {"folder": kept.parent, "file": kept, "above": cache}[open_one]
    place.chmod(0o777)
    opened = []
    monkeypatch.setattr(cpu_kernels, "loaded", opened.append)
    cpu_kernels.library()
    assert opened[0] != kept
    assert f"others may write to {place}" in caplog.text


@pytest.mark.slow
def test_library_of_another_user_is_not_loaded(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernels.library()
    (kept,) = (tmp_path / "chat-api").iterdir()
    found = os.stat(kept)
    monkeypatch.setattr(os, "geteuid", lambda: found.st_uid + 1)
    assert cpu_kernels.why_untrusted(kept) is None or found.st_uid  # root's is everybody's
    monkeypatch.undo()
    stranger = list(found)
    stranger[4] = 12345
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result(stranger))
    assert cpu_kernels.why_untrusted(kept) == f"{kept} belongs to another user"


@pytest.mark.slow
def test_user_without_a_home_compiles_them_each_time(monkeypatch):
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert cpu_kernels.cache_folder() is None
    assert cpu_kernels.library()
