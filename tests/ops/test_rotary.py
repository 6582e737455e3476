"""rotary: both layouts against the reference, gradients, partial rotation, bad input refused."""

import mmap
from dataclasses import dataclass

import pytest
import torch
from fresh_python import run_under_isa
from hypothesis import given, settings
from hypothesis import strategies as st

from encfast import ops, ref
from encfast.testing import assert_close_to_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = ops.backends("rotary")["cpu"] == "native"


def name(dtype):
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One call of rotary_qk; `str` gives the readable test id."""

    rows: int = 9
    heads: int = 3
    kv_heads: int = 2
    size: int = 64
    rotated: int = 64
    positions: str = "int64"  # or int32, or "" for one table row per row
    interleaved: bool = False
    layout: str = "qkv"  # or contiguous, transposed, expanded

    def __str__(self) -> str:
        words = [f"N{self.rows}-H{self.heads}-Hk{self.kv_heads}-D{self.size}-R{self.rotated}"]
        words += [self.positions or "rows", "interleaved" if self.interleaved else "halves"]
        return "-".join([*words, self.layout])


CASES = [
    Case(),
    Case(positions=""),
    Case(positions="int32", interleaved=True),
    Case(size=40, rotated=40),  # 20 pairs: the last vectors overlap
    Case(size=40, rotated=40, interleaved=True),
    Case(size=128, rotated=36, layout="transposed"),  # partial
    Case(size=128, rotated=36, interleaved=True, layout="transposed"),
    Case(size=7, rotated=6, positions="", layout="expanded"),  # narrower than one vector
    Case(size=7, rotated=4, interleaved=True),
    Case(size=2, rotated=2, heads=1, kv_heads=1, layout="contiguous"),
    Case(size=256, rotated=256, rows=1),
    Case(size=255, rotated=254, interleaved=True, layout="contiguous"),
]


def make(case: Case, dtype: torch.dtype, table_dtype: torch.dtype = torch.float32):
    """q, k, cos, sin, positions."""
    n, heads, size = case.rows, case.heads + case.kv_heads, case.size
    if case.layout == "transposed":  # the last dimension is not contiguous
        qk = torch.randn(n, size, heads).to(dtype).mT
    elif case.layout == "expanded":  # one row for all
        qk = torch.randn(1, heads, size).to(dtype).expand(n, -1, -1)
    elif case.layout == "qkv":  # a fused projection
        qk = torch.randn(n, heads + case.kv_heads, size).to(dtype)[:, :heads]
    else:
        qk = torch.randn(n, heads, size).to(dtype)
    q, k = qk.split((case.heads, case.kv_heads), dim=1)
    angles = torch.rand(17 if case.positions else n, case.rotated // 2) * 6.3
    positions = None
    if case.positions:
        positions = torch.randint(17, (n,)).to(getattr(torch, case.positions))
    return q, k, angles.cos().to(table_dtype), angles.sin().to(table_dtype), positions


def results(case, rotate, q, k, *douts):
    """Results and gradients of `rotate(q, k) -> (q, k)`."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    turned = rotate(*leaves)
    loss = sum((t * d.to(t.dtype)).sum() for t, d in zip(turned, douts, strict=True))
    named = zip(("q", "k", "dq", "dk"), (*turned, *torch.autograd.grad(loss, leaves)), strict=True)
    return dict(named)


