"""seg_pool against its float64 reference: every reduction, dtype, layout and ISA; errors."""

import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_cases import CASES, CHOOSE, HOWS, LENGTHS, N, compare, ends, weights_for
from row_cases import BF16, DTYPES, FP32, LAYOUTS, for_thread_counts, name, results, rows

from encfast import PackedBatch, ops, ref

NATIVE = ops.backends("seg_pool")["cpu"] == "native"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize(("how", "weighted"), CASES)
def test_matches_reference(how, weighted, normalize, dtype):
    weights = weights_for(how) if weighted else None
    options = {"how": how, "normalize": normalize}
    compare(rows((N, 74), dtype) + 0.3, weights=weights, sparse=how in CHOOSE, **options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("how", CHOOSE)
def test_chosen_rows_of_short_segments_match_reference(how, dtype):
    """Few rows a segment, so that the gradient is no matrix of zeros."""
    for normalize in (False, True):
        compare(rows((7, 74), dtype), ends((1, 2, 0, 1, 1, 2)), how=how, normalize=normalize)


@pytest.mark.quick
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "permuted"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_layouts_match_reference(layout, dtype):
    x = rows((N, 34), dtype, layout)
    compare(x, how="mean", normalize=True)
    compare(x, weights=weights_for("sum", dtype), how="sum")


@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 65, 128, 384, 511, 513, 1100])
@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_widths_match_reference(width, how):
    for dtype in (FP32, BF16):
        compare(rows((N, width), dtype), sparse=how in CHOOSE, how=how)


@pytest.mark.quick
@pytest.mark.parametrize("how", HOWS)
def test_empty_segments_give_zeros(how):
    x, cu_seqlens = torch.randn(0, 5, requires_grad=True), torch.zeros(4, dtype=torch.int32)
    weights = torch.zeros(0) if how == "attention" else None
    out = ops.seg_pool(x, cu_seqlens, how, weights=weights, normalize=True)
    assert torch.equal(out, torch.zeros(3, 5))
    out.sum().backward()
    assert x.grad.shape == (0, 5)
    none = ops.seg_pool(x, torch.zeros(1, dtype=torch.int32), how, weights=weights)
    assert none.shape == (0, 5)


@pytest.mark.quick
def test_first_of_equal_values_is_the_largest():
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [3.0, 1.0]], requires_grad=True)
    for pooled in (ops.seg_pool, ref.seg_pool):
        out = pooled(x, ends((3,)), "max")
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert out.tolist() == [[3.0, 2.0]]
        assert grad.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.quick
def test_nan_is_the_largest_and_stays_in_its_segment():
    x = torch.randn(9, 20)
    x[4, 3] = x[6, 3] = math.nan
    x[2, 5] = -math.inf
    for pooled in (ops.seg_pool, ref.seg_pool):
        for how in HOWS:
            weights = torch.zeros(9) if how == "attention" else None
            out = pooled(x, ends((3, 4, 2)), how, weights=weights)
            clean = pooled(x[7:], ends((2,)), how, weights=None if weights is None else weights[7:])
            assert torch.equal(out[2:], clean)
            assert out[1].isnan().tolist() == [c == 3 and how not in ("first",) for c in range(20)]
    leaf = x.clone().requires_grad_()
    ops.seg_pool(leaf, ends((3, 4, 2)), "max")[1, 3].backward()
    assert leaf.grad.nonzero().tolist() == [[4, 3]]


@pytest.mark.quick
def test_mean_of_zero_weights_is_zero():
    x, weights = torch.randn(5, 7, requires_grad=True), torch.zeros(5, requires_grad=True)
    for pooled in (ops.seg_pool, ref.seg_pool):
        out = pooled(x, ends((2, 3)), "mean", weights=weights)
        assert torch.equal(out, torch.zeros(2, 7))
    ops.seg_pool(x, ends((2, 3)), "mean", weights=weights).sum().backward()
    assert torch.equal(x.grad, torch.zeros(5, 7)) and torch.equal(weights.grad, torch.zeros(5))


