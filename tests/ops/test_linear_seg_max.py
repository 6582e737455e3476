"""linear_seg_max against its float64 reference: dtypes, slices, ties, empty segments, memory."""

import itertools

import pytest
import torch
from fresh_python import PEAK, python
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import (
    BF16,
    DTYPES,
    FP32,
    LAYOUTS,
    assert_same,
    for_thread_counts,
    name,
    results,
    rows,
)

from encfast import ops, ref
from encfast.ops import _linear_seg_max_cpu as cpu
from encfast.ref.linear_seg_max import linear_seg_max_bwd

NATIVE = ops.backends("linear_seg_max")["cpu"] == "native"
OP = torch.ops.encfast.linear_seg_max.default
BWD = torch.ops.encfast.linear_seg_max_bwd.default

# Lengths, V, C.
CASES = {
    "one row": ((1,), 7, 5),
    "odd": ((3, 0, 1, 11, 0, 6), 67, 13),
    "first empty": ((0, 5, 2), 128, 32),
    "slices": ((8, 0, 30, 1), 5000, 24),
}


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def operands(case, dtype=FP32):
    lengths, v, c = case
    inputs = {
        "x": torch.randn(sum(lengths), c).to(dtype),
        "weight": (torch.randn(v, c) * 2 / c**0.5).to(dtype),
        "bias": torch.randn(v),
    }
    return inputs, ends(lengths)


def ours(cu_seqlens):
    return lambda x, weight, bias: ops.linear_seg_max(x, weight, cu_seqlens, bias)


def exact(cu_seqlens):
    return lambda x, weight, bias: ref.linear_seg_max(x, weight, cu_seqlens, bias)[0]


def plain(cu_seqlens):
    """Segment by segment with the logits of all rows, in the dtype of x."""

    def f(x, weight, bias):
        z = (x @ weight.mT).float() + bias
        parts = z.split(cu_seqlens.diff().tolist())
        return torch.stack([p.amax(0) if len(p) else p.sum(0) for p in parts])

    return f


def clear(inputs, cu_seqlens, margin):
    """Whether no second row comes near a largest logit, so that every dtype chooses the same."""
    z = inputs["x"].double() @ inputs["weight"].double().mT
    for part in z.split(cu_seqlens.diff().tolist()):
        if len(part) > 1:
            first, second = part.topk(2, 0).values
            yield (first - second) > margin


def assert_matches(case, dtype):
    """Gradients where the choice is clear: a rounding turns ties, and then other rows are right."""
    inputs, cu_seqlens = operands(case, dtype)
    keep = torch.stack([torch.ones(case[1], dtype=torch.bool), *clear(inputs, cu_seqlens, 0.05)])
    keep = keep.all(0)
    assert keep.float().mean() > 0.3
    grad = torch.randn(len(case[0]), case[1]) * keep
    options = {"eps_factor": 4.0, "allow_degenerate": True}
    assert_same(ours(cu_seqlens), exact(cu_seqlens), plain(cu_seqlens), inputs, [grad], **options)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_cases_match_reference(case, dtype):
    assert_matches(CASES[case], dtype)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name)
def test_slices_of_the_backward(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_COLUMNS", 9)
    assert_matches(CASES["odd"], dtype)


@pytest.mark.quick
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x not in ("permuted", "expanded")])
def test_layouts_match_reference(layout):
    cu_seqlens = ends((4, 0, 9))
    inputs = {"x": rows((13, 20), FP32, layout), "weight": rows((40, 20), FP32, layout)}
    inputs["bias"] = torch.randn(80)[::2]
    functions = ours(cu_seqlens), exact(cu_seqlens), plain(cu_seqlens)
    assert_same(*functions, inputs, [torch.randn(3, 40)], eps_factor=4.0, allow_degenerate=True)


@pytest.mark.quick
def test_reference_gradients():
    inputs, cu_seqlens = operands(((2, 0, 3), 6, 4))
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(exact(cu_seqlens), leaves)
    dout = torch.randn(3, 6).double()
    expected = torch.autograd.grad(exact(cu_seqlens)(*leaves), leaves, dout)
    x, weight, bias = (t.detach() for t in leaves)
    chosen = ref.linear_seg_max(x, weight, cu_seqlens, bias)[1]
    found = linear_seg_max_bwd(dout, x, weight, chosen)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.quick
