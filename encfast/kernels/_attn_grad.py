"""Gradients of q, k and v of varlen_attn, from the saved log-sum-exps (FlashAttention-2, section
3.1.2): no probabilities are kept, each kernel makes its tiles of them anew.

Tiling. Two kernels, so that no sum crosses programs and no atomics are needed.

    dq       a program owns BLOCK_M queries of a query head and walks over the keys they see
    dk, dv   a program owns BLOCK_N keys of a key head and walks over the queries that see them, of
             all query heads of the group, one head after the other. Its tiles are keys by queries,
             so that p and ds are the left factors of their products as they come out of registers.

A small kernel in front makes what each row needs in both: delta = sum(dout out) - dlse, and lse
with 0 in place of -inf, where no key is visible and all scores are -inf anyway.

Memory traffic per row and head: dq reads 3 D elements and writes D, and reads k and v once per tile
of queries; dk, dv read k and v once, and q and dout once per tile of keys: seven products in all,
two more than with atomics, for the same bits in every run.

Assumptions: those of the forward.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _tune
from ._attn_tile import (
    BIASED,
    PLAIN,
    POSITIONAL,
    Heads,
    Rule,
    count_edges,
    edge_start,
    find_tile,
    head_at,
    heads_of,
    kept,
    load_rows,
    multiplier,
    row_at,
    scores,
    store_rows,
    visited,
)
from ._softmax import LOG2E

# As in the forward: BLOCK_M, BLOCK_N, warps, stages. At 128 channels a program's own rows do not
# stay in registers; the more of them share what a step brings, the less its loads hold the tensor
# cores up. With fewer than 16 own rows per warp, warps may compute the same products.
_DQ_AMPERE = {
    (2, PLAIN): {64: (128, 64, 8, 2), 128: (128, 64, 8, 3), 256: (32, 32, 8, 1)},
    (2, POSITIONAL): {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    (2, BIASED): {64: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    (4, BIASED): {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
# Of less shared memory.
_DQ_SMALL = _DQ_AMPERE | {
    (2, PLAIN): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
}
_DQ_HOPPER = _DQ_AMPERE | {
    (2, PLAIN): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    (2, POSITIONAL): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
    (4, BIASED): {64: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
}
_DKV_AMPERE = {
    (2, PLAIN): {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 32, 8, 1)},
    (2, POSITIONAL): {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    (2, BIASED): {256: (32, 32, 8, 1)},
    (4, BIASED): {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
_DKV_HOPPER = _DKV_AMPERE | {
    (2, PLAIN): {64: (64, 64, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
    (2, POSITIONAL): {64: (64, 64, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
    (2, BIASED): {128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    (4, PLAIN): {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 32, 8, 1)},
}
_AMD = {
    (2, POSITIONAL): {64: (64, 64, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    (2, BIASED): {128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    (4, BIASED): {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
}
_DQ_TILES = {
    "sm_80": _DQ_AMPERE,
    "sm_86": _DQ_SMALL,
    "sm_90": _DQ_HOPPER,
    "sm_100": _DQ_HOPPER
    | {
        (2, PLAIN): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
        (2, BIASED): {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    },
    "sm_120": _DQ_SMALL,
    "gfx90a": _AMD,
    "interpreter": {(2, BIASED): {256: (64, 32, 1, 1)}, (4, BIASED): {256: (32, 64, 1, 1)}},
}
_DKV_TILES = {
    "sm_80": _DKV_AMPERE,
    "sm_86": _DKV_AMPERE
    | {
        (2, PLAIN): {64: (64, 128, 8, 3), 128: (16, 128, 8, 2), 256: (32, 32, 8, 1)},
        (2, BIASED): {128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    },
    "sm_90": _DKV_HOPPER,
    "sm_100": {
        (2, PLAIN): {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        (2, POSITIONAL): {64: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        (2, BIASED): {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        (4, PLAIN): {256: (16, 16, 8, 1)},
        (4, BIASED): {128: (16, 16, 8, 1), 256: (16, 16, 4, 1)},
    },
    "sm_120": _DKV_AMPERE
    | {
        (2, PLAIN): {
            32: (64, 64, 8, 1),
            64: (32, 128, 8, 2),
            128: (16, 128, 8, 2),
            256: (16, 32, 8, 1),
        },
        (2, POSITIONAL): {128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
        (2, BIASED): {128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
        (4, BIASED): {64: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "gfx90a": _AMD,
    "interpreter": {(2, BIASED): {256: (32, 64, 1, 1)}, (4, BIASED): {256: (64, 32, 1, 1)}},
}
_TERM_ELEMENTS = 2048  # of a tile of the kernel in front


class Saved(NamedTuple):
    """What the gradients are made of."""

    q: Heads
    k: Heads
    v: Heads
    dout: Heads
    delta: Tensor  # [H, N] float32
    lse: Tensor  # [H, N] float32, finite
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


@triton.jit
def varlen_attn_row_terms_kernel(
    dout,
    out,
    dlse,  # [H, N] or None
    lse,
    delta,
    finite_lse,
    N,
    dlse_stride_h,
    dlse_stride_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_n = first + tl.arange(0, BLOCK_M)
    m_row = o_n < N
    p_dout, p_out = head_at(dout, 0, i_h), head_at(out, 0, i_h)
    b_dout = load_rows(p_dout, dout.stride_n, first, N, D, BLOCK_M, BLOCK_D, True).to(tl.float32)
    b_out = load_rows(p_out, out.stride_n, first, N, D, BLOCK_M, BLOCK_D, True).to(tl.float32)
    b_delta = tl.sum(b_dout * b_out, 1)
    if dlse is not None:
        p_dlse = dlse + i_h * dlse_stride_h + o_n * dlse_stride_n
        b_delta -= tl.load(p_dlse, mask=m_row, other=0.0)
    at = i_h * N + o_n
    b_lse = tl.load(lse + at, mask=m_row, other=0.0)
    tl.store(delta + at, b_delta, mask=m_row)
    tl.store(finite_lse + at, tl.where(b_lse == float("-inf"), 0.0, b_lse), mask=m_row)


@triton.jit
def _probabilities(
    b_qk,
    b_lse,
    rule,
    i_b,
    i_h,
    first_q,
    o_q,
    n_q,
    start_k,
    n_k,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Those of a tile before dropout, and the softcap's derivative."""
    o_k = start_k + tl.arange(0, BLOCK_N)
    AXIS: tl.constexpr = 0 if KEYS_FIRST else 1  # along which the queries are the same
    t_q, t_k = tl.expand_dims(o_q, AXIS), tl.expand_dims(o_k, 1 - AXIS)
    b_s, b_dcap = scores(b_qk, rule, i_b, i_h, first_q, t_q, n_q, t_k, n_k, EDGE)
    # Scores and lse may be large: their difference is taken before anything else rounds them.
    return tl.exp2((b_s - tl.expand_dims(b_lse, AXIS)) * LOG2E), b_dcap


