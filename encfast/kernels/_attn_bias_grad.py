"""Gradients of varlen_attn's biases: the gradients ds of the scores, made anew tile by tile.

Tiling. A program owns BLOCK queries of a head and walks over the keys they see, BLOCK at a time.

    dbias [H, T]          each tile of ds is stored where its pairs stand in the packed matrices
    dbias [T]             the same, the tile being the sum over the heads, one after the other
    drel_bias [Nq, H, R]  the entries of a row stand for one key each and are stored, but for both
                          ends, for which the row's farther keys are summed on the way
    drel_bias [H, R]      an entry is a diagonal of the tiles: see below

A tile's diagonals are summed by turning row i of ds left by i columns; of the column sums, those
that did not wrap around belong to the diagonals right of the tile's corner, the others to those
left of it, where the tile before has left its part:

    ds   a b c d     turned   a b c d     sums not wrapped, carried on   a+f+k+p  b+g+l  c+h  d
         e f g h              f g h E     sums wrapped (capitals),       E+I+M..., added to what the
         i j k l              k l I J     tile before has carried here
         m n o p              p M N O

Each program writes its line of partials, which are added in their order: no atomics, bit-equal from
run to run. The launches come in parts so that the partials take at most 64 MiB.

Memory traffic: 4 D elements per row, tile and head as in dq, and the gradient itself.

Assumptions: those of the forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._attn_grad import Saved, load_terms, pair_grads, terms_at
from ._attn_tile import BIASED, Rule, find_tile, head_at, load_rows, rel_entry, visited

# As in the forward: BLOCK, warps.
_TILES = {
    "sm_80": {(2, BIASED): {128: (32, 8), 256: (16, 8)}, (4, BIASED): {64: (32, 8), 256: (16, 8)}},
    "sm_100": {(2, BIASED): {256: (16, 8)}, (4, BIASED): {256: (16, 8)}},
    "sm_120": {(2, BIASED): {64: (32, 8), 256: (16, 8)}, (4, BIASED): {64: (32, 8), 256: (16, 8)}},
    "gfx90a": {
        (2, BIASED): {128: (32, 4), 256: (16, 4)},
        (4, BIASED): {64: (32, 4), 256: (16, 4)},
    },
    "interpreter": {(2, BIASED): {256: (64, 1)}, (4, BIASED): {256: (32, 1)}},
}
_MAX_PARTIALS = 64 * 2**20  # bytes


@triton.jit
def _score_grads(
    saved,
    rule,
    i_b,
    i_h,
    N,
    group,
    first_q,
    start_q,
    n_q,
    first_k,
    start_k,
    n_k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ds of BLOCK rows and BLOCK keys; 0 where a pair is hidden or beyond the lengths."""
    i_hk = i_h // group
    p_q, p_dout = head_at(saved.q, first_q, i_h), head_at(saved.dout, first_q, i_h)
    p_k, p_v = head_at(saved.k, first_k, i_hk), head_at(saved.v, first_k, i_hk)
    b_q = load_rows(p_q, saved.q.stride_n, start_q, n_q, D, BLOCK, BLOCK_D, True)
    b_dout = load_rows(p_dout, saved.dout.stride_n, start_q, n_q, D, BLOCK, BLOCK_D, True)
    b_k = load_rows(p_k, saved.k.stride_n, start_k, n_k, D, BLOCK, BLOCK_D, True)
    b_v = load_rows(p_v, saved.v.stride_n, start_k, n_k, D, BLOCK, BLOCK_D, True)
    o_q = start_q + tl.arange(0, BLOCK)
    p_delta, p_lse = terms_at(saved, i_h, N, first_q)
    b_delta, b_lse = load_terms(p_delta, p_lse, o_q, n_q, True)
    _, b_ds, _ = pair_grads(
        b_q, b_k, b_dout, b_v, b_lse, b_delta, rule, i_b, i_h, first_q, o_q, n_q, start_k, n_k,
        BLOCK, True, False,
    )  # fmt: skip
    return b_ds


@triton.jit
def _find(saved, rule, B, i_slot, BLOCK: tl.constexpr):
    """find_tile, the keys of the sequence, and which of them the tile sees."""
    i_b, first_q, n_q, start_q = find_tile(saved.cu_seqlens_q, B, i_slot, BLOCK)
    first_k = tl.load(saved.cu_seqlens_k + i_b)
    n_k = tl.load(saved.cu_seqlens_k + i_b + 1) - first_k
    shift = n_k - n_q
    last = tl.minimum(start_q + BLOCK, n_q) - 1
    lo, _, _, hi = visited(start_q + shift, last + shift, rule.left, rule.right, n_k, BLOCK)
    return i_b, first_q, n_q, start_q, first_k, n_k, lo, hi


