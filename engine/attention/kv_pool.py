"""The KV cache's memory: each layer's rows of keys and values."""

import numpy as np
import torch

from engine.attention.groups import Scoring

# In place of an infinity in the cache; any dtype holds it.
_MAX_FINITE = 60_000.0


class LayerKVCache:
    """One layer's keys and values, [rows, heads, width] each, created where the layer lives."""

    keys: torch.Tensor
    values: torch.Tensor
    scoring = Scoring()  # as the layer's attention last asked for it

    def __init__(self, rows: int):
        self.rows = rows + 1  # the last one is for padding

    def write(
        self, where: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows [tokens, heads, width], and return all keys and values.

        Without values, which MLA's latents hold already, the keys are returned for both.
        """
        self.prepare(key, value)
        self._write(self.keys, where, key)
        if value is not None:
            self._write(self.values, where, value)
        return self.keys, self.values

    def prepare(self, key: torch.Tensor, value: torch.Tensor | None) -> None:
        """Create the rows, if they are not yet, for keys and values like these."""
        if not hasattr(self, "keys"):
            self.keys = self._create(key)
            self.values = self.keys if value is None else self._create(value)

    @property
    def row_bytes(self) -> int:
        shared = self.values is self.keys
        return self.keys[0].nbytes + (0 if shared else self.values[0].nbytes)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` rows."""
        for x in {id(x): x for x in (self.keys, self.values)}.values():
            x[target : target + count] = x[source : source + count]

    def _write(self, rows: torch.Tensor, where: torch.Tensor, new: torch.Tensor) -> None:
        if rows.device.type == "cpu":
            # A masked row must be finite, or its weight of zero times it is not a number. What is
            # not finite here is also in the token's own logits, which end its answer.
            new = new.nan_to_num(0.0, _MAX_FINITE, -_MAX_FINITE)
        rows.index_copy_(0, where, new)

    def _create(self, like: torch.Tensor) -> torch.Tensor:
        _, heads, width = like.shape
        if like.device.type == "cpu":
            # A head's rows side by side, as sdpa reads them there. They are zeros, as masked rows
            # must be finite, by calloc: until a page is written it costs no memory.
            size = heads * self.rows * width * like.itemsize
            zeros = torch.from_numpy(np.zeros(size, np.uint8)).view(like.dtype)
            return zeros.view(heads, self.rows, width).transpose(0, 1)
        # Zeros here too, as a view of several spans reads rows before they are written.
        return like.new_zeros((self.rows, heads, width))


class KVCache:
    """The KV cache of every sequence; each layer's rows are created on first use."""

    def __init__(self, layers: list[int], rows: int):
        self.rows = rows
        self.by_index = {n: LayerKVCache(rows) for n in layers}
        self.layers = [*self.by_index.values()]

    def layer(self, layer_idx: int) -> LayerKVCache:
        return self.by_index[layer_idx]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy `count` rows of every layer."""
        for layer in self.layers:
            layer.copy(source, target, count)
