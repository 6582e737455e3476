"""grouped_mm against its float64 reference: groups, shapes, layouts, gradients, errors."""

import pytest
import torch
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import (
    BF16,
    DTYPES,
    FP32,
    assert_near,
    assert_same,
    for_thread_counts,
    name,
    results,
    rows,
)

from encfast import ops, ref

NATIVE = ops.backends("grouped_mm")["cpu"] == "native"
OP = torch.ops.encfast.grouped_mm.default
BWD = torch.ops.encfast.grouped_mm_bwd.default

# Lengths of the groups, rows beyond them, C and F: one group, empty ones, no rows, odd sizes, more
# than one block of terms, rows and columns.
CASES = {
    "one group": ((37,), 0, 50, 70),
    "one row": ((1,), 0, 3, 2),
    "empty groups": ((0, 5, 0, 0, 21, 1, 0), 0, 65, 33),
    "rows beyond": ((3, 18), 9, 40, 64),
    "no rows": ((0, 0), 0, 8, 6),
    "none but beyond": ((0, 0), 5, 8, 6),
    "all in one": ((0, 64, 0), 0, 32, 32),
    "blocks": ((13, 230, 40), 2, 601, 290),
    "many terms of dW": ((560,), 0, 34, 38),
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def operands(lengths, beyond, c, f, dtype=FP32, layout="contiguous"):
    n, e = sum(lengths) + beyond, len(lengths)
    return {
        "x": rows((n, c), dtype, layout),
        "weight": rows((e, f, c), dtype, layout) / c**0.5,
        "bias": torch.randn(e, f),
    }


def assert_matches(case, dtype=FP32, layout="contiguous"):
    lengths, beyond, c, f = case
    cu, inputs = offsets(lengths), operands(*case, dtype, layout)
    few = sum(lengths) < 2
    assert_same(
        lambda x, weight, bias: ops.grouped_mm(x, weight, cu, bias=bias),
        lambda x, weight, bias: ref.grouped_mm(x, weight, cu, bias),
        lambda x, weight, bias: ref.grouped_mm(x, weight, cu, bias),
        inputs,
        [torch.randn(sum(lengths) + beyond, f)],
        eps_factor=4.0 if min(c * f, sum(lengths) * f) < 1000 else 1.0,
        allow_degenerate=few or 0 in lengths,
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_reference(case, dtype):
    assert_matches(CASES[case], dtype)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts_match_reference(layout, dtype):
    assert_matches(((9, 0, 28), 3, 45, 50), dtype, layout)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rows_beyond_the_groups_may_hold_anything(dtype):
    lengths, beyond = (7, 0, 12), 6
    cu, inputs = offsets(lengths), operands(lengths, beyond, 35, 41, dtype)
    grad = torch.randn(25, 41)

    def both(poison):
        inputs["x"][19:], grad[19:] = poison, poison
        return results(
            lambda x, weight, bias: ops.grouped_mm(x, weight, cu, bias=bias), inputs, [grad]
        )

    clean, poisoned = both(0.0), both(float("nan"))
    for key, value in poisoned.items():
        assert value.abs().sum() > 0 and torch.equal(value, clean[key]), key
    assert (poisoned["out0"][19:] == 0).all() and (poisoned["dx"][19:] == 0).all()
    assert (poisoned["dweight"][1] == 0).all() and (poisoned["dbias"][1] == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_bit_equal_for_any_thread_count(dtype):
    cu, inputs = offsets((200, 3, 0, 31)), operands((200, 3, 0, 31), 0, 300, 280, dtype)
    grad = torch.randn(234, 280)
    first, *others = for_thread_counts(
        lambda: results(
            lambda x, weight, bias: ops.grouped_mm(x, weight, cu, bias=bias), inputs, [grad]
        )
    )
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.quick
def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(300, 530), torch.randn(1, 40, 530)
    whole = ops.grouped_mm(x, weight, offsets((300,)))
    for n in (1, 5, 13, 200):
        assert torch.equal(ops.grouped_mm(x[:n], weight, offsets((n,))), whole[:n])


@pytest.mark.quick
def test_no_channels_and_no_columns():
    bias, cu = torch.randn(2, 5), offsets((1, 2))
    got = ops.grouped_mm(torch.empty(3, 0), torch.empty(2, 5, 0), cu, bias=bias)
    assert torch.equal(got, bias[[0, 1, 1]])
    assert ops.grouped_mm(torch.empty(3, 4), torch.empty(2, 0, 4), cu).shape == (3, 0)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(dtype, biased):
    tensors = operands((3, 0, 4), 2, 10, 6, dtype, "transposed")
    cu = offsets((3, 0, 4))
    x, weight, bias = (t.detach().requires_grad_() for t in tensors.values())
    torch.library.opcheck(OP, (x, weight, cu, bias if biased else None))
    dout = torch.randn(6, 9).to(dtype).mT
    for wanted in ((True, True, biased), (False, True, False), (True, False, True)):
        torch.library.opcheck(BWD, (dout, x.detach(), weight.detach(), cu, *wanted))


@pytest.mark.quick
def test_double_backward_raises():
    x = torch.randn(3, 4, requires_grad=True)
    y = ops.grouped_mm(x, torch.randn(1, 5, 4), offsets((3,))).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="grouped_mm: double backward"):
        dx.sum().backward()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    beyond=st.integers(0, 9),
    c=st.integers(1, 90),
    f=st.integers(1, 90),
    dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(lengths, beyond, c, f, dtype, seed):
    torch.manual_seed(seed)
    cu, inputs = offsets(lengths), operands(lengths, beyond, c, f, dtype)
    grad = torch.randn(sum(lengths) + beyond, f).to(dtype)
    wide = {k: v.double() for k, v in inputs.items()}
    got = results(lambda x, weight, bias: ops.grouped_mm(x, weight, cu, bias=bias), inputs, [grad])
    want = results(lambda x, weight, bias: ref.grouped_mm(x, weight, cu, bias), wide, [grad])
    assert_near(got, want, dtype)


X, W, CU = torch.randn(5, 6), torch.randn(2, 8, 6), offsets((2, 3))
ERRORS = {
    "x is list": (lambda: ops.grouped_mm([1], W, CU), TypeError),
    r"x has shape \(6,\)": (lambda: ops.grouped_mm(X[0], W, CU), ValueError),
    "x is float64, expected .* encfast.ref": (
        lambda: ops.grouped_mm(X.double(), W, CU),
        TypeError,
    ),
    r"weight has shape \(8, 6\)": (lambda: ops.grouped_mm(X, W[0], CU), ValueError),
    "weight is bfloat16, expected float32, the dtype of x": (
        lambda: ops.grouped_mm(X, W.bfloat16(), CU),
        TypeError,
    ),
    "weight is on meta": (lambda: ops.grouped_mm(X, W.to("meta"), CU), ValueError),
    r"weight has shape \(2, 8, 5\), expected \[E, F, 6\]": (
        lambda: ops.grouped_mm(X, W[..., :5], CU),
        ValueError,
    ),
    r"cu_seqlens has shape \(1, 3\)": (lambda: ops.grouped_mm(X, W, CU[None]), ValueError),
    "cu_seqlens is int64": (lambda: ops.grouped_mm(X, W, CU.long()), TypeError),
    "cu_seqlens is on meta": (lambda: ops.grouped_mm(X, W, CU.to("meta")), ValueError),
    "cu_seqlens has 2 entries, expected 3": (lambda: ops.grouped_mm(X, W, CU[:2]), ValueError),
    "cu_seqlens starts at 1": (lambda: ops.grouped_mm(X, W, CU + 1), ValueError),
    "cu_seqlens decreases from 2 to 0 at group 1": (
        lambda: ops.grouped_mm(X, W, CU * torch.tensor([1, 1, 0], dtype=torch.int32)),
        ValueError,
    ),
    "cu_seqlens ends at 5, but x has 4 rows": (lambda: ops.grouped_mm(X[:4], W, CU), ValueError),
    r"bias has shape \(8,\)": (lambda: ops.grouped_mm(X, W, CU, bias=X.new_ones(8)), ValueError),
    "bias is int64": (
        lambda: ops.grouped_mm(X, W, CU, bias=torch.ones(2, 8).long()),
        TypeError,
    ),
    "bias is on meta": (
        lambda: ops.grouped_mm(X, W, CU, bias=torch.ones(2, 8, device="meta")),
        ValueError,
    ),
    r"bias has shape \(2, 7\), expected \(2, 8\)": (
        lambda: ops.grouped_mm(X, W, CU, bias=torch.ones(2, 7)),
        ValueError,
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=f"grouped_mm: {message}"):
        call()


@pytest.mark.host
@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What Python checks, the kernel checks again: compiled graphs skip the Python check."""
    down = torch.tensor([0, 4, 2], dtype=torch.int32)
    for x, weight, cu, bias in (
        (X, W, CU + 1, None),
        (X[:4], W, CU, None),
        (X, W, down, None),
        (X, W, CU[:2], None),
        (X, W, CU.long(), None),
        (X, W[..., :5], CU, None),
        (X, W.half(), CU, None),
        (X, W, CU, torch.ones(2, 7)),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="grouped_mm"):
            OP(x, weight, cu, bias)
    if NATIVE:
        for dout in (torch.ones(5, 7), torch.ones(4, 8), torch.ones(5, 8).half()):
            with pytest.raises(RuntimeError, match="grouped_mm_bwd: dout"):
                BWD(dout, X, W, CU, True, True, True)


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    cases = "cases_match or layouts_match or anything or no_channels"
    run_under_isa(isa, f"({cases}) and not every_isa", __file__)
