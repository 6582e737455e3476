"""Softmax attention over packed sequences, flash-attention's online softmax, in Triton.

Tiling. A program owns BLOCK_M queries of one head and walks over the keys they see in blocks of
BLOCK_N, first the full ones, then the edges (`_attn_tile` says which, `_ragged` whose rows).
Neighbours in the grid are neighbours in the sequence and find its keys in L2.

                 keys of one sequence
               +-------+-------+--..--+
    BLOCK_M    | q kT -> p -> acc     |      acc [BLOCK_M, BLOCK_D], row maximum m, row sum l
    queries    +-------+-------+--..--+
                BLOCK_N

q stays in registers (or shared memory, as the tensor core wants it), k and v pass through a
pipeline of `stages` blocks in shared memory. The backward is in `_attn_grad`, the gradients of the
biases in `_attn_bias_grad`.

Memory traffic per query and head: D elements in, D out and one float32; keys are read once per
tile of queries, from L2 mostly. No buffer grows with the square of the length.

Assumptions. D <= 256 and contiguous (else the input is copied first), padded to a power of two
inside; any other strides. Row offsets are 64-bit. float32 multiplies in IEEE precision: TF32 would
not meet the tolerance of `encfast.testing`. No atomics: bit-equal from run to run.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attn_bias_grad, _attn_grad, _tune
from ._attn_tile import (
    BIASED,
    PLAIN,
    POSITIONAL,
    count_edges,
    edge_start,
    find_tile,
    head_at,
    heads_of,
    kept,
    load_rows,
    make_rule,
    multiplier,
    row_at,
    scores,
    store_rows,
    visited,
)
from ._softmax import LOG2E

# By bytes of an element, weight of the rule and BLOCK_D: BLOCK_M, BLOCK_N, warps, stages.
_AMPERE = {
    (2, PLAIN): {64: (128, 128, 8, 3), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
    (2, POSITIONAL): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    (2, BIASED): {64: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    (4, BIASED): {64: (16, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
}
# The instructions of sm_80, but for sm_86, 89 and 120 the compiler runs out of registers earlier.
_SMALL = _AMPERE | {
    (2, PLAIN): {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    (4, BIASED): {128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
}
_HOPPER = _AMPERE | {
    (2, PLAIN): {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
    (2, POSITIONAL): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
}
_TILES = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_90": _HOPPER,
    "sm_120": _SMALL,
    "gfx90a": {
        (2, POSITIONAL): {64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1)},
        (2, BIASED): {64: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
        (4, BIASED): {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
    "interpreter": {(2, BIASED): {256: (64, 32, 1, 1)}, (4, BIASED): {256: (32, 64, 1, 1)}},
}


@triton.jit
def _visit(
    b_acc,
    b_m,
    b_l,
    b_q,
    p_k,
    p_v,
    start,
    rule,
    i_b,
    i_h,
    first_q,
    o_q,
    n_q,
    n_k,
    stride_k,
    stride_v,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One block of keys; p_k and p_v point at its first, which is `start` in the sequence."""
    o_k = start + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, stride_k, 0, n_k - start, D, BLOCK_N, BLOCK_D, EDGE)
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s, _ = scores(b_qk, rule, i_b, i_h, first_q, o_q[:, None], n_q, o_k[None, :], n_k, EDGE)
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_top = b_m_new
    if EDGE or (rule.rel_bias is not None) or (rule.bias is not None):
        b_top = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # nothing seen so far
    if b_q.dtype == tl.float32:
        b_p = tl.exp2((b_s - b_top[:, None]) * LOG2E)
    else:  # one FMA; its rounding is far below that of the inputs
        b_p = tl.exp2(b_s * LOG2E - (b_top * LOG2E)[:, None])
    b_shrink = tl.exp2((b_m - b_top) * LOG2E)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    if rule.rng is not None:
        b_p = tl.where(kept(rule, i_b, i_h, o_q, start, BLOCK_N), b_p, 0.0)
    b_v = load_rows(p_v, stride_v, 0, n_k - start, D, BLOCK_N, BLOCK_D, EDGE)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision="ieee")
    return b_acc, b_m_new, b_l


