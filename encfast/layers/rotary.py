"""Angles of rotary positions (Su et al., arXiv 2104.09864), the tables of `encfast.ops.rotary`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from encfast.config import RopeScaling
from encfast.layers.exact import ExactBuffers


class Rotary(ExactBuffers):
    """Tables cos and sin of the rotation angles ``position * theta^(-2i/D)``.

    Frequencies, angles and tables are fp32 whatever dtype the model has: at position 8000 bf16
    could not tell neighbours apart.

    Args:
        head_dim: D, even.
        theta: base of the frequencies.
        scaling: of their wavelengths; None: none.

    Raises:
        ValueError: for an odd ``head_dim``.
    """

    inv_freq: Tensor

    def __init__(
        self,
        head_dim: int,
        theta: float,
        *,
        scaling: RopeScaling | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        empty = torch.empty(head_dim // 2, dtype=torch.float32, device=device)
        self.register_buffer("inv_freq", empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills ``inv_freq``, fp32 ``[D / 2]``."""
        if self.inv_freq.is_meta:
            return
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequency = 1.0 / self.theta**exponent
        if self.scaling is not None:
            frequency = _scaled(frequency, self.scaling)
        with torch.no_grad():
            self.inv_freq.copy_(frequency)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 ``[N, D / 2]``, for integer ``positions`` ``[N]``."""
        angles = positions.float()[:, None] * self.inv_freq
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"head_dim={self.head_dim}, theta={self.theta:g}"


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original * frequency / (2 * math.pi)  # of the original length
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)
