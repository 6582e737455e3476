"""The Triton kernels of linear_kl against the reference in float64, by Triton's interpreter."""

import pytest
import torch
from kl_cases import assert_matches, operands
from row_cases import BF16, FP16, FP32, name, rows

from encfast import ops
from encfast.kernels import _logits
from encfast.ops.linear_kl import _triton_fwd

pytestmark = pytest.mark.usefixtures("triton_serves_vocabularies")

# Rows, V, channels of student and teacher, temperature; tiles are 16 by 32.
CASES = {
    "one row": (1, 7, 5, 3, None),
    "odd": (21, 67, 13, 70, None),
    "warm": (21, 67, 13, 29, 3.0),
    "whole tiles": (16, 64, 64, 128, 0.5),
}


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_the_reference(case, dtype):
    assert_matches(CASES[case], dtype)


def test_float16_matches_the_reference():
    assert_matches((9, 20, 8, 5, 2.0), FP16)


def test_several_parts_and_slices(monkeypatch):
    for attribute, value in (("_PROGRAMS", 2), ("SLOT_BYTES", 0), ("_LEAST_COLUMNS", 64)):
        monkeypatch.setattr(_logits, attribute, value)
    assert _logits.shares_of(20, 150, {"BLOCK_X": 16, "BLOCK_Y": 32}) == (2, 1, 5)
    assert_matches((20, 150, 24, 8, 2.0), FP32)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_a_student_that_is_its_teacher(dtype):
    x, weight, bias = operands((20, 60, 16, 1, None), dtype)[0].values()
    leaf = x.clone().requires_grad_()
    loss = ops.linear_kl(leaf, weight, x, weight, bias=bias, teacher_bias=bias, reduction="sum")
    (dx,) = torch.autograd.grad(loss, leaf)
    assert loss.abs() < 1e-4 and dx.abs().max() < 1e-5


def test_entries_that_the_teacher_hides_and_large_logits():
    """A tile of nothing but -inf; an entry with p = 0 adds 0, also where the student has it not."""
    student, teacher = operands((5, 70, 8, 8, None))
    bias, teacher_bias = student["bias"], teacher[2]
    teacher_bias[:33] = bias[:3] = -torch.inf
    x, weight = student["x"] * 1e3, student["weight"]
    leaf = x.clone().requires_grad_()
    loss = ops.linear_kl(
        leaf, weight, *teacher[:2], bias=bias, teacher_bias=teacher_bias, reduction="none"
    )
    p = torch.nn.functional.linear(*teacher).double().log_softmax(1)
    q = torch.nn.functional.linear(x, weight, bias).double().log_softmax(1)
    expected = (p.exp() * (p - q)).where(p > -torch.inf, 0).sum(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


def test_views_give_the_bits_of_their_copies():
    x, weight = rows((9, 16), BF16, "strided"), rows((20, 16), BF16, "transposed")
    tx, tw = rows((9, 16), BF16, "expanded"), rows((20, 16), BF16, "strided")
    found = []
    for tensors in ((x, weight, tx, tw), [t.contiguous() for t in (x, weight, tx, tw)]):
        leaves = [t.detach().requires_grad_() for t in tensors[:2]]
        loss = ops.linear_kl(*leaves, *tensors[2:])
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_rows_and_what_is_not_wanted():
    x, weight = torch.empty(0, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    loss = ops.linear_kl(x, weight, torch.empty(0, 3), torch.randn(8, 3))
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and dx.shape == (0, 6) and torch.equal(dweight, torch.zeros(8, 6))
    x, teacher = torch.randn(5, 6), (torch.randn(5, 3), torch.randn(8, 3))
    both = torch.ops.encfast.linear_kl(x, weight.detach(), *teacher, None, None, None, False)
    args = (torch.randn(5), x, weight.detach(), *teacher, None, None, None, *both[1:])
    bwd = torch.ops.encfast.linear_kl_bwd
    every = bwd(*args, True, True, True)
    for i in range(3):
        found = bwd(*args, *(i == j for j in range(3)))
        for j, (got, want) in enumerate(zip(found, every, strict=True)):
            assert torch.equal(got, want) if i == j else got.shape == (0,)


def test_what_serves_the_op_checks_its_arguments():
    x, weight = torch.randn(5, 6), torch.randn(8, 6)
    with pytest.raises(ValueError, match="teacher_weight has shape"):
        _triton_fwd(x, weight, x, weight[:7], None, None, None, False)
