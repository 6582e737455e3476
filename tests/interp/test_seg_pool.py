"""The Triton kernels of seg_pool against the reference in float64, by Triton's interpreter."""

import math

import pytest
import torch
from pool_cases import CASES, CHOOSE, HOWS, compare, ends, weights_for
from row_cases import BF16, FP16, FP32, name, rows

from encfast import ops, ref
from encfast.kernels import seg_pool as kernels
from encfast.ops.seg_pool import _triton_bwd, _triton_fwd

pytestmark = pytest.mark.usefixtures("triton_serves_seg_pool")

# Tiles are 4 rows by 32 columns: segments of less, of as many, of several and a rest.
LENGTHS = (3, 0, 9, 4)
N, C = sum(LENGTHS), 37


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize(("how", "weighted"), CASES)
def test_matches_the_reference(how, weighted, normalize):
    weights = weights_for(how, n=N) if weighted else None
    options = {"how": how, "normalize": normalize, "sparse": how in CHOOSE}
    compare(rows((N, C)) + 0.3, ends(LENGTHS), weights, **options)


@pytest.mark.parametrize(
    ("dtype", "how", "weighted"), [(BF16, *case) for case in CASES] + [(FP16, "attention", True)]
)
def test_half_precision_matches_the_reference(how, weighted, dtype):
    weights = weights_for(how, dtype, n=6) if weighted else None
    compare(rows((6, 30), dtype), ends((1, 2, 0, 3)), weights, how in CHOOSE, how=how)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_match_the_reference(layout):
    x = rows((N, 34), BF16, layout)
    compare(x, ends(LENGTHS), how="mean", normalize=True)
    compare(x, ends(LENGTHS), weights_for("sum", BF16, n=2 * N)[::2], how="sum")


@pytest.mark.parametrize("width", [1, 32, 65])
@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_widths_match_the_reference(width, how):
    compare(rows((7, width)), ends((1, 2, 0, 4)), sparse=True, how=how, normalize=True)


def test_weights_and_columns_of_several_steps(monkeypatch):
    """Programs that own a segment's weights, or a row, walk along them."""
    monkeypatch.setattr(kernels, "_WEIGHTS", 4)
    monkeypatch.setattr(kernels, "_row_block", lambda C: 16)
    for how in ("attention", "mean"):
        compare(rows((9, C)), ends((7, 2)), weights_for(how, n=9), how=how, normalize=True)


@pytest.mark.parametrize("how", HOWS)
def test_empty_segments_give_zeros(how):
    x, cu = torch.randn(0, 5, requires_grad=True), torch.zeros(4, dtype=torch.int32)
    weights = torch.zeros(0) if how == "attention" else None
    out = ops.seg_pool(x, cu, how, weights=weights, normalize=True)
    assert torch.equal(out, torch.zeros(3, 5))
    out.sum().backward()
    assert x.grad.shape == (0, 5)
    assert ops.seg_pool(x, cu[:1], how, weights=weights).shape == (0, 5)


def test_first_of_equal_values_is_the_largest_wherever_its_tile():
    x = torch.zeros(11, 3, requires_grad=True)
    out = ops.seg_pool(x, ends((2, 9)), "max")
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.nonzero()[:, 0].tolist() == [0, 0, 0, 2, 2, 2]
    lowest = torch.full((9, 3), -math.inf, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.seg_pool(lowest, ends((9,)), "max").sum(), lowest)
    assert grad.nonzero()[:, 0].tolist() == [0, 0, 0]


def test_nan_is_the_largest_and_stays_in_its_segment():
    x = torch.randn(16, 20)
    x[9, 3] = x[4, 3] = math.nan
    x[2, 5] = -math.inf
    for how in HOWS:
        weights = torch.zeros(16) if how == "attention" else None
        out = ops.seg_pool(x, ends((3, 11, 2)), how, weights=weights)
        want = ref.seg_pool(x, ends((3, 11, 2)), how, weights)
        torch.testing.assert_close(out, want, equal_nan=True)
    leaf = x.clone().requires_grad_()
    ops.seg_pool(leaf, ends((3, 11, 2)), "max")[1, 3].backward()
    assert leaf.grad.nonzero().tolist() == [[4, 3]]


def test_mean_of_zero_weights_and_a_zero_row_have_zero_results():
    x, weights = torch.randn(5, 7, requires_grad=True), torch.zeros(5, requires_grad=True)
    out = ops.seg_pool(x, ends((2, 3)), "mean", weights=weights, normalize=True)
    assert torch.equal(out, torch.zeros(2, 7))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(5, 7)) and torch.equal(weights.grad, torch.zeros(5))
    zero = torch.zeros(2, 6, requires_grad=True)
    out = ops.seg_pool(zero, ends((1, 1)), "first", normalize=True)
    (grad,) = torch.autograd.grad(out.sum(), zero)
    torch.testing.assert_close(grad, torch.full((2, 6), 1e12))


def test_large_scores():
    scores = torch.tensor([1e4, -1e4, 0.0, 9.999e3, -math.inf])
    compare(torch.randn(5, 40), ends((5,)), scores, sparse=True, how="attention")


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=name)
def test_what_is_not_wanted_is_empty_and_the_rest_the_same(dtype):
    x, weights, cu = rows((6, 20), dtype), torch.rand(6), ends((2, 0, 4))
    saved = kernels.seg_pool(x, cu, weights, "attention", True)
    args = (rows(saved[0].shape, dtype), x, cu, weights, *saved, "attention", True)
    dx, dweights = kernels.seg_pool_bwd(*args, True, True)
    assert (dx.dtype, dweights.dtype, saved[2].dtype) == (dtype, FP32, FP32)
    none, alone = kernels.seg_pool_bwd(*args, False, True)
    assert none.shape == (0,) and torch.equal(alone, dweights)
    alone, none = kernels.seg_pool_bwd(*args, True, False)
    assert none.shape == (0,) and torch.equal(alone, dx)


def test_what_serves_the_op_checks_its_arguments():
    x, cu = torch.randn(5, 6), ends((2, 3))
    out, rows_of_max, norm = _triton_fwd(x, cu, None, "max", True)
    assert torch.equal(out, kernels.seg_pool(x, cu, None, "max", True)[0])
    args = (out, x, cu, None, out, rows_of_max, norm, "max", True, True, False)
    assert torch.equal(_triton_bwd(*args)[0], kernels.seg_pool_bwd(*args)[0])
    with pytest.raises(ValueError, match="cu_seqlens ends at 2"):
        _triton_fwd(x, cu[:2], None, "mean", False)
