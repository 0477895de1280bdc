"""How much memory of the cards this process holds."""

import sys


def device_memory() -> int | None:
    """Bytes that torch holds on all cards; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count())))
