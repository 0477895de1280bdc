"""Which files of a repository are taken, how models are named, and where one lies."""

import json
from pathlib import Path

import pytest

import model_download
from hubs import DownloadError
from hubs.contents import is_plain, quant_of, wanted
from hubs.layouts import hub_id_of, name_of
from hubs.reference import Reference, read_reference
from model_download import find_base

# ---- What is taken


def taken(*names: str, quant: str = "") -> list[str]:
    return wanted(dict.fromkeys(names, 1), quant)


def test_first_format_is_taken():
    common = ["config.json", "tokenizer.model"]
    junk = ["a.py", "training_args.bin", "x/config.json", "optimizer.bin"]
    whole, index = "model.safetensors", "model.safetensors.index.json"
    old, old_index = "pytorch_model.bin", "pytorch_model.bin.index.json"
    for n, weights in enumerate(formats := (whole, index, old, old_index)):
        assert taken(*common, *junk, *formats[n:], "q.gguf") == [*common, weights]


def test_repository_without_weights_names_its_largest_file():
    with pytest.raises(DownloadError, match=r"no weights .* largest file is model\.onnx"):
        wanted({"config.json": 5, "model.onnx": 6})
    with pytest.raises(DownloadError, match="largest file is none"):
        wanted({})


def test_weights_of_an_adapter_need_its_settings():
    assert taken("adapter_config.json", "adapter_model.bin")[-1] == "adapter_model.bin"
    both = taken("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors")
    assert both == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(DownloadError, match="no weights"):
        taken("adapter_model.bin")


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "LICENSE（中文）.txt", "Some-1.5B (v2)-00001-of-00002.safetensors", "a/b/c.jinja"],
)
def test_name_that_is_the_same_everywhere(name):
    assert is_plain(name)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "a/../x",
        "/x",
        "a//x",
        "a/",
        ".x",
        "a/.x",
        "C:x",
        "a\\b",
        "LICENSE\\..\\..\\evil.bat",
        "x.",
        "x ",
        "a?",
        "a*",
        "a<b",
        'a"b',
        "a\nb",
        "nul",
        "NUL.txt",
        "com1",
        "a/con",
        "lpt9.json",
        "a\x00b",
        "",
    ],
)
def test_name_that_leads_elsewhere_somewhere(name):
    assert not is_plain(name)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("qwen2.5-1.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("Llama-3.2-1B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Q8_0/x-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("x-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("x.i1-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-1.5b-instruct-fp16.gguf", "F16"),
        ("model_bf16.GGUF", "BF16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Llama-Q4U.v2.gguf", "Llama-Q4U.v2"),
        ("ggml-model.gguf", "ggml-model"),
    ],
)
def test_quantisation_in_a_files_name(name, quant):
    assert quant_of(name) == quant
    assert taken(name, "other-Q1_0.gguf", quant=quant.lower()) == [name]


def test_gguf_file_is_meant_by_one_name():
    files = ("a-Q4_K_M.gguf", "a-UD-Q4_K_XL.gguf", "b/a-Q8_0.gguf", "mmproj-F16.gguf")
    for quant, file in [
        ("q4_k_m", files[0]),
        ("Q4_K_XL", files[1]),
        ("UD-Q4_K_XL", files[1]),
        ("a-Q8_0.gguf", files[2]),
        ("b/a-q8_0.gguf", files[2]),
    ]:
        assert taken(*files, "LICENSE", quant=quant) == [file, "LICENSE"]
    for quant in ("Q4", "K_M", "F16", "gguf", "4"):
        with pytest.raises(DownloadError, match=f"no GGUF file '{quant}'"):
            taken(*files, quant=quant)
    with pytest.raises(DownloadError, match="more than one GGUF file 'Q8_0'"):
        taken(*files, "c-Q8_0.gguf", quant="Q8_0")
    assert taken("only-Q8_0.gguf", "mmproj-x.gguf") == ["only-Q8_0.gguf"]


