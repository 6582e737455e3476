"""The precision that losses compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
