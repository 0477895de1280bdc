"""Mamba's selective scan (arXiv 2312.00752) from the state of the text so far.

transformers' begins at nothing, so that a prompt that is read in chunks would forget the chunks
before. What it lacks can be added, as the scan is linear in the state.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F

_NAME = "mamba_selective_scan"


class HasState(Protocol):
    """A cache that was asked for the recurrent state of the layer that is computed."""

    recurrent: torch.Tensor | None


_computing: ContextVar[HasState | None] = ContextVar("computing", default=None)


@contextmanager
def going_on(cache: HasState) -> Iterator[None]:
    """Let scans begin at the state that the cache was asked for."""
    before = _computing.set(cache)
    try:
        yield
    finally:
        _computing.reset(before)


def carry_states(module: Any) -> None:
    """Let the scan of a module's own code, if it has one, begin where the text is."""
    home = sys.modules[type(module).__module__]
    own = getattr(home, _NAME, None)
    if own is not None and not isinstance(own, _Scan):
        setattr(home, _NAME, _Scan(own))


class _Scan:
    """Stands in for transformers' scan, and adds what became of the state before."""

    def __init__(self, own: Callable[..., Any]):
        self.own = own

    def __call__(
        self, x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, *args: Any, **how: Any
    ) -> Any:
        """By transformers' interface: x and dt [texts, channels, tokens], a [channels, size]."""
        cache = _computing.get()
        state = None if cache is None else cache.recurrent
        found = self.own(x, dt, a, *args, **how)
        if state is None or not how.get("return_last_state"):
            return found
        said, last = found
        _, c = args
        carried = _decays(dt, a, how) * state[:, :, None].float()
        more = torch.einsum("bdtn,bnt->bdt", carried, c.float()) * F.silu(how["z"].float())
        return said + more.to(said.dtype), last + carried[:, :, -1].to(last.dtype)


def _decays(dt: torch.Tensor, a: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    """What is left of the state before after each token, [texts, channels, tokens, size]."""
    steps = dt.float()
    if how.get("delta_bias") is not None:
        steps = steps + how["delta_bias"].float()[..., None]
    if how.get("delta_softplus"):
        steps = F.softplus(steps)
    return torch.exp(a.float()[None, :, None] * steps.cumsum(-1)[..., None])
