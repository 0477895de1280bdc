"""Updates of a mixture's stacked experts (peft's target_parameters), on a checkpoint's own experts.

transformers 5 stacks all experts into gate_up_proj [experts, 2 width, hidden] and down_proj
[experts, hidden, width]; checkpoints have a matrix of each expert. peft keeps one A of all experts'
rows, [experts rank, in], and one B, [out, rank experts] (peft/tuners/lora/layer.py, ParamWrapper).
"""

import re

import torch

from engine.checkpoint.adapters import Adapter, Parts, refused
from engine.checkpoint.stored import Stored

# What each stacked parameter is made of, as checkpoints call it, one below the other.
_STACKED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def merge_stack(
    weights: dict[str, Stored], adapter: Adapter, module: str, wrapped: dict[int, Parts]
) -> None:
    """Add the updates of a module of experts to each expert's own matrices.

    Raises StartError if they do not fit.
    """
    for parameter, parts in _by_parameter(adapter, module, wrapped).items():
        if parts.keys() != {"lora_A", "lora_B"}:
            raise refused(adapter.folder, f"{module}.{parameter} has {', '.join(sorted(parts))}")
        experts = _expert_matrices(weights, module, parameter)
        if not experts:
            raise refused(
                adapter.folder,
                f"it changes {parameter} of {module}, whose experts are not to be found; merge it"
                " with peft's merge_and_unload()",
            )
        _merge_parameter(weights, adapter, f"{module}.{parameter}", parts, experts)


def _by_parameter(adapter: Adapter, module: str, wrapped: dict[int, Parts]) -> dict[str, Parts]:
    """The updates by the parameter that each changes: peft wraps them in the model's order, so
    that the last of them is outermost."""
    targets = adapter.settings.get("target_parameters") or []
    ends = [str(target).rpartition(".")[2] for target in targets]
    names = [name for name in _STACKED if name in ends]
    if len(names) != len(wrapped) or sorted(wrapped) != list(range(len(names))):
        raise refused(
            adapter.folder,
            f"it changes parameters of {module}, and target_parameters does not say which; merge"
            " it with peft's merge_and_unload()",
        )
    return {name: wrapped[len(names) - 1 - place] for place, name in enumerate(names)}


def _expert_matrices(
    weights: dict[str, Stored], module: str, parameter: str
) -> list[tuple[str, ...]]:
    """The names of each expert's matrices of a stacked parameter, one below the other."""
    layer = re.match(r"(.*\blayers\.\d+\.)", module)
    start = re.escape(layer[1] if layer else module)
    for names in _STACKED[parameter]:
        found: dict[int, dict[str, str]] = {}
        pattern = re.compile(rf"{start}(?:.+\.)?experts\.(\d+)\.({'|'.join(names)})\.weight")
        for name in weights:
            if match := pattern.fullmatch(name):
                found.setdefault(int(match[1]), {})[match[2]] = name
        if found and all(found.get(n, {}).keys() == {*names} for n in range(len(found))):
            return [tuple(found[n][part] for part in names) for n in range(len(found))]
    return []


def _merge_parameter(
    weights: dict[str, Stored],
    adapter: Adapter,
    parameter: str,
    parts: Parts,
    experts: list[tuple[str, ...]],
) -> None:
    """Add s B[e] A[e] to expert e's matrices, which stand one below the other in the stack."""
    a, b = parts["lora_A"], parts["lora_B"]
    rank = adapter.rank_of(parameter)
    if a.shape[0] != rank * len(experts) or b.shape[1] != rank * len(experts):
        stated = f"rank {rank} of {len(experts)} experts"
        raise refused(adapter.folder, f"{parameter} has {a.shape[0]} rows, and not {stated}")
    scale = adapter.scale_of(parameter, rank)
    first = [weights[name].shape for name in experts[0]]
    whole = (sum(shape[0] for shape in first), first[0][1])
    turned = _is_turned(adapter, parameter, (b.shape[0], a.shape[1]), whole)
    for number, names in enumerate(experts):
        row = 0
        for name in names:
            own = weights[name]
            rows = slice(row, row + own.shape[0])
            weights[name] = _updated(own, parts, (number, len(experts)), rows, turned, scale)
            row += own.shape[0]


def _is_turned(
    adapter: Adapter, parameter: str, update: tuple[int, int], whole: tuple[int, int]
) -> bool:
    """Whether B A is the update [in, out] of a stack [out, in]: peft's first releases took it so.

    Raises StartError where the shapes do not fit, or tell nothing.
    """
    if update not in (whole, whole[::-1]):
        shapes = f"{list(update)}, and the model's is {list(whole)}"
        raise refused(adapter.folder, f"its {parameter} is {shapes}; is it another model's?")
    if whole[0] != whole[1]:
        return update != whole
    version = str(adapter.settings.get("peft_version") or "0").split(".")
    if tuple(int(re.match(r"\d*", part)[0] or 0) for part in version[:2]) < (0, 19):  # type: ignore[index]
        raise refused(
            adapter.folder,
            f"{parameter} is square, and it is not said by which release of peft it was saved;"
            " merge it with peft's merge_and_unload()",
        )
    return False


def _updated(
    own: Stored, parts: Parts, expert: tuple[int, int], rows: slice, turned: bool, scale: float
) -> Stored:
    """Some rows of an expert's matrix, with the same rows of its update."""
    number, count = expert

    def read() -> torch.Tensor:
        a = parts["lora_A"][...].float().unflatten(0, (count, -1))[number]
        b = parts["lora_B"][...].float().unflatten(1, (-1, count))[..., number]
        left, right = (a.T, b.T) if turned else (b, a)
        return own[...].float().addmm(left[rows], right, alpha=scale)

    return Stored(own.shape, torch.float32, read)
