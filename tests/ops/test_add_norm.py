"""add_norm against its float64 reference: every option, dtype, layout and ISA; errors; threads."""

import pytest
import torch
import torch.nn.functional as F
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import ADD_NORM_PARTS as PARTS
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
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from encfast import ops, ref

KINDS = ("layernorm", "rmsnorm")
NATIVE = ops.backends("add_norm")["cpu"] == "native"


def plain(x, residual=None, weight=None, bias=None, branch_scale=None, kind="layernorm", eps=1e-5):
    """The same in plain PyTorch at the dtype of its inputs; parameters do not promote."""
    s = x if branch_scale is None else branch_scale.to(x.dtype) * x
    s = s if residual is None else residual + s
    weight, bias = (None if p is None else p.to(s.dtype) for p in (weight, bias))
    if kind == "layernorm":
        return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s
    y = F.rms_norm(s, s.shape[-1:], weight, eps)
    return (y if bias is None else y + bias), s


def make(shape, parts, dtypes, layout="contiguous", offset=0.0):
    """x, residual and parameters; dtypes of x, residual and parameters."""
    x = rows(shape, dtypes[0], layout) + offset if offset else rows(shape, dtypes[0], layout)
    inputs = {"x": x}
    for part in parts:
        if part == "residual":
            inputs[part] = rows(shape, dtypes[1], layout)
        else:
            inputs[part] = (torch.randn(shape[-1]) * 0.5 + 1).to(dtypes[2])
    return inputs


def cancelling_terms(inputs, kind, dy):
    """What gradients of rows are differences of; two channels leave little of it."""
    wide = {k: v.double() for k, v in inputs.items()}
    rstd = ref.add_norm(**wide, kind=kind)[3]
    terms = rstd[..., None] * dy.double() * wide.get("weight", 1)
    largest = max(terms.abs().flatten().tolist(), default=0.0)
    by_scale = max((terms * wide["x"]).abs().flatten().tolist(), default=0.0)
    return {"dx": largest, "dresidual": largest, "dbranch_scale": by_scale}


def compare(inputs, kind="layernorm", eps=None, few_elements=False, **options):
    """few_elements: the error of the plain maths may be small by luck, and sums cancel."""
    x, shape = inputs["x"], inputs["x"].shape
    scale = "branch_scale" in inputs
    has_sum = scale or "residual" in inputs
    grads = [torch.randn(shape).to(x.dtype) for _ in range(1 + has_sum)]

    def take(outs):
        return outs[: 1 + has_sum]

    if few_elements:
        options |= {"terms": cancelling_terms(inputs, kind, grads[0]), "eps_factor": 4.0}
    assert_same(
        lambda **a: take(ops.add_norm(**a, kind=kind, eps=eps, return_sum=True)),
        lambda **a: take(ref.add_norm(**a, kind=kind, eps=eps)),
        lambda **a: take(plain(**a, kind=kind, eps=1e-5 if eps is None else eps)),
        inputs,
        grads,
        **options,
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_add_norm_matches_reference(parts, kind, dtype):
    compare(make((37, 75), PARTS[parts], (dtype,) * 3), kind)


MIXED = [
    (BF16, FP32, FP32),
    (FP32, BF16, BF16),
    (BF16, BF16, FP32),
    (FP16, BF16, FP32),
    (FP32, FP32, BF16),
]


@pytest.mark.quick
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(map(name, d)))
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes_match_reference(dtypes, kind):
    inputs = make((40, 130), PARTS["scaled"], dtypes)
    y, total = ops.add_norm(**inputs, kind=kind, return_sum=True)
    assert y.dtype == total.dtype == torch.promote_types(*dtypes[:2])
    compare(inputs, kind)


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_layouts_match_reference(layout, dtype):
    compare(make((5, 6, 33), PARTS["scaled"], (dtype,) * 3, layout))


@pytest.mark.quick
@pytest.mark.parametrize("channels", [2, 15, 16, 17, 63, 64, 65, 384, 1023])
def test_channel_counts_match_reference(channels):
    for dtype in (FP32, BF16):
        compare(make((19, channels), PARTS["scaled"], (dtype,) * 3))


def test_wide_rows_match_reference():
    for channels in (4097, 8192):
        compare(make((7, channels), PARTS["scaled"], (FP32,) * 3))


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_channel(kind):
    """LayerNorm of one channel is its bias, RMSNorm its sign."""
    x, w, b = torch.tensor([[3.0], [-2.0], [0.5]]), torch.tensor([2.0]), torch.tensor([0.25])
    y = ops.add_norm(x, None, w, b, kind=kind, eps=0.0 if kind == "rmsnorm" else None)
    want = torch.full((3, 1), 0.25) if kind == "layernorm" else x.sign() * 2 + 0.25
    torch.testing.assert_close(y, want)


@pytest.mark.quick
def test_a_large_mean_does_not_cancel():
    """The variance of rows around 1000 by sums of squares would have three digits."""
    compare(make((16, 768), PARTS["affine"], (FP32,) * 3, offset=1000.0))


