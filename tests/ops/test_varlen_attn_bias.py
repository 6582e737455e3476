"""rel_bias, bias and dropout of varlen_attn against the float64 reference, and their promises."""

import dataclasses

import pytest
import torch
from attn_cases import (
    Case,
    assert_matches_reference,
    cu_seqlens,
    make_biases,
    make_douts,
    make_qkv,
    run_op,
)

from encfast import ops

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RAGGED = (1, 63, 0, 129)
CROSS = {"lens": (7, 0, 130, 1), "lens_k": (140, 3, 65, 1), "kv_heads": 2}

QUICK = [
    Case(RAGGED, rel="H"),
    Case(RAGGED, rel="NH", head_size=33),
    Case(RAGGED, bias="T", head_size=64),
    Case(RAGGED, bias="HT", layout="qkv"),
    Case(RAGGED, bias="bool T"),
    Case(RAGGED, dropout=0.1),
    Case(RAGGED, head_size=32, alibi="H", bias="HT", dropout=0.3),
    Case(**CROSS, rel="H", rel_size=161, window=(60, 40), softcap=5.0),
    Case(
        (7, 0, 60, 1),
        (140, 3, 65, 1),
        kv_heads=2,
        rel="NH",
        rel_size=9,
        bias="bool HT",
        softcap=5.0,
        alibi="BH",
        dropout=0.2,
        scale=-0.2,
    ),
]
MORE = [
    Case(RAGGED, rel="H", rel_size=1),
    Case(RAGGED, rel="H", rel_size=9, causal=True, head_size=64, kv_heads=1),
    Case(RAGGED, rel="NH", rel_size=5, window=(50, 90), layout="transposed"),
    Case(RAGGED, rel="NH", rel_size=1, kv_heads=2, layout="offset"),
    Case(RAGGED, rel="H", bias="HT", layout="expanded"),
    Case(RAGGED, rel="H", bias="HT", layout="transposed", head_size=128),
    Case(RAGGED, rel="H", bias="T", layout="offset", dropout=0.5),
    Case(RAGGED, rel="NH", bias="T", bias_dtype=FP32, dropout=0.1),
    Case(RAGGED, bias="bool HT", layout="transposed", causal=True),
    Case(RAGGED, bias="bool HT", layout="expanded", kv_heads=4),
    Case((5, 100, 1, 0), (70, 83, 1, 9), window=(50, 30), head_size=64, kv_heads=2, bias="HT"),
    Case((31, 32, 33, 0, 1, 95, 96, 97), head_size=32, heads=2, rel="NH", rel_size=65, bias="HT"),
    Case((600, 1, 0, 5), head_size=64, heads=2, rel="H", rel_size=255, dropout=0.1),
    Case((1, 0, 50), head_size=255, heads=2, rel="H", bias="T"),
    Case((1, 0, 200), head_size=1, rel="NH", bias="bool T", dropout=0.9),
]


@pytest.mark.quick
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_biases_match_reference(case):
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(case, dtype)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_biases_match_reference_more(case):
    for dtype in (FP32, BF16, FP16):
        assert_matches_reference(case, dtype)


@pytest.mark.quick
def test_biases_of_short_sequences():
    case = Case((2, 1) * 6 + (0,), head_size=32, heads=2, rel="H", rel_size=3, bias="T")
    for dtype in (FP32, BF16, FP16):
        for dropout in (None, 0.2):
            varied = dataclasses.replace(case, dropout=dropout)
            assert_matches_reference(varied, dtype, few_elements=True)  # drel_bias has six


@pytest.mark.quick
def test_biases_of_another_dtype_than_the_tensors():
    case = Case(RAGGED, rel="H", bias="HT", bias_dtype=FP16)
    assert_matches_reference(case, BF16, FP32, BF16)


@pytest.mark.parametrize("bias", ["", "HT"])
def test_gradients_match_where_lse_is_far_from_zero(bias):
    """Queries up to 150 positions before the first key, under ALiBi: lse goes down to -100.

    The gradient is made of exp(s - lse), two large numbers whose rounding errors must not add up.
    """
    case = Case((190, 90), (40, 20), head_size=32, kv_heads=2, alibi="H", bias=bias)
    for dtype in (FP32, BF16):
        assert_matches_reference(case, dtype)
    lse = run_op(case, make_qkv(case, FP32), make_douts(case, FP32))["lse"]
    assert lse.min() < -60