@triton.jit
def varlen_attn_kernel(
    q,
    k,
    v,
    out,
    lse,  # [H, N]
    cu_seqlens_q,
    cu_seqlens_k,
    rule,
    B,
    N,
    group,  # query heads of a key head
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_h = tl.program_id(1)
    i_b, first_q, n_q, start_q = find_tile(cu_seqlens_q, B, tl.program_id(0), BLOCK_M)
    if start_q >= n_q:
        return
    first_k = tl.load(cu_seqlens_k + i_b)
    n_k = tl.load(cu_seqlens_k + i_b + 1) - first_k
    o_q = start_q + tl.arange(0, BLOCK_M)
    p_q = head_at(q, first_q, i_h)
    b_q = load_rows(p_q, q.stride_n, start_q, n_q, D, BLOCK_M, BLOCK_D, True)
    p_k, p_v = head_at(k, first_k, i_h // group), head_at(v, first_k, i_h // group)
    b_m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    position = start_q + n_k - n_q
    last = tl.minimum(start_q + BLOCK_M, n_q) - 1 + n_k - n_q
    lo, full_lo, full_hi, hi = visited(position, last, rule.left, rule.right, n_k, BLOCK_N)
    # Pointers that move instead of `start` times a stride: so the loop is counted in 32 bits.
    p_full_k, p_full_v = row_at(p_k, k.stride_n, full_lo), row_at(p_v, v.stride_n, full_lo)
    for start in range(full_lo, full_hi, BLOCK_N):
        b_acc, b_m, b_l = _visit(
            b_acc, b_m, b_l, b_q, p_full_k, p_full_v, start, rule, i_b, i_h, first_q, o_q, n_q, n_k,
            k.stride_n, v.stride_n, D, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
        p_full_k = row_at(p_full_k, k.stride_n, BLOCK_N)
        p_full_v = row_at(p_full_v, v.stride_n, BLOCK_N)
    for i_edge in range(count_edges(lo, full_lo, full_hi, hi, BLOCK_N)):
        start = edge_start(i_edge, lo, full_lo, full_hi, BLOCK_N)
        b_acc, b_m, b_l = _visit(
            b_acc, b_m, b_l, b_q, row_at(p_k, k.stride_n, start), row_at(p_v, v.stride_n, start),
            start, rule, i_b, i_h, first_q, o_q, n_q, n_k,
            k.stride_n, v.stride_n, D, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip

    b_l = tl.where(b_l == 0, 1.0, b_l)  # a row that saw no key: out 0, lse -inf
    b_acc /= b_l[:, None]
    if rule.rng is not None:
        b_acc *= multiplier(rule)
    store_rows(out, first_q, i_h, start_q, n_q, b_acc, D, BLOCK_M, BLOCK_D)
    p_lse = lse + tl.cast(i_h, tl.int64) * N + first_q
    tl.store(p_lse + o_q, b_m + tl.log(b_l), mask=o_q < n_q)


def varlen_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
    alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _promoted(q, k, v)
    (N, H, D), B = q.shape, cu_seqlens_q.shape[0] - 1
    out, lse = q.new_empty(q.shape), q.new_empty((H, N), dtype=torch.float32)
    if N == 0:
        return out, lse
    rule = make_rule(
        D, scale, causal, window, alibi_slopes, rel_bias, bias, bias_offsets, softcap,
        dropout_p, rng,
    )  # fmt: skip
    args = (
        heads_of(q),
        heads_of(k),
        heads_of(v),
        heads_of(out),
        lse,
        *_both_lengths(cu_seqlens_q, cu_seqlens_k),
        rule,
        B,
        N,
        H // k.shape[1],
    )
    _tune.launch(
        varlen_attn_kernel, lambda tile: (N // tile["BLOCK_M"] + B, H), args,
        _TILES, q.dtype, D, rule,
    )  # fmt: skip
    return out, lse


def varlen_attn_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    scale, causal, window, alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng,
    rel_bias_grad, bias_grad,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtypes = [x.dtype for x in (q, k, v)]
    q, k, v = _promoted(q, k, v)
    rule = make_rule(
        q.shape[2], scale, causal, window, alibi_slopes, rel_bias, bias, bias_offsets, softcap,
        dropout_p, rng,
    )  # fmt: skip
    dout = dout.to(q.dtype)
    delta, finite_lse = _attn_grad.row_terms(dout, dlse, out, lse)
    saved = _attn_grad.Saved(
        heads_of(q),
        heads_of(k),
        heads_of(v),
        heads_of(dout),
        delta,
        finite_lse,
        *_both_lengths(cu_seqlens_q, cu_seqlens_k),
    )
    grads = _attn_grad.input_grads(saved, rule)
    drel_bias = _attn_bias_grad.rel_bias_grad(saved, rule, rel_bias) if rel_bias_grad else None
    dbias = _attn_bias_grad.bias_grad(saved, rule, bias) if bias_grad else None
    return (
        *(x.to(dtype) for x, dtype in zip(grads, dtypes, strict=True)),
        *(q.new_empty(0) if x is None else x for x in (drel_bias, dbias)),
    )


def _promoted(*tensors: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def _both_lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    ends_q = cu_seqlens_q.contiguous()
    return ends_q, ends_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()
