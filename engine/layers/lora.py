"""LoRA adapters (arXiv 2106.09685) beside a model's weights: each token is computed with its own.

To a linear layer's product an adapter adds x Aᵀ Bᵀ. On a CPU our kernels compute it, for each token
in the same order whatever else is in the step; elsewhere torch does, for all tokens of an adapter
together, or in a CUDA graph our kernel for experts, as each token chooses its matrices.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from engine.attention.forward_batch import ForwardBatch
from engine.kernels.cpu import Update as KernelUpdate
from engine.kernels.cpu import Updates as KernelUpdates
from engine.kernels.cpu import kernels


class Update(NamedTuple):
    """What an adapter adds to a linear layer."""

    down: torch.Tensor  # A, [rank, in]
    up: torch.Tensor  # B times the adapter's scale, [out, rank]


class Part(NamedTuple):
    """An update of some columns of a product, from `first` on."""

    first: int
    update: Update


class Current:
    """The step that a model computes now, whose tokens' adapters its products ask for."""

    step: ForwardBatch | None = None

    @contextmanager
    def computing(self, step: ForwardBatch) -> Iterator[None]:
        self.step = step
        try:
            yield
        finally:
            self.step = None


def _own(matrix: torch.Tensor) -> torch.Tensor:
    """A copy in float32, whose rows lie one behind the other."""
    return torch.empty(matrix.shape, dtype=torch.float32).copy_(matrix)


class Table:
    """A product's updates as the kernels read them; keeps alive what it points to.

    `parts` are those of each adapter, by its number from 1 to `count`.
    """

    def __init__(self, in_features: int, parts: dict[int, list[Part]], count: int):
        each = [parts.get(number, []) for number in range(count + 1)]
        numbers = [0]
        for mine in each:
            numbers.append(numbers[-1] + len(mine))
        self.begins = (ctypes.c_int64 * len(numbers))(*numbers)
        flat = [part for mine in each for part in mine]
        # Copies: what a file maps would change, or end the server, when a training writes it anew.
        self.tensors = [(_own(update.down), _own(update.up.T)) for _, update in flat]
        self.parts = (KernelUpdate * len(flat))(
            *(
                KernelUpdate(down.data_ptr(), up.data_ptr(), len(down), part.first, up.shape[1])
                for part, (down, up) in zip(flat, self.tensors, strict=True)
            )
        )
        self.ranks = max(sum(len(part.update.down) for part in mine) for mine in each)
        pointers = ctypes.addressof(self.parts), ctypes.addressof(self.begins)
        self.described = KernelUpdates(*pointers, in_features, self.ranks)
        self.address = ctypes.addressof(self.described)

    def add(self, step: ForwardBatch, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the tokens' updates for x [tokens, in] to out [tokens, columns], both float32."""
        said = torch.empty(len(x), self.ranks)
        pointers = x.data_ptr(), out.data_ptr(), out.shape[1], said.data_ptr()
        assert step.adapters is not None
        adapters = step.adapters.data_ptr()
        kernels().adapt(self.address, adapters, len(x), *pointers, torch.get_num_threads())


class _Stacks:
    """A product's updates as one matrix each of an adapter, zeros where it has none."""

    def __init__(self, product: Any, parts: dict[int, list[Part]], count: int, like: torch.Tensor):
        rank = max(sum(len(part.update.down) for part in mine) for mine in parts.values())
        self.down = like.new_zeros(count + 1, rank, product.in_features)
        self.up = like.new_zeros(count + 1, product.out_features, rank)
        for number, mine in parts.items():
            row = 0
            for first, (down, up) in mine:
                end = row + len(down)
                self.down[number, row:end] = down
                self.up[number, first : first + len(up), row:end] = up
                row = end

    def add(self, step: ForwardBatch, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the tokens' updates for x [tokens, in] to out [tokens, columns]."""
        here = step.on(x.device)
        assert here.adapters is not None
        if not here.tokens_of:  # in a graph, whose tokens change their adapters
            from engine.kernels.cuda import expert_product

            chosen = here.adapters[:, None]
            said = expert_product(x, self.down, None, chosen)[:, 0]
            out += expert_product(said, self.up, None, chosen)[:, 0]
            return
        for number, tokens in here.tokens_of.items():
            added = x[tokens] @ self.down[number].T @ self.up[number].T
            out.index_add_(0, tokens, added)


class Adapted(torch.nn.Module):
    """A product of a model's, and what each token's adapter adds to it."""

    updates: Table | _Stacks

    def __init__(self, product: Any, current: Current):
        super().__init__()
        self.product = product
        self.in_features, self.out_features = product.in_features, product.out_features
        self.current = current
        self.parts: dict[int, list[Part]] = {}  # of each adapter

    def seal(self, count: int, like: torch.Tensor | None) -> None:
        """Lay out the updates of all `count` adapters: for our kernels, or like a tensor."""
        if like is None:
            self.updates = Table(self.in_features, self.parts, count)
        else:
            self.updates = _Stacks(self.product, self.parts, count, like)
        self.parts = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out], whose rows are the current step's tokens."""
        out: torch.Tensor = self.product.forward(x)
        step = self.current.step
        if step is None or step.adapters is None:
            return out
        if x.numel() != len(step.ids) * self.in_features:
            raise RuntimeError("an adapter's layer is not computed once for each token")
        if isinstance(self.updates, Table):
            x = x.float()
        rows = x.reshape(-1, self.in_features).contiguous()
        self.updates.add(step, rows, out.view(-1, self.out_features))
        return out
