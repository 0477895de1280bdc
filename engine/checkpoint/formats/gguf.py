"""A model in one GGUF file: configuration, weights and tokenizer, from the file alone."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.formats.gguf_blocks import GROUP, NO_OFFSET, affine, weights_of
from engine.checkpoint.formats.gguf_config import Metadata, read_config
from engine.checkpoint.formats.gguf_names import ARCHITECTURES
from engine.checkpoint.formats.gguf_reader import Tensor, read_gguf
from engine.checkpoint.formats.gguf_tokenizer import read_tokenizer
from engine.checkpoint.formats.packing import Packed, computed
from engine.checkpoint.stored import Stored
from engine.errors import StartError
from engine.layers.block_packing import pairs_of

# By what each frequency of the rotary embedding is divided, as Llama 3.1's are.
_FREQUENCIES = "rope_freqs.weight"


class GGUFFile:
    """An opened file, mapped into memory.

    Raises StartError for a kind of model that is not known.
    """

    def __init__(self, path: Path):
        self.path = path
        fields, self.tensors = read_gguf(path)
        self.said = Metadata(fields, path)
        if self.said.name not in ARCHITECTURES:
            raise StartError(
                f"{path} is a GGUF file of the kind {self.said.name}, of which only"
                f" {', '.join(sorted(ARCHITECTURES))} are known; fetch the model in safetensors"
            )
        self.kind = ARCHITECTURES[self.said.name]
        if lost := sorted({"token_embd.weight", "output_norm.weight"} - self.tensors.keys()):
            raise StartError(f"{path} has no {lost[0]}; run the download again")

    def config(self) -> Any:
        """As transformers' own configuration."""
        return read_config(self.said, self.kind, self.tensors)

    def tokenizer(self) -> Any:
        """The tokenizer that the file describes, with its chat template."""
        return read_tokenizer(self.said.fields, self.path)

    def dtype(self) -> torch.dtype:
        """The type of most of its matrices; of few bits, what they were most likely made from."""
        kinds = Counter(tensor.kind for tensor in self.tensors.values() if len(tensor.shape) > 1)
        dtypes = {"F32": torch.float32, "F16": torch.float16}
        return dtypes.get(kinds.most_common(1)[0][0], torch.bfloat16)

    def frequency_factors(self) -> torch.Tensor | None:
        """By what each frequency is divided; None if by nothing."""
        factors = self.tensors.get(_FREQUENCIES)
        return None if factors is None else weights_of(factors)

    def weights(self) -> dict[str, Stored]:
        """The weights by their names in transformers' checkpoints, float32, unpacked when asked
        for."""
        found: dict[str, Stored] = {}
        for name, tensor in self.tensors.items():
            if expert := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", name):
                place = f"model.layers.{expert[1]}.mlp.experts"
                for number in range(tensor.shape[0]):
                    named = f"{place}.{number}.{expert[2]}_proj.weight"
                    found[named] = self._stored(tensor, number)
            elif layer := re.fullmatch(r"blk\.(\d+)\.attn_k_b\.weight", name):
                place = f"model.layers.{layer[1]}.self_attn.kv_b_proj.weight"
                found[place] = self._up_projection(name, name.replace("_k_b", "_v_b"))
            elif name != _FREQUENCIES and not name.endswith(".attn_v_b.weight"):
                found[self.renamed(name)] = self._stored(tensor)
        return found

    def packed(self) -> dict[str, Packed]:
        """The matrices that can stay in the file's own bits, by module, and their parts."""
        return {
            self.renamed(tensor.name).removesuffix(".weight"): self._packed(tensor)
            for tensor in self.tensors.values()
            if tensor.kind in GROUP and len(tensor.shape) == 2 and "_b." not in tensor.name
        }

    def _packed(self, tensor: Tensor) -> Packed:
        rows, columns = tensor.shape
        size, bits = GROUP[tensor.kind]
        # Of one level, scales and offsets are fp16 in the file; of two, products of such.
        factors = torch.float32 if tensor.kind.endswith("_K") else torch.float16
        shapes: dict[str, tuple[Any, torch.dtype]] = {
            "weight": ((rows, columns // 2), torch.uint8)
            if bits == 4
            else ((rows, columns), torch.int8),
            "weight_scale": ((rows, columns // size), factors),
        }
        if tensor.kind not in NO_OFFSET:
            shapes["weight_offset"] = ((rows, columns // size), factors)
        order = self.row_order(tensor.name)

        def compute() -> dict[str, torch.Tensor]:
            values, scale, offset = affine(tensor)
            if bits == 4:
                values = pairs_of(values)
            parts = {"weight": values, "weight_scale": scale, "weight_offset": offset}
            return {name: order(part) for name, part in parts.items() if part is not None}

        return computed(shapes, compute)

    def renamed(self, name: str) -> str:
        """A tensor's name in transformers' checkpoints. Raises StartError if it has none."""
        if ours := self.kind.renamed(name):
            return ours
        raise StartError(f"{self.path} has a tensor {name}, which is not understood")

    def _stored(self, tensor: Tensor, number: int | None = None) -> Stored:
        """A tensor, or one matrix of a stack."""
        shape = tensor.shape if number is None else tensor.shape[1:]
        if tensor.name.endswith("ffn_gate_inp_shexp.weight"):  # kept as one row's numbers
            shape = (1, shape[-1])
        order = self.row_order(tensor.name)
        return Stored(
            shape, torch.float32, lambda: order(weights_of(tensor, number)).reshape(shape)
        )

    def row_order(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """What puts a tensor's rows into transformers' order."""
        match = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
        if not (match and self.kind.interleaved):
            return lambda weight: weight
        count = self.said.get("attention.head_count")
        heads = int(count if match[1] == "q" else self.said.get("attention.head_count_kv", count))
        return lambda x: x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()

    def _up_projection(self, keys: str, values: str) -> Stored:
        """MLA's, of which files since April 2025 have two: [heads, latent, nope], [heads, v,
        latent]."""
        key, value = self.tensors[keys], self.tensors[values]
        heads, latent, nope = key.shape

        def read() -> torch.Tensor:
            return torch.cat([weights_of(key).transpose(1, 2), weights_of(value)], 1).flatten(0, 1)

        return Stored((heads * (nope + value.shape[1]), latent), torch.float32, read)
