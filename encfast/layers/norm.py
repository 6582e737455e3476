"""LayerNorm and RMSNorm whose arithmetic precision is a choice, not an accident of autocast."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.config import NormPrecision
from encfast.layers.dropout import StaticFloat

_FUSED_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
# Below, the costlier call of the op eats its gain. Measured on Sapphire Rapids (bench/add_norm.py):
# the two are even at 2^17 to 2^18 elements in inference, at 2^18 (bf16) to 2^21 (fp32) in training.
_FUSED_ELEMENTS = 2**18
_FUSED_ELEMENTS_TRAINING = 2**21


class Norm(nn.Module):
    """Normalises the last dimension.

    ``precision`` says in which dtype statistics and arithmetic run:

    - ``"default"``: as PyTorch does (a GPU's autocast promotes to fp32, the CPU's does not);
    - ``"fp32"``: in fp32, returned in the input's dtype;
    - ``"low"``: under autocast, in autocast's dtype (MosaicBERT's low-precision LayerNorm); without
      autocast, in the input's dtype.

    Args:
        dim: size of the last dimension.
        kind: ``"layernorm"`` or ``"rmsnorm"``.
        eps: added to the variance (mean square).
        bias: learn a bias; layernorm only.
        unit_offset: keep the weight as its difference from 1, as Gemma does: weight decay then
            pulls the factor to 1.
        precision: see above.
    """

    bias: nn.Parameter | None
    eps = StaticFloat()

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["layernorm", "rmsnorm"] = "layernorm",
        eps: float = 1e-5,
        bias: bool = True,
        unit_offset: bool = False,
        precision: NormPrecision = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.kind, self.eps, self.precision = dim, kind, eps, precision
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim, **factory))
        with_bias = bias and kind == "layernorm"
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(dim, **factory)) if with_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A factor of 1, bias 0."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        branch_scale: Tensor | None = None,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Norm of ``x`` or, in one pass where that is served, of ``residual + branch_scale * x``.

        Args:
            x: ``[..., dim]``; with ``residual``, the branch that is added to it.
            residual: of x's shape, or None.
            branch_scale: ``[dim]``, the factors of LayerScale; None: 1.
            return_sum: also return the sum, as a pre-norm block hands it on.

        Returns:
            Of x's shape; with ``return_sum`` the sum of x's shape beside it.
        """
        if residual is not None and self._fuses(x, residual):
            return self._fused(x, residual, branch_scale, return_sum)
        branch = x if branch_scale is None else branch_scale.to(x.dtype) * x
        total = branch if residual is None else residual + branch
        y = self._alone(total)
        return (y, total) if return_sum else y

    def _alone(self, x: Tensor) -> Tensor:
        if self.precision == "default":
            return self._normalise(x, None)
        low = self._low_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            if self.precision == "fp32":
                return self._normalise(x, torch.float32).to(x.dtype)
            return self._normalise(x, low)

    def _low_dtype(self, x: Tensor) -> torch.dtype | None:
        """What precision "low" computes in; None: the dtype of the rows, as the others do."""
        device = x.device.type
        if self.precision != "low" or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)

    def _fuses(self, x: Tensor, residual: Tensor) -> bool:
        # Elsewhere than on a CPU the op is its reference, and autocast may promote. A compiler
        # fuses the plain form itself.
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        training = torch.is_grad_enabled() and x.requires_grad
        if x.numel() < (_FUSED_ELEMENTS_TRAINING if training else _FUSED_ELEMENTS):
            return False
        if x.dtype not in _FUSED_DTYPES or residual.dtype not in _FUSED_DTYPES:
            return False
        # The op computes in fp32 and returns the dtype of the sum: all but a rounding before it.
        low = self._low_dtype(x)
        return low is None or low == torch.promote_types(x.dtype, residual.dtype)

    def _fused(
        self, x: Tensor, residual: Tensor, branch_scale: Tensor | None, return_sum: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        low = self._low_dtype(x)
        weight, bias = (
            p if p is None or low is None else p.to(low) for p in (self.weight, self.bias)
        )
        if self.unit_offset:
            weight = 1 + weight.float()  # as the op computes
        return ops.add_norm(
            x,
            residual,
            weight,
            bias,
            branch_scale=branch_scale,
            kind=self.kind,
            eps=self.eps,
            return_sum=return_sum,
        )

    def _normalise(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if self.unit_offset:
            weight = 1 + weight
        if self.kind == "rmsnorm":
            return F.rms_norm(x, (self.dim,), weight, self.eps)
        return F.layer_norm(x, (self.dim,), weight, bias, self.eps)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.dim}, {self.kind}, eps={self.eps}, precision={self.precision!r}"
