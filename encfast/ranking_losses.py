"""Losses that distil a teacher's scores of each query's K candidates, beside `ops.partial_ranking`.

All take the student's logits and the teacher's scores, ``[B, K]`` each, in the same order of the
candidates, in fp32 or wider (fp64 stays fp64), and return the mean over the B queries. No gradient
goes to the teacher. Student logits of features come from :func:`encfast.ops.candidate_dots`.
"""

from __future__ import annotations

import math

from torch import Tensor

from encfast._precision import wide


def logit_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` over a query's candidates.

    Source: Hinton et al. 2015, arXiv 1503.02531.

    Args:
        student: ``[B, K]``.
        teacher: ``[B, K]``.
        temperature: T, a positive finite number.

    Returns:
        0-dim, fp32 or wider: the mean over the queries.

    Raises:
        ValueError: for shapes that differ or are empty, or another temperature.

    Examples:
        >>> from encfast.ranking_losses import logit_kl
        >>> teacher = torch.tensor([[3.0, 2.0, 1.0]])
        >>> logit_kl(teacher + 5, teacher).abs() < 1e-6
        tensor(True)
    """
    student, teacher = _pair(student, teacher)
    _check_temperature(temperature)
    log_p, log_q = (x.div(temperature).log_softmax(1) for x in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


def list_net(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross entropy of the student's top-one probabilities against the teacher's.

    Source: Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach".

    Args:
        student: ``[B, K]``.
        teacher: ``[B, K]``.
        temperature: of the teacher's softmax, a positive finite number.

    Returns:
        0-dim, fp32 or wider: the mean over the queries.

    Raises:
        ValueError: as :func:`logit_kl`.

    Examples:
        >>> from encfast.ranking_losses import list_net
        >>> teacher = torch.tensor([[3.0, 2.0, 1.0]])
        >>> list_net(teacher, teacher) < list_net(-teacher, teacher)
        tensor(True)
    """
    student, teacher = _pair(student, teacher)
    _check_temperature(temperature)
    p = teacher.div(temperature).softmax(1)
    return -(p * student.log_softmax(1)).sum(1).mean()


def list_mle(student: Tensor, teacher: Tensor) -> Tensor:
    """Negative log likelihood of the teacher's whole order: `partial_ranking` with all K valid.

    Source: Xia et al. 2008, "Listwise approach to learning to rank: theory and algorithm".

    Args:
        student: ``[B, K]``.
        teacher: ``[B, K]``; of ties the first candidate is ranked first.

    Returns:
        0-dim, fp32 or wider: the mean over the queries.

    Raises:
        ValueError: as :func:`logit_kl`.

    Examples:
        >>> from encfast.ranking_losses import list_mle
        >>> teacher = torch.tensor([[3.0, 2.0, 1.0]])
        >>> list_mle(9 * teacher, teacher) < list_mle(-9 * teacher, teacher)
        tensor(True)
    """
    student, teacher = _pair(student, teacher)
    x = student.gather(1, teacher.argsort(dim=1, descending=True, stable=True))
    return (x.flip(1).logcumsumexp(1).flip(1) - x).sum(1).mean()


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square of how margins ``s_j - s_k`` differ from the teacher's, over all pairs j < k.

    Computed as twice the variance of what the scores differ by: no ``[B, K, K]``. A single
    candidate has no pair and a loss of 0.

    Source: Hofstaetter et al. 2020, arXiv 2010.02666, which takes one pair of a query.

    Args:
        student: ``[B, K]``.
        teacher: ``[B, K]``.

    Returns:
        0-dim, fp32 or wider: the mean over queries and pairs.

    Raises:
        ValueError: as :func:`logit_kl`.

    Examples:
        >>> from encfast.ranking_losses import margin_mse
        >>> margin_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor(4.)
    """
    student, teacher = _pair(student, teacher)
    difference = student - teacher
    difference = difference - difference.mean(1, keepdim=True)
    # sum_{j < k} (d_j - d_k)^2 = K sum_j (d_j - mean)^2, over K (K - 1) / 2 pairs.
    return (2 * difference.square().sum(1) / max(student.shape[1] - 1, 1)).mean()


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or 0 in student.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, expected [B, K] with a query and a "
            "candidate at least"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)}, expected {tuple(student.shape)} like the "
            "student"
        )
    student = wide(student)
    return student, teacher.detach().to(student.dtype)


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a positive finite number")
