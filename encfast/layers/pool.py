"""One row per sequence: mean, first or last."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from encfast import ops
from encfast.packed import PackedBatch


def pool(batch: PackedBatch, how: Literal["mean", "first", "last"]) -> Tensor:
    """``[B, C]`` from rows ``[N, C]``: the mean over a sequence, its first or its last row.

    A zero-length sequence yields a row of zeros. The mean adds up in fp32.

    Raises:
        ValueError: for another ``how``.
    """
    data, cu_seqlens = batch.data, batch.cu_seqlens
    if how == "mean":
        sums = torch.zeros(
            batch.batch_size, *data.shape[1:], dtype=torch.float32, device=data.device
        ).index_add(0, batch.segment_ids(), data.float())
        count = batch.lengths().clamp(min=1).view(-1, *[1] * (data.dim() - 1))
        return (sums / count).to(data.dtype)
    if how not in ("first", "last"):
        raise ValueError(f"how must be 'mean', 'first' or 'last', got {how!r}")
    row = cu_seqlens[:-1] if how == "first" else cu_seqlens[1:] - 1
    # -1 is the zero row of gather_rows: an empty sequence has no first or last row.
    return ops.gather_rows(data, torch.where(batch.lengths() > 0, row, -1).long())
