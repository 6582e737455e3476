"""Reconstructions without a network: the best r of each objective on a grid over the line.

They show what the objectives themselves learn, whatever a network can represent.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_rcae(x: Tensor, p: Tensor, sigma: float) -> Tensor:
    r"""The function that minimises the contractive objective on a grid.

    .. math:: \sum_i p_i d_i (r_i - x_i)^2 + \sigma^2 \sum_i p_i (r_{i+1} - r_i)^2 / d_i,
        \quad d_i = x_{i+1} - x_i, \quad i < n - 1

    Its derivative is a tridiagonal system, solved in O(n). The last point has no cell of its own:
    only its neighbour holds it, so that the slope at the right end is 0.

    Args:
        x: ``[n]``, strictly rising, n >= 2.
        p: ``[n]`` > 0: density at the points, up to a factor.
        sigma: > 0.

    Returns:
        r, float64 ``[n]``.

    Raises:
        ValueError: for other shapes, an x that does not rise, a p or sigma that is not positive.
    """
    x, p = _checked(x, p, sigma)
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} points, expected at least 2")
    d = x.diff()
    if not (d > 0).all():
        raise ValueError("x must rise strictly from each point to the next")
    mass = torch.cat((p[:-1] * d, p.new_zeros(1)))  # [n]
    pull = sigma**2 * p[:-1] / d  # [n - 1]: between a point and the next
    diagonal = mass.clone()
    diagonal[:-1] += pull
    diagonal[1:] += pull
    return _solve_tridiagonal(diagonal, -pull, mass * x)


def grid_dae(x: Tensor, p: Tensor, sigma: float, at: Tensor | None = None) -> Tensor:
    r"""The best denoising function for a density of point masses.

    .. math:: r(y) = \sum_i w_i p_i x_i / \sum_i w_i p_i,
        \quad w_i = \exp(-(x_i - y)^2 / 2 \sigma^2)

    Args:
        x: ``[n]``, n >= 1.
        p: ``[n]`` > 0: masses, up to a factor (the density, on an even grid).
        sigma: > 0.
        at: y ``[m]``; x if None.

    Returns:
        r, float64 ``[m]``.

    Raises:
        ValueError: for other shapes, a p or sigma that is not positive.
    """
    x, p = _checked(x, p, sigma)
    y = x if at is None else at.double()
    # A softmax, because far from all points every weight is below the smallest float.
    log_weights = p.log() - (x - y[:, None]).square() / (2 * sigma**2)  # [m, n]
    return log_weights.softmax(-1) @ x


def _checked(x: Tensor, p: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    if x.dim() != 1 or x.shape != p.shape or not len(x):
        raise ValueError(
            f"x and p must be of one shape [n], n >= 1, got {tuple(x.shape)} and {tuple(p.shape)}"
        )
    if not (p > 0).all():
        raise ValueError(f"p must be positive, its minimum is {p.min().item()}")
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    return x.double(), p.double()


def _solve_tridiagonal(diagonal: Tensor, beside: Tensor, right: Tensor) -> Tensor:
    """Symmetric A of ``diagonal`` [n] and ``beside`` [n - 1]: the r of A r = right [n].

    Elimination without pivots is stable where the diagonal dominates, as it does here.
    """
    a, b, c = diagonal.tolist(), beside.tolist(), right.tolist()
    for i in range(1, len(a)):
        factor = b[i - 1] / a[i - 1]
        a[i] -= factor * b[i - 1]
        c[i] -= factor * c[i - 1]
    c[-1] /= a[-1]
    for i in range(len(a) - 2, -1, -1):
        c[i] = (c[i] - b[i] * c[i + 1]) / a[i]
    return torch.tensor(c, dtype=torch.float64, device=diagonal.device)
