"""What a folder of this machine holds, and where hubs' clients and trainers put a model in one."""

import json
import re
from pathlib import Path

from hubs.errors import DownloadError

# Where a model lies in the folder that is given, or that a hub's client was given as its cache.
_LAYOUTS = (
    "",
    "snapshots/*/",  # of one model, huggingface_hub and modelscope
    "*/snapshots/*/",
    "models/*/snapshots/*/",
    "*/*/",  # modelscope's older releases, as in the tutorials
)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which may be one or a hub's cache."""
    for layout in _LAYOUTS:
        configs = folder.glob(f"{layout}config.json")
        if found := sorted(c.parent for c in configs if any(c.parent.glob("*model*"))):
            return found
    return []


def is_gguf(path: Path) -> bool:
    """Whether it is a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def gguf_models(folder: Path) -> list[Path]:
    """The models in a folder that are a GGUF file each; of one in several parts, the first."""
    files = sorted(path for path in folder.glob("*.[gG][gG][uU][fF]") if path.is_file())
    other = r"mmproj|imatrix|-(?!00001)\d{5}-of-\d{5}\."
    return [path for path in files if not re.search(other, path.name, re.IGNORECASE)]


def find_adapters(folder: Path) -> list[Path]:
    """The LoRA adapters in a folder, which may be one or a hub's cache."""
    for layout in _LAYOUTS:
        configs = folder.glob(f"{layout}adapter_config.json")
        if found := sorted(c.parent for c in configs if is_adapter(c.parent)):
            return found
    return []


def training_steps(folder: Path) -> list[Path]:
    """The checkpoints of a training run, in their order."""
    # By number, as 1000 has one digit more than 500.
    return sorted(folder.glob("checkpoint-*/"), key=lambda step: (len(step.name), step.name))


def is_adapter(folder: Path) -> bool:
    """Whether it holds a LoRA adapter, and not the merged model beside it."""
    whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / "adapter_config.json").is_file() and not whole


def base_of(adapter: Path) -> str:
    """The path or the hub id of an adapter's model, as peft wrote it down; "" if it did not.

    Raises DownloadError.
    """
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        return str(config.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise DownloadError(f"{file} cannot be read ({error}); fetch or copy it again") from error


def hub_id_of(path: str) -> str:
    """The last two parts of a path, or the last one, as a hub calls them.

    `models--ORG--NAME/snapshots/COMMIT` and `ORG--NAME/snapshots/REVISION` are ORG/NAME; older
    releases of modelscope write `___` for each dot.
    """
    parts = [part for part in re.split(r"[/\\]", path) if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].removeprefix("models--").split("--")
    return "/".join(parts[-2:]).replace("___", ".")


def name_of(model: Path) -> str:
    """The name of a model's folder or GGUF file, as it was before it lay in a hub's cache."""
    model = model.absolute()
    if model.suffix.lower() == ".gguf":
        return re.sub(r"-\d{5}-of-\d{5}$", "", model.stem)
    return hub_id_of(model.as_posix()).rpartition("/")[2]
