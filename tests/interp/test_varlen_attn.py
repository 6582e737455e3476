"""The Triton kernels of varlen_attn, forward and backward, against the reference in float64.

Triton's interpreter runs them on CPU tensors in place of the C++ kernels, behind the op itself: its
checks, autograd and dtypes are in use, and the cases are those of the CPU's tests.
"""

import pytest
import torch
import triton
import triton.language as tl
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
)

from encfast import ops
from encfast.kernels import _attn_bias_grad, _attn_grad, _attn_tile
from encfast.kernels import varlen_attn as kernels
from encfast.ops.varlen_attn import _triton_fwd
from encfast.ref.philox import dropout_keep

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RAGGED = (1, 40, 0, 90)
CROSS = {"lens": (7, 0, 40, 1), "lens_k": (70, 3, 65, 1), "kv_heads": 2}
SMALL = {"lens": (1, 0, 40), "heads": 2}


pytestmark = pytest.mark.usefixtures("triton_serves_attention")


@pytest.fixture
def narrow_tiles(monkeypatch):
    """16 queries by 16 keys, so that a few dozen rows make many tiles."""
    narrow = {(4, _attn_tile.BIASED): {256: (16, 16, 1, 1)}}
    for file, table in ((kernels, "_TILES"), (_attn_grad, "_DQ_TILES"), (_attn_grad, "_DKV_TILES")):
        monkeypatch.setitem(getattr(file, table), "interpreter", narrow)
    narrow = {(4, _attn_tile.BIASED): {256: (16, 1)}}
    monkeypatch.setitem(_attn_bias_grad._TILES, "interpreter", narrow)


@pytest.mark.parametrize("dtype", (FP32, BF16, pytest.param(FP16, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(RAGGED, heads=2),
        Case(RAGGED, heads=2, head_size=64, causal=True, layout="qkv"),
        Case(RAGGED, heads=2, window=(16, 16), alibi="H"),
        Case(**CROSS),
        Case(RAGGED, head_size=33, heads=2, kv_heads=1, alibi="BH", softcap=5.0),
        Case(RAGGED, heads=2, rel="H"),
        Case(RAGGED, heads=2, rel="NH", head_size=33),
        Case(RAGGED, heads=2, bias="T"),
        Case(RAGGED, heads=2, bias="HT", layout="qkv"),
        Case(RAGGED, heads=2, bias="bool T"),
        Case(RAGGED, heads=2, dropout=0.3),
        Case(
            **CROSS,
            rel="NH",
            rel_size=9,
            bias="bool HT",
            softcap=5.0,
            alibi="BH",
            dropout=0.2,
            scale=-0.2,
        ),
    ],
    ids=str,
)
def test_matches_reference(case, dtype):
    assert_matches_reference(case, dtype)


MORE = [
    Case((1, 0, 60), head_size=1, heads=2),
    Case((1, 0, 60), head_size=128, heads=2, layout="transposed"),
    Case((1, 0, 50), head_size=255, heads=1, layout="offset"),
    Case((1, 0, 64), head_size=256, heads=1),
    Case(RAGGED, heads=2, layout="expanded", softcap=2.0),
    Case(RAGGED, heads=2, window=(1, 0), head_size=16),
    Case(RAGGED, heads=2, window=(5, -1)),
    Case(RAGGED, heads=2, window=(3, -1), causal=True),
    Case(RAGGED, heads=2, window=(1000, 1000)),
    Case(RAGGED, heads=2, scale=0.0, degenerate=True),
    Case(RAGGED, heads=2, scale=8.0, head_size=64),
    Case((5, 100, 1, 0), (70, 83, 1, 9), causal=True, head_size=64, kv_heads=2),
    Case((130, 40, 1, 0), (64, 70, 1, 0), heads=2, window=(8, 3), alibi="BH"),
    Case((0, 4, 60), (5, 0, 64), causal=True, heads=2),
    Case((300, 1, 0, 5), head_size=64, heads=1, window=(64, 64), alibi="H"),
    Case((1, 70), (0, 300), head_size=32, heads=2, kv_heads=1, window=(100, 90), alibi="H"),
    Case((31, 32, 33, 0, 1, 95, 96, 97), head_size=32, heads=1, causal=True),
    Case(RAGGED, heads=2, rel="H", rel_size=1),
    Case(RAGGED, heads=2, rel="H", rel_size=9, causal=True, kv_heads=1),
    Case(RAGGED, heads=2, rel="NH", rel_size=5, window=(50, 90), layout="transposed"),
    Case(RAGGED, heads=2, rel="NH", rel_size=1, layout="offset"),
    Case(**CROSS, rel="H", rel_size=161, window=(60, 40), softcap=5.0),
    Case(RAGGED, heads=2, rel="H", bias="HT", layout="expanded"),
    Case(RAGGED, heads=2, rel="H", bias="HT", layout="transposed"),
    Case(RAGGED, heads=2, rel="H", bias="T", layout="offset", dropout=0.5),
    Case(RAGGED, heads=2, rel="NH", bias="T", bias_dtype=FP32, dropout=0.1),
    Case(RAGGED, heads=2, bias="bool HT", layout="transposed", causal=True),
    Case((5, 100, 1, 0), (70, 83, 1, 9), window=(50, 30), head_size=32, kv_heads=2, bias="HT"),
    Case((190, 90), (40, 20), head_size=32, heads=2, kv_heads=1, alibi="H", bias="HT"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_matches_reference_more(case, dtype):
    assert_matches_reference(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 0, 15, 16, 17, 50), heads=2, head_size=16),
        Case((50, 17), heads=2, head_size=16, causal=True, rel="H", rel_size=21),
        Case((33, 50), (70, 12), heads=2, head_size=16, window=(20, 3), rel="H", rel_size=1),
        Case((60, 9), heads=2, head_size=16, window=(20, 50), bias="HT", rel="NH", rel_size=7),
        Case((60, 9), heads=2, head_size=16, window=(-1, 30), dropout=0.5, bias="T"),
        Case((40,), (100,), heads=2, head_size=16, window=(25, 25), rel="H", rel_size=31),
    ],
    ids=str,
)
def test_many_narrow_tiles(case, narrow_tiles):
    assert_matches_reference(case, FP32, few_elements=True)


