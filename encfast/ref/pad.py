"""What the row moves of encfast.ops.pad mean, in plain PyTorch: each is the other's adjoint."""

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
