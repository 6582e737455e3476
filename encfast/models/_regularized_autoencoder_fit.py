"""Fitting by L-BFGS: the score is the small difference r(x) - x over sigma^2, so fits are exact."""

from __future__ import annotations

from typing import Any

import torch

from encfast.layers.base import Model


def fit_lbfgs(
    model: Model,
    batch: Any,
    *,
    iterations: int = 1000,
    history: int = 50,
    tolerance: float = 1e-14,
) -> list[float]:
    """Minimises ``model.loss(batch).total`` over one fixed batch, as the first author's BFGS does.

    Args:
        model: with float64 parameters; they are changed in place.
        batch: the whole data set, noise included.
        iterations: at most.
        history: pairs of steps and gradients that stand for the Hessian.
        tolerance: stops where no gradient is larger, or a step changes the loss or every parameter
            by less.

    Returns:
        The loss at every evaluation, the first before any step; there are more of them than
        iterations, and the last need not be the least.

    Raises:
        TypeError: if a parameter is not float64: with sigma = 0.01 a score of 1 is a difference of
            1e-4, in which float32 has three digits left.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float64:
            raise TypeError(f"{name} is {parameter.dtype}, expected torch.float64 for L-BFGS")
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=history,
        tolerance_grad=tolerance,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )
    losses: list[float] = []

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = model.loss(batch).total
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    optimizer.step(evaluate)
    return losses
