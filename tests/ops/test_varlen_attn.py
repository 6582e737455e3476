"""varlen_attn against its float64 reference, and the promises its docstring makes."""

import dataclasses
import itertools

import pytest
import torch
from attn_cases import (
    RESULTS,
    Case,
    assert_matches_reference,
    cu_seqlens,
    drawn_key,
    make_biases,
    make_douts,
    make_qkv,
    run_op,
    run_reference,
)

from encfast import ops, ref
from encfast.ref.varlen_attn import varlen_attn_bwd

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RAGGED = (1, 63, 0, 129)

QUICK = [
    Case(RAGGED),
    Case(RAGGED, head_size=32, heads=12, layout="qkv"),
    Case(RAGGED, head_size=64, causal=True, layout="qkv"),
    Case(RAGGED, head_size=64, window=(16, 16), alibi="H"),
    Case((7, 0, 130, 1), (140, 3, 65, 1), kv_heads=2),
    Case(RAGGED, head_size=33, alibi="BH", softcap=5.0, kv_heads=1),
]
MORE = [
    Case((1, 0, 200), head_size=1),
    Case((1, 0, 77), head_size=7, heads=3),
    Case((1, 0, 90), head_size=80, heads=2),
    Case((1, 0, 65), head_size=128, heads=2, layout="transposed"),
    Case((1, 0, 50), head_size=255, heads=2, layout="offset"),
    Case((1, 0, 64), head_size=256, heads=1),
    Case(RAGGED, layout="transposed"),
    Case(RAGGED, layout="expanded", softcap=2.0),
    Case(RAGGED, layout="offset", head_size=33),
    Case(RAGGED, window=(1, 0), head_size=16),
    Case(RAGGED, window=(-1, 0)),
    Case(RAGGED, window=(5, -1)),
    Case(RAGGED, window=(3, -1), causal=True),
    Case(RAGGED, window=(1000, 1000)),
    Case(RAGGED, scale=0.0, degenerate=True),
    Case(RAGGED, scale=-1.5),
    Case(RAGGED, scale=8.0, head_size=64),
    Case(RAGGED, causal=True, alibi="H", kv_heads=2),
    Case((5, 100, 1, 0), (70, 83, 1, 9), causal=True, head_size=64, kv_heads=2),
    Case((130, 40, 1, 0), (64, 70, 1, 0), window=(8, 3), alibi="BH"),
    Case((0, 4, 60), (5, 0, 64), causal=True),
    Case((600, 1, 0, 5), head_size=64, heads=2, alibi="H"),
    Case((2100, 0, 1), head_size=64, heads=1),
    Case((1, 1300), (0, 2100), head_size=32, heads=2, kv_heads=1, window=(700, 90), alibi="H"),
    Case((2,) * 12 + (0,), head_size=32, heads=2),
    Case((31, 32, 33, 0, 1, 95, 96, 97, 193), head_size=32, heads=2, causal=True),
]


@pytest.mark.quick
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_matches_reference(case):
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(case, dtype)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_matches_reference_more(case):
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(case, dtype)


