"""Sampling from a score alone: energy differences along a path, and Metropolis-Hastings on them.

With ``E = -log p`` a score is ``-grad E``. No normaliser is needed, as the chain asks for energy
differences only, and those are integrals of the score along the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Chains:
    """Samples of B independent chains."""

    points: Tensor  # [n, B, d]
    acceptance: Tensor  # float [B]: accepted share of the proposals after burn-in


def energy_difference(score: Field, x: Tensor, y: Tensor, *, nodes: int = 2) -> Tensor:
    """E(y) - E(x), integrated over the straight line from x to y.

    Args:
        score: ``[..., d] -> [..., d]``.
        x: ``[..., d]``.
        y: ``[..., d]``.
        nodes: m >= 1 places where the score is read. 1: at x alone, the first-order estimate
            ``-score(x) . (y - x)``, whose error is of second order in the step; 2: at both ends,
            of third order, and exact for a Gaussian; more: the trapezoid rule over m - 1 pieces.

    Returns:
        ``[...]``.

    Raises:
        ValueError: if ``nodes`` < 1.
    """
    _check_at_least("nodes", nodes, 1)
    return _integrate(score, x, score(x), y, nodes)[0]


def _integrate(
    score: Field, x: Tensor, score_x: Tensor, y: Tensor, nodes: int
) -> tuple[Tensor, Tensor]:
    """E(y) - E(x) ``[...]`` and score(y) ``[..., d]``."""
    way = y - x
    pieces = max(nodes - 1, 1)
    t = torch.arange(1, pieces + 1, dtype=x.dtype, device=x.device) / pieces
    scores = score(x + t.view(-1, *[1] * x.dim()) * way)  # [pieces, ..., d]
    score_y = scores[-1]
    mean = score_x if nodes == 1 else (scores.sum(0) + 0.5 * (score_x - score_y)) / pieces
    return -(mean * way).sum(-1), score_y


@torch.no_grad()
def sample_chains(
    score: Field,
    x0: Tensor,
    n: int,
    *,
    step: float,
    drift: float = 0.0,
    hessian: Field | None = None,
    nodes: int = 2,
    temperature: float = 1.0,
    thinning: int = 1,
    burn_in: int = 0,
    accept_all: bool = False,
    generator: torch.Generator | None = None,
) -> Chains:
    """Metropolis-Hastings chains, one per row of ``x0``, that know a density by its score.

    A proposal is ``x* = g(y)`` with ``y = x + N(0, step^2 I)`` and ``g(y) = y + drift score(y)``:
    a random walk without drift, a Langevin step with ``drift = step^2 / 2``. It is accepted with
    probability ``min(1, exp(-(E(x*) - E(x)) / T) q(x | x*) / q(x* | x))``, where

        log q(g(y) | x) = -|y - x|^2 / (2 step^2) - log|det dg/dy|

    is read at the preimage y of each of the two points, which the chain remembers. A g that maps
    two places onto one would need the sum over both; small drifts have none. With drift a chain
    starts at g(x0), whose preimage is known, rather than at x0.

    Args:
        score: ``[..., d] -> [..., d]``.
        x0: ``[B, d]``, where the chains start.
        n: samples per chain, >= 0.
        step: standard deviation of the noise, in the units of the points, > 0.
        drift: in those units squared.
        hessian: ``[B, d] -> [B, d, d]``, derivative of the score; by ``torch.func`` if None.
        nodes: of :func:`energy_difference`.
        temperature: T > 0: the chains draw from p^(1/T).
        thinning: steps per sample, >= 1.
        burn_in: steps before the first sample's, >= 0.
        accept_all: accept every proposal: plain Langevin, whose error grows with the step.
        generator: of all random numbers, on x0's device.

    Returns:
        The samples of all chains, and which share of the proposals was accepted.

    Raises:
        ValueError: for an argument out of its range.
    """
    if x0.dim() != 2:
        raise ValueError(f"x0 must be [B, d], got {tuple(x0.shape)}")
    for name, value, least in (("n", n, 0), ("nodes", nodes, 1), ("burn_in", burn_in, 0)):
        _check_at_least(name, value, least)
    _check_at_least("thinning", thinning, 1)
    for name, positive in (("step", step), ("temperature", temperature)):
        if not positive > 0:
            raise ValueError(f"{name} must be > 0, got {positive}")
    if hessian is None:
        hessian = torch.func.vmap(torch.func.jacrev(score))

    def moved(y: Tensor) -> tuple[Tensor, Tensor]:
        """g(y) ``[B, d]`` and log|det dg/dy| ``[B]``."""
        if drift == 0.0:
            return y, y.new_zeros(len(y))
        slope = torch.eye(y.shape[1], dtype=y.dtype, device=y.device) + drift * hessian(y)
        return y + drift * score(y), torch.linalg.slogdet(slope).logabsdet

    def way_there(x: Tensor, preimage: Tensor, log_det: Tensor) -> Tensor:
        """log q of a point, given by its preimage, from x; up to a constant ``[B]``."""
        return -(preimage - x).square().sum(-1) / (2 * step**2) - log_det

    draw = {"generator": generator, "dtype": x0.dtype, "device": x0.device}
    preimage = x0
    x, log_det = moved(x0)
    score_x = score(x)
    points = x0.new_empty((n, *x0.shape))
    accepted = x0.new_zeros(len(x0))
    for i in range(burn_in + n * thinning):
        y = x + step * torch.randn(x.shape, **draw)  # type: ignore[call-overload]
        proposed, log_det_y = moved(y)
        rise, score_y = _integrate(score, x, score_x, proposed, nodes)
        log_ratio = -rise / temperature
        log_ratio += way_there(proposed, preimage, log_det) - way_there(x, y, log_det_y)
        # A ratio that is no number compares as false, and its proposal is rejected.
        take = torch.rand(len(x), **draw).log() < log_ratio  # type: ignore[call-overload]
        take |= accept_all
        row = take[:, None]
        x, preimage = torch.where(row, proposed, x), torch.where(row, y, preimage)
        score_x, log_det = torch.where(row, score_y, score_x), torch.where(take, log_det_y, log_det)
        if i >= burn_in:
            accepted += take
            done, rest = divmod(i - burn_in + 1, thinning)
            if not rest:
                points[done - 1] = x
    return Chains(points, accepted / max(n * thinning, 1))


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
