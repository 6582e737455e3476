"""What linear means, in plain PyTorch; `linear_bwd` is its gradient for the fallback."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. Args of `encfast.ops.linear`, x [N, C]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute) @ weight.to(compute).mT
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def linear_bwd(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last in the compute dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    dx = linear(dout, weight.mT)
    dweight = linear(dout.mT, x.mT)
    return dx, dweight, dout.to(compute).sum(0)
