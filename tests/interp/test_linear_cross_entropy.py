"""The Triton kernels of linear_cross_entropy against the reference in float64, interpreted."""

import pytest
import torch
from row_cases import BF16, FP16, FP32, name, rows
from vocab_cases import IGNORE, assert_matches, operands, ours, targets_of

from encfast import ops
from encfast.kernels import _logits
from encfast.ops.linear_cross_entropy import _triton_fwd

pytestmark = pytest.mark.usefixtures("triton_serves_vocabularies")

# Rows, V and C; tiles are 32 by 32 with steps of 64 terms (32 where rows lie at no multiple of 16).
CASES = {
    "one row": (1, 7, 5),
    "one entry": (6, 1, 4),
    "odd": (35, 67, 37),
    "whole tiles": (32, 64, 64),
}
OPTIONS = {
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0, "ignore_index": 3},
}


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_the_reference(case, dtype):
    m, v, c = CASES[case]
    assert_matches(operands(m, v, c, dtype), targets_of(m, v))


@pytest.mark.parametrize("dtype", (FP32, FP16), ids=name)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_the_reference(options, dtype):
    given = OPTIONS[options]
    targets = targets_of(20, 45, given.get("ignore_index", IGNORE))
    assert_matches(operands(20, 45, 24, dtype), targets, **given)


@pytest.mark.parametrize("layout", ("transposed", "strided", "expanded"))
def test_layouts_match_the_reference(layout):
    inputs = operands(9, 20, 16, BF16)
    inputs["weight"] = rows((20, 16), BF16, layout)
    inputs["x"] = rows((9, 16), BF16, "strided")
    assert_matches(inputs, torch.randint(0, 20, (18,))[::2])


def test_chosen_rows_in_any_order_and_twice():
    chosen = torch.tensor([7, 0, 7, 3, 8])
    assert_matches(operands(9, 33, 8), targets_of(5, 33), rows=chosen)


def test_several_parts_and_slices(monkeypatch):
    """Five tiles of columns, one program each or three and two; slices of 2, 2 and 1 tiles."""
    inputs, targets = operands(40, 150, 24), targets_of(40, 150)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    assert_matches(inputs, targets, **options)
    for attribute, value in (
        ("_PROGRAMS", 3),
        ("SLOT_BYTES", 40 * 64 * 4),
        ("_COLUMN_STEP", 32),
        ("_LEAST_COLUMNS", 32),
    ):
        monkeypatch.setattr(_logits, attribute, value)
    tile = {"BLOCK_X": 32, "BLOCK_Y": 32}
    assert _logits.shares_of(40, 150, tile) == (2, 2, 3)
    slices = _logits.Slices(inputs["x"], inputs["weight"], True, True)
    assert [c.stop - c.start for c, grad in slices if grad.zero_() is grad] == [64, 64, 22]
    assert_matches(inputs, targets, **options)


def test_ignored_rows_may_hold_anything():
    x, weight, bias = operands(9, 20, 6).values()
    targets = targets_of(9, 20)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    clean = ours(targets)(*leaves)
    expected = torch.autograd.grad(clean.sum(), leaves)
    x[targets == IGNORE] = torch.nan
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    loss = ours(targets)(*leaves)
    assert torch.equal(loss, clean) and (loss[targets == IGNORE] == 0).all()
    for got, want in zip(torch.autograd.grad(loss.sum(), leaves), expected, strict=True):
        assert want.abs().sum() > 0 and torch.equal(got, want)
    none = torch.full((9,), IGNORE)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    loss = ops.linear_cross_entropy(*leaves[:2], none, leaves[2])
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


def test_large_logits_and_entries_that_are_hidden():
    """Exponentials that overflow; a first tile of nothing but -inf."""
    x, weight = torch.eye(4) * 1e4, torch.cat((torch.zeros(33, 4), torch.eye(4)))
    bias = torch.zeros(37)
    bias[:33] = -torch.inf
    weight.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.arange(33, 37), bias, reduction="none")
    assert torch.equal(loss, torch.zeros(4))
    (dweight,) = torch.autograd.grad(loss.sum(), weight)
    assert torch.equal(dweight, torch.zeros(37, 4))
    wrong = ops.linear_cross_entropy(
        x, weight, torch.tensor([34, 33, 33, 33]), bias, reduction="sum"
    )
    assert wrong == 4e4


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
def test_what_is_not_wanted_is_empty_and_the_rest_the_same(dtype):
    x, weight, bias = operands(9, 20, 6, dtype).values()
    targets, options = targets_of(9, 20), (-100, None, None, None)
    _, lse, kept = torch.ops.encfast.linear_cross_entropy(
        x, weight, targets, bias, None, *options, True
    )
    args = (torch.randn(9), x, weight, targets, bias, None, lse, kept, *options)
    bwd = torch.ops.encfast.linear_cross_entropy_bwd
    every = bwd(*args, True, True, True)
    assert [g.dtype for g in every] == [dtype, dtype, FP32]
    for i in range(3):
        found = bwd(*args, *(i == j for j in range(3)))
        for j, (got, want) in enumerate(zip(found, every, strict=True)):
            assert torch.equal(got, want) if i == j else got.shape == (0,)


def test_no_rows():
    x, weight = torch.empty(0, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    targets, bias = torch.empty(0, dtype=torch.int64), torch.randn(8, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, targets, bias)
    assert loss == 0
    for g, like in zip(
        torch.autograd.grad(loss, (x, weight, bias)), (x, weight, bias), strict=True
    ):
        assert torch.equal(g, torch.zeros_like(like))


def test_what_serves_the_op_checks_its_arguments():
    x, weight, bias = operands(5, 8, 6).values()
    with pytest.raises(ValueError, match="targets holds 8"):
        _triton_fwd(x, weight, torch.full((5,), 8), bias, None, -100, None, None, None, False)