def test_gguf_file_in_parts_is_one():
    parts = [f"b/x-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert taken(*parts) == parts
    assert taken(*parts, "x-Q4_0.gguf", quant="Q8_0") == parts
    with pytest.raises(DownloadError, match=r"Q8_0 \(3e-09 GB\), Q4_0 \(1e-09 GB\)$"):
        taken(*parts, "x-Q4_0.gguf")


# ---- How models are named


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Qwen/Qwen2.5-7B", Reference("Qwen/Qwen2.5-7B")),
        ("Qwen/X-GGUF:Q4_K_M", Reference("Qwen/X-GGUF", "Q4_K_M")),
        ("qwen/x-gguf@q4_k_m", Reference("qwen/x-gguf", "q4_k_m")),
        ("hf.co/a/b:Q8_0", Reference("a/b", "Q8_0", "huggingface")),
        ("https://huggingface.co/a/b", Reference("a/b", "", "huggingface")),
        ("https://huggingface.co/a/b/tree/main", Reference("a/b", "", "huggingface")),
        ("https://hf-mirror.com/a/b/", Reference("a/b", "", "huggingface")),
        (
            "https://huggingface.co/a/b/resolve/main/q/c-Q4_0.gguf?download=true",
            Reference("a/b", "q/c-Q4_0.gguf", "huggingface"),
        ),
        ("https://www.modelscope.cn/models/a/b/summary", Reference("a/b", "", "modelscope")),
        ("modelscope.cn/a/b:c.gguf", Reference("a/b", "c.gguf", "modelscope")),
    ],
)
def test_model_is_named_as_elsewhere(text, meant):
    assert read_reference(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        "llama-3-8b",
        "a/b/c",
        "../a",
        "a/..",
        "/a/b",
        "C:\\a/b",
        "https://elsewhere.org/a/b",
        "a/b:",
        "a/b:../c",
        "a/b@c/d",
        "https://huggingface.co/a/b/tree/v1",
        "https://huggingface.co/a/b/blob/main/a.bin",
        "a b/c",
        "",
    ],
)
def test_what_names_no_model(text):
    assert read_reference(text) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/c/hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots/0a1b2c", "Qwen2.5-1.5B-Instruct"),
        ("/c/models/Qwen--Qwen2.5-1.5B-Instruct/snapshots/master", "Qwen2.5-1.5B-Instruct"),
        ("/c/Qwen/Qwen2___5-1___5B-Instruct", "Qwen2.5-1.5B-Instruct"),
        ("/c/models--gpt2/snapshots/0a1b2c", "gpt2"),
        ("/c/my__model", "my__model"),
        ("/c/llama-3-8b", "llama-3-8b"),
        ("/c/x-Q4_K_M.gguf", "x-Q4_K_M"),
        ("/c/x-Q4_K_M-00001-of-00002.gguf", "x-Q4_K_M"),
        ("/c/models--a--b-GGUF/snapshots/0a/x-Q4_0.GGUF", "x-Q4_0"),
    ],
)
def test_name_before_the_cache(path, name):
    assert name_of(Path(path)) == name


def test_hub_id_of_a_windows_path():
    assert hub_id_of("C:\\cache\\models--Qwen--Q\\snapshots\\0a\\") == "Qwen/Q"
    assert hub_id_of("D:\\LLM-Research\\Llama-3___2-1B") == "LLM-Research/Llama-3.2-1B"
    assert hub_id_of("alone") == "alone"
    assert hub_id_of("") == ""


# ---- The model of an adapter


@pytest.fixture
def models(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(model_download, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def adapter(folder: Path, base: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"base_model_name_or_path": base})
    (folder / "adapter_config.json").write_text(settings, encoding="utf-8-sig")
    return folder


@pytest.mark.parametrize(
    ("named", "place"),
    [
        ("{tmp}/elsewhere/base", "elsewhere/base"),
        ("elsewhere/base", "elsewhere/base"),
        ("/root/autodl-tmp/LLM-Research/Meta-Llama-3-8B-Instruct/", "models/llama-3-8b"),
        ("meta-llama/meta-llama-3-8b-instruct", "models/llama-3-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "models/Qwen/Qwen2.5-7B-Instruct"),
        ("/c/Qwen/Qwen2___5-7B-Instruct", "models/Qwen/Qwen2.5-7B-Instruct"),
        ("C:\\c\\models--Qwen--Qwen2.5-7B\\snapshots\\0a", "models/Qwen2.5-7B"),
        ("/old/place/mine", "models/mine"),
        ("/old/place/mine", "data/mine"),
        ("someone/mine", "data/someone/mine"),
    ],
)
def test_base_is_found_by_its_name(models, tmp_path, named: str, place: str):
    base = model(tmp_path / place)
    found = find_base(adapter(tmp_path / "data/lora", named.format(tmp=tmp_path)))
    assert found.resolve() == base


def test_base_that_is_given_goes_first(models, tmp_path):
    model(models / "named")
    given = model(models / "given")
    lora = adapter(tmp_path / "lora", "named")
    assert find_base(lora, "given") == find_base(lora, str(given)) == given
    with pytest.raises(DownloadError, match="no model 'gone'"):
        find_base(lora, "gone")


@pytest.mark.parametrize(
    ("named", "remedy"),
    [
        ("/x/Meta-Llama-3-8B-Instruct", "python model_download.py llama-3-8b`, or give"),
        ("Qwen/Qwen2.5-7B", "python model_download.py Qwen/Qwen2.5-7B`, or give"),
        ("", "on a model that it does not name, which is not here; give its folder"),
        (None, "on a model that it does not name, which is not here; give its folder"),
        ("mine", "on mine, which is not here; give its folder or name with --base"),
        ("~nobody/mine", "on ~nobody/mine, which is not here"),
        ("a\0b", "which is not here"),
    ],
)
def test_missing_base_is_told(models, tmp_path, named, remedy: str):
    # What lies in the working directory is not meant by an empty name.
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DownloadError) as refused:
        find_base(adapter(tmp_path / "lora", named))
    assert remedy in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\ufeff"])
def test_damaged_adapter_is_told(models, tmp_path, content: str):
    (tmp_path / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(DownloadError, match=r"adapter_config\.json cannot be read"):
        find_base(tmp_path)
