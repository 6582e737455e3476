"""RMSNorm over the last dimension, on PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight for x [..., C] and weight [C]."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight [hidden_size].

    Args:
        hidden_size: C.
        eps: added to the mean square.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the weight with ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)
