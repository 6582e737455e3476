"""What linear_seg_max means, in plain PyTorch with all logits; `linear_seg_max_bwd` is its gradient
for the fallback."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_cross_entropy import logits
from .seg_pool import chosen_rows


def linear_seg_max(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(largest logits [B, V], their rows int32 [B, V]). Args of `encfast.ops.linear_seg_max`."""
    z = logits(x, weight)  # [N, V]
    rows = chosen_rows(z.detach(), cu_seqlens, "max")
    # Row N of zeros stands for that of an empty segment.
    largest = F.pad(z, (0, 0, 0, 1)).gather(0, rows.where(rows >= 0, x.shape[0]))
    if bias is not None:
        largest = largest + bias.to(z.dtype)
    return largest.where(rows >= 0, 0), rows.int()


def linear_seg_max_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last in the compute dtype."""
    compute, n = torch.promote_types(x.dtype, torch.float32), x.shape[0]
    d = dout.to(compute).where(rows >= 0, 0)
    dz = d.new_zeros(n + 1, weight.shape[0])
    dz = dz.scatter(0, rows.long().where(rows >= 0, n), d)[:n]
    dx, dweight = dz @ weight.to(compute), dz.mT @ x.to(compute)
    return dx.to(x.dtype), dweight.to(weight.dtype), d.sum(0)