def test_rows_are_those_of_the_largest_logits():
    inputs, cu_seqlens = operands(CASES["odd"])
    out, chosen = OP(inputs["x"], inputs["weight"], cu_seqlens, inputs["bias"])
    z = inputs["x"] @ inputs["weight"].mT
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if begin == end:
            assert (chosen[b] == -1).all() and not out[b].any()
        else:
            assert torch.equal(chosen[b].long(), begin + z[begin:end].argmax(0))


@pytest.mark.quick
def test_ties_go_to_the_lower_row():
    x = torch.randn(3, 8)[[0, 1, 1, 0, 2, 2]].requires_grad_()
    weight, cu_seqlens = torch.randn(50, 8), ends((4, 2))
    _, chosen = OP(x, weight, cu_seqlens, None)
    assert set(chosen[0].tolist()) == {0, 1} and set(chosen[1].tolist()) == {4}
    ops.linear_seg_max(x, weight, cu_seqlens).sum().backward()
    assert not x.grad[[2, 3, 5]].any() and x.grad[[0, 1, 4]].any(1).all()


@pytest.mark.quick
def test_one_segment_never_reaches_another():
    """NaN in one; the others stay bit-equal, gradients too."""
    inputs, cu_seqlens = operands(((4, 5, 3), 40, 12))
    grad = [torch.randn(3, 40)]
    clean = results(ours(cu_seqlens), inputs, grad)
    inputs["x"][4:9] = torch.nan
    found = results(ours(cu_seqlens), inputs, grad)
    assert found["out0"][1].isnan().all()
    for b, its_rows in ((0, slice(0, 4)), (2, slice(9, 12))):
        assert torch.equal(found["out0"][b], clean["out0"][b])
        assert torch.equal(found["dx"][its_rows], clean["dx"][its_rows])


@pytest.mark.quick
def test_entries_outside_of_the_vocabulary():
    inputs, cu_seqlens = operands(CASES["odd"])
    inputs["bias"][40:] = -torch.inf
    out = ours(cu_seqlens)(**inputs)
    full = cu_seqlens.diff() > 0
    assert (out[full, 40:] == -torch.inf).all() and out[full, :40].isfinite().all()
    assert not out[~full].any()


@pytest.mark.quick
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_rows(lengths):
    inputs, cu_seqlens = operands((lengths, 9, 4))
    found = results(ours(cu_seqlens), inputs, [torch.randn(len(lengths), 9)])
    assert found["out0"].shape == (len(lengths), 9) and found["dx"].shape == (0, 4)
    assert all((value == 0).all() for value in found.values())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck(dtype):
    inputs, cu_seqlens = operands(((3, 0, 4), 20, 5), dtype)
    x, weight, bias = (t.requires_grad_() for t in inputs.values())
    for b in (bias, None):
        torch.library.opcheck(OP, (x, weight, cu_seqlens, b))
    x, weight = x.detach(), weight.detach()
    chosen = OP(x, weight, cu_seqlens, None)[1]
    for wanted in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(BWD, (torch.randn(3, 20), x, weight, chosen, *wanted))


def test_compiles_whole():
    inputs, cu_seqlens = operands(CASES["odd"])
    f, grad = ours(cu_seqlens), [torch.randn(6, 67)]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    found, expected = results(compiled, inputs, grad), results(f, inputs, grad)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.quick
def test_double_backward_raises():
    inputs, cu_seqlens = operands(CASES["odd"])
    inputs["x"].requires_grad_()
    out = ours(cu_seqlens)(**inputs)
    (dx,) = torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_seg_max: double backward"):
        dx.sum().backward()


@pytest.mark.quick
def test_gradients_are_the_same_bits_for_any_number_of_threads():
    """The sums of chosen rows; the products of the forward are PyTorch's."""
    inputs, cu_seqlens = operands(CASES["slices"])
    x, weight = inputs["x"], inputs["weight"]
    chosen, dout = OP(x, weight, cu_seqlens, None)[1], torch.randn(4, 5000)
    first, *others = for_thread_counts(lambda: BWD(dout, x, weight, chosen, True, True, True))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