@triton.jit
def pair_grads(
    b_x,
    b_y,
    b_gx,
    b_gy,
    b_lse,
    b_delta,
    rule,
    i_b,
    i_h,
    first_q,
    o_q,
    n_q,
    start_k,
    n_k,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """The probabilities of a tile after dropout, the gradient of its scores, and the softcap's
    derivative.

    b_x b_y^T are the products q k, b_gx b_gy^T those of dout and v; with KEYS_FIRST k and v are on
    the left, and the tile is [keys, queries].
    """
    b_qk = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    b_dp = tl.dot(b_gx, tl.trans(b_gy), input_precision="ieee")
    b_p, b_dcap = _probabilities(
        b_qk, b_lse, rule, i_b, i_h, first_q, o_q, n_q, start_k, n_k, BLOCK_N, EDGE, KEYS_FIRST
    )
    b_kept = b_p
    if rule.rng is not None:
        m_kept = kept(rule, i_b, i_h, o_q, start_k, BLOCK_N)
        if KEYS_FIRST:
            m_kept = tl.trans(m_kept)
        b_kept = tl.where(m_kept, b_p * multiplier(rule), 0.0)
        b_dp = tl.where(m_kept, b_dp * multiplier(rule), 0.0)
    return b_kept, b_p * (b_dp - tl.expand_dims(b_delta, 0 if KEYS_FIRST else 1)), b_dcap


@triton.jit
def terms_at(saved, i_h, N, first_row):
    """Pointers to delta and lse of a sequence's first row."""
    at = tl.cast(i_h, tl.int64) * N + first_row
    return saved.delta + at, saved.lse + at


@triton.jit
def load_terms(p_delta, p_lse, o_q, n_q, EDGE: tl.constexpr):
    """delta and lse of the rows o_q of a sequence; on edges 0 beyond it."""
    o_row = o_q.to(tl.uint32)  # which keeps loops over `o_q` from counting in 64 bits
    if EDGE:
        b_delta = tl.load(p_delta + o_row, mask=o_q < n_q, other=0.0)
        return b_delta, tl.load(p_lse + o_row, mask=o_q < n_q, other=0.0)
    else:
        return tl.load(p_delta + o_row), tl.load(p_lse + o_row)


@triton.jit
def _visit_keys(
    b_dq,
    b_q,
    b_dout,
    b_lse,
    b_delta,
    p_k,
    p_v,
    start,
    saved,
    rule,
    i_b,
    i_h,
    first_q,
    o_q,
    n_q,
    n_k,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One block of keys; p_k and p_v point at its first, which is `start` in the sequence."""
    b_k = load_rows(p_k, saved.k.stride_n, 0, n_k - start, D, BLOCK_N, BLOCK_D, EDGE)
    b_v = load_rows(p_v, saved.v.stride_n, 0, n_k - start, D, BLOCK_N, BLOCK_D, EDGE)
    _, b_ds, b_dcap = pair_grads(
        b_q, b_k, b_dout, b_v, b_lse, b_delta, rule, i_b, i_h, first_q, o_q, n_q, start, n_k,
        BLOCK_N, EDGE, False,
    )  # fmt: skip
    return tl.dot((b_ds * b_dcap).to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def varlen_attn_dq_kernel(
    saved,
    dq,
    rule,
    B,
    N,
    group,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_h = tl.program_id(1)
    i_b, first_q, n_q, start_q = find_tile(saved.cu_seqlens_q, B, tl.program_id(0), BLOCK_M)
    if start_q >= n_q:
        return
    first_k = tl.load(saved.cu_seqlens_k + i_b)
    n_k = tl.load(saved.cu_seqlens_k + i_b + 1) - first_k
    o_q = start_q + tl.arange(0, BLOCK_M)
    p_q, p_dout = head_at(saved.q, first_q, i_h), head_at(saved.dout, first_q, i_h)
    b_q = load_rows(p_q, saved.q.stride_n, start_q, n_q, D, BLOCK_M, BLOCK_D, True)
    b_dout = load_rows(p_dout, saved.dout.stride_n, start_q, n_q, D, BLOCK_M, BLOCK_D, True)
    p_delta, p_lse = terms_at(saved, i_h, N, first_q)
    b_delta, b_lse = load_terms(p_delta, p_lse, o_q, n_q, True)
    p_k, p_v = head_at(saved.k, first_k, i_h // group), head_at(saved.v, first_k, i_h // group)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    position = start_q + n_k - n_q
    last = tl.minimum(start_q + BLOCK_M, n_q) - 1 + n_k - n_q
    lo, full_lo, full_hi, hi = visited(position, last, rule.left, rule.right, n_k, BLOCK_N)
    # Pointers that move, as in the forward.
    stride_k, stride_v = saved.k.stride_n, saved.v.stride_n
    p_full_k, p_full_v = row_at(p_k, stride_k, full_lo), row_at(p_v, stride_v, full_lo)
    for start in range(full_lo, full_hi, BLOCK_N):
        b_dq = _visit_keys(
            b_dq, b_q, b_dout, b_lse, b_delta, p_full_k, p_full_v, start, saved, rule, i_b, i_h,
            first_q, o_q, n_q, n_k, D, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
        p_full_k = row_at(p_full_k, stride_k, BLOCK_N)
        p_full_v = row_at(p_full_v, stride_v, BLOCK_N)
    for i_edge in range(count_edges(lo, full_lo, full_hi, hi, BLOCK_N)):
        start = edge_start(i_edge, lo, full_lo, full_hi, BLOCK_N)
        b_dq = _visit_keys(
            b_dq, b_q, b_dout, b_lse, b_delta,
            row_at(p_k, stride_k, start), row_at(p_v, stride_v, start), start, saved, rule, i_b,
            i_h, first_q, o_q, n_q, n_k, D, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    store_rows(dq, first_q, i_h, start_q, n_q, b_dq * rule.scale, D, BLOCK_M, BLOCK_D)


@triton.jit
def _visit_queries(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_dout,
    p_delta,
    p_lse,
    start,
    saved,
    rule,
    i_b,
    i_h,
    first_q,
    n_q,
    start_k,
    n_k,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One block of queries; p_q and p_dout point at its first, which is `start` in the sequence."""
    o_q = start + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, saved.q.stride_n, 0, n_q - start, D, BLOCK_M, BLOCK_D, EDGE)
    b_dout = load_rows(p_dout, saved.dout.stride_n, 0, n_q - start, D, BLOCK_M, BLOCK_D, EDGE)
    b_delta, b_lse = load_terms(p_delta, p_lse, o_q, n_q, EDGE)
    BIAS: tl.constexpr = (rule.rel_bias is not None) or (rule.bias is not None)
    BENT: tl.constexpr = (rule.rng is not None) or (rule.softcap is not None)
    if (rule.slopes is None) and not BIAS and not BENT:
        # As pair_grads, but where little besides the products needs registers it takes fewer: dv
        # does not wait for dp, nor dp for delta, which its sums begin with.
        b_qk = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p, b_dcap = _probabilities(
            b_qk, b_lse, rule, i_b, i_h, first_q, o_q, n_q, start_k, n_k, BLOCK_N, EDGE, True
        )
        b_dv = tl.dot(b_p.to(b_v.dtype), b_dout, b_dv, input_precision="ieee")
        b_delta = tl.broadcast_to(-b_delta[None, :], b_p.shape)
        b_ds = b_p * tl.dot(b_v, tl.trans(b_dout), b_delta, input_precision="ieee")
    else:
        b_p, b_ds, b_dcap = pair_grads(
            b_k, b_q, b_v, b_dout, b_lse, b_delta, rule, i_b, i_h, first_q, o_q, n_q, start_k, n_k,
            BLOCK_N, EDGE, True,
        )  # fmt: skip
        b_dv = tl.dot(b_p.to(b_v.dtype), b_dout, b_dv, input_precision="ieee")
    b_dk = tl.dot((b_ds * b_dcap).to(b_k.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def varlen_attn_dkv_kernel(
    saved,
    dk,
    dv,
    rule,
    B,
    N,
    group,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_hk = tl.program_id(1)
    i_b, first_k, n_k, start_k = find_tile(saved.cu_seqlens_k, B, tl.program_id(0), BLOCK_N)
    if start_k >= n_k:
        return
    first_q = tl.load(saved.cu_seqlens_q + i_b)
    n_q = tl.load(saved.cu_seqlens_q + i_b + 1) - first_q
    p_k, p_v = head_at(saved.k, first_k, i_hk), head_at(saved.v, first_k, i_hk)
    b_k = load_rows(p_k, saved.k.stride_n, start_k, n_k, D, BLOCK_N, BLOCK_D, True)
    b_v = load_rows(p_v, saved.v.stride_n, start_k, n_k, D, BLOCK_N, BLOCK_D, True)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    # Key j is seen by the queries j - shift - right .. j - shift + left.
    shift = n_k - n_q
    last = tl.minimum(start_k + BLOCK_N, n_k) - 1 - shift
    lo, full_lo, full_hi, hi = visited(start_k - shift, last, rule.right, rule.left, n_q, BLOCK_M)
    stride_q, stride_dout = saved.q.stride_n, saved.dout.stride_n
    for i_h in range(i_hk * group, i_hk * group + group):
        p_q, p_dout = head_at(saved.q, first_q, i_h), head_at(saved.dout, first_q, i_h)
        p_full_q, p_full_dout = row_at(p_q, stride_q, full_lo), row_at(p_dout, stride_dout, full_lo)
        p_delta, p_lse = terms_at(saved, i_h, N, first_q)
        for start in range(full_lo, full_hi, BLOCK_M):
            b_dk, b_dv = _visit_queries(
                b_dk, b_dv, b_k, b_v, p_full_q, p_full_dout, p_delta, p_lse, start, saved, rule,
                i_b, i_h, first_q, n_q, start_k, n_k, D, BLOCK_M, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
            p_full_q = row_at(p_full_q, stride_q, BLOCK_M)
            p_full_dout = row_at(p_full_dout, stride_dout, BLOCK_M)
        for i_edge in range(count_edges(lo, full_lo, full_hi, hi, BLOCK_M)):
            start = edge_start(i_edge, lo, full_lo, full_hi, BLOCK_M)
            b_dk, b_dv = _visit_queries(
                b_dk, b_dv, b_k, b_v, row_at(p_q, stride_q, start),
                row_at(p_dout, stride_dout, start), p_delta, p_lse, start, saved,
                rule, i_b, i_h, first_q, n_q, start_k, n_k, D, BLOCK_M, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
    store_rows(dk, first_k, i_hk, start_k, n_k, b_dk * rule.scale, D, BLOCK_N, BLOCK_D)
    store_rows(dv, first_k, i_hk, start_k, n_k, b_dv, D, BLOCK_N, BLOCK_D)


def row_terms(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """delta and lse of `Saved`."""
    N, H, D = out.shape
    delta, finite_lse = lse.new_empty((H, N)), lse.new_empty((H, N))
    block_d = triton.next_power_of_2(D)
    block_m = min(64, _TERM_ELEMENTS // block_d)
    if N:
        varlen_attn_row_terms_kernel[(triton.cdiv(N, block_m), H)](
            heads_of(dout),
            heads_of(out),
            dlse,
            lse.contiguous(),
            delta,
            finite_lse,
            N,
            *((0, 0) if dlse is None else dlse.stride()),
            D=D,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return delta, finite_lse


def input_grads(saved: Saved, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous."""
    q, k = saved.q.data, saved.k.data
    (N, H, D), (Nk, Hk, _), B = q.shape, k.shape, saved.cu_seqlens_q.shape[0] - 1
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
    sizes = (rule, B, N, H // Hk)
    if N:
        _tune.launch(
            varlen_attn_dq_kernel, lambda tile: (N // tile["BLOCK_M"] + B, H),
            (saved, heads_of(dq), *sizes), _DQ_TILES, q.dtype, D, rule,
        )  # fmt: skip
    if Nk:
        _tune.launch(
            varlen_attn_dkv_kernel, lambda tile: (Nk // tile["BLOCK_N"] + B, Hk),
            (saved, heads_of(dk), heads_of(dv), *sizes), _DKV_TILES, q.dtype, D, rule,
        )  # fmt: skip
    return dq, dk, dv