@pytest.mark.quick
@pytest.mark.parametrize("name", ["bias", "rel_bias"])
def test_a_stride_0_expand_gives_every_head_its_gradient(name):
    """The gradient of an expanded bias has the expanded shape; autograd sums it over the heads."""
    case = Case((5, 40), rel="H" if name == "rel_bias" else "", bias="HT" if name == "bias" else "")
    qkv = make_qkv(case, FP32)
    one = torch.randn(1, make_biases(case, FP32)[name].shape[-1])
    grads = []
    for expanded in (lambda x: x.expand(4, -1), lambda x: x.repeat(4, 1)):
        leaf = one.clone().requires_grad_()
        out = ops.varlen_attn(*qkv, cu_seqlens(case.lens), **{name: expanded(leaf)})
        grads.append((out, *torch.autograd.grad(out.sin().sum(), leaf)))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bool T", "HT"])
def test_rows_hidden_by_the_bias_are_zero(dtype, kind):
    """One row of the second sequence and all of the third: out 0, lse -inf, no gradient."""
    case = Case((3, 40, 17), (5, 40, 20), head_size=32, bias=kind)
    biases = make_biases(case, dtype)
    bias = biases["bias"].clone()
    bias[..., 15 + 6 * 40 : 15 + 7 * 40] = bias[..., 15 + 40 * 40 :] = (
        False if kind == "bool T" else float("-inf")
    )
    qkv, douts = make_qkv(case, dtype), make_douts(case, dtype)
    got = run_op(case, qkv, douts, {"bias": bias})
    blind = torch.zeros(60, dtype=torch.bool)
    blind[3 + 6] = blind[43:] = True
    assert (got["out"][blind] == 0).all() and (got["dq"][blind] == 0).all()
    assert (got["lse"][:, blind] == float("-inf")).all()
    assert (got["dk"][45:] == 0).all() and (got["dv"][45:] == 0).all()
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")
    if kind == "HT":
        assert (got["dbias"][bias == float("-inf")] == 0).all()
        assert (got["dbias"] != 0).any()


@pytest.mark.quick
def test_dbias_is_zero_outside_of_the_window():
    case = Case((9, 70), causal=True, window=(20, -1), bias="HT")
    qkv, douts = make_qkv(case, FP32), make_douts(case, FP32)
    dbias = run_op(case, qkv, douts)["dbias"][:, 81:].view(4, 70, 70)
    offset = torch.arange(70) - torch.arange(70)[:, None]
    outside = (offset > 0) | (offset < -20)
    assert (dbias[:, outside] == 0).all() and (dbias[:, ~outside] != 0).float().mean() > 0.5


@pytest.mark.quick
def test_offsets_of_the_bias_are_those_of_the_lengths():
    case = Case(**CROSS, bias="HT")
    q, k, v = make_qkv(case, FP32)
    options, biases = case.options, make_biases(case, FP32)
    offsets = torch.tensor([0, 980, 980, 9430, 9431])
    args = (q, k, v, cu_seqlens(case.lens))
    assert torch.equal(
        ops.varlen_attn(*args, **options, **biases, bias_offsets=offsets),
        ops.varlen_attn(*args, **options, **biases),
    )