def test_a_zero_row_is_normalised_as_pytorch_does_it():
    x = torch.zeros(2, 6, requires_grad=True)
    grads = []
    for f in (
        lambda: ops.seg_pool(x, ends((1, 1)), "first", normalize=True),
        lambda: F.normalize(x),
    ):
        out = f()
        assert torch.equal(out, torch.zeros(2, 6))
        grads += torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(*grads)


def test_large_scores():
    scores = torch.tensor([1e4, -1e4, 0.0, 9.999e3, -math.inf])
    compare(torch.randn(5, 40), ends((5,)), scores, sparse=True, how="attention")


@pytest.mark.quick
def test_equal_for_any_number_of_threads():
    x, w = torch.randn(3000, 600), torch.rand(3000)
    cu_seqlens = ends((1, 2500, 0, 499))
    for how, weights in (("mean", w), ("max", None), ("attention", w)):
        inputs = {"x": x, "weights": weights}

        def run(how=how, inputs=inputs):
            f = functools.partial(_call, cu_seqlens=cu_seqlens, how=how)
            return results(f, inputs, [torch.ones(4, 600)])

        first, *others = for_thread_counts(run)
        for other in others:
            assert all(torch.equal(first[k], other[k]) for k in first)


def _call(x, weights=None, **options):
    return ops.seg_pool(x, weights=weights, normalize=True, **options)


@pytest.mark.quick
def test_opcheck_and_double_backward():
    x, w = torch.randn(N, 12, requires_grad=True), torch.rand(N, requires_grad=True)
    for how, weighted in CASES:
        for dtype in (FP32, BF16):
            args = (x.to(dtype), ends(), w if weighted else None, how, how != "sum")
            torch.library.opcheck(torch.ops.encfast.seg_pool.default, args)
    saved = torch.ops.encfast.seg_pool(x.detach(), ends(), w.detach(), "mean", True)
    dout = torch.randn(len(LENGTHS), 12)
    args = (dout, x.detach(), ends(), w.detach(), *saved, "mean", True, True, True)
    torch.library.opcheck(torch.ops.encfast.seg_pool_bwd.default, args)
    (grad,) = torch.autograd.grad(ops.seg_pool(x, ends()).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="seg_pool: double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(("how", "weighted"), CASES)
def test_gradcheck_of_the_reference(how, weighted):
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(8, dtype=torch.float64, requires_grad=True) if weighted else None
    cu_seqlens = ends((3, 0, 5))
    for normalize in (False, True):
        torch.autograd.gradcheck(
            lambda x, w, n=normalize: ref.seg_pool(x, cu_seqlens, how, w, n), (x, w)
        )


@pytest.mark.parametrize(("how", "weighted"), CASES)
def test_fallback_matches_the_kernel(how, weighted):
    """What serves where no kernel is: the same outputs and gradients."""
    module = importlib.import_module("encfast.ops.seg_pool")
    x, w = torch.randn(N, 12), weights_for(how) if weighted else None
    args = (x, ends(), w, how, True)
    kernel, fallback = torch.ops.encfast.seg_pool(*args), module._reference_fwd(*args)
    for a, b in zip(kernel, fallback, strict=True):
        torch.testing.assert_close(a, b)
    dout = torch.randn(len(LENGTHS), 12)
    more = (dout, x, ends(), w, *kernel, how, True, True, weighted)
    for a, b in zip(
        torch.ops.encfast.seg_pool_bwd(*more), module._reference_bwd(*more), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_compiles():
    def f(x, cu_seqlens, w):
        return ops.seg_pool(x, cu_seqlens, "attention", weights=w, normalize=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 4), (2, 0, 9), (8, 1)):
        n = sum(lengths)
        x, w = torch.randn(n, 6, requires_grad=True), torch.randn(n)
        out = compiled(x, ends(lengths), w)
        assert torch.equal(out, f(x, ends(lengths), w))
        out.sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    run_under_isa(isa, "match_reference or matches_reference or number_of_threads", __file__)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), min_size=0, max_size=6),
    st.integers(1, 40),
    st.sampled_from(CASES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([x for x in LAYOUTS if x != "permuted"]),
)
def test_fuzz(lengths, width, case, dtype, normalize, layout):
    torch.manual_seed(width)
    how, weighted = case
    n = sum(lengths)
    x = rows((n, width), dtype, layout)
    weights = weights_for(how, n=n) if weighted else None
    out = ops.seg_pool(x, ends(lengths), how, weights=weights, normalize=normalize)
    wide = None if weights is None else weights.double()
    expected = ref.seg_pool(x.double(), ends(lengths), how, wide, normalize)
    eps = torch.finfo(dtype).eps
    assert out.shape == (len(lengths), width) and out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=8 * eps, atol=20 * eps)