def assert_matches_reference(case, dtype, table_dtype=torch.float32):
    q, k, cos, sin, positions = make(case, dtype, table_dtype)
    douts = [torch.randn(x.shape).to(dtype) for x in (q, k)]

    def reference(q, k, compute=None):
        options = {"interleaved": case.interleaved, "compute_dtype": compute}
        return [ref.rotary(x, cos, sin, positions, **options) for x in (q, k)]

    def op(q, k):
        return ops.rotary_qk(q, k, cos, sin, positions=positions, interleaved=case.interleaved)

    got = results(case, op, q, k, *douts)
    exact = results(case, reference, q.double(), k.double(), *(d.double() for d in douts))
    plain = results(case, lambda q, k: reference(q, k, dtype), q, k, *douts)
    for what, actual in got.items():
        assert actual.dtype == dtype
        factor = 3 if what.startswith("d") else 2
        assert_close_to_reference(what, actual, exact[what], plain[what], factor)
    assert got["q"].is_contiguous() and got["k"].is_contiguous()
    single = ops.rotary(q, cos, sin, positions, interleaved=case.interleaved)
    assert torch.equal(single, got["q"])
    assert torch.equal(single[..., case.rotated :], q[..., case.rotated :])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, dtype):
    assert_matches_reference(case, dtype)


@pytest.mark.quick
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16], ids=name)
def test_matches_reference_with_half_tables(table_dtype):
    for dtype in FLOATS:
        assert_matches_reference(Case(size=40, rotated=36), dtype, table_dtype)


@pytest.mark.quick
@pytest.mark.parametrize("interleaved", [False, True])
def test_matches_complex_multiplication(interleaved):
    """The formula once more, as the paper has it: pairs are complex numbers times e^(i angle)."""
    x, angles = torch.randn(5, 2, 8), torch.rand(5, 4) * 6.3
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(()), angles[:, None]
    )
    want = torch.view_as_real(turned)
    want = want.flatten(-2) if interleaved else want.mT.flatten(-2)
    got = ops.rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
def test_conjugate_turns_back():
    q, k, cos, sin, positions = make(Case(size=40, rotated=36), torch.float32)
    there = ops.rotary_qk(q, k, cos, sin, positions=positions)
    back = ops.rotary_qk(*there, cos, sin, positions=positions, conjugate=True)
    torch.testing.assert_close(back[0], q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back[1], k, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("used", ["q", "k"])
def test_gradient_where_one_result_is_unused(used):
    q, k, cos, sin, positions = make(Case(), torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    turned = dict(zip("qk", ops.rotary_qk(*leaves, cos, sin, positions=positions), strict=True))
    grads = torch.autograd.grad(turned[used].sum(), leaves, allow_unused=True)
    which = "qk".index(used)
    assert grads[1 - which] is None
    ones = torch.ones_like(leaves[which])
    assert torch.equal(grads[which], ops.rotary(ones, cos, sin, positions, conjugate=True))


@pytest.mark.quick
@pytest.mark.parametrize("trained", ["q", "k"])
def test_gradient_where_one_input_needs_none(trained):
    named = dict(zip("qk", make(Case(positions=""), torch.float32)[:2], strict=True))
    _, _, cos, sin, _ = make(Case(positions=""), torch.float32)
    leaf = named[trained] = named[trained].detach().requires_grad_()
    turned = dict(zip("qk", ops.rotary_qk(**named, cos=cos, sin=sin), strict=True))
    (grad,) = torch.autograd.grad(sum(t.sum() for t in turned.values()), leaf)
    assert torch.equal(grad, ops.rotary(torch.ones_like(leaf), cos, sin, conjugate=True))


@pytest.mark.quick
def test_gradients_of_any_order():
    q, _, cos, sin, _ = make(Case(positions=""), torch.float32)
    x = q.detach().requires_grad_()
    (first,) = torch.autograd.grad(ops.rotary(x, cos, sin).square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * x)  # a turn keeps the length
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2))


@pytest.mark.quick
def test_reference_gradient():
    _, _, cos, sin, positions = make(Case(), torch.float32, torch.float64)
    x = torch.randn(9, 2, 64, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, i=interleaved: ref.rotary(x, cos, sin, positions, interleaved=i),
            (x,),
            fast_mode=True,
        )


@pytest.mark.quick
@pytest.mark.parametrize("interleaved", [False, True])
def test_no_rows_and_a_single_one(interleaved):
    for n in (0, 1):
        x, table = torch.randn(n, 2, 8, requires_grad=True), torch.rand(n, 4)
        turned = ops.rotary(x, table, table, interleaved=interleaved)
        assert turned.shape == (n, 2, 8)
        assert torch.autograd.grad(turned.sum(), x)[0].shape == x.shape
    empty = ops.rotary(torch.randn(0, 2, 8), table, table, torch.empty(0, dtype=torch.int64))
    assert empty.shape == (0, 2, 8)


