"""LayerNorm and RMSNorm whose arithmetic precision is a choice, not an accident of autocast."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import NormPrecision
from encfast.layers.dropout import StaticFloat


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
        precision: NormPrecision = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.kind, self.eps, self.precision = dim, kind, eps, precision
        self.weight = nn.Parameter(torch.empty(dim, **factory))
        with_bias = bias and kind == "layernorm"
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(dim, **factory)) if with_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` -> ``[..., dim]``."""
        if self.precision == "default":
            return self._normalise(x, None)
        device = x.device.type
        if self.precision == "fp32":
            with torch.autocast(device, enabled=False):
                return self._normalise(x, torch.float32).to(x.dtype)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            return self._normalise(x, low)

    def _normalise(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, (self.dim,), weight, self.eps)
        return F.layer_norm(x, (self.dim,), weight, bias, self.eps)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.dim}, {self.kind}, eps={self.eps}, precision={self.precision!r}"
