"""linear against its float64 reference: shapes, layouts, gradients of both orders, errors."""

import pytest
import torch
import torch.nn.functional as F
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

NATIVE = ops.backends("linear")["cpu"] == "native"
OP = torch.ops.encfast.linear.default
BWD = torch.ops.encfast.linear_bwd.default

# N, C and F: one value, no whole vector, whole groups of rows, one row more, several blocks of
# terms for each of the three products, several tasks.
CASES = {
    "one value": (1, 1, 1),
    "no rows": (0, 8, 6),
    "odd": (37, 45, 29),
    "whole": (96, 64, 128),
    "one row more": (97, 64, 128),
    "many channels": (50, 1650, 70),
    "many features": (50, 70, 1650),
    "many rows": (1000, 70, 66),
}


def operands(n, c, f, dtype=FP32, layout="contiguous"):
    return {
        "x": rows((n, c), dtype, layout),
        "weight": rows((f, c), dtype, layout) / c**0.5,
        "bias": torch.randn(f),
    }


def assert_matches(case, dtype=FP32, layout="contiguous"):
    n, c, f = case
    assert_same(
        ops.linear,
        ref.linear,
        ref.linear,
        operands(*case, dtype, layout),
        [torch.randn(n, f)],
        eps_factor=4.0 if min(c * f, n * f) < 1000 else 1.0,
        allow_degenerate=n < 2,
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
    assert_matches((61, 45, 50), dtype, layout)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_rows_a_page_apart_match_reference(dtype):
    """Rows that would all fall into the same cache sets are packed."""
    whole = torch.randn(50, 2048).to(dtype)
    inputs = operands(50, 96, 40, dtype) | {"x": whole[:, :96]}
    assert inputs["x"].stride(0) * inputs["x"].element_size() % 4096 == 0
    assert_same(ops.linear, ref.linear, ref.linear, inputs, [torch.randn(50, 40)])


@pytest.mark.quick
def test_leading_dimensions_and_no_bias():
    x, weight = torch.randn(2, 3, 5, 8), torch.randn(6, 8)
    assert torch.allclose(ops.linear(x, weight), F.linear(x, weight), atol=1e-5)
    assert torch.allclose(ops.linear(x[0, 0, 0], weight), F.linear(x[0, 0, 0], weight), atol=1e-5)


@pytest.mark.quick
def test_no_channels_and_no_features():
    bias = torch.randn(5)
    assert torch.equal(ops.linear(torch.empty(3, 0), torch.empty(5, 0), bias), bias.expand(3, 5))
    assert ops.linear(torch.empty(3, 4), torch.empty(0, 4)).shape == (3, 0)
    x, weight = torch.empty(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ops.linear(x, weight).sum().backward()
    assert x.grad.shape == (0, 4) and torch.equal(weight.grad, torch.zeros(5, 4))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_bit_equal_for_any_thread_count(dtype):
    inputs, grad = operands(330, 800, 410, dtype), torch.randn(330, 410)
    first, *others = for_thread_counts(lambda: results(ops.linear, inputs, [grad]))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_a_row_does_not_depend_on_the_others(dtype):
    inputs, grad = operands(300, 1600, 70, dtype), torch.randn(300, 70).to(dtype)
    whole = results(ops.linear, inputs, [grad])
    for n in (1, 5, 13, 200):
        part = results(ops.linear, inputs | {"x": inputs["x"][:n]}, [grad[:n]])
        assert torch.equal(part["out0"], whole["out0"][:n])
        assert torch.equal(part["dx"], whole["dx"][:n])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(dtype, biased):
    x, weight, bias = (
        t.detach().requires_grad_() for t in operands(9, 10, 6, dtype, "transposed").values()
    )
    torch.library.opcheck(OP, (x, weight, bias if biased else None))
    dout = torch.randn(6, 9).to(dtype).mT.requires_grad_()
    for wanted in ((True, True, biased), (False, True, False), (True, False, True)):
        torch.library.opcheck(BWD, (dout, x, weight, *wanted))


@pytest.mark.quick
@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",), ("bias",)])
def test_gradients_of_gradients_match_reference(wanted):
    inputs = operands(30, 20, 25)

    def second(f, dtype):
        leaves = {k: v.to(dtype).requires_grad_(k in wanted) for k, v in inputs.items()}
        dout = torch.linspace(-1, 1, 25, dtype=dtype).expand(30, 25).clone().requires_grad_()
        given = [leaves[k] for k in wanted]
        first = torch.autograd.grad(f(**leaves), given, dout, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found = torch.autograd.grad(penalty, [dout, *given], allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    ours, exact = second(ops.linear, FP32), second(F.linear, torch.float64)
    for got, want in zip(ours, exact, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 120),
    c=st.integers(1, 90),
    f=st.integers(1, 90),
    dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(n, c, f, dtype, seed):
    torch.manual_seed(seed)
    inputs, grad = operands(n, c, f, dtype), torch.randn(n, f).to(dtype)
    got = results(ops.linear, inputs, [grad])
    want = results(ref.linear, {k: v.double() for k, v in inputs.items()}, [grad])
    assert_near(got, want, dtype)


X, W = torch.randn(5, 6), torch.randn(8, 6)
ERRORS = {
    "x is list": (lambda: ops.linear([1], W), TypeError),
    r"x is a scalar, expected \[..., C\]": (lambda: ops.linear(X[0, 0], W), ValueError),
    "x is float64, expected .* torch.nn.functional.linear": (
        lambda: ops.linear(X.double(), W),
        TypeError,
    ),
    r"weight has shape \(6,\)": (lambda: ops.linear(X, W[0]), ValueError),
    "weight is bfloat16, expected float32, the dtype of x": (
        lambda: ops.linear(X, W.bfloat16()),
        TypeError,
    ),
    "weight is on meta": (lambda: ops.linear(X, W.to("meta")), ValueError),
    r"weight has shape \(8, 5\), expected \[F, 6\]": (
        lambda: ops.linear(X, W[:, :5]),
        ValueError,
    ),
    r"bias has shape \(1, 8\)": (lambda: ops.linear(X, W, torch.ones(1, 8)), ValueError),
    "bias is int64": (lambda: ops.linear(X, W, torch.ones(8).long()), TypeError),
    "bias is on meta": (lambda: ops.linear(X, W, torch.ones(8, device="meta")), ValueError),
    r"bias has shape \(7,\), expected \(8,\)": (
        lambda: ops.linear(X, W, torch.ones(7)),
        ValueError,
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=f"linear: {message}"):
        call()


@pytest.mark.host
@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What Python checks, the kernel checks again: compiled graphs skip the Python check."""
    for x, weight, bias in (
        (X[None], W, None),
        (X, W[:, :5], None),
        (X, W.half(), None),
        (X, W, torch.ones(7)),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="linear"):
            OP(x, weight, bias)
    if NATIVE:
        for dout in (torch.ones(5, 7), torch.ones(4, 8), torch.ones(5, 8).half()):
            with pytest.raises(RuntimeError, match="linear_bwd: dout"):
                BWD(dout, X, W, True, True, True)


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    run_under_isa(isa, "(cases or layouts or apart or channels) and not every_isa", __file__)