@pytest.mark.quick
def test_a_row_of_nan_stays_one_row():
    q, k, cos, sin, positions = make(Case(layout="contiguous"), torch.float32)
    clean = ops.rotary_qk(q, k, cos, sin, positions=positions)
    q, k = q.clone(), k.clone()
    q[4], k[4] = float("nan"), float("inf")
    for got, want in zip(ops.rotary_qk(q, k, cos, sin, positions=positions), clean, strict=True):
        assert not torch.isfinite(got[4]).any()
        keep = torch.arange(9) != 4
        assert torch.equal(got[keep], want[keep])


@pytest.mark.quick
def test_results_do_not_alias_their_input():
    x = torch.randn(3, 2, 8)
    turned = ops.rotary(x, torch.ones(3, 4), torch.zeros(3, 4))
    assert torch.equal(turned, x) and turned.data_ptr() != x.data_ptr()


@pytest.mark.quick
def test_bit_equal_for_any_thread_count():
    q, k, cos, sin, positions = make(Case(rows=3000, size=40, rotated=36), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        turned = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            turned.append(ops.rotary_qk(q, k, cos, sin, positions=positions))
    finally:
        torch.set_num_threads(threads)
    for again in turned[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, turned[0], strict=True))


@pytest.mark.quick
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
def test_a_fused_projection_is_read_in_place():
    """No copy of q, k or v on the way from the projection to the attention."""
    qkv, table = torch.randn(64, 6, 16), torch.rand(64, 8)
    q, k, v = qkv.split(2, dim=1)
    cu = torch.tensor([0, 30, 64], dtype=torch.int32)
    ops.varlen_attn(*ops.rotary_qk(q, k, table, table), v, cu)
    with torch.profiler.profile() as profile:
        ops.varlen_attn(*ops.rotary_qk(q, k, table, table), v, cu)
    keys = {event.key for event in profile.key_averages()}
    assert "encfast::rotary" in keys
    assert not keys & {"aten::copy_", "aten::clone", "aten::cat"}


@pytest.mark.quick
def test_rows_more_than_two_gibi_elements_apart():
    """Row offsets beyond 32 bits; the mapping reserves address space, three rows are touched."""
    stride, shape = 2**31 + 11, (3, 2, 8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * (3 * stride), flags=flags)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, (stride, 8, 1))
    x.copy_(torch.randn(shape))
    for interleaved in (False, True):
        far, near = (ops.rotary(t, T, T, P[:3], interleaved=interleaved) for t in (x, x.clone()))
        assert torch.equal(far, near)


@given(
    rows=st.integers(0, 5),
    heads=st.integers(1, 3),
    kv_heads=st.integers(0, 2),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fuzz(rows, heads, kv_heads, pairs, rest, interleaved, dtype, seed):
    """Any shape, bit-equal to the reference's rounding up to one step of the dtype."""
    torch.manual_seed(seed)
    q, k = (torch.randn(rows, h, 2 * pairs + rest).to(dtype) for h in (heads, kv_heads))
    angles, positions = torch.rand(7, pairs) * 6.3, torch.randint(7, (rows,))
    options = {"interleaved": interleaved}
    turned = ops.rotary_qk(
        q, k, angles.cos(), angles.sin(), positions=positions, interleaved=interleaved
    )
    eps = torch.finfo(dtype).eps
    for x, got in zip((q, k), turned, strict=True):
        want = ref.rotary(x.double(), angles.cos(), angles.sin(), positions, **options)
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=4e-7)


