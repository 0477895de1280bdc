"""How a checkpoint says that it is quantised, and whether weights of that kind can be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.blame import REMEDY, read_object
from engine.errors import StartError

_KNOWN = ("awq", "gptq", "compressed-tensors", "fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes")
# What the tools for GPTQ and AWQ wrote beside config.json before they wrote into it.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def settings_of(config: Any, folder: Path) -> dict[str, Any] | None:
    """How a checkpoint says that it is quantised, with its `quant_method`; None if it says nothing.

    Raises StartError where what it says is no object.
    """
    for name in ("quantization_config", "compression_config"):
        if settings := getattr(config, name, None):
            return _with_method(settings, name)
    for file, method in _OWN_FILES.items():
        if (folder / file).is_file():
            return {"quant_method": method, **read_object(folder / file)}
    return None


def _with_method(settings: Any, name: str) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise StartError(f"config.json says {name} {settings!r}, which is no object; {REMEDY}")
    settings = dict(settings)
    if any(settings.get(bits) for bits in ("load_in_4bit", "load_in_8bit")):
        return settings | {"quant_method": "bitsandbytes"}
    stated = settings.get("quant_method")
    if stated in (None, "compressed_tensors") and (name == "compression_config" or stated):
        return settings | {"quant_method": "compressed-tensors"}
    return settings | {"quant_method": str(stated or "a method that config.json does not name")}


def why_unreadable(settings: dict[str, Any]) -> str | None:
    """What kind of weights these are that cannot be read, by its name; None if they can be."""
    method = str(settings["quant_method"])
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "")
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        return f"AWQ of the version {settings['version']}"
    if method == "gptq" and layout not in ("", "gptq", "gptq_v2"):
        return f"GPTQ in the layout {layout}"
    if method == "compressed-tensors":
        if settings.get("transform_config"):
            return "compressed-tensors with transforms"
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense" or "24" in layout or "sparse" in layout:
            return f"compressed-tensors in the layout {layout or sparsity}"
    if method in _KNOWN:
        return None
    return method.upper() if len(method) <= 4 else method
