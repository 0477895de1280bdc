"""The files of a model's folder, looked at before a library reads them.

Libraries pass over some that they cannot read, and of others they do not say which it is. Weights
are looked at as far as their headers, so this takes no time.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from engine.blame import damaged, not_loaded, read_object, read_text
from engine.errors import StartError

# What we read, or transformers does.
OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "adapter_config.json",
    "quant_config.json", "quantize_config.json", "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)  # fmt: skip
# In the order in which transformers looks for them.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_OF_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# What Git leaves in the place of a large file where Git LFS is not installed.
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_folder(folder: Path) -> None:
    """Raise StartError for the first file that is damaged, or is not there yet, by its name."""
    for name in (*OBJECTS, "tokenizer.model"):
        if (folder / name).is_file():
            check_pointer(folder / name)
    for name in OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    adapters = [folder / name for name in _OF_ADAPTER if (folder / name).is_file()]
    for file in (*weight_files(folder), *adapters):
        check_pointer(file)
        if file.suffix == ".safetensors":
            with damaged(file), safe_open(file, "pt"):
                pass


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, in one format; none where there are none.

    Raises StartError for one that an index names in vain.
    """
    for name in _WHOLE:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards_of(index)
    return []


def _shards_of(index: Path) -> list[Path]:
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise not_loaded(index, "it has no weight_map")
    shards = [index.parent / name for name in sorted({*map(str, named.values())})]
    for shard in shards:
        if not shard.is_file():
            raise not_loaded(shard, f"it is not there, and {index.name} names it")
    return shards


def check_pointer(file: Path) -> None:
    """Raise StartError for a file that is Git LFS's pointer to it."""
    with damaged(file), file.open("rb") as opened:
        begins = opened.read(len(_POINTER))
    if begins == _POINTER:
        raise StartError(
            f"{file} is a pointer of Git LFS, in place of the file itself; run `git lfs pull` in"
            " the folder, or download the model with `python model_download.py NAME`"
        )


@contextmanager
def plain_folder(folder: Path, by_links: bool = True) -> Iterator[Path]:
    """The folder as transformers can read it, which takes UTF-8 without a byte order mark alone.

    Where an editor saved a file otherwise, it is a folder of links, and of such files' texts, which
    is gone after the block. Raises StartError where links are not wanted, or cannot be.
    """
    texts = [*folder.glob("*.json"), *folder.glob("*.jinja")]
    marked = {file.name: read_text(file) for file in texts if _has_mark(file)}
    if not marked:
        yield folder
        return
    remedy = StartError(f"save {', '.join(sorted(marked))} in {folder} as UTF-8 without BOM")
    if not by_links:
        raise remedy
    with tempfile.TemporaryDirectory(prefix="chat-api-") as place:
        try:
            for file in folder.iterdir():
                if file.name in marked:
                    Path(place, file.name).write_text(marked[file.name], encoding="utf-8")
                else:
                    Path(place, file.name).symlink_to(file.absolute(), file.is_dir())
        except OSError as error:  # Windows may not let us
            raise remedy from error
        try:
            yield Path(place)
        except StartError as error:
            raise StartError(str(error).replace(place, str(folder))) from error


def _has_mark(file: Path) -> bool:
    """Whether a text is not in plain UTF-8."""
    with file.open("rb") as opened:
        return json.detect_encoding(opened.read(4)) != "utf-8"
