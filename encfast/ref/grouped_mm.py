"""What grouped_mm means, in plain PyTorch; `grouped_mm_bwd` is its gradient for the fallback."""

from itertools import pairwise

import torch
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None) -> Tensor:
    """x_i W[e]^T + bias[e] for the rows of each group e. Args of `encfast.ops.grouped_mm`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    out = []
    for e, rows in enumerate(_groups(x, cu_seqlens)):
        y = rows.to(compute) @ weight[e].to(compute).mT
        out.append(y if bias is None else y + bias[e].to(compute))
    n = sum(len(y) for y in out)
    out.append(x.new_zeros(x.shape[0] - n, weight.shape[1], dtype=compute))
    return torch.cat(out).to(x.dtype)


def grouped_mm_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last in the compute dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    groups = [g.to(compute) for g in _groups(dout, cu_seqlens)]
    dx = grouped_mm(dout, weight.mT, cu_seqlens)
    dweight, dbias = torch.zeros_like(weight), x.new_zeros(weight.shape[:2], dtype=compute)
    for e, (g, rows) in enumerate(zip(groups, _groups(x, cu_seqlens), strict=True)):
        dweight[e] = (g.mT @ rows.to(compute)).to(x.dtype)
        dbias[e] = g.sum(0)
    return dx, dweight, dbias


def _groups(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    ends = cu_seqlens.tolist()
    return [x[begin:end] for begin, end in pairwise(ends)]
