"""What weights in fewer bits cost: perplexity, and how often the likeliest token is another.

    python benchmarks/quality.py                                the demo, as it is, in 8 and 4 bits
    python benchmarks/quality.py --model FOLDER --tokens 20000  another, over so many tokens

The text is Python's own: the topics of its `help()`, which are its reference manual. It is read in
windows of --window tokens. The first way in the list is what the others' tokens are compared with.
Without --quantize a folder's weights are computed in their own type, a GGUF file's in its own bits,
and fewer bits as a server here would. On a card 4 bits need bitsandbytes.
"""

import argparse
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "models" / "demo" / "demo.gguf"

from engine.checkpoint.checkpoint import load_model  # noqa: E402
from engine.layers.autotune import choose_weight_format  # noqa: E402
from engine.runner.self_check import reference_logits  # noqa: E402


class Quality(NamedTuple):
    """How well a model predicts the text."""

    weights: str  # what they are, in words
    perplexity: float
    likeliest: torch.Tensor  # the token that it would have said, at each place


def windows_of(folder: str, tokens: int, window: int) -> list[list[int]]:
    """The beginning of the text as token ids, in windows."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer_of(Path(folder))(text)["input_ids"]
    return [ids[n : n + window] for n in range(0, min(tokens, len(ids)) - window + 1, window)]


def tokenizer_of(model: Path) -> Any:
    """The tokenizer of a checkpoint's folder, or of a GGUF file."""
    from transformers import AutoTokenizer

    from engine.checkpoint.formats.gguf import GGUFFile

    if model.suffix.lower() == ".gguf":
        return GGUFFile(model).tokenizer()
    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def measure(folder: str, quantize: str, windows: list[list[int]]) -> Quality:
    model, _ = load_model(folder, quantize=quantize)
    kept = str(model.dtype).removeprefix("torch.")
    weights = choose_weight_format(model, kept if quantize == "none" else "auto")
    total = 0.0
    likeliest = []
    for ids in tqdm(windows, desc=quantize, unit="window"):
        logits = reference_logits(model, ids)[:-1].float()
        wanted = torch.tensor(ids[1:], device=logits.device)
        total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        likeliest.append(logits.argmax(-1).cpu())
    count = sum(len(ids) - 1 for ids in windows)
    return Quality(weights, math.exp(total / count), torch.cat(likeliest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEMO), help="a folder, or a GGUF file")
    ways = ["none", "8bit", "4bit"]
    parser.add_argument("--quantize", nargs="+", choices=ways, default=ways)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, at most")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once")
    options = parser.parse_args()
    windows = windows_of(options.model, options.tokens, options.window)
    print(f"{len(windows)} windows of {options.window} tokens\n")
    print("| --quantize | weights | perplexity | the same likeliest token |")
    print("| --- | --- | --- | --- |")
    first: Quality | None = None
    for quantize in options.quantize:
        seen = measure(options.model, quantize, windows)
        first = first or seen
        same = float((seen.likeliest == first.likeliest).float().mean())
        change = seen.perplexity / first.perplexity - 1
        print(
            f"| {quantize} | {seen.weights} | {seen.perplexity:.3f} ({change:+.2%}) | {same:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
