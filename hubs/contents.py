"""Which files of a repository serving reads: a whole model's, an adapter's, or one GGUF file."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hubs.errors import DownloadError

_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
_LICENCE = r"LICENSE[^/]*"
# Quantisers' settings, which their older releases put beside config.json.
_SETTINGS = r"(config|generation_config|quantize_config|quant_config|hf_quant_config)\.json"
_MODEL = rf"{_SETTINGS}|{_TOKENIZER}|{_LICENCE}"
_ADAPTER = rf"adapter_config\.json|{_TOKENIZER}|{_LICENCE}"

# The first that a repository has is the one to take; an index names the files of the weights.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEX = ".index.json"

# A path that is the same file on every system and lies below its folder. Of the rest of what a hub
# may list, \ and : lead elsewhere on Windows, where some names are devices.
_PART = (
    r"(?!\.|(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$|/))"
    r"[^/\\:*?\"<>|\x00-\x1f\x7f]{1,200}(?<![. ])"
)
_PLAIN = re.compile(rf"{_PART}(/{_PART}){{0,3}}")


def is_plain(name: str) -> bool:
    """Whether a file that a repository lists may be written under its name."""
    return bool(_PLAIN.fullmatch(name))


def wanted(sizes: Mapping[str, int], quant: str = "") -> list[str]:
    """Those of a repository's files that serving needs, but for the shards that an index names.

    `quant` names one GGUF file, which may have several parts. Raises DownloadError where there is
    nothing, or not one, to take.
    """
    if quant:
        return [*gguf_files(sizes, quant), *_matching(_LICENCE, sizes)]
    for weights in _WEIGHTS:
        if weights in sizes:
            return [*_matching(_MODEL, sizes), weights]
    for weights in _ADAPTER_WEIGHTS:
        if weights in sizes and "adapter_config.json" in sizes:
            return [*_matching(_ADAPTER, sizes), weights]
    if any(name.lower().endswith(".gguf") for name in sizes):
        return [*gguf_files(sizes, ""), *_matching(_LICENCE, sizes)]
    large = sorted(sizes, key=lambda name: -sizes[name])[:1]
    raise DownloadError(
        "the repository has no weights in a format that the server reads; its largest file is"
        f" {''.join(large) or 'none'}"
    )


def shards(index: Any, name: str) -> list[str]:
    """The files that an index names, in order. Raises DownloadError if it is none."""
    try:
        return sorted(set(map(str, index["weight_map"].values())))
    except (AttributeError, LookupError, TypeError) as error:
        raise DownloadError(f"{name} names no weights; the repository is damaged") from error


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(pattern, name))


# ---- GGUF -------------------------------------------------------------------

# Of a model in several files, the number of one and how many there are.
_PARTS = r"(-\d{5}-of-\d{5})?\.gguf$"
_QUANT = r"(?:^|[-._])((?:UD-)?(?:I?Q\d|TQ\d|B?FP?\d|MXFP\d|NVFP\d)\w*)$"


def quant_of(name: str) -> str:
    """How a GGUF file's name says that it is quantised, as Q4_K_M; else the name."""
    stem = re.sub(_PARTS, "", name.rpartition("/")[2], flags=re.IGNORECASE)
    found = re.search(_QUANT, stem, re.IGNORECASE)
    return re.sub(r"^FP", "F", found[1].upper()) if found else stem


def gguf_files(sizes: Mapping[str, int], quant: str) -> list[str]:
    """The parts of the GGUF file that is named, or of the only one. Raises DownloadError."""
    models: dict[str, list[str]] = {}
    for name in sorted(sizes):
        # Of the others, one is for pictures, and one was made on the way.
        if name.lower().endswith(".gguf") and not re.search("mmproj|imatrix", name, re.IGNORECASE):
            models.setdefault(re.sub(_PARTS, "", name, flags=re.IGNORECASE), []).append(name)
    found = [parts for parts in models.values() if not quant or _is_meant(parts[0], quant)]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(
        f"{quant_of(parts[0])} ({sum(sizes[part] for part in parts) / 1e9:.2g} GB)"
        for parts in models.values()
    )
    have = f"it has {listing or 'none'}"
    if not quant:
        raise DownloadError(
            f"name one of the repository's GGUF files, as in ORG/NAME:QUANT; {have}"
        )
    several = "more than one" if found else "no"
    raise DownloadError(f"the repository has {several} GGUF file {quant!r}; {have}")


def _is_meant(name: str, quant: str) -> bool:
    """Whether a file is what was asked for, by its quantisation or by its name."""
    asked, own = re.sub(r"^FP", "F", quant.upper()), quant_of(name).upper()
    return asked in (own, own.removeprefix("UD-"), name.upper(), name.rpartition("/")[2].upper())
