"""A repository in a folder: what of it is there, whether it fits, and whether it came whole."""

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hubs.clients import HUBS, Hub, size_of
from hubs.contents import wanted
from hubs.errors import DownloadError, sentence

# Written last into a folder: the size of every file that belongs there.
RECORD = ".sizes.json"


def fetch_repository(source: str, repo: str, target: Path, others: Iterable[str] = ()) -> None:
    """Fetch what of a repository is not in the folder yet; `others` are hubs that have it too.

    Raises DownloadError.
    """
    try:
        _fill(target, HUBS[source](repo))
    except DownloadError:
        raise
    except Exception as error:  # the clients raise almost every kind
        access = HUBS[source].closed.format(repo=repo)
        other = "".join(f", or use --source {hub}" for hub in others)
        raise DownloadError(sentence(error, source, repo, target, access, other)) from error


def is_whole(target: Path) -> bool:
    """Whether everything is there of what an earlier run fetched to its end."""
    recorded: dict[str, int] = {}
    with suppress(OSError, ValueError):
        recorded = dict(json.loads((target / RECORD).read_text(encoding="utf-8")))
    return bool(recorded) and not _missing(target, recorded)


def _fill(target: Path, hub: Hub) -> None:
    """Fetch what is not there, and make sure that everything is."""
    listed = hub.sizes()
    sizes = {name: listed[name] for name in wanted(listed)}
    target.mkdir(parents=True, exist_ok=True)
    # To ModelScope's client, an empty list would mean everything.
    if missing := _missing(target, sizes):
        for name in missing:
            print(f"to fetch: {name}, {size_of(target / name)} of {sizes[name]} bytes are there")
        check_room(target, {name: sizes[name] for name in missing})
        hub.download(missing, target)
    if broken := _missing(target, sizes) or _lost_shards(target):
        raise DownloadError(f"{', '.join(broken)} did not come whole; run the same command again")
    (target / RECORD).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


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


def _lost_shards(target: Path) -> list[str]:
    """The files that an index names, and nobody has."""
    indexes = [json.loads(path.read_bytes()) for path in target.glob("*.index.json")]
    shards = {shard for index in indexes for shard in index["weight_map"].values()}
    return sorted(shard for shard in shards if not (target / shard).is_file())