@pytest.mark.quick
def test_a_bool_bias_is_what_a_mask_says():
    """A 4-D mask of a padded user, packed, against scaled_dot_product_attention."""
    lens = (5, 33)
    q, k, v = make_qkv(Case(lens, head_size=16), FP32)
    masks = [torch.rand(n, n) < 0.5 for n in lens]
    for mask in masks:
        mask.fill_diagonal_(True)
    bias = torch.cat([mask.flatten() for mask in masks])
    out = ops.varlen_attn(q, k, v, cu_seqlens(lens), bias=bias)
    for rows, mask in zip((slice(0, 5), slice(5, 38)), masks, strict=True):
        heads = (x[rows].transpose(0, 1) for x in (q, k, v))
        want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        torch.testing.assert_close(out[rows], want.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_a_relative_table_is_symmetric_alibi():
    """-slope |j - p| as a table of offsets: the signs, the order and the alignment of R."""
    case = Case((9, 40, 0, 3), (12, 33, 4, 3), head_size=16, alibi="H")
    qkv = make_qkv(case, FP32)
    options = case.options
    slopes = options.pop("alibi_slopes")
    table = -slopes[:, None] * (torch.arange(-40, 41)).abs()
    cu = cu_seqlens(case.lens)
    got = ops.varlen_attn(*qkv, cu, rel_bias=table, **options)
    want = ops.varlen_attn(*qkv, cu, alibi_slopes=slopes, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_sequences_never_leak_with_biases_and_dropout(dtype):
    """Other tokens and other biases in A, B bit-equal: the mask knows the place, not the data."""
    case = Case(
        (37, 70, 0, 90), head_size=32, rel="NH", bias="HT", dropout=0.2, kv_heads=2, alibi="H"
    )
    qkv, douts, biases = (make(case, dtype) for make in (make_qkv, make_douts, make_biases))
    before = run_op(case, qkv, douts, biases)
    a, rest = slice(37, 107), [*range(37), *range(107, 197)]
    pairs, others = slice(37**2, 37**2 + 70**2), [*range(37**2), *range(37**2 + 70**2, case.pairs)]
    for x in (*qkv, biases["rel_bias"]):
        x[a] = torch.randn(70, *x.shape[1:]).to(dtype)
    biases["rel_bias"][50] = float("nan")
    biases["bias"][:, pairs] = torch.randn(4, 70**2).to(dtype)
    after = run_op(case, qkv, douts, biases)
    for name in before:
        rows = {"lse": (slice(None), rest), "dbias": (slice(None), others)}.get(name, rest)
        assert torch.equal(before[name][rows], after[name][rows]), name
    assert not torch.equal(before["out"][a], after["out"][a])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("dtype", "rel"), [(FP32, "H"), (BF16, "NH"), (BF16, "H")], ids=["float32", "bfloat16", "table"]
)
def test_bit_equal_for_any_thread_count_and_run(dtype, rel):
    case = Case(
        (200, 1, 0, 70, 99, 5), head_size=64, heads=2, kv_heads=1, rel=rel, bias="T", dropout=0.1
    )
    qkv, douts, biases = (make(case, dtype) for make in (make_qkv, make_douts, make_biases))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run_op(case, qkv, douts, biases)
        for n in (1, 2):
            torch.set_num_threads(n)
            for _ in range(25):
                got = run_op(case, qkv, douts, biases)
                assert all(torch.equal(got[name], want[name]) for name in want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.quick
@pytest.mark.parametrize("needed", ["rel_bias", "bias", "q"])
def test_gradients_of_biases_only_where_they_are_needed(needed):
    case = Case((5, 60), rel="H", bias="HT")
    inputs = dict(zip("qkv", make_qkv(case, FP32), strict=True)) | make_biases(case, FP32)

    def grads(names):
        leaves = {n: x.detach().requires_grad_(n in names) for n, x in inputs.items()}
        out = ops.varlen_attn(**leaves, cu_seqlens_q=cu_seqlens((5, 60)))
        out.sin().sum().backward()
        return {n: x.grad for n, x in leaves.items()}

    want, got = grads(inputs), grads([needed])
    assert all((got[n] is None) != (n == needed) for n in inputs)
    assert torch.equal(got[needed], want[needed])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_keys_may_be_the_values(dtype):
    """One tensor as k and v, as in retrieval: its gradient is the sum of both."""
    case = Case((4, 70, 1), head_size=32, kv_heads=2)
    q, k, _ = make_qkv(case, dtype)
    cu = cu_seqlens(case.lens)
    shared = k.clone().requires_grad_()
    out = ops.varlen_attn(q, shared, shared, cu)
    apart = [k.clone().requires_grad_() for _ in range(2)]
    want = ops.varlen_attn(q, *apart, cu)
    assert torch.equal(out, want)
    (grad,) = torch.autograd.grad(out.sin().sum(), shared)
    dk, dv = torch.autograd.grad(want.sin().sum(), apart)
    assert torch.equal(grad, dk + dv)