@pytest.mark.quick
@pytest.mark.parametrize(
    "dtypes",
    [(BF16, FP32, BF16), (FP32, FP32, BF16), (BF16, FP16, FP16), (FP16, FP16, BF16)],
    ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d),
)
def test_mixed_dtypes_compute_in_the_promoted_one(dtypes):
    assert_matches_reference(Case(RAGGED, kv_heads=2), *dtypes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_matches_reference_on_random_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    lens = tuple(torch.randint(0, 700, (12,), generator=generator).tolist())
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(Case(lens, head_size=64, heads=3, alibi="H"), dtype)


REFERENCE_CASES = [
    Case((1, 4, 0, 3), head_size=3, heads=2),
    Case((1, 4, 0, 3), (2, 3, 2, 5), head_size=2, heads=4, kv_heads=2, causal=True, alibi="BH"),
    Case((2, 5), (4, 2), head_size=2, heads=2, window=(1, 0), softcap=1.5, alibi="H"),
    Case((1, 4, 0), (2, 3, 2), head_size=2, kv_heads=2, rel="H", rel_size=3, bias="bool T"),
    Case((2, 3), head_size=2, heads=2, rel="NH", rel_size=5, bias="HT", dropout=0.3),
    Case((2, 0, 3), (1, 2, 4), head_size=2, heads=2, rel="H", rel_size=1, bias="T", softcap=1.5),
]


@pytest.mark.quick
@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_reference_passes_gradcheck(case):
    inputs = dict(zip("qkv", make_qkv(case, torch.float64), strict=True))
    inputs |= make_biases(case, torch.float64)
    if case.bias and not case.bias.startswith("bool"):  # finite differences of -inf are NaN
        inputs["bias"] = inputs["bias"].clamp(min=-2)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    options = {"rng": drawn_key(), **case.options}

    def f(*_):
        out, lse = ref.varlen_attn(**inputs, cu_seqlens_q=cu_seqlens(case.lens), **options)
        return out, lse.where(torch.isfinite(lse), 0)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.quick
@pytest.mark.parametrize("case", REFERENCE_CASES, ids=str)
def test_written_out_gradient_of_the_reference_is_its_autograd(case):
    qkv = make_qkv(case, torch.float64)
    douts, biases = make_douts(case, torch.float64), make_biases(case, torch.float64)
    want = run_reference(case, qkv, douts, biases=biases)
    dlse = douts[1].where(torch.isfinite(want["lse"]), 0)
    got = varlen_attn_bwd(
        douts[0],
        dlse,
        *qkv,
        want["out"],
        want["lse"],
        cu_seqlens(case.lens),
        rng=drawn_key(),
        rel_bias_grad="drel_bias" in want,
        bias_grad="dbias" in want,
        **case.options,
        **biases,
    )
    for name, grad in zip(("dq", "dk", "dv", "drel_bias", "dbias"), got, strict=True):
        if name in want:
            torch.testing.assert_close(grad, want[name], rtol=1e-12, atol=1e-12, msg=name)
        else:
            assert grad.shape == (0,), name


def test_reference_agrees_with_sdpa():
    """The reference itself against an independent implementation, one sequence at a time."""
    case = Case((5, 1, 64), kv_heads=2, causal=True, layout="qkv")
    q, k, v = make_qkv(case, torch.float64)
    out, _ = ref.varlen_attn(q, k, v, cu_seqlens(case.lens), **case.options)
    ends = cu_seqlens(case.lens).tolist()
    for a, b in itertools.pairwise(ends):
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[a:b], want.transpose(0, 1))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_rows_without_a_visible_key_are_zero(dtype):
    """Queries without keys, and queries whose window lies before the first key."""
    case = Case((3, 6, 2), (0, 2, 2), causal=True, head_size=16)
    qkv, douts = make_qkv(case, dtype), make_douts(case, dtype)
    got = run_op(case, qkv, douts)
    blind = torch.tensor([True] * 3 + [True] * 4 + [False] * 4)
    assert (got["out"][blind] == 0).all() and (got["dq"][blind] == 0).all()
    assert (got["lse"][:, blind] == float("-inf")).all()
    assert torch.isfinite(got["lse"][:, ~blind]).all()
    assert all(torch.isfinite(got[n]).all() for n in ("out", "dq", "dk", "dv"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shape", "lens"),
    [((0, 2, 8), ()), ((0, 2, 8), (0, 0)), ((1, 2, 1), (1,)), ((3, 1, 1), (0, 3))],
    ids=["B0", "N0", "N1-D1", "D1"],
)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
def test_smallest_inputs(shape, lens, dtype):
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    out, lse = ops.varlen_attn(q, k, v, cu_seqlens(lens), return_lse=True)
    assert out.shape == shape and lse.shape == (shape[1], shape[0])
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.shape == shape and torch.isfinite(g).all() for g in grads)


@pytest.mark.quick
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_one_side_may_have_no_rows_at_all(side):
    some, none = torch.randn(4, 2, 8), torch.randn(0, 2, 8)
    q, kv = (none, some) if side == "queries" else (some, none)
    cu_q, cu_k = (cu_seqlens((len(x),)) for x in (q, kv))
    q, k, v = (x.clone().requires_grad_() for x in (q, kv, kv))
    out = ops.varlen_attn(q, k, v, cu_q, cu_seqlens_k=cu_k)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", ["other tokens", "NaN", "Inf"])
def test_sequences_never_leak(dtype, change):
    """Whatever happens to the tokens of A at equal length, B stays bit-equal, gradients too."""
    case = Case((37, 70, 0, 90), head_size=32, alibi="H", layout="qkv")
    qkv, douts = make_qkv(case, dtype), make_douts(case, dtype)
    before = run_op(case, qkv, douts)
    a, rest = slice(37, 107), [*range(37), *range(107, 197)]
    for x in qkv:
        if change == "other tokens":
            x[a] = torch.randn(70, *x.shape[1:]).to(dtype)
        else:
            x[50] = float(change)
    after = run_op(case, qkv, douts)
    assert not torch.equal(before["out"][a], after["out"][a])
    for name in RESULTS:
        rows = (slice(None), rest) if name == "lse" else rest
        assert torch.equal(before[name][rows], after[name][rows]), name