X, T, P = torch.randn(4, 2, 8), torch.rand(6, 4), torch.tensor([0, 5, 1, 2])
ERRORS = {
    "rotary: x is list": (lambda: ops.rotary([1], T, T, P), TypeError),
    r"rotary: x has shape \(4, 8\)": (lambda: ops.rotary(X[:, 0], T, T, P), ValueError),
    "rotary: x is float64, .*encfast.ref.rotary": (
        lambda: ops.rotary(X.double(), T, T, P),
        TypeError,
    ),
    "rotary: x has head size 258, expected 2..256": (
        lambda: ops.rotary(torch.randn(4, 2, 258), T, T, P),
        ValueError,
    ),
    "rotary_qk: k is bfloat16, expected float32 like q": (
        lambda: ops.rotary_qk(X, X.bfloat16(), T, T, positions=P),
        TypeError,
    ),
    r"rotary_qk: k has shape \(3, 2, 8\), expected rows and head size of q": (
        lambda: ops.rotary_qk(X, X[:3], T, T, positions=P),
        ValueError,
    ),
    "rotary: cos has 5 columns, .* 1..4 for head size 8": (
        lambda: ops.rotary(X, torch.rand(6, 5), torch.rand(6, 5), P),
        ValueError,
    ),
    r"rotary: sin has shape \(6, 3\), expected that of cos": (
        lambda: ops.rotary(X, T, T[:, :3], P),
        ValueError,
    ),
    "rotary: sin is bfloat16, expected float32 like cos": (
        lambda: ops.rotary(X, T, T.bfloat16(), P),
        TypeError,
    ),
    "rotary: cos is int64": (lambda: ops.rotary(X, T.long(), T, P), TypeError),
    r"rotary: cos has no gradient; pass cos.detach\(\)": (
        lambda: ops.rotary(X, T.clone().requires_grad_(), T, P),
        ValueError,
    ),
    "rotary: cos is on meta, x is on cpu": (
        lambda: ops.rotary(X, T.to("meta"), T, P),
        ValueError,
    ),
    "rotary: cos has 6 rows, x has 4; pass positions": (lambda: ops.rotary(X, T, T), ValueError),
    "rotary: positions is float32": (lambda: ops.rotary(X, T, T, P.float()), TypeError),
    r"rotary: positions has shape \(1, 4\)": (lambda: ops.rotary(X, T, T, P[None]), ValueError),
    "rotary: positions has 3 entries, x has 4 rows": (
        lambda: ops.rotary(X, T, T, P[:3]),
        ValueError,
    ),
    "rotary: positions holds 6, the tables have 6 rows": (
        lambda: ops.rotary(X, T, T, P + 1),
        ValueError,
    ),
    "rotary: positions holds -1": (lambda: ops.rotary(X, T, T, P - 1), ValueError),
    "rotary: interleaved is int": (lambda: ops.rotary(X, T, T, P, interleaved=1), TypeError),
    "rotary_qk: conjugate is str": (
        lambda: ops.rotary_qk(X, X, T, T, positions=P, conjugate=""),
        TypeError,
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_and_value(message):
    call, kind = ERRORS[message]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.host
@pytest.mark.quick
@pytest.mark.parametrize("value", [-1, 6, 2**40, -(2**62)])
def test_direct_calls_never_read_out_of_bounds(value):
    """What Python checks, the kernel checks again: compiled graphs skip the Python check."""
    positions = torch.tensor([0, value, 1, 2])
    with pytest.raises((RuntimeError, ValueError), match="positions holds"):
        torch.ops.encfast.rotary(X, X, T, T, positions, False, False)
    for cos, sin in ((T, T), (T[:4], T[:3]), (T[:4].double(), T[:4].double())):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.encfast.rotary(X, X, cos, sin, None, False, False)


@pytest.mark.host
@pytest.mark.skipif(not NATIVE, reason="the compiled library is not loaded")
@pytest.mark.parametrize("isa", torch.ops.encfast.cpu_isas().split(",") if NATIVE else [])
def test_every_isa_of_this_machine_matches_the_reference(isa):
    run_under_isa(isa, "matches_reference or fuzz or complex", __file__)
