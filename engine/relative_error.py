"""How far a result is from the right one."""

import torch


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, in float32, as a part of the wanted one's; NaN where one is.

    Of outputs in half precision some percent are rounding.
    """
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())
