"""Batch normalisation over packed rows: there is no padding whose zeros could enter a mean."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encfast.layers.dropout import StaticFloat


class BatchNorm(nn.Module):
    """Normalises each channel over all rows (Ioffe and Szegedy 2015, arXiv 1502.03167).

    While training: by mean and biased variance of the rows at hand, which also move the running
    averages (of mean and unbiased variance), as in ``torch.nn.BatchNorm1d``. In evaluation: by the
    running averages. A batch without rows leaves them alone.

    Args:
        dim: C.
        eps: added to the variance.
        momentum: weight of the rows at hand in the running averages, in [0, 1].
        affine: whether channels have a weight and a bias.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    eps = StaticFloat()
    momentum = StaticFloat()

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.eps, self.momentum = dim, eps, momentum
        self.held = False
        for name in ("weight", "bias"):
            own = nn.Parameter(torch.empty(dim, **factory)) if affine else None
            self.register_parameter(name, own)
        self.register_buffer("running_mean", torch.empty(dim, **factory))
        self.register_buffer("running_var", torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and running variance 1, bias and running mean 0."""
        nn.init.ones_(self.running_var)
        nn.init.zeros_(self.running_mean)
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., C]`` -> ``[..., C]``; all dimensions but the last are rows.

        Raises:
            ValueError: while training, for a single row, which has no variance.
        """
        rows = x.flatten(0, -2)  # [N, C]
        if rows.shape[0] == 0:
            return x
        mean, var = self.running_mean, self.running_var
        if self.held:  # recomputing: copies move, as autograd keeps the same tensors both times
            mean, var = mean.clone(), var.clone()
        y = F.batch_norm(
            rows, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        affine = self.weight is not None
        return f"{self.dim}, eps={self.eps}, momentum={self.momentum}, affine={affine}"


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """``module(*args)``, recomputed in the backward, whose running averages move once all the same.

    Args:
        module: may hold :class:`BatchNorm` layers; not in use by another thread.
        *args: tensors and whatever else ``module`` takes.

    Returns:
        What ``module`` returns.
    """
    if torch.compiler.is_compiling():  # writes to buffers happen once at the end of the graph
        return checkpoint(module, *args, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _held_averages(module)

    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _held_averages(module: nn.Module) -> Any:
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for norm in norms:
        norm.held = True
    try:
        yield
    finally:
        for norm in norms:
            norm.held = False
