"""What linear_kl means, in plain PyTorch with all logits; `linear_kl_bwd` is its gradient for the
fallback."""

import torch
from torch import Tensor

from .linear_cross_entropy import logits


def linear_kl(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(KL [M], log-sum-exps of student and teacher [2, M]). Args of `encfast.ops.linear_kl`."""
    t = temperature or 1.0
    student, teacher = (
        logits(x, weight, bias) / t,
        logits(teacher_x, teacher_weight, teacher_bias) / t,
    )
    lse = torch.stack((student.logsumexp(1), teacher.logsumexp(1)))
    p = teacher.softmax(1)
    terms = p * (teacher - student)
    return lse[0] - lse[1] + terms.where(p > 0, 0).sum(1), lse  # 0 times an infinity is 0


def linear_kl_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's x, weight and bias, the last in the compute dtype."""
    t = temperature or 1.0
    student, teacher = (
        logits(x, weight, bias) / t,
        logits(teacher_x, teacher_weight, teacher_bias) / t,
    )
    dz = dloss.to(student.dtype)[:, None] / t * (student.softmax(1) - teacher.softmax(1))
    dx, dweight = dz @ weight.to(dz.dtype), dz.mT @ x.to(dz.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dz.sum(0)
