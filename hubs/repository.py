"""A repository in a folder: what of it is there, whether it fits, and whether it came whole."""

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hubs.clients import HUBS, Hub, size_of
from hubs.contents import INDEX, gguf_files, is_plain, shards, wanted
from hubs.environment import check_environment
from hubs.errors import AGAIN, DownloadError, sentence

# Written last into a folder: the size of every file that belongs there.
RECORD = ".sizes.json"

_POINTER = b"version https://git-lfs.github.com/spec/"


def fetch_repository(
    source: str, repo: str, target: Path, others: Iterable[str] = (), quant: str = ""
) -> None:
    """Fetch what of a repository is not in the folder yet; of GGUF files the one that is named.

    `others` are hubs that have it too. Raises DownloadError.
    """
    try:
        check_environment(source)
        _fill(target, HUBS[source](repo), quant)
    except DownloadError:
        raise
    except Exception as error:  # the clients raise almost every kind
        access = HUBS[source].closed.format(repo=repo)
        other = "".join(f", or use --source {hub}" for hub in others)
        raise DownloadError(sentence(error, source, repo, target, access, other)) from error


def is_whole(target: Path, quant: str = "") -> bool:
    """Whether everything is there of what an earlier run fetched to its end."""
    recorded = _recorded(target)
    with suppress(DownloadError):
        return bool(wanted(recorded, quant)) and not _missing(target, recorded)
    return False


def find_gguf(folder: Path, quant: str) -> Path | None:
    """The GGUF file of that name in a folder, or its first part, if there is one."""
    files = {file.relative_to(folder).as_posix(): size_of(file) for file in folder.rglob("*.gguf")}
    with suppress(DownloadError):
        return folder / gguf_files(files, quant)[0]
    return None


def _recorded(target: Path) -> dict[str, int]:
    """What RECORD says; nothing where an earlier run did not come to its end."""
    with suppress(OSError, ValueError):
        return dict(json.loads((target / RECORD).read_text(encoding="utf-8")))
    return {}


def _fill(target: Path, hub: Hub, quant: str) -> None:
    """Fetch what is not there, and make sure that everything is."""
    listed = {name: size for name, size in hub.sizes().items() if is_plain(name)}
    names = wanted(listed, quant)
    target.mkdir(parents=True, exist_ok=True)
    for index in [name for name in names if name.endswith(INDEX)]:
        _bring(target, hub, {index: listed[index]})
        named = shards(_read_json(target / index), index)
        if lost := [name for name in named if name not in listed]:
            raise DownloadError(f"the repository has no {', '.join(lost)}, which {index} names")
        names += named
    sizes = {name: listed[name] for name in names}
    _bring(target, hub, sizes)
    if pointers := [name for name in sizes if _is_pointer(target / name)]:
        raise DownloadError(
            f"{', '.join(pointers)} is a Git LFS pointer on the hub too: whoever uploaded the"
            " repository left the file itself out; take another"
        )
    # Other GGUF files may lie in the same folder.
    record = _recorded(target) if quant else {}
    (target / RECORD).write_text(json.dumps(record | sizes, indent=1), encoding="utf-8")


def _bring(target: Path, hub: Hub, sizes: dict[str, int]) -> None:
    """Fetch those of these files that are not there. Raises DownloadError if one is not then."""
    missing = _missing(target, sizes)
    if not missing:  # to ModelScope's client, an empty list would mean everything
        return
    for name in missing:
        print(f"to fetch: {name}, {size_of(target / name)} of {sizes[name]} bytes are there")
    check_room(target, {name: sizes[name] for name in missing})
    hub.download(missing, target)
    if broken := _missing(target, sizes):
        raise DownloadError(f"{', '.join(broken)} did not come whole; run the same command again")


def check_room(target: Path, sizes: dict[str, int]) -> None:
    """Raise DownloadError if the disk has no room for the rest of these files."""
    begun = sum(size_of(target / f"{name}.incomplete") for name in sizes)
    needed, free = sum(sizes.values()) - begun, shutil.disk_usage(target).free
    if needed > free:
        raise DownloadError(
            f"{target} needs {needed / 1e9:.3g} GB more, and its disk has {free / 1e9:.3g} GB free;"
            " make room, or fetch it to another disk with `python model_download.py NAME --dir DIR`"
        )


def _missing(target: Path, sizes: dict[str, int]) -> list[str]:
    """The files that are not there, or not of their size."""
    return [name for name, size in sizes.items() if size_of(target / name) != size]


def _read_json(path: Path) -> Any:
    """What a file that was fetched says. Raises DownloadError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DownloadError(f"{path} is damaged; delete it and {AGAIN}") from error


def _is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS keeps in a repository in place of a large one."""
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER
