"""The sanitizer sees each kind of bug, planted once, and nothing in the project's kernels."""

import functools
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from attn_cases import Case, make_biases, make_douts, make_qkv, run_op
from sanitizer import sanitized
from triton.runtime.errors import InterpreterError

from encfast.kernels import _logits, add_norm, glu, grouped_mm, rank_loss, rotary, seg_pool
from encfast.kernels import linear_cross_entropy as vocabulary
from encfast.kernels import linear_kl as divergence


@triton.jit
def _planted(x, out, n, BUG: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o_n, mask=o_n < n, other=0.0)
    if BUG == "read beyond the end":
        b_x = tl.load(x + o_n)
    elif BUG == "write beyond the end":
        tl.store(out + o_n, b_x)
    elif BUG == "write before the start":
        tl.store(out + o_n - BLOCK, b_x, mask=o_n < n)
    elif BUG == "all write one element":
        tl.store(out, tl.sum(b_x, 0))
    elif BUG == "one reads what another writes":
        tl.store(out + o_n, b_x + tl.load(out + (o_n + BLOCK) % n), mask=o_n < n)
    elif BUG == "stores and atomics":
        tl.atomic_add(out, 1.0)
        tl.store(out + o_n, b_x, mask=o_n < n)
    elif BUG == "two lanes of one store":
        tl.store(out + o_n // 2, b_x, mask=o_n < n)
    elif BUG == "misaligned":
        p_odd = out.to(tl.pointer_type(tl.int8)) + 1
        tl.store(p_odd.to(tl.pointer_type(tl.float32)), 1.0, mask=i_n == 0)
    elif BUG == "atomics":
        tl.atomic_add(out, tl.sum(b_x, 0))
    else:
        tl.store(out + o_n, b_x, mask=o_n < n)


def _launch(bug, grid=(3,)):
    x, out = torch.randn(40), torch.zeros(40)
    _planted[grid](x, out, 40, bug, 16)
    return x, out


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("read beyond the end", "out of bounds: program 2 reads 8 elements"),
        ("write beyond the end", "out of bounds: program 2 writes 8 elements"),
        ("write before the start", "out of bounds: program 0 writes 16 elements"),
        ("all write one element", "race: program . writes an element that program . wrote"),
        ("one reads what another writes", "race: program . (reads|writes) an element that program"),
        ("stores and atomics", "race: program . (stores where atomics|updates an element)"),
        ("two lanes of one store", "race: program . stores twice to one address at once"),
        ("misaligned", "writes at an odd address"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_planted_bugs_are_reported(bug, report, seed):
    with sanitized(seed), pytest.raises(InterpreterError, match=report):
        _launch(bug)


@pytest.mark.parametrize("grid", [(3, 65536), (1, 1, 65536)])
def test_grids_that_no_gpu_takes(grid):
    with sanitized(), pytest.raises(Exception, match="a grid of"):
        _launch("", grid)


@pytest.mark.parametrize("bug", ["", "atomics"])
def test_what_is_right_is_not_reported(bug):
    with sanitized() as launches:
        x, out = _launch(bug)
    assert launches == ["_planted"]
    torch.testing.assert_close(out, x) if not bug else torch.testing.assert_close(out[0], x.sum())


@triton.jit
def _last_wins(out, BLOCK: tl.constexpr):
    tl.atomic_xchg(out, tl.program_id(0))


def test_an_order_that_matters_shows_between_seeds():
    found = set()
    for seed in range(5):
        out = torch.zeros(1, dtype=torch.int32)
        with sanitized(seed):
            _last_wins[(8,)](out, 1)
        found.add(out.item())
    assert len(found) > 1


def test_everything_is_as_before_afterwards():
    with sanitized(), pytest.raises(InterpreterError):
        _launch("two lanes of one store")
    x, out = torch.randn(40), torch.zeros(40)
    _planted[(3,)](x, out, 40, "all write one element", 16)
    assert out[0] != 0


# The project's kernels: no report, and the same bits in any order.


def _glu(dtype):
    x, bias, dout = (
        torch.randn(300, 140).to(dtype),
        torch.randn(140),
        torch.randn(300, 70).to(dtype),
    )
    return (
        glu.glu(x, bias, "gelu", True, False),
        *glu.glu_bwd(dout, x, bias, "silu", True, True, True),
    )


def _add_norm(dtype):
    """Of views of rows in registers, then in stripes."""
    results = []
    x, residual = torch.randn(2, 2, 13, 42).to(dtype)[..., 1:]
    weight, bias, scale = torch.randn(3, 41)
    for kind, widest in (("layernorm", 64), ("rmsnorm", 32)):
        with mock.patch.multiple(add_norm, _WIDEST=(widest, widest), _STRIPE=16):
            outs = add_norm.add_norm(x, residual, weight, bias, scale, kind, None, True)
            y, *saved = outs
            rest = (x, weight, scale, kind, True, True)
            results += [*outs, *add_norm.add_norm_bwd(x, y, *saved, *rest)]
    return tuple(results)


def _rotary(dtype):
    q, k = torch.randn(37, 3, 24).to(dtype), torch.randn(37, 1, 24).to(dtype)
    cos, sin = torch.randn(50, 10), torch.randn(50, 10)
    positions = torch.randint(0, 50, (37,))
    return (
        *rotary.rotary(q, k, cos, sin, positions, False, False),
        *rotary.rotary(q, None, cos, sin, None, True, True),
    )


def _grouped_mm(dtype):
    """Of views, to whole tiles and to edges, with rows beyond the last group."""
    cu = torch.tensor([0, 18, 18, 40], dtype=torch.int32)
    results = []
    for C, F in ((32, 64), (41, 35)):
        x, dout = torch.randn(45, 2 * C).to(dtype)[:, C:], torch.randn(45, F).to(dtype)
        weight, bias = torch.randn(3, C, F).to(dtype).mT, torch.randn(3, F)
        results.append(grouped_mm.grouped_mm(x, weight, cu, bias))
        results += grouped_mm.grouped_mm_bwd(dout, x, weight, cu, True, True, True)
    return tuple(results)


def _seg_pool(dtype):
    """Of views, short and empty segments and one of several tiles; weights' programs take steps."""
    cu = torch.tensor([0, 3, 3, 12], dtype=torch.int32)
    x, weights, dout = (torch.randn(n, 40).to(dtype)[:, 3:] for n in (12, 12, 3))
    results = []
    with mock.patch.multiple(seg_pool, _WEIGHTS=4, _row_block=lambda C: 16):
        for how in ("attention", "max"):
            given = weights[:, 0] if how == "attention" else None
            saved = seg_pool.seg_pool(x, cu, given, how, True)
            rest = (given, *saved, how, True, True, how == "attention")
            results += [*saved, *seg_pool.seg_pool_bwd(dout, x, cu, *rest)]
    return tuple(results)


def _in_parts_and_slices():
    """Statistics by two programs a row, gradients in slices of one tile."""
    return mock.patch.multiple(_logits, _PROGRAMS=1, _MOST_STEPS=1, SLOT_BYTES=0, _LEAST_COLUMNS=32)


def _linear_cross_entropy(dtype):
    """Of views, rows and columns that fill no tile."""
    x, weight = torch.randn(35, 40).to(dtype)[:, 3:], torch.randn(45, 40).to(dtype)[:, 3:]
    targets, options = torch.randint(0, 45, (35,)), (7, 0.1, 1e-2, 3.0)
    head = x, weight, targets, torch.randn(45), torch.arange(35)
    with _in_parts_and_slices():
        loss, lse = vocabulary.linear_cross_entropy(*head, *options)
        rest = (lse, *options, True, True, True)
        grads = vocabulary.linear_cross_entropy_bwd(torch.randn(35), *head, *rest)
    return loss, lse, *grads


def _linear_kl(dtype):
    x, weight, teacher_x, teacher_weight = (
        torch.randn(n, c).to(dtype)[:, 3:] for c in (36, 24) for n in (19, 45)
    )
    heads = x, weight, teacher_x, teacher_weight, torch.randn(45), None, 2.0
    with _in_parts_and_slices():
        loss, lse = divergence.linear_kl(*heads)
        grads = divergence.linear_kl_bwd(torch.randn(19), *heads, lse, True, True, True)
    return loss, lse, *grads


def _rank_loss(dtype):
    """Of views, with pairs that are no candidates and rows that share a positive or have none."""
    a, b = torch.randn(35, 40).to(dtype)[:, 3:], torch.randn(45, 40).to(dtype)[:, 3:]
    scale, bias, positives = torch.tensor(0.3), torch.tensor(-1.0), torch.randint(-1, 45, (35,))
    head, grads = (a, b, scale, positives, (positives + 2) % 45), torch.randn(3, 35)
    with _in_parts_and_slices():
        losses = rank_loss.info_nce(*head, True)
        results = rank_loss.info_nce_bwd(*grads, *head, *losses[3:], True, True, True)
        pairs = a, b, scale, bias, positives
        results += rank_loss.siglip_bwd(grads[0], *pairs, True, True)
        return *losses, *results, rank_loss.siglip(*pairs)


_ATTENTION = [
    Case((1, 0, 35, 70), heads=2, head_size=20, rel="H", rel_size=9),
    Case((7, 0, 40, 1), (60, 3, 20, 1), head_size=16, kv_heads=2, causal=True, alibi="BH"),
    Case((5, 40), heads=2, head_size=16, window=(9, 5), rel="NH", bias="HT", dropout=0.3),
    Case((5, 40), heads=2, head_size=16, bias="bool T", softcap=3.0, layout="offset"),
    Case((5, 40), heads=2, head_size=16, bias="T", layout="transposed"),
]


def _attention(case, dtype):
    biases = make_biases(case, dtype)
    return tuple(run_op(case, make_qkv(case, dtype), make_douts(case, dtype), biases).values())


CALLS = {"add_norm": _add_norm, "glu": _glu, "grouped_mm": _grouped_mm, "rotary": _rotary}
CALLS |= {"linear_cross_entropy": _linear_cross_entropy, "linear_kl": _linear_kl}
CALLS |= {"rank_loss": _rank_loss, "seg_pool": _seg_pool}
CALLS |= {str(case): functools.partial(_attention, case) for case in _ATTENTION}


@pytest.mark.usefixtures("triton_serves_attention")
@pytest.mark.parametrize("call", CALLS)
def test_kernels_are_clean_and_give_the_same_bits_in_any_order(call):
    torch.manual_seed(0)
    expected = CALLS[call](torch.bfloat16)
    for seed in range(2):
        torch.manual_seed(0)
        with sanitized(seed) as launches:
            results = CALLS[call](torch.bfloat16)
        assert launches
        for got, wanted in zip(results, expected, strict=True):
            assert torch.equal(got, wanted)
