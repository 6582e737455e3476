"""Float attributes that ``torch.compile`` reads as constants, and dropouts that have one.

A float attribute of a module is a symbol under ``torch.compile(dynamic=True)``. That costs a second
pass of the compiler, and PyTorch (2.10 to 2.14) fails with "lift_tracked_freevar_to_input" when one
module is checkpointed twice, as in a stack that shares its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast.packed import PackedBatch


class StaticFloat:
    """A float attribute, or None, kept as text, which compiled code takes for a constant."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        text = getattr(obj, self._name)
        return None if text is None else float(text)

    def __set__(self, obj: Any, value: float | None) -> None:
        setattr(obj, self._name, None if value is None else repr(float(value)))


class Dropout(nn.Dropout):
    """``nn.Dropout`` in a module that may be used more than once."""

    p = StaticFloat()  # type: ignore[assignment]


class DropPath(nn.Module):
    """Drops a residual branch of whole sequences while training (stochastic depth).

    A kept branch is scaled by 1 / (1 - p), so that its mean stays. Source: Huang et al. 2016, arXiv
    1603.09382, per sample as in timm.

    Args:
        p: probability in [0, 1) that a sequence's branch is dropped.
    """

    p = StaticFloat()

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """``[N, C]``, or ``[M, C]`` of the ``rows`` ``[M]`` of ``batch``, in the same shape."""
        if not self.training or self.p == 0.0:
            return branch
        count = batch.batch_size
        kept = torch.rand(count, device=branch.device) >= self.p
        factor = (kept / (1.0 - self.p)).to(branch.dtype)  # [B]
        # Row -1, a row of zeros, may take anyone's factor.
        owner = batch.segment_ids() if rows is None else batch.owners(rows).clamp(max=count - 1)
        return branch * factor[owner].unsqueeze(-1)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"p={self.p}"
