"""What encfast.ops.pad means, in plain PyTorch: two row moves, each the other's adjoint, and which
rows a mask keeps."""

import torch
from torch import Tensor


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """out[i] = x[index[i]], or a row of zeros where index[i] is -1. x [n, ...], index [m]."""
    if x.shape[0] == 0:  # every index is -1: there is no row to read
        return x.new_zeros((index.shape[0], *x.shape[1:]))
    missing = (index < 0).reshape(-1, *[1] * (x.dim() - 1))
    return x.index_select(0, index.clamp(min=0)).masked_fill(missing, 0)


def scatter_rows(x: Tensor, index: Tensor, n: int) -> Tensor:
    """out[index[i]] += x[i], from zeros, in the order of i; rows with index -1 are dropped.

    x [m, ...], index [m], out [n, ...]. Half types are summed in float32 and rounded once.
    """
    compute = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    kept = index >= 0
    out = torch.zeros((n, *x.shape[1:]), dtype=compute, device=x.device)
    return out.index_add(0, index[kept], x[kept].to(compute)).to(x.dtype)


def find_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the entries of mask [B, S] that are not 0, with -1 behind them: [B * S] int64; and
    how many of them stand before each row: [B + 1] int32."""
    keep = mask != 0
    indices = torch.nonzero_static(keep.flatten(), size=mask.numel(), fill_value=-1).flatten()
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = keep.sum(1).cumsum(0)
    return indices, cu_seqlens
