"""Metrics of SQuAD and GLUE, on whole evaluation sets, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries.

    Args:
        predicted: ``[M]``.
        labels: ``[M]``.

    Returns:
        In 0..1.

    Raises:
        ValueError: for shapes that differ or are empty.

    Examples:
        >>> from encfast.metrics import accuracy
        >>> accuracy(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 0, 1]))
        0.75
    """
    _check(predicted, labels)
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 of class 1 among 0 and 1; 0 if it is neither predicted nor present.

    Args:
        predicted: ``[M]``.
        labels: ``[M]``.

    Returns:
        In 0..1.

    Raises:
        ValueError: for shapes that differ or are empty.
    """
    _check(predicted, labels)
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    count = (predicted == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / count if count else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews correlation coefficient of class ids; 0 if one side is constant.

    Source: Gorodkin 2004, which extends Matthews 1975 to more than two classes.

    Args:
        predicted: ``[M]``.
        labels: ``[M]``.

    Returns:
        In -1..1.

    Raises:
        ValueError: for shapes that differ or are empty.
    """
    _check(predicted, labels)
    classes = int(max(predicted.max(), labels.max())) + 1
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2).double()
    counts = counts.view(classes, classes)
    true, pred, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = counts.trace() * total - true @ pred
    spread = (total**2 - pred @ pred) * (total**2 - true @ true)
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson correlation; 0 if one side is constant.

    Args:
        predicted: ``[M]``.
        labels: ``[M]``.

    Returns:
        In -1..1.

    Raises:
        ValueError: for shapes that differ or are empty.
    """
    _check(predicted, labels)
    x, y = (v.double() - v.double().mean() for v in (predicted, labels))
    spread = x.norm() * y.norm()
    return (x @ y / spread).item() if spread > 0 else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Pearson correlation of the ranks; equal values share the mean of their ranks.

    Args:
        predicted: ``[M]``.
        labels: ``[M]``.

    Returns:
        In -1..1.

    Raises:
        ValueError: for shapes that differ or are empty.
    """
    _check(predicted, labels)
    return pearson(_ranks(predicted), _ranks(labels))


def mean_reciprocal_rank(scores: Tensor, relevant: Tensor) -> float:
    """Mean of 1 / rank of the one right candidate; candidates of equal scores stand before it.

    Args:
        scores: ``[Q, D]`` of every query and candidate.
        relevant: int64 ``[Q]`` in [0, D).

    Returns:
        In 0..1.

    Raises:
        ValueError: for numbers of queries that differ, or none.
    """
    _check(scores[:, 0], relevant)
    own = scores.gather(1, relevant[:, None])
    return (scores >= own).sum(1).double().reciprocal().mean().item()


def exact_match(start: Tensor, end: Tensor, starts: Tensor, ends: Tensor) -> float:
    """Share of spans with both borders right.

    Args:
        start, end: ``[M]``, the predicted borders, inclusive; -1 and -1 for "no answer".
        starts, ends: ``[M]``, the true ones.

    Returns:
        In 0..1.

    Raises:
        ValueError: for shapes that differ or are empty.
    """
    _check(start, starts)
    _check(end, ends)
    return ((start == starts) & (end == ends)).double().mean().item()


def span_f1(start: Tensor, end: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """F1 of the tokens of predicted and true span, borders inclusive.

    "No answer" is -1 and -1: right if both say so, else 0.

    Args:
        start, end: ``[M]``, the predicted borders.
        starts, ends: ``[M]``, the true ones.

    Returns:
        ``[M]``, in 0..1.

    Raises:
        ValueError: for shapes that differ or are empty.
    """
    _check(start, starts)
    _check(end, ends)
    overlap = (torch.minimum(end, ends) - torch.maximum(start, starts) + 1).clamp(min=0).double()
    sizes = (end - start + 1) + (ends - starts + 1)
    none, none_true = start < 0, starts < 0
    return torch.where(none | none_true, (none & none_true).double(), 2 * overlap / sizes)


def _ranks(values: Tensor) -> Tensor:
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[group]


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.dim() != 1 or not predicted.numel():
        raise ValueError(
            f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} must both be "
            "[M] with M >= 1"
        )