MEMORY = (
    PEAK
    + """
B, L, V, C = 6, 128, 30522, 32
x, weight = (torch.randn(n, C).requires_grad_() for n in (B * L, V))
cu_seqlens = torch.arange(0, B * L + 1, L, dtype=torch.int32)
heads = {
    "ours": lambda: encfast.ops.linear_seg_max(x, weight, cu_seqlens),
    "logits": lambda: (x @ weight.mT).view(B, L, V).amax(1),
}
torch.autograd.grad(heads["ours"]().logsumexp(1).sum(), (x, weight))  # threads and MKL's buffers
for head in heads.values():
    print(peak(lambda: torch.autograd.grad(head().logsumexp(1).sum(), (x, weight))))
"""
)


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the reference holds all logits")
def test_peak_memory():
    """Less than a quarter of what logits of 89 MiB and their gradient need."""
    found, logits = map(int, python("-c", MEMORY, OMP_NUM_THREADS="1").split()[-2:])
    assert logits > 89 * 2**20
    assert found < logits / 4, f"{found / 2**20:.1f} MiB of {logits / 2**20:.1f} MiB"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    v=st.integers(1, 90),
    c=st.integers(1, 40),
    dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(lengths, v, c, dtype, seed):
    """Values; and gradients by the rows that were chosen."""
    torch.manual_seed(seed)
    inputs, cu_seqlens = operands((tuple(lengths), v, c), dtype)
    grad = torch.randn(len(lengths), v)
    found = results(ours(cu_seqlens), inputs, [grad])
    limit = 5e-2 if dtype == BF16 else 1e-4
    wide = {k: t.double() for k, t in inputs.items()}
    want = exact(cu_seqlens)(**wide)
    torch.testing.assert_close(found["out0"].double(), want, rtol=limit, atol=limit)
    chosen = OP(*(inputs[k] for k in ("x", "weight")), cu_seqlens, inputs["bias"])[1]
    expected = linear_seg_max_bwd(grad.double(), wide["x"], wide["weight"], chosen)
    for key, value in zip(("dx", "dweight", "dbias"), expected, strict=True):
        torch.testing.assert_close(found[key].double(), value, rtol=limit, atol=limit)


X, W, CU = torch.randn(5, 6), torch.randn(8, 6), ends((2, 3))


def call(*args, **options):
    return lambda: ops.linear_seg_max(*args, **options)


ERRORS = {
    "x is list": (call([1], W, CU), TypeError),
    "x is float64, expected .* encfast.ref": (call(X.double(), W, CU), TypeError),
    r"x has shape \(6,\)": (call(X[0], W, CU), ValueError),
    r"weight has shape \(8, 5\)": (call(X, W[:, :5], CU), ValueError),
    r"weight has shape \(0, 6\)": (call(X, W[:0], CU), ValueError),
    "weight is bfloat16, expected float32": (call(X, W.bfloat16(), CU), TypeError),
    "cu_seqlens is int64": (call(X, W, CU.long()), TypeError),
    "cu_seqlens is empty": (call(X, W, CU[:0]), ValueError),
    "cu_seqlens .*5": (call(X, W, ends((2, 2))), ValueError),
    "cu_seqlens .*start": (call(X, W, CU[1:]), ValueError),
    "cu_seqlens .*decrease": (call(X, W, torch.tensor([0, 4, 2, 5]).int()), ValueError),
    r"bias has shape \(7,\)": (call(X, W, CU, torch.ones(7)), ValueError),
    "bias is int64": (call(X, W, CU, torch.ones(8).long()), TypeError),
    "weight is on meta": (call(X, W.to("meta"), CU), ValueError),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=f"linear_seg_max: {message}"):
        call()


@pytest.mark.quick
def test_direct_calls_check_too():
    for args in ((X, W[:, :5], CU, None), (X, W, CU[1:], None), (X, W, CU, torch.ones(7))):
        with pytest.raises((ValueError, TypeError), match="linear_seg_max"):
            OP(*args)
    if NATIVE:
        dout, (_, chosen) = torch.ones(2, 8), OP(X, W, CU, None)
        for bad_dout, bad_rows, what in (
            (dout[:1], chosen, "dout"),
            (dout.double(), chosen, "dout"),
            (dout, chosen[:, :7], "rows"),
            (dout, chosen + 3, "rows"),
            (dout, chosen.where(torch.arange(8) > 0, -1), "rows"),
        ):
            with pytest.raises((ValueError, TypeError), match=f"_bwd: {what}"):
                BWD(bad_dout, X, W, bad_rows, True, True, True)