def test_groups_within_sequences():
    batch = PackedBatch.from_lengths(torch.randn(12, 4), [5, 0, 7])
    groups = batch.groups(3)
    assert groups.lengths().tolist() == [3, 2, 3, 2, 2]
    assert PackedBatch.from_lengths(torch.zeros(26, 1), [9, 17]).groups(8).lengths().tolist() == [
        *(5, 4),
        *(6, 6, 5),
    ]
    out = ops.seg_pool(groups.data, groups.cu_seqlens)
    torch.testing.assert_close(out[1], batch.data[3:5].mean(0))
    with pytest.raises(ValueError, match="size is 0"):
        batch.groups(0)


X, CU = torch.zeros(4, 3), torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "x is list", ([[1.0]], CU), {}),
        (ValueError, r"x has shape \(4,\), expected 2-D", (X[:, 0], CU), {}),
        (ValueError, r"x has shape \(4, 0\)", (X[:, :0], CU), {}),
        (TypeError, "x is float64", (X.double(), CU), {}),
        (TypeError, "cu_seqlens is int64", (X, CU.long()), {}),
        (ValueError, "cu_seqlens is empty", (X, CU[:0]), {}),
        (ValueError, "cu_seqlens starts at 1", (X, CU[1:]), {}),
        (ValueError, "cu_seqlens ends at 1, expected the number of rows, 4", (X, CU[:2]), {}),
        (ValueError, "cu_seqlens decreases", (X, torch.tensor([0, 5, 4]).int()), {}),
        (ValueError, "how is 'median', expected one of 'mean'", (X, CU, "median"), {}),
        (ValueError, r"expected weights \[N\], its scores", (X, CU, "attention"), {}),
        (ValueError, "how is 'max', which takes none", (X, CU, "max"), {"weights": X[:, 0]}),
        (ValueError, "weights has 3 entries, x has 4 rows", (X, CU), {"weights": X[0]}),
        (ValueError, r"weights has shape \(4, 3\)", (X, CU), {"weights": X}),
        (TypeError, "weights is int64", (X, CU), {"weights": torch.ones(4).long()}),
        (ValueError, r"weights holds -1\.0, expected finite", (X, CU), {"weights": X[:, 0] - 1}),
        (ValueError, "weights holds inf", (X, CU), {"weights": X[:, 0] + math.inf}),
    ],
)
def test_errors(error, message, args, options):
    with pytest.raises(error, match=f"seg_pool: .*{message}"):
        ops.seg_pool(*args, **options)


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("cu_seqlens goes from 0 to 3, expected 0 to the number of rows, 4",
         (X, torch.tensor([0, 3]).int(), None, "mean", False)),
        ("decreases from 6 to 4", (X, torch.tensor([0, 6, 4]).int(), None, "mean", False)),
        ("how is median", (X, CU, None, "median", False)),
        ("how is attention, expected weights", (X, CU, None, "attention", False)),
        ("weights were given", (X, CU, torch.ones(4), "first", False)),
        (r"weights has shape \(3\)", (X, CU, torch.ones(3), "sum", False)),
    ],
)  # fmt: skip
def test_direct_calls_are_checked(message, args):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.encfast.seg_pool(*args)
