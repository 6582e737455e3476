"""glu against its float64 reference: every activation, form, dtype, layout and ISA; errors."""

import functools

import pytest
import torch
import torch.nn.functional as F
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    LAYOUTS,
    assert_same,
    for_thread_counts,
    name,
    results,
    rows,
)

from encfast import ops, ref

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
NATIVE = ops.backends("glu")["cpu"] == "native"
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
FORMS = {
    "plain": {"gated": False},
    "first": {"activated": "first"},
    "second": {"activated": "second"},
}


def plain(x, bias=None, activation="gelu", gated=True, activated="first"):
    """The same in plain PyTorch at the dtype of x."""
    x = x if bias is None else x + bias.to(x.dtype)
    if not gated:
        return PLAIN[activation](x)
    a, b = x.chunk(2, dim=-1)
    return PLAIN[activation](a) * b if activated == "first" else a * PLAIN[activation](b)


def compare(x, bias=None, bounds=None, **options):
    shape = plain(x, **options).shape
    assert_same(
        *(functools.partial(f, **options) for f in (ops.glu, ref.glu, plain)),
        {"x": x, "bias": bias},
        [torch.randn(shape).to(x.dtype)],
        **(bounds or {}),
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_matches_reference(activation, form, dtype):
    for bias in (None, torch.randn(74).to(dtype)):
        compare(2 * rows((41, 74), dtype) + 0.7, bias, activation=activation, **FORMS[form])


@pytest.mark.quick
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_mixed_dtypes_match_reference(dtype, bias_dtype):
    x, bias = rows((30, 96), dtype), torch.randn(96).to(bias_dtype)
    assert ops.glu(x, bias=bias).dtype == dtype
    compare(x, bias)


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_layouts_match_reference(layout, dtype):
    x = rows((5, 6, 34), dtype, layout)
    compare(x, torch.randn(34))
    compare(x, gated=False, activation="silu")


@pytest.mark.quick
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 63, 64, 65, 384, 1023])
def test_widths_match_reference(width):
    for dtype in (FP32, BF16):
        compare(rows((19, 2 * width), dtype), torch.randn(2 * width), activated="second")
        compare(rows((19, width), dtype), torch.randn(width), gated=False)


def test_wide_rows_match_reference():
    compare(rows((3, 16384)), torch.randn(16384))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_whole_range_matches_reference(activation, dtype):
    """A dense sweep, the tails included, where quotients and exponents could leave their range."""
    x = torch.cat([torch.linspace(-12, 12, 24001), torch.logspace(-6, 4.5, 400)])
    x = torch.cat([x, -x[-400:]])[None].to(dtype)
    compare(x, gated=False, activation=activation, bounds={"allow_degenerate": True})


@pytest.mark.quick
def test_gelu_is_as_exact_as_the_error_function():
    """Relative to the value, down the lower tail, where (1 + erf) / 2 would keep no digit."""
    x = torch.linspace(-6, 6, 100001)
    exact = x.double() * torch.special.ndtr(x.double())
    error = (ops.glu(x, gated=False).double() - exact).abs()
    assert (error / exact.abs().clamp(min=1e-30)).max() < 6e-6
    assert error.max() < 4e-7