def test_partials_of_a_table_in_several_launches(monkeypatch, narrow_tiles):
    monkeypatch.setattr(_attn_bias_grad, "_MAX_PARTIALS", 4 * 2 * 9 * 3)  # three tiles a launch
    assert_matches_reference(Case((50, 33), heads=2, head_size=16, rel="H", rel_size=9), FP32)


@pytest.mark.parametrize("dtypes", [(BF16, FP32, BF16), (FP16, FP16, BF16)], ids=str)
def test_mixed_dtypes_compute_in_the_promoted_one(dtypes):
    assert_matches_reference(Case(**SMALL, kv_heads=1), *dtypes, few_elements=True)


@pytest.mark.parametrize("dropout_p", (0.1, 0.7))
def test_the_mask_is_that_of_the_reference(dropout_p):
    """With v the identity, the output is the matrix of the probabilities."""
    L, H = 40, 2
    q, k = torch.randn(2 * L, H, L), torch.randn(2 * L, H, L)
    v = torch.eye(L).repeat(2, 1)[:, None].expand(-1, H, -1)
    torch.manual_seed(4)
    out = ops.varlen_attn(q, k, v, cu_seqlens((L, L)), dropout_p=dropout_p)
    for b in range(2):
        keep, _ = dropout_keep(dropout_p, drawn_key(), b, (H, L, L))
        assert torch.equal(out[b * L : b * L + L].transpose(0, 1) != 0, keep)


def test_sequences_never_leak():
    """NaN in one sequence, or in what lies between the rows, stays where it is."""
    case = Case((5, 40, 0, 33), heads=2, head_size=20, window=(9, 20), rel="NH", bias="HT")
    douts = make_douts(case, FP32)
    clean, biases = make_qkv(case, FP32), make_biases(case, FP32)
    expected = run_op(case, clean, douts, biases)
    rows = slice(5, 45)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[rows] = float("nan")
    actual = run_op(case, poisoned, douts, biases)
    for name in ("out", "dq", "dk", "dv", "drel_bias"):
        others = torch.ones(78, dtype=torch.bool)
        others[rows] = False
        assert torch.equal(actual[name][others], expected[name][others]), name
        assert actual[name][rows].isnan().any(), name


@pytest.mark.parametrize("side", ("queries", "keys", "both"))
def test_no_rows(side):
    q = torch.randn(0 if side != "keys" else 3, 2, 8, requires_grad=True)
    k = torch.randn(0 if side != "queries" else 3, 2, 8, requires_grad=True)
    ends_q, ends_k = (torch.tensor([0, x.shape[0]], dtype=torch.int32) for x in (q, k))
    out, lse = ops.varlen_attn(q, k, k, ends_q, cu_seqlens_k=ends_k, return_lse=True)
    assert not out.any() and (lse == float("-inf")).all()
    out.sum().backward()
    assert not q.grad.any() and not k.grad.any()


def test_gradients_of_biases_only_where_they_are_needed():
    case = Case(**SMALL, rel="H", bias="HT")
    qkv, biases = make_qkv(case, FP32), make_biases(case, FP32)
    biases["rel_bias"].requires_grad_()
    out = ops.varlen_attn(*qkv, cu_seqlens(case.lens), **biases)
    out.sum().backward()
    assert biases["rel_bias"].grad is not None and biases["bias"].grad is None


