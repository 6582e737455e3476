"""What seg_pool means, in plain PyTorch; `seg_pool_bwd` is its gradient for the fallback.

Nothing here waits for a device: the lengths are not read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # of torch.nn.functional.normalize


def seg_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    how: str = "mean",
    weights: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """[B, C], one row per segment. Args of `encfast.ops.seg_pool`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(compute)
    if how in ("max", "first", "last"):
        # Row N of zeros stands for that of an empty segment.
        chosen = chosen_rows(rows.detach(), cu_seqlens, how)
        chosen = torch.where(chosen < 0, x.shape[0], chosen).expand(-1, x.shape[1])
        pooled = F.pad(rows, (0, 0, 0, 1)).gather(0, chosen)
    else:
        weighted = rows * coefficients(cu_seqlens, x.shape[0], how, weights, compute)[:, None]
        pooled = rows.new_zeros(cu_seqlens.shape[0] - 1, x.shape[1])
        pooled = pooled.index_add(0, segment_ids(cu_seqlens, x.shape[0]), weighted)
    return (F.normalize(pooled, dim=1, eps=EPS) if normalize else pooled).to(x.dtype)


def segment_ids(cu_seqlens: Tensor, n: int) -> Tensor:
    """int64 [N]: the segment of each row."""
    return torch.bucketize(torch.arange(n, device=cu_seqlens.device), cu_seqlens[1:], right=True)


def coefficients(
    cu_seqlens: Tensor, n: int, how: str, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[N]: what each row counts in the sum that is its segment's result."""
    ids, count = segment_ids(cu_seqlens, n), cu_seqlens.shape[0] - 1
    device = cu_seqlens.device
    w = torch.ones(n, dtype=dtype, device=device) if weights is None else weights.to(dtype)
    if how == "sum":
        return w
    if how == "attention":
        most = torch.full((count,), -torch.inf, dtype=dtype, device=device)
        most = most.scatter_reduce(0, ids, w.detach(), "amax")
        w = (w - most[ids]).exp()
    total = torch.zeros(count, dtype=dtype, device=device).index_add(0, ids, w)
    return torch.where(total[ids] == 0, 0, w / total[ids])


def chosen_rows(x: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """int64 [B, C], or [B, 1] for "first" and "last": the row that is the result; -1 for none."""
    n, (begin, end) = x.shape[0], (cu_seqlens[:-1].long(), cu_seqlens[1:].long())
    if how in ("first", "last"):
        row = begin if how == "first" else end - 1
        return torch.where(begin < end, row, -1)[:, None]
    ids = segment_ids(cu_seqlens, n)[:, None].expand_as(x)
    best = x.new_full((begin.shape[0], x.shape[1]), -torch.inf).scatter_reduce(0, ids, x, "amax")
    is_best = (x == best.gather(0, ids)) | x.isnan()
    place = torch.where(is_best, torch.arange(n, device=x.device)[:, None], n)
    first = place.new_full(best.shape, n).scatter_reduce(0, ids, place, "amin")
    return torch.where(first == n, -1, first)


def seg_pool_bwd(
    dout: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    out: Tensor,
    rows: Tensor,
    norm: Tensor,
    how: str,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of weights (in the compute dtype; zeros where none are given)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    n, ids, grad = x.shape[0], segment_ids(cu_seqlens, x.shape[0]), dout.to(compute)
    if normalize:
        y, length = out.to(compute), norm.to(compute)[:, None]
        along = (grad * y).sum(1, keepdim=True)
        grad = torch.where(length > EPS, grad - along * y, grad) / length.clamp(min=EPS)
    dweights = grad.new_zeros(n)
    if how in ("max", "first", "last"):
        place = torch.where(rows < 0, n, rows.long()).expand(-1, x.shape[1])
        return grad.new_zeros(n + 1, x.shape[1]).scatter(0, place, grad)[:n].to(x.dtype), dweights
    share = coefficients(cu_seqlens, n, how, weights, compute)
    dx = (share[:, None] * grad[ids]).to(x.dtype)
    if weights is not None:
        dots = (grad[ids] * x.to(compute)).sum(1)
        dweights = dots
        if how != "sum":
            mean = grad.new_zeros(grad.shape[0]).index_add(0, ids, share * dots)
            dweights = dots - mean[ids]
            total = grad.new_zeros(grad.shape[0]).index_add(0, ids, weights.to(compute))[ids]
            scale = share if how == "attention" else torch.where(total == 0, 0, 1 / total)
            dweights = scale * dweights
    return dx, dweights