@pytest.mark.quick
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.1])
def test_eps(eps):
    compare(make((9, 40), PARTS["affine"], (FP32,) * 3), "rmsnorm", eps)
    compare(make((9, 40), PARTS["affine"], (FP32,) * 3), "layernorm", eps)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 8)], ids=str)
def test_few_rows(shape, kind):
    inputs = make(shape, PARTS["scaled"], (FP32,) * 3)
    found = results(
        lambda **a: ops.add_norm(**a, kind=kind, return_sum=True), inputs, [torch.ones(shape)] * 2
    )
    want = results(lambda **a: plain(**a, kind=kind), inputs, [torch.ones(shape)] * 2)
    for key, value in found.items():
        torch.testing.assert_close(value, want[key], atol=2e-6, rtol=1e-5)
    if 0 in shape:
        assert (found["dweight"] == 0).all() and (found["dbranch_scale"] == 0).all()


@pytest.mark.quick
def test_the_sum_is_rounded_before_its_norm():
    """y is the norm of the very sum that is returned."""
    x, residual = rows((50, 96), BF16), rows((50, 96), BF16)
    y, total = ops.add_norm(x, residual, return_sum=True)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.add_norm(total))


@pytest.mark.quick
def test_gradient_through_one_output_only():
    inputs = make((20, 48), PARTS["residual"], (FP32,) * 3)
    for pick in (0, 1):
        leaves = [v.detach().requires_grad_() for v in inputs.values()]
        ours = ops.add_norm(*leaves, return_sum=True)[pick].square().sum()
        want = plain(*leaves)[pick].square().sum()
        for a, b in zip(
            torch.autograd.grad(ours, leaves[:2]),
            torch.autograd.grad(want, leaves[:2]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("needs", ["x", "residual", "weight", "bias", "branch_scale"])
def test_each_input_may_need_the_only_gradient(needs):
    inputs = make((20, 48), PARTS["scaled"], (FP32,) * 3)
    everything = results(lambda **a: ops.add_norm(**a), inputs, [torch.ones(20, 48)])
    inputs[needs].requires_grad_()
    (got,) = torch.autograd.grad(ops.add_norm(**inputs).sum(), inputs[needs])
    assert torch.equal(got, everything[f"d{needs}"])


@pytest.mark.quick
def test_a_direct_call_that_keeps_no_sum_has_the_same_gradients():
    inputs = make((20, 48), PARTS["scaled"], (BF16,) * 3)
    order = ("x", "residual", "weight", "bias", "branch_scale")
    found = []
    for keep in (True, False):
        leaves = [inputs[k].detach().requires_grad_() for k in order]
        y, total, *_ = torch.ops.encfast.add_norm(*leaves, "layernorm", None, keep)
        assert total.shape == (y.shape if keep else (0,))
        found.append((y, *torch.autograd.grad(y.float().sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
def test_inputs_are_not_written_and_outputs_do_not_alias():
    x, residual = rows((4, 32)), rows((4, 32))
    before = x.clone(), residual.clone()
    y, total = ops.add_norm(x, residual, return_sum=True)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert len({t.data_ptr() for t in (x, residual, y, total)}) == 4


@pytest.mark.quick
def test_a_nan_row_stays_one_row():
    x = rows((6, 40))
    clean = ops.add_norm(x)
    x[2, 3] = float("nan")
    y = ops.add_norm(x)
    assert y.isnan().all(1).tolist() == [i == 2 for i in range(6)]
    assert torch.equal(y[3:], clean[3:])


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradcheck(kind):
    inputs = make((3, 2, 5), PARTS["scaled"], (torch.float64,) * 3)
    leaves = [v.requires_grad_() for v in inputs.values()]

    def f(x, residual, weight, bias, scale):
        return ref.add_norm(x, residual, weight, bias, branch_scale=scale, kind=kind)[:2]

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def opcheck_inputs(parts, kind, dtypes, layout):
    inputs = make((3, 4, 10), PARTS[parts], dtypes, layout)
    order = ("x", "residual", "weight", "bias", "branch_scale")
    return [inputs[k].detach() if k in inputs else None for k in order]


OPCHECKS = {
    "x-float32": ("x", "layernorm", (FP32,) * 3, "contiguous"),
    "x-bfloat16-rmsnorm": ("x", "rmsnorm", (BF16,) * 3, "contiguous"),
    "residual-float16-transposed": ("residual", "layernorm", (FP16,) * 3, "transposed"),
    "scaled-mixed-expanded": ("scaled", "layernorm", (BF16, FP32, FP32), "expanded"),
    "scaled-mixed-rmsnorm": ("scaled", "rmsnorm", (FP32, BF16, BF16), "contiguous"),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    tensors = opcheck_inputs(*OPCHECKS[case])
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    args = (*leaves, OPCHECKS[case][1], 1e-5, True)
    torch.library.opcheck(torch.ops.encfast.add_norm.default, args)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_bwd(kind):
    x, residual, weight, bias, scale = opcheck_inputs("scaled", kind, (BF16, FP32, BF16), "strided")
    y, total, mean, rstd = torch.ops.encfast.add_norm(
        x, residual, weight, bias, scale, kind, None, True
    )
    saved = (total, mean, rstd, x, weight, scale, kind)
    op = torch.ops.encfast.add_norm_bwd.default
    torch.library.opcheck(op, (torch.randn_like(y), None, *saved, True, True))
    torch.library.opcheck(op, (torch.randn_like(y), torch.randn_like(y), *saved, False, True))


@pytest.mark.quick
def test_compiles_once_for_ragged_shapes():
    torch._dynamo.reset()
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return aot_eager(module, example_inputs)

    weight = torch.randn(24, requires_grad=True)

    def block(x, residual):
        y, total = ops.add_norm(x, residual, weight, eps=1e-6, return_sum=True)
        return ops.add_norm(y.sin(), total, weight)

    def step(x):
        for _ in range(2):
            x = checkpoint(block, x.cos(), x, use_reentrant=False)
        return x

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for n in (5, 9, 2, 30):
        x = rows((n, 24)).requires_grad_()
        for got, want in zip(
            torch.autograd.grad(compiled(x).square().sum(), (x, weight)),
            torch.autograd.grad(step(x).square().sum(), (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    assert len(graphs) <= 2
    torch._dynamo.reset()


@pytest.mark.quick
def test_double_backward_raises():
    x = rows((4, 8)).requires_grad_()
    (g,) = torch.autograd.grad(ops.add_norm(x).sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="add_norm: double backward"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.quick
def test_bit_equal_for_any_thread_count():
    inputs = make((700, 130), PARTS["scaled"], (BF16, FP32, FP32))
    grads = [torch.randn(700, 130)] * 2
    first, *others = for_thread_counts(
        lambda: results(lambda **a: ops.add_norm(**a, return_sum=True), inputs, grads)
    )
    for other in others:
        assert all(torch.equal(first[k], other[k]) for k in first)


@given(
    lead=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    channels=st.integers(2, 80),
    parts=st.sampled_from(list(PARTS)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["contiguous", "strided", "expanded"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_fuzz_matches_reference(lead, channels, parts, dtypes, kind, layout):
    torch.manual_seed(channels)
    inputs = make((*lead, channels), PARTS[parts], dtypes, layout)
    compare(inputs, kind, few_elements=True, allow_degenerate=True)


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    run_under_isa(isa, "match_reference or matches_reference or cancel or thread_count", __file__)


X, C3 = torch.randn(4, 3), torch.ones(3)
ERRORS = {
    "add_norm: x is list": (lambda: ops.add_norm([1.0]), TypeError),
    r"add_norm: x has shape \(\)": (lambda: ops.add_norm(torch.tensor(1.0)), ValueError),
    r"add_norm: x has shape \(4, 0\)": (lambda: ops.add_norm(X[:, :0]), ValueError),
    "add_norm: x is float64, expected .*encfast.ref": (lambda: ops.add_norm(X.double()), TypeError),
    r"add_norm: residual has shape \(3,\), x has \(4, 3\); expand": (
        lambda: ops.add_norm(X, C3),
        ValueError,
    ),
    "add_norm: residual is int64": (lambda: ops.add_norm(X, X.long()), TypeError),
    "add_norm: residual is on meta, x is on cpu": (
        lambda: ops.add_norm(X, X.to("meta")),
        ValueError,
    ),
    "add_norm: weight has 2 entries, x has 3 channels": (
        lambda: ops.add_norm(X, None, C3[:2]),
        ValueError,
    ),
    r"add_norm: bias has shape \(1, 3\)": (
        lambda: ops.add_norm(X, None, None, C3[None]),
        ValueError,
    ),
    "add_norm: branch_scale is float": (lambda: ops.add_norm(X, branch_scale=0.1), TypeError),
    "add_norm: kind is 'batchnorm'": (lambda: ops.add_norm(X, kind="batchnorm"), ValueError),
    "add_norm: eps is -1": (lambda: ops.add_norm(X, eps=-1), ValueError),
    "add_norm: eps is nan": (lambda: ops.add_norm(X, eps=float("nan")), ValueError),
    "add_norm: eps is str": (lambda: ops.add_norm(X, eps="1e-5"), TypeError),
    "add_norm: x has layout torch.sparse_coo": (lambda: ops.add_norm(X.to_sparse()), TypeError),
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
    op, bwd = torch.ops.encfast.add_norm, torch.ops.encfast.add_norm_bwd
    bad = (RuntimeError, ValueError, TypeError)
    for args in ((X, X[:2], None, None), (X, None, C3[:2], None), (X, None, None, C3.double())):
        with pytest.raises(bad):
            op(*args, None, "layernorm", None, True)
    with pytest.raises(bad):
        op(X, None, None, None, None, "other", None, True)
    if NATIVE:
        one = torch.ones(4)
        with pytest.raises(bad, match="rstd"):
            bwd(X, None, X, one, one[:3], None, None, None, "layernorm", False, False)
        with pytest.raises(bad, match="dy"):
            bwd(X[:3], None, X, one, one, None, None, None, "layernorm", False, False)
        with pytest.raises(bad, match="branch_scale"):
            bwd(X, None, X, one, one, None, None, C3, "layernorm", False, False)
