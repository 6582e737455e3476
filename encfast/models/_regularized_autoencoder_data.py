"""What goes into a regularized auto-encoder: points of the plane, their corruption, toy data.

The two data sets are those of the paper's experiments, with the numbers of the first author's code
(github.com/gyom/denoising_autoencoder).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class PointBatch:
    """Points and the random numbers of one step; an objective reads the fields it needs."""

    tokens: PackedBatch  # points [N, d]; the sequences they stand in mean nothing to the model
    noisy: Tensor | None = None  # [R, N, d]: R corrupted copies of every point
    probes: Tensor | None = None  # [K, N, d]: directions to estimate the contraction along

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PointBatch:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        extra = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.noisy, self.probes)
        )
        return PointBatch(self.tokens.to(device, non_blocking=non_blocking), *extra)


torch.export.register_dataclass(
    PointBatch, serialized_type_name="encfast.models.regularized_autoencoder.PointBatch"
)


def corrupted(
    points: Tensor,
    copies: int,
    sigma: float,
    *,
    far_share: float = 0.0,
    far_factor: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gaussian corruption, with larger noise on some copies.

    Few points lie far from the data, and there the score may hold maxima of its own, in which a
    chain gets stuck; far copies show the way back.

    Args:
        points: ``[N, d]``.
        copies: R >= 0.
        sigma: standard deviation of the noise, in the units of the points.
        far_share: probability in [0, 1] that a copy gets ``far_factor`` times that noise.
        far_factor: > 0.
        generator: of all random numbers, on the points' device.

    Returns:
        ``[R, N, d]``.
    """
    options = {"generator": generator, "dtype": points.dtype, "device": points.device}
    noise = torch.randn((copies, *points.shape), **options)
    if far_share > 0.0:
        far = torch.rand((copies, len(points), 1), **options) < far_share
        noise = torch.where(far, far_factor * noise, noise)
    return points + sigma * noise


def spiral(n: int, *, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """``[n, 2]`` float64: 0.04 t (sin t, cos t) for t uniform in [3, 15).

    Args:
        n: >= 0.
        noise: standard deviation of the distance to the curve, along the ray from the origin.
        generator: of all random numbers.

    Returns:
        float64 ``[n, 2]``.
    """
    t = 3.0 + 12.0 * torch.rand(n, dtype=torch.float64, generator=generator)
    radius = 0.04 * t
    if noise > 0.0:
        radius = radius + noise * torch.randn(n, dtype=torch.float64, generator=generator)
    return torch.stack((radius * t.sin(), radius * t.cos()), -1)


def two_bumps(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """``[n, 2]`` float64: a Gaussian whose first coordinate changes sign with probability 1/2.

    Its mean is (5, 0), its variances are 40 along (1, 1) and 5 along (1, -1). All numbers are drawn
    from ``generator``.
    """
    draw = torch.randn((n, 2), dtype=torch.float64, generator=generator)
    axes = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5  # rows
    points = draw * torch.tensor([40.0, 5.0], dtype=torch.float64).sqrt() @ axes
    points[:, 0] += 5.0
    flip = torch.rand(n, dtype=torch.float64, generator=generator) < 0.5
    points[:, 0] = torch.where(flip, -points[:, 0], points[:, 0])
    return points


DATA = {"spiral": spiral, "two-bumps": two_bumps}
