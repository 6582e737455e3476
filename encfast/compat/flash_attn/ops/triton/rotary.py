"""apply_rotary: what the functions of `layers.rotary` are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from encfast import ops

from ..._arguments import require


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first R elements of each head by the angles of its position.

    Args:
        x: [B, S, H, D], or [N, H, D] with `cu_seqlens`.
        cos, sin: [S, R / 2], R <= D, not differentiable.
        seqlen_offsets: an int, or one per sequence [B]: the position of the first row.
        cu_seqlens: int32 [B + 1] of packed sequences.
        max_seqlen: accepted; positions come from cu_seqlens.
        interleaved: pairs are neighbours instead of halves.
        inplace: write the result into x, outside of autograd, and return x.
        conjugate: by minus the angle.

    Returns:
        Of x's shape; x itself with `inplace`.

    Raises:
        TypeError, ValueError: a malformed argument; a position outside of the tables.
    """
    op = "apply_rotary"
    packed = cu_seqlens is not None
    require(op, "x", x, 3 if packed else 4, "[N, H, D]" if packed else "[B, S, H, D]")
    positions = _positions(op, x, seqlen_offsets, cu_seqlens)
    rows = x if packed else x.flatten(0, 1)
    out = ops.rotary(rows, cos, sin, positions, interleaved=interleaved, conjugate=conjugate).view(
        x.shape
    )
    if not inplace:
        return out
    with torch.no_grad():
        return x.copy_(out)


def _positions(op: str, x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [N]: the row of the tables for each row of x."""
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(offsets, Tensor):
        require(op, "seqlen_offsets", offsets, 1, f"an int or [{batch}]")
        if offsets.shape[0] != batch:
            raise ValueError(
                f"{op}: seqlen_offsets has {offsets.shape[0]} entries, expected one for each of "
                f"{batch} sequences"
            )
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: seqlen_offsets is {offsets.dtype}, expected int32 or int64")
        offsets = offsets.to(x.device)
    elif not isinstance(offsets, int | torch.SymInt):
        raise TypeError(
            f"{op}: seqlen_offsets is {type(offsets).__name__}, expected an int or a tensor"
        )
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device).expand(batch, -1)
        shift = offsets[:, None] if isinstance(offsets, Tensor) else offsets
        return (steps + shift).flatten()
    require(op, "cu_seqlens", cu_seqlens, 1, "[B + 1]")
    rows = torch.arange(x.shape[0], device=x.device)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    segment = segment.clamp(max=max(batch - 1, 0))
    shift = offsets[segment] if isinstance(offsets, Tensor) else offsets
    return rows - cu_seqlens[segment] + shift
