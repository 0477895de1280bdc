"""Gives the system back what was freed.

glibc's malloc keeps it for what comes next. While a model's layers change their form one by one,
little of it is used again: it lies in pieces between layers that stay, and adds up to the model.
"""

import ctypes
from collections.abc import Callable
from typing import Any


def _find_trim() -> Callable[[int], Any] | None:
    """glibc's malloc_trim(3); None where the C library is another one."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS lack it; Windows takes no None
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim


trim = _find_trim()


def return_freed_memory() -> None:
    """Give back every whole page that is free, if the C library can."""
    if trim:
        trim(0)
