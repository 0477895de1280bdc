"""Merges a LoRA adapter into a checkpoint's own tensors, before they are renamed, split or packed.

An adapter speaks of the modules of the code that it was trained with, and a checkpoint's tensors
have the same names. Each changed matrix is computed in float32 when it is asked for.
"""

from typing import Any

import torch

from engine.checkpoint.adapter_experts import merge_stack
from engine.checkpoint.adapters import Adapter, Parts, pattern_value, refused
from engine.checkpoint.stored import Stored, Weights
from engine.errors import StartError

# Models whose linear layers keep their weights as [in, out].
_TRANSPOSED = ("gpt2", "gpt-sw3", "openai-gpt")
_INPUTS = ("embed_tokens", "tok_embeddings", "wte", "embed_in", "word_embeddings")
_OUTPUTS = ("lm_head", "output", "embed_out")


def merge_adapter(weights: Weights, adapter: Adapter, config: Any) -> dict[str, Stored]:
    """A checkpoint's weights with an adapter in them; `config` is changed where sizes do.

    Raises StartError before anything is read if the two do not fit.
    """
    merged = dict(weights)
    _untie(merged, adapter, config)
    for name, tensor in adapter.whole.items():
        _replace_whole(merged, adapter, name, tensor, config)
    for module, parts in adapter.pairs.items():
        _merge_pair(merged, adapter, module, parts, config)
    for module, wrapped in adapter.stacks.items():
        merge_stack(merged, adapter, module, wrapped)
    for module, rows in adapter.tokens.items():
        _merge_tokens(merged, adapter, module, rows)
    return merged


def _leaf(name: str) -> str:
    """The last part of a module's name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _untie(weights: dict[str, Stored], adapter: Adapter, config: Any) -> None:
    """Give a tied model an output head of its own where an adapter changes one of the two alone."""
    if not getattr(config, "tie_word_embeddings", False):
        return
    changed = {_leaf(name) for name in (*adapter.whole, *adapter.pairs)}
    if not changed & {*_INPUTS, *_OUTPUTS}:
        return
    inputs = [name for name in weights if name.endswith(".weight") and _leaf(name) in _INPUTS]
    if len(inputs) != 1:
        raise refused(adapter.folder, "the model's embedding is not to be found")
    if not any(_leaf(name) in _OUTPUTS for name in weights):
        heads = (name for name in (*adapter.whole, *adapter.pairs) if _leaf(name) in _OUTPUTS)
        head = next(heads, "lm_head").removesuffix(".weight")
        weights[f"{head}.weight"] = weights[inputs[0]]
    config.tie_word_embeddings = False


def _replace_whole(
    weights: dict[str, Stored], adapter: Adapter, name: str, tensor: Stored, config: Any
) -> None:
    """Put a tensor that was trained or saved whole in place of the model's."""
    own = weights.get(name)
    if own is None and not name.endswith(".bias"):
        raise _no_such(adapter, name)
    if own is not None and own.shape != tensor.shape:
        if _leaf(name) not in (*_INPUTS, *_OUTPUTS) or own.shape[1:] != tensor.shape[1:]:
            raise _unlike(adapter, name, tensor.shape, own.shape)
        config.get_text_config().vocab_size = tensor.shape[0]
    weights[name] = tensor


def _no_such(adapter: Adapter, name: str) -> StartError:
    return refused(adapter.folder, f"the model has no {name}; is it another model's adapter?")


def _unlike(adapter: Adapter, name: str, ours: Any, own: Any) -> StartError:
    shapes = f"{list(ours)}, and the model's is {list(own)}"
    return refused(adapter.folder, f"its {name} is {shapes}; is it another model's adapter?")


def _merge_pair(
    weights: dict[str, Stored], adapter: Adapter, module: str, parts: Parts, config: Any
) -> None:
    """W + s B A; with DoRA (arXiv 2402.09353) its rows are then as long as the magnitudes say."""
    name = f"{module}.weight"
    own = weights.get(name)
    if own is None:
        raise _no_such(adapter, name)
    embedding = "lora_embedding_A" in parts
    a, b = (parts[f"lora_{'embedding_' if embedding else ''}{x}"] for x in "AB")
    turned = embedding or adapter.settings.get("fan_in_fan_out") or config.model_type in _TRANSPOSED
    shape = (b.shape[0], a.shape[1])
    if tuple(own.shape) != (shape[::-1] if turned else shape):
        raise _unlike(adapter, module, shape[::-1] if turned else shape, own.shape)
    scale = adapter.scale_of(module, a.shape[0])
    magnitude = None if embedding else parts.get("lora_magnitude_vector")

    def read() -> torch.Tensor:
        weight = own[...].to(torch.float32, copy=True)
        rows = weight.T if turned else weight
        rows.addmm_(b[...].float(), a[...].float(), alpha=scale)
        if magnitude is not None:
            length = torch.linalg.norm(rows, dim=1)
            rows.mul_((magnitude[...].float().flatten() / length)[:, None])
        return weight

    weights[name] = Stored(own.shape, torch.float32, read)
    if bias := parts.get("lora_B.bias"):
        _merge_bias(weights, adapter, module, bias, scale)


def _merge_bias(
    weights: dict[str, Stored], adapter: Adapter, module: str, bias: Stored, scale: float
) -> None:
    """With lora_bias, an update has a bias of its own."""
    own = weights.get(f"{module}.bias")
    if own is None:
        raise refused(adapter.folder, f"it gives {module} a bias (lora_bias), which has none")
    weights[f"{module}.bias"] = Stored(
        own.shape, torch.float32, lambda: own[...].float() + scale * bias[...].float()
    )


def _merge_tokens(weights: dict[str, Stored], adapter: Adapter, module: str, rows: Stored) -> None:
    """Put some tokens' rows, which were trained alone, into an embedding."""
    indices = adapter.settings.get("trainable_token_indices") or []
    if isinstance(indices, dict):
        indices = pattern_value(indices, module) or []
    own = weights.get(f"{module}.weight")
    if own is None or len(indices) != rows.shape[0] or rows.shape[1:] != own.shape[1:]:
        raise refused(adapter.folder, f"its tokens of {module} are not the model's")
    if not all(0 <= index < own.shape[0] for index in indices):
        raise refused(adapter.folder, f"its tokens of {module} are not all in the vocabulary")
    at = torch.tensor(indices)
    weights[f"{module}.weight"] = Stored(
        own.shape, torch.float32, lambda: own[...].float().index_copy(0, at, rows[...].float())
    )