@pytest.mark.quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_are_those_of_float64(activation):
    inf = float("inf")
    x = torch.tensor([[0.0, -0.0, inf, float("nan"), 1e30, -1e30, 88.0, -88.0, -104.0, 3e38]])
    x.requires_grad_()
    y = ops.glu(x, activation=activation, gated=False)
    torch.testing.assert_close(y, PLAIN[activation](x.double()).float(), equal_nan=True)
    (got,) = torch.autograd.grad(y[0, [0, 1, 4, 5, 6, 7, 8]].sum(), x)
    want = {"relu": 0.0}.get(activation, 0.5)
    assert got[0, :2].tolist() == [want] * 2  # relu'(0) is 0
    assert got[0, [4, 6]].tolist() == [1.0] * 2 and got[0, [5, 8]].abs().max() < 1e-30


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 2)], ids=str)
def test_few_rows(shape):
    x, bias = rows(shape), torch.randn(shape[-1])
    grads = [torch.ones(*shape[:-1], shape[-1] // 2)]
    found = results(ops.glu, {"x": x, "bias": bias}, grads)
    want = results(plain, {"x": x, "bias": bias}, grads)
    for key, value in found.items():
        torch.testing.assert_close(value, want[key], atol=2e-6, rtol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("needs", ["x", "bias"])
def test_each_input_may_need_the_only_gradient(needs):
    inputs = {"x": rows((20, 48)), "bias": torch.randn(48)}
    everything = results(ops.glu, inputs, [torch.ones(20, 24)])
    inputs[needs].requires_grad_()
    (got,) = torch.autograd.grad(ops.glu(**inputs).sum(), inputs[needs])
    torch.testing.assert_close(got, everything[f"d{needs}"])


@pytest.mark.quick
def test_a_nan_row_stays_one_row():
    x = rows((6, 40))
    clean = ops.glu(x)
    x[2] = float("nan")
    y = ops.glu(x)
    assert y.isnan().all(1).tolist() == [i == 2 for i in range(6)]
    assert torch.equal(y[3:], clean[3:])


@pytest.mark.quick
def test_only_the_input_is_kept_for_the_backward():
    x, kept = rows((64, 256)).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.glu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradcheck(activation, form):
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def f(x, bias):
        return ref.glu(x, bias=bias, activation=activation, **FORMS[form])

    assert torch.autograd.gradcheck(f, (x, bias))
    assert torch.autograd.gradgradcheck(f, (x, bias))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("form", "dtype", "layout"),
    [
        ("plain", FP32, "contiguous"),
        ("first", BF16, "contiguous"),
        ("second", FP16, "transposed"),
        ("first", FP32, "expanded"),
    ],
)
def test_opcheck(form, dtype, layout):
    gated, second = form != "plain", form == "second"
    x, bias = rows((3, 4, 10), dtype, layout).detach(), torch.randn(10)
    options = ("silu", gated, second)
    leaves = (x.clone().requires_grad_() if layout == "contiguous" else x, bias.requires_grad_())
    torch.library.opcheck(torch.ops.encfast.glu.default, (*leaves, *options))
    if layout == "contiguous":
        dout = torch.randn(3, 4, 5 if gated else 10).to(dtype)
        for want in (True, False):
            args = (dout, x, bias.detach(), *options, want)
            torch.library.opcheck(torch.ops.encfast.glu_bwd.default, args)


@pytest.mark.quick
def test_double_backward_raises():
    x = rows((4, 8)).requires_grad_()
    (g,) = torch.autograd.grad(ops.glu(x).sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="glu: double backward"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.quick
def test_bit_equal_for_any_thread_count():
    inputs = {"x": rows((700, 130), BF16), "bias": torch.randn(130)}
    grads = [torch.randn(700, 65)]
    first, *others = for_thread_counts(lambda: results(ops.glu, inputs, grads))
    for other in others:
        assert all(torch.equal(first[k], other[k]) for k in first)


@given(
    lead=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.integers(1, 70),
    dtypes=st.tuples(*[st.sampled_from((FP32, BF16, FP16))] * 2),
    activation=st.sampled_from(ACTIVATIONS),
    form=st.sampled_from(list(FORMS)),
    layout=st.sampled_from(["contiguous", "strided", "expanded"]),
    biased=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_fuzz_matches_reference(lead, width, dtypes, activation, form, layout, biased):
    torch.manual_seed(width)
    channels = width if form == "plain" else 2 * width
    bias = torch.randn(channels).to(dtypes[1]) if biased else None
    # Of a few elements, the error of the plain maths may be small by luck.
    bounds = {"eps_factor": 4.0, "allow_degenerate": True}
    x = rows((*lead, channels), dtypes[0], layout)
    compare(x, bias, bounds, activation=activation, **FORMS[form])


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    run_under_isa(isa, "match_reference or matches_reference or special or thread_count", __file__)


X = torch.randn(4, 6)
ERRORS = {
    "glu: x is list": (lambda: ops.glu([1.0]), TypeError),
    r"glu: x has shape \(\)": (lambda: ops.glu(torch.tensor(1.0)), ValueError),
    r"glu: x has shape \(4, 0\)": (lambda: ops.glu(X[:, :0]), ValueError),
    "glu: x is float64, expected .*encfast.ref": (lambda: ops.glu(X.double()), TypeError),
    "glu: x has 5 channels, expected two halves": (lambda: ops.glu(X[:, :5]), ValueError),
    "glu: activation is 'swish', expected one of gelu": (
        lambda: ops.glu(X, activation="swish"),
        ValueError,
    ),
    "glu: activated is 1, expected 'first' or 'second'": (
        lambda: ops.glu(X, activated=1),
        ValueError,
    ),
    "glu: bias has 3 entries, x has 6 channels": (
        lambda: ops.glu(X, bias=torch.ones(3)),
        ValueError,
    ),
    "glu: bias is on meta": (lambda: ops.glu(X, bias=torch.ones(6, device="meta")), ValueError),
    "glu: bias is int64": (lambda: ops.glu(X, bias=torch.ones(6).long()), TypeError),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.host
@pytest.mark.quick
def test_direct_calls_never_read_out_of_bounds():
    """What Python checks, the kernels check again: compiled graphs skip the Python check."""
    op, bad = torch.ops.encfast.glu, (RuntimeError, ValueError, TypeError)
    for args in (
        (X[:, :5], None, "gelu", True, False),
        (X, torch.ones(3), "gelu", True, False),
        (X, None, "swish", True, False),
        (X.double(), None, "gelu", True, False),
    ):
        with pytest.raises(bad):
            op(*args)
    if NATIVE:
        with pytest.raises(bad, match="dout"):
            torch.ops.encfast.glu_bwd(X, X, None, "gelu", True, False, False)