@triton.jit
def varlen_attn_dbias_kernel(
    saved,
    dbias,  # [H, T], or [T] for all heads
    stride_h,
    rule,
    B,
    N,
    group,
    heads,  # of a program: 1, or all
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b, first_q, n_q, start_q, first_k, n_k, lo, hi = _find(
        saved, rule, B, tl.program_id(0), BLOCK
    )
    if start_q >= n_q:
        return
    i_first = tl.program_id(1) * heads
    o_q = start_q + tl.arange(0, BLOCK)
    p_matrix = dbias + i_first.to(tl.int64) * stride_h + tl.load(rule.bias_offsets + i_b)
    for start_k in range(lo, hi, BLOCK):
        b_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
        for i_h in range(i_first, i_first + heads):
            b_sum += _score_grads(
                saved, rule, i_b, i_h, N, group, first_q, start_q, n_q, first_k, start_k, n_k,
                D, BLOCK, BLOCK_D,
            )  # fmt: skip
        o_k = start_k + tl.arange(0, BLOCK)
        p_pairs = p_matrix + o_q.to(tl.int64)[:, None] * n_k + o_k[None, :]
        m_pairs = (o_q < n_q)[:, None] & (o_k < n_k)[None, :]
        tl.store(p_pairs, b_sum.to(dbias.dtype.element_ty), mask=m_pairs)


@triton.jit
def varlen_attn_drel_rows_kernel(
    saved,
    drel,  # [N, H, R]
    rule,
    B,
    N,
    H,
    group,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b, first_q, n_q, start_q, first_k, n_k, lo, hi = _find(
        saved, rule, B, tl.program_id(0), BLOCK
    )
    if start_q >= n_q:
        return
    i_h = tl.program_id(1)
    o_q = start_q + tl.arange(0, BLOCK)
    radius = rule.rel_radius
    dtype = drel.dtype.element_ty
    p_row = drel + ((first_q + o_q).to(tl.int64) * H + i_h) * (2 * radius + 1)
    b_low = tl.zeros((BLOCK,), tl.float32)
    b_high = tl.zeros((BLOCK,), tl.float32)
    for start_k in range(lo, hi, BLOCK):
        b_ds = _score_grads(
            saved, rule, i_b, i_h, N, group, first_q, start_q, n_q, first_k, start_k, n_k,
            D, BLOCK, BLOCK_D,
        )  # fmt: skip
        o_k = start_k + tl.arange(0, BLOCK)
        o_entry = rel_entry(rule, (o_q + n_k - n_q)[:, None], o_k[None, :])
        m_low = o_entry == 0
        m_high = (o_entry == 2 * radius) & (radius > 0)
        b_low += tl.sum(tl.where(m_low, b_ds, 0.0), 1)
        b_high += tl.sum(tl.where(m_high, b_ds, 0.0), 1)
        m_pairs = (
            (o_q < n_q)[:, None] & (o_k < n_k)[None, :] & (o_entry > 0) & (o_entry < 2 * radius)
        )
        tl.store(p_row[:, None] + o_entry, b_ds.to(dtype), mask=m_pairs)
    tl.store(p_row, b_low.to(dtype), mask=o_q < n_q)
    tl.store(p_row + 2 * radius, b_high.to(dtype), mask=(o_q < n_q) & (radius > 0))


@triton.jit
def _add_diagonals(p_line, b_low, b_high, b_sums, start, radius, BLOCK: tl.constexpr):
    """Stores the sums of the offsets from start on; those of the ends go to b_low and b_high."""
    o_offset = start + tl.arange(0, BLOCK)
    m_low = (o_offset <= -radius) | (radius == 0)
    m_high = (o_offset >= radius) & (radius > 0)
    tl.store(p_line + radius + o_offset, b_sums, mask=(o_offset > -radius) & (o_offset < radius))
    return b_low + tl.where(m_low, b_sums, 0.0), b_high + tl.where(m_high, b_sums, 0.0)


@triton.jit
def varlen_attn_drel_table_kernel(
    saved,
    partials,  # [slots of this launch, H, R] float32, zeros
    first_slot,
    rule,
    B,
    N,
    H,
    group,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b, first_q, n_q, start_q, first_k, n_k, lo, hi = _find(
        saved, rule, B, first_slot + tl.program_id(0), BLOCK
    )
    if start_q >= n_q:
        return
    i_h, radius = tl.program_id(1), rule.rel_radius
    p_line = partials + (tl.program_id(0).to(tl.int64) * H + i_h) * (2 * radius + 1)
    o_row, o_turned = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    position = start_q + n_k - n_q
    b_low = tl.zeros((BLOCK,), tl.float32)
    b_high = tl.zeros((BLOCK,), tl.float32)
    b_carried = tl.zeros((BLOCK,), tl.float32)
    for start_k in range(lo, hi, BLOCK):
        b_ds = _score_grads(
            saved, rule, i_b, i_h, N, group, first_q, start_q, n_q, first_k, start_k, n_k,
            D, BLOCK, BLOCK_D,
        )  # fmt: skip
        b_turned = tl.gather(b_ds, (o_turned + o_row) % BLOCK, 1)
        m_wrapped = o_turned + o_row >= BLOCK
        b_sums = b_carried + tl.sum(tl.where(m_wrapped, b_turned, 0.0), 0)
        b_low, b_high = _add_diagonals(
            p_line, b_low, b_high, b_sums, start_k - BLOCK - position, radius, BLOCK
        )
        b_carried = tl.sum(tl.where(m_wrapped, 0.0, b_turned), 0)
    # hi need not be a multiple of BLOCK; what was carried belongs behind the last block.
    behind = lo + tl.cdiv(hi - lo, BLOCK) * BLOCK
    b_low, b_high = _add_diagonals(
        p_line, b_low, b_high, b_carried, behind - BLOCK - position, radius, BLOCK
    )
    tl.store(p_line, tl.sum(b_low, 0))
    if radius > 0:
        tl.store(p_line + 2 * radius, tl.sum(b_high, 0))


def bias_grad(saved: Saved, rule: Rule, bias: Tensor) -> Tensor:
    """The gradient of bias, [T] or [H, T], contiguous."""
    dbias = bias.new_zeros(bias.shape)  # hidden pairs of blocks that no query visits stay 0
    shared = bias.dim() == 1
    (N, H, _), slots, options = _launch(saved)
    if N and dbias.numel():
        heads = H if shared else 1
        varlen_attn_dbias_kernel[(slots, H // heads)](
            saved,
            dbias,
            0 if shared else dbias.stride(0),
            rule,
            saved.cu_seqlens_q.shape[0] - 1,
            N,
            H // saved.k.data.shape[1],
            heads,
            **options,
        )
    return dbias


def rel_bias_grad(saved: Saved, rule: Rule, rel_bias: Tensor) -> Tensor:
    """The gradient of rel_bias, [H, R] or [Nq, H, R], contiguous."""
    (N, H, _), slots, options = _launch(saved)
    B, group = saved.cu_seqlens_q.shape[0] - 1, H // saved.k.data.shape[1]
    if rel_bias.dim() == 3:
        drel = rel_bias.new_zeros(rel_bias.shape)
        if N:
            varlen_attn_drel_rows_kernel[(slots, H)](saved, drel, rule, B, N, H, group, **options)
        return drel
    drel = rel_bias.new_zeros(rel_bias.shape, dtype=torch.float32)
    most = max(1, _MAX_PARTIALS // (4 * max(drel.numel(), 1)))
    for first in range(0, slots if N else 0, most):
        count = min(most, slots - first)
        partials = drel.new_zeros((count, *drel.shape))
        varlen_attn_drel_table_kernel[(count, H)](
            saved, partials, first, rule, B, N, H, group, **options
        )
        drel += partials.sum(0)
    return drel.to(rel_bias.dtype)


def _launch(saved: Saved) -> tuple[torch.Size, int, dict]:
    """Shape of q, slots of the queries, and what the kernels are compiled with."""
    q = saved.q.data
    block_d, (block, warps) = _config.for_head(_TILES, q.dtype, q.shape[2], BIASED)
    slots = q.shape[0] // block + saved.cu_seqlens_q.shape[0] - 1
    options = {"D": q.shape[2], "BLOCK": block, "BLOCK_D": block_d, "num_warps": warps}
    return q.shape, slots, options | {"num_stages": 1}
