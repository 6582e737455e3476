"""What add_norm means, in plain PyTorch; `add_norm_bwd` is its gradient written out.

The fallback backend needs the latter, because autograd does not record inside an operator.
"""

import torch
from torch import Tensor


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layernorm",
    eps: float | None = None,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y and the sum it is the norm of, both [..., C], and mean and rstd [...].

    Args are those of `encfast.ops.add_norm`. Computes in float32, or float64 where x is float64.
    """
    total = residual_sum(x, residual, branch_scale)
    s = total.to(_compute(total))
    mean = s.mean(-1) if kind == "layernorm" else s.new_zeros(s.shape[:-1])
    centred = s - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + (1e-5 if eps is None else eps))
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(total.dtype), total, mean, rstd


def residual_sum(x: Tensor, residual: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    """residual + branch_scale * x, rounded once to the dtype that x and residual promote to."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    compute = _compute(x) if residual is None else torch.promote_types(_compute(x), dtype)
    total = x.to(compute)
    if branch_scale is not None:
        total = total * branch_scale.to(compute)
    if residual is not None:
        total = total + residual.to(compute)
    return total.to(dtype)


def add_norm_bwd(
    dy: Tensor,
    dtotal_in: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    branch_scale: Tensor | None,
    *,
    kind: str = "layernorm",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of the sum and, with branch_scale, of x; of weight, bias and branch_scale.

    dtotal_in is what reaches the sum past the norm. Parameter gradients are in the compute dtype.
    """
    compute = _compute(total)
    grad, leading = dy.to(compute), tuple(range(dy.dim() - 1))
    normalised = (total.to(compute) - mean[..., None]) * rstd[..., None]
    dweight, dbias = _sum(grad * normalised, leading), _sum(grad, leading)
    if weight is not None:
        grad = grad * weight.to(compute)
    d = grad - normalised * (grad * normalised).mean(-1, keepdim=True)
    if kind == "layernorm":
        d = d - grad.mean(-1, keepdim=True)
    d = d * rstd[..., None]
    if dtotal_in is not None:
        d = d + dtotal_in.to(compute)
    if branch_scale is None or x is None:
        return d.to(total.dtype), None, dweight, dbias, None
    dx = (d * branch_scale.to(compute)).to(x.dtype)
    return d.to(total.dtype), dx, dweight, dbias, _sum(d * x.to(compute), leading)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x  # an empty list of dimensions would mean all


def _compute(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