@pytest.mark.quick
def test_nan_is_not_swallowed_within_its_sequence():
    q, k, v = make_qkv(Case((4, 40), head_size=32), FP32)
    q[10] = float("nan")
    v[20] = float("nan")
    out = ops.varlen_attn(q, k, v, cu_seqlens((4, 40)))
    assert torch.isfinite(out[:4]).all() and out[4:].isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_bit_equal_for_any_thread_count_and_run(dtype):
    case = Case((300, 1, 0, 70, 129, 5), head_size=64, kv_heads=2, alibi="H")
    qkv, douts = make_qkv(case, dtype), make_douts(case, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run_op(case, qkv, douts)
        for n in (2, 3):
            torch.set_num_threads(n)
            for _ in range(25):
                got = run_op(case, qkv, douts)
                assert all(torch.equal(got[name], want[name]) for name in RESULTS)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.quick
def test_nothing_but_the_output_is_returned_and_it_aliases_no_input():
    q, k, v = make_qkv(Case((3, 4)), FP32)
    out = ops.varlen_attn(q, k, v, cu_seqlens((3, 4)))
    assert isinstance(out, torch.Tensor)
    assert out.untyped_storage().data_ptr() not in {
        x.untyped_storage().data_ptr() for x in (q, k, v)
    }


@pytest.mark.quick
@pytest.mark.parametrize("needed", ["q", "k", "v", "kv"])
def test_gradients_only_where_they_are_needed(needed):
    qkv = dict(zip("qkv", make_qkv(Case((5, 60)), FP32), strict=True))
    full = [x.detach().requires_grad_() for x in qkv.values()]
    want = torch.autograd.grad(ops.varlen_attn(*full, cu_seqlens((5, 60))).sin().sum(), full)
    some = {n: x.detach().requires_grad_(n in needed) for n, x in qkv.items()}
    ops.varlen_attn(*some.values(), cu_seqlens((5, 60))).sin().sum().backward()
    for (name, x), grad in zip(some.items(), want, strict=True):
        if name in needed:
            assert torch.equal(x.grad, grad)
        else:
            assert x.grad is None


@pytest.mark.quick
def test_gradient_of_lse_alone():
    """Splitting the keys and merging by lse is exact attention, in value and gradient."""
    q, k, v = (x.requires_grad_() for x in make_qkv(Case((60,), head_size=32), FP32))
    whole = ops.varlen_attn(q, k, v, cu_seqlens((60,)))
    parts = [
        ops.varlen_attn(
            q, k[s], v[s], cu_seqlens((60,)), cu_seqlens_k=cu_seqlens((n,)), return_lse=True
        )
        for s, n in ((slice(0, 25), 25), (slice(25, 60), 35))
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)  # [2, H, N]
    merged = sum(w.T[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    want = torch.autograd.grad(whole.sin().sum(), (q, k, v))
    got = torch.autograd.grad(merged.sin().sum(), (q, k, v))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_double_backward_raises():
    q, k, v = (x.requires_grad_() for x in make_qkv(Case((3, 4)), FP32))
    out = ops.varlen_attn(q, k, v, cu_seqlens((3, 4)))
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_a_window_of_one_key_copies_v():
    """Softmax over one key is 1, and its gradient is what cancels exactly: dP - rowsum(dO O)."""
    case = Case(RAGGED, head_size=16, window=(0, 0))
    qkv, douts = make_qkv(case, FP32), make_douts(case, FP32)
    got = run_op(case, qkv, (douts[0], torch.zeros_like(douts[1])))
    torch.testing.assert_close(got["out"], qkv[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(got["dv"], douts[0].float(), rtol=1e-6, atol=0)
    for name in ("dq", "dk"):  # a sum of 16 products of size up to ~10, rounded, minus itself
        assert got[name].abs().max() < 1e-4


def test_window_and_causal_are_what_a_mask_says():
    """Window inclusivity and bottom-right alignment, spelled out key by key."""
    case = Case((3,), (5,), head_size=8, heads=1, window=(1, 1))
    q, k, v = make_qkv(case, FP32)
    seen = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)
    for causal, mask in ((False, seen), (True, seen & ~torch.ones(3, 5).triu(3).bool())):
        options = dataclasses.replace(case, causal=causal).options
        out = ops.varlen_attn(q, k, v, cu_seqlens((3,)), **options)
        score = (q[:, 0] @ k[:, 0].T / 8**0.5).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(out[:, 0], score.softmax(-1) @ v[:, 0])


def test_equal_keys_cancel_up_to_the_rounding_of_their_terms():
    """Of equal keys and values dq is 0, and what is left of it is an eps of the terms.

    The plain maths gets 0 by chance: it takes the mean of dP from the very numbers it is subtracted
    from, a flash backward takes it from dout and out.
    """
    q, dout = torch.randn(33, 3, 128), torch.randn(33, 3, 128)
    k, v = (torch.randn(128).expand(2, 3, 128) for _ in range(2))
    q.requires_grad_()
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (33, 2))
    out = ops.varlen_attn(q, k, v, cu_q, cu_seqlens_k=cu_k)
    (dq,) = torch.autograd.grad(out, q, dout)
    terms = (dout * v[0]).abs().sum(-1).amax() * k.abs().amax() / 128**0.5
    assert dq.abs().amax() <= torch.finfo(torch.float32).eps * terms