def test_bit_equal_from_run_to_run():
    case = Case((20, 40), heads=2, kv_heads=1, head_size=16, rel="H", bias="T", dropout=0.2)
    qkv, douts = make_qkv(case, FP16), make_douts(case, FP16)
    first, second = run_op(case, qkv, douts), run_op(case, qkv, douts)
    for name in (*RESULTS, "drel_bias", "dbias"):
        assert torch.equal(first[name], second[name]), name


def test_lengths_and_offsets_may_lie_apart():
    case = Case(**SMALL, bias="T")
    qkv, biases = make_qkv(case, FP32), make_biases(case, FP32)
    cu = cu_seqlens(case.lens)
    offsets = torch.tensor([0, 1, 1, 1601])
    expected = ops.varlen_attn(*qkv, cu, bias_offsets=offsets, **biases)
    apart = [x.repeat_interleave(2)[::2] for x in (cu, offsets)]
    assert not apart[0].is_contiguous()
    assert torch.equal(ops.varlen_attn(*qkv, apart[0], bias_offsets=apart[1], **biases), expected)


def test_what_serves_the_op_checks_its_arguments():
    case = Case(**SMALL, rel="H")
    q, k, v = make_qkv(case, FP32)
    cu = cu_seqlens(case.lens)
    rule = [None, False, [-1, -1], *[None] * 7]
    out, _ = _triton_fwd(q, k, v, cu, None, None, None, *rule)
    assert torch.equal(out, ops.varlen_attn(q, k, v, cu))
    with pytest.raises(ValueError, match="k has 40 rows and q has 41"):
        _triton_fwd(q, k[1:], v[1:], cu, None, None, None, *rule)
    with pytest.raises(ValueError, match="rel_bias has 4 entries"):
        _triton_fwd(q, k, v, cu, None, None, None, *rule[:4], torch.zeros(2, 4), *rule[5:])


@triton.jit
def _plan_kernel(plan, first, last, left, right, n, BLOCK: tl.constexpr):
    lo, full_lo, full_hi, hi = _attn_tile.visited(first, last, left, right, n, BLOCK)
    tl.store(plan, lo)
    tl.store(plan + 1, full_lo)
    tl.store(plan + 2, full_hi)
    tl.store(plan + 3, hi)
    tl.store(plan + 4, _attn_tile.count_edges(lo, full_lo, full_hi, hi, BLOCK))


@triton.jit
def _edges_kernel(starts, n_edges, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    for i_edge in range(n_edges):
        tl.store(starts + i_edge, _attn_tile.edge_start(i_edge, lo, full_lo, full_hi, BLOCK))


def _plan(first, count, left, right, n, block):
    """First rows of the full blocks and of the edges that a tile of positions visits."""
    plan = torch.zeros(5, dtype=torch.int32)
    _plan_kernel[(1,)](plan, first, first + count - 1, left, right, n, block)
    lo, full_lo, full_hi, _, n_edges = plan.tolist()
    starts = torch.zeros(max(n_edges, 1), dtype=torch.int32)
    _edges_kernel[(1,)](starts, n_edges, lo, full_lo, full_hi, block)
    return list(range(full_lo, full_hi, block)), starts[:n_edges].tolist()


@pytest.mark.parametrize("left", (None, 0, 7, 100))
@pytest.mark.parametrize("right", (None, 0, 9, 100))
def test_full_blocks_are_exactly_those_without_a_hidden_pair(left, right):
    """The plan of blocks of every tile of a few geometries, against the mask written out."""
    block = 8
    for n_q, n_k in ((1, 1), (20, 33), (33, 20), (40, 40), (5, 0), (16, 8)):
        position = torch.arange(n_q)[:, None] + n_k - n_q
        offset = torch.arange(n_k) - position
        seen = torch.ones_like(offset, dtype=torch.bool)
        if left is not None:
            seen &= offset >= -left
        if right is not None:
            seen &= offset <= right
        for start in range(0, n_q, block):
            rows = seen[start : start + block]
            full, edges = _plan(int(position[start]), len(rows), left, right, n_k, block)
            cut = {at: rows[:, at : at + block] for at in range(0, n_k, block)}
            assert len(edges) == len(set(edges)) and not set(full) & set(edges)
            for at, part in cut.items():
                whole = part.shape[1] == block and bool(part.all())
                assert (at in full) == whole, (n_q, n_k, start, at)
                assert at in full or at in edges or not part.any(), (n_q, n_k, start, at)
            assert set(full) | set(edges) <= set(cut)
