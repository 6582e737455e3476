"""Learned biases of relative positions in logarithmic buckets: T5 and MPNet."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops


def relative_bucket(offset: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of key position - query position: Raffel et al. 2020, arXiv 1910.10683, 2.1.

    Half of the buckets are for keys behind the query. Of each half, the first half holds one
    distance each, the others grow logarithmically up to ``max_distance``; the last holds the rest.

    Args:
        offset: int64, any shape.

    Returns:
        int64 in [0, num_buckets), the shape of ``offset``.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(offset > 0, half, 0) + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A bias per head and bucket of relative positions, as the op's ``rel_bias``.

    T5 and MPNet share one among all blocks. Their checkpoints hold the transpose of ``weight``.

    Args:
        num_heads: H.
        num_buckets: an even number >= 4, half of them for keys behind the query.
        max_distance: from here on, in both directions, all keys share a bucket.

    Raises:
        ValueError: for an odd or too small ``num_buckets``, or a ``max_distance`` they do not
            reach.
    """

    buckets: Tensor

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if num_buckets < 4 or num_buckets % 2:
            raise ValueError(f"num_buckets must be even and >= 4, got {num_buckets}")
        if max_distance <= num_buckets // 4:
            raise ValueError(f"max_distance must be > num_buckets / 4, got {max_distance}")
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.weight = nn.Parameter(torch.empty(num_heads, num_buckets, **factory))
        buckets = torch.empty(2 * max_distance + 1, dtype=torch.int64, device=device)
        self.register_buffer("buckets", buckets, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights from N(0, 0.02) and refills the buckets of the offsets."""
        nn.init.normal_(self.weight, std=0.02)
        if self.buckets.is_meta:
            return
        far = self.max_distance
        offset = torch.arange(-far, far + 1, device=self.buckets.device)
        with torch.no_grad():
            self.buckets.copy_(relative_bucket(offset, self.num_buckets, far))

    def forward(self) -> Tensor:
        """``[H, R]``, R = 2 * max_distance + 1: ``rel_bias`` of the attention op."""
        # A gather of rows, so that the gradient of a bucket is a sum in a fixed order.
        return ops.select_rows(self.weight.T, self.buckets).T

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        heads = self.weight.shape[0]
        return f"{heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}"
