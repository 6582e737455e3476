"""One row per sequence of a batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from encfast import ops
from encfast.packed import PackedBatch

How = Literal["mean", "sum", "max", "first", "last", "attention"]


def pool(
    batch: PackedBatch, how: How, *, weights: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """``[B, C]`` from rows ``[N, C]``: :func:`encfast.ops.seg_pool` of the batch's sequences.

    A zero-length sequence yields a row of zeros. Sums add up in fp32.

    Args:
        batch: rows ``[N, C]``, or ``[N, ...]`` for ``[B, ...]``.
        how: mean, sum, largest value, first or last row, or attention by ``weights``.
        weights: ``[N]``, see there.
        normalize: to length 1.

    Returns:
        ``[B, C]`` in the dtype of the rows.

    Raises:
        ValueError: for another ``how``, or weights that do not fit it.

    Examples:
        >>> from encfast.layers import pool
        >>> texts = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(0, 2)]
        >>> batch = PackedBatch.from_list(texts)
        >>> pool(batch, "mean")
        tensor([[2., 3.],
                [0., 0.]])
    """
    data = batch.data
    pooled = ops.seg_pool(
        data.flatten(1), batch.cu_seqlens, how, weights=weights, normalize=normalize
    )
    return pooled.view(-1, *data.shape[1:])
