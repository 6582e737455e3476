"""What the tests of linear_kl share: both heads, the same in plain PyTorch, a comparison."""

import torch
import torch.nn.functional as F
from row_cases import FP32, assert_same

from encfast import ops, ref


def operands(case, dtype=FP32):
    """The student, and the teacher with its bias."""
    m, v, c, teacher_c, _ = case
    student = {
        "x": torch.randn(m, c).to(dtype),
        "weight": (torch.randn(v, c) * 2 / c**0.5).to(dtype),
        "bias": torch.randn(v),
    }
    teacher = torch.randn(m, teacher_c).to(dtype), (torch.randn(v, teacher_c) / 3).to(dtype)
    return student, (*teacher, torch.randn(v))


def ours(teacher, temperature, **options):
    tx, tw, tb = teacher
    return lambda x, weight, bias: ops.linear_kl(
        x, weight, tx, tw, bias=bias, teacher_bias=tb, temperature=temperature, **options
    )


def exact(teacher, temperature):
    tx, tw, tb = teacher
    return lambda x, weight, bias: ref.linear_kl(
        x, weight, tx.to(x.dtype), tw.to(x.dtype), bias, tb.to(bias.dtype), temperature
    )[0]


def plain(teacher, temperature):
    """The same with both heads' logits in the dtype of x."""
    tx, tw, tb = teacher

    def loss(x, weight, bias):
        z = F.linear(x, weight, bias.to(x.dtype)).float() / (temperature or 1.0)
        t = F.linear(tx, tw, tb.to(x.dtype)).float() / (temperature or 1.0)
        p, q = t.log_softmax(1), z.log_softmax(1)
        return F.kl_div(q, p, reduction="none", log_target=True).sum(1)

    return loss


def assert_matches(case, dtype):
    student, teacher = operands(case, dtype)
    assert_same(
        ours(teacher, case[-1], reduction="none"),
        exact(teacher, case[-1]),
        plain(teacher, case[-1]),
        student,
        [torch.randn(case[0])],
        eps_factor=4.0,
        allow_degenerate=case[0] < 3,
    )
