"""What linear_cross_entropy means, in plain PyTorch with all logits; `linear_cross_entropy_bwd` is
its gradient for the fallback."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | None = None,
    z_loss: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [M], log-sum-exp [M]), not reduced. Args of `encfast.ops.linear_cross_entropy`."""
    eps, active = label_smoothing or 0.0, targets != ignore_index
    z = logits(x if rows is None else x[rows], weight, bias, softcap)  # [M, V]
    at_target = z.gather(1, targets.where(active, 0)[:, None]).squeeze(1)
    lse = z.logsumexp(1)
    loss = lse - (1 - eps) * at_target + (z_loss or 0.0) * lse.square()
    if eps:
        loss = loss - eps * z.mean(1)
    return loss.where(active, 0), lse.where(active, 0)


def logits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """[M, V] in the upcast of x's dtype: x W^T + bias, and softcap * tanh(that / softcap)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    z = F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | None = None,
    z_loss: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last in the compute dtype."""
    eps, active = label_smoothing or 0.0, targets != ignore_index
    taken = x if rows is None else x[rows]
    z = logits(taken, weight, bias, softcap)
    d = dloss.to(z.dtype).where(active, 0)[:, None]
    dz = (1 + 2 * (z_loss or 0.0) * z.logsumexp(1, keepdim=True)) * z.softmax(1)
    dz = dz - (1 - eps) * F.one_hot(targets.where(active, 0), z.shape[1]) - eps / z.shape[1]
    if softcap is not None:
        dz = dz * (1 - (z / softcap).square())
    dz = (d * dz).where(active[:, None], 0)
    dx = dz @ weight.to(z.dtype)
    if rows is not None:
        dx = x.new_zeros(x.shape, dtype=z.dtype).index_add(0, rows, dx)
    return dx.to(x.dtype), (dz.mT @ taken.to(z.dtype)).to(weight.dtype), dz.sum(0)
