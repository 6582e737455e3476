"""What encfast.ops.patch_gather means, in plain PyTorch."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def select_patches(
    noise: Tensor, cu_seqlens: Tensor, cu_keep: Tensor, ordered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence the rows with the least noise, the others, and where each row went.

    noise [N]; sequence b owns rows cu_seqlens[b] : cu_seqlens[b + 1] and keeps
    cu_keep[b + 1] - cu_keep[b] of them. NaN counts as the largest; equals go by position. Rows are
    listed in the order of their noise, or, ordered, in their own.
    """
    visible: list[Tensor] = []
    hidden: list[Tensor] = []
    ends, keeps = cu_seqlens.tolist(), cu_keep.diff().tolist()
    for (start, end), keep in zip(itertools.pairwise(ends), keeps, strict=True):
        order = noise[start:end].argsort(stable=True) + start
        for rows, kind in ((order[:keep], visible), (order[keep:], hidden)):
            kind.append(rows.sort().values if ordered else rows)
    nothing = cu_seqlens.new_empty(0, dtype=torch.int64)
    seen, unseen = torch.cat([*visible, nothing]), torch.cat([*hidden, nothing])
    restore = torch.full_like(noise, -1, dtype=torch.int64)
    restore[seen] = torch.arange(len(seen), device=noise.device)
    return seen, unseen, restore


def gather_patches(
    image: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    channels_last: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """image [B, C, *size] -> rows [M, C * prod(patch)] of the patches b * P + p in ids [M].

    Pixels are multiplied by scale [C] and shift [C] is added, None for no change, in float32 or
    wider; the rows have this dtype. With channels_last a row is ordered [*patch, C].
    """
    x = image.to(torch.promote_types(dtype, torch.float32))
    per_channel = (-1, *[1] * len(patch))
    if scale is not None:
        x = x * scale.to(x.dtype).view(per_channel)
    if shift is not None:
        x = x + shift.to(x.dtype).view(per_channel)
    return unfold_patches(x, patch, channels_last).index_select(0, ids).to(dtype)


def unfold_patches(image: Tensor, patch: Sequence[int], channels_last: bool) -> Tensor:
    """image [B, C, *size] -> all its patches [B * P, C * prod(patch)], the last axis fastest.

    With channels_last a row is ordered [*patch, C].
    """
    batch, channels, *size = image.shape
    cut = [n for pair in zip(_grid(size, patch), patch, strict=True) for n in pair]
    x = image.reshape(batch, channels, *cut)  # [B, C, G0, p0, G1, p1, ...]
    return x.permute(_unfolding(len(patch), channels_last)).reshape(
        batch * math.prod(cut[::2]), channels * math.prod(patch)
    )


def fold_patches(
    rows: Tensor, shape: Sequence[int], patch: Sequence[int], channels_last: bool
) -> Tensor:
    """The inverse of `unfold_patches`: rows [B * P, C * prod(patch)] -> `shape`."""
    batch, channels, *size = shape
    inner = (*patch, channels) if channels_last else (channels, *patch)
    x = rows.reshape(batch, *_grid(size, patch), *inner)
    order = _unfolding(len(patch), channels_last)
    return x.permute([order.index(d) for d in range(len(order))]).reshape(tuple(shape))


def _grid(size: Sequence[int], patch: Sequence[int]) -> list[int]:
    return [n // p for n, p in zip(size, patch, strict=True)]


def _unfolding(dims: int, channels_last: bool) -> list[int]:
    """[B, C, G0, p0, G1, p1, ...] -> [B, G0, G1, ..., C, p0, p1, ...], or C last."""
    grid, inner = [2 + 2 * d for d in range(dims)], [3 + 2 * d for d in range(dims)]
    return [0, *grid, *inner, 1] if channels_last else [0, *grid, 1, *inner]


def restore_rows(
    x: Tensor,
    index: Tensor,
    fill: Tensor | None = None,
    add: Tensor | None = None,
    add_index: Tensor | None = None,
) -> Tensor:
    """out[i] = (x[index[i]], or fill where index[i] is -1) + add[add_index[i]].

    x [n, C], index [M], fill [C] (zeros if None), add [A, C] (nothing if None), add_index [M]
    (i % A if None). Half types are summed in float32 and rounded once.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = torch.cat([x.to(compute), _fill_row(x, fill, compute)])
    out = rows.index_select(0, torch.where(index < 0, len(x), index))
    if add is not None:
        out = out + add.to(compute).index_select(0, _added(index, add.shape[0], add_index))
    return out.to(x.dtype)


def restore_rows_bwd(
    dout: Tensor, index: Tensor, add_index: Tensor | None, n_add: int
) -> tuple[Tensor, Tensor]:
    """Gradients of fill [C] and add [n_add, C], in float32 or wider."""
    dout = dout.to(torch.promote_types(dout.dtype, torch.float32))
    dfill = dout[index < 0].sum(0)
    dadd = dout.new_zeros((n_add, dout.shape[1]))
    if n_add:
        dadd.index_add_(0, _added(index, n_add, add_index), dout)
    return dfill, dadd


def _fill_row(x: Tensor, fill: Tensor | None, dtype: torch.dtype) -> Tensor:
    row = x.new_zeros(x.shape[1]) if fill is None else fill
    return row.to(dtype).unsqueeze(0)


def _added(index: Tensor, n_add: int, add_index: Tensor | None) -> Tensor:
    return torch.arange(len(index), device=index.device) % n_add if add_index is None else add_index
