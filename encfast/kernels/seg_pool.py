"""Rows of a segment reduced to one, and the gradient of that handed back to the rows.

Tiling. Forward, a program owns one segment and a stripe of BLOCK_C columns and walks down the rows,
BLOCK_N at a time, with a sum (or largest value and its row) for each place of the tile; these are
reduced once, at the end. Backward, a program owns a slot of BLOCK_N rows of one segment (`_ragged`)
and walks along the columns.

                     BLOCK_C
                +--------+--------+..      per segment, over its weights, before both ways:
          rows  |        |        |          stats    largest score, 1 / sum of the shares
    of segment  |   |    |        |        per segment, over a row, where results are normalised:
             b  |   v    |        |          norm     float32 pooled --> out, length
                +--------+--------+..        grad     dout, out --> float32 gradient of pooled
         out_b  |        |        |        per segment, after the backward:
                +--------+--------+..        weights  <gradient, x> --> dweights, in place

Memory traffic. x is read once forward, and backward for dweights alone; dx is written once. What
there is per segment (out, or with `normalize` also its float32 twin, 12 bytes an element) is small
beside that where segments are long.

Assumptions. Channels are contiguous, rows evenly spaced; other x and dout are copied first. Row
offsets are 64-bit. No length is read on the host. One segment has as many programs as there are
stripes, so a batch of a few long ones leaves a large GPU partly idle. Every result is owned by one
program, which adds in a fixed order: no atomics, the same bits from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._ragged import find_slot
from ._rows import contiguous, rows_of

# BLOCK_N, BLOCK_C, warps: 16 elements a thread, in loads of 16 bytes of half precision. Of lines of
# 256 bytes a segment of 16 rows leaves none idle, and 768 columns make six programs of it.
_TILES = {"sm_80": (16, 128, 4), "gfx90a": (16, 128, 4), "interpreter": (4, 32, 1)}
_WEIGHTS = 1024  # of a step of the programs that read weights alone
_EPS = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def _segment(cu_seqlens, i_b, HOW: tl.constexpr):
    """The rows that count in segment i_b; of "first" and "last" one, or none."""
    begin = tl.load(cu_seqlens + i_b).to(tl.int64)
    end = tl.load(cu_seqlens + i_b + 1).to(tl.int64)
    if HOW == "first":
        end = tl.minimum(end, begin + 1)
    if HOW == "last":
        begin = tl.maximum(begin, end - 1)
    return begin, end


@triton.jit
def _shares(weights, stats, i_b, B, o_n, m_n, HOW: tl.constexpr):
    """What rows o_n count in their segment's sum, 0 where they are masked."""
    b_w = tl.load(weights + o_n, mask=m_n, other=0.0).to(tl.float32)
    if HOW == "attention":
        b_w = tl.exp(b_w - tl.load(stats + i_b))
    if HOW != "sum":
        b_w *= tl.load(stats + B + i_b)
    return tl.where(m_n, b_w, 0.0)


@triton.jit
def seg_pool_stats_kernel(
    weights,  # [N]
    cu_seqlens,  # [B + 1]
    stats,  # [2, B] float32: largest score (of attention alone), 1 / sum
    B,
    HOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = _segment(cu_seqlens, i_b, HOW)
    most = 0.0
    if HOW == "attention":
        b_most = tl.full((BLOCK,), -float("inf"), tl.float32)
        for start in range(begin, end, BLOCK):
            o_n = start + tl.arange(0, BLOCK)
            b_w = tl.load(weights + o_n, mask=o_n < end, other=-float("inf"))
            b_most = tl.maximum(b_most, b_w.to(tl.float32))
        most = tl.max(b_most, 0)
        tl.store(stats + i_b, most)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < end
        b_w = tl.load(weights + o_n, mask=m_n, other=0.0).to(tl.float32)
        if HOW == "attention":
            b_w = tl.exp(b_w - most)
        b_sum += tl.where(m_n, b_w, 0.0)
    total = tl.sum(b_sum, 0)
    tl.store(stats + B + i_b, tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total)))


@triton.jit
def seg_pool_sum_kernel(
    x,  # [N, C]
    cu_seqlens,  # [B + 1]
    weights,  # [N] or None
    stats,  # [2, B] or None
    out,  # [B, C]
    B,
    C,
    stride_x,
    HOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stripes = tl.cdiv(C, BLOCK_C)
    i_b, i_c = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
    begin, end = _segment(cu_seqlens, i_b, HOW)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        p_x = x + (o_n * stride_x)[:, None] + o_c[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            b_x *= _shares(weights, stats, i_b, B, o_n, m_n, HOW)[:, None]
        b_sum += b_x
    b_out = tl.sum(b_sum, 0)
    if HOW == "mean" and weights is None:
        # One rounding of the sum and one of the quotient, as the plain maths has.
        b_out = tl.div_rn(b_out, tl.maximum(end - begin, 1).to(tl.float32))
    tl.store(out + i_b * C + o_c, b_out.to(out.dtype.element_ty), mask=m_c)


@triton.jit
def seg_pool_max_kernel(
    x,  # [N, C]
    cu_seqlens,  # [B + 1]
    out,  # [B, C]
    rows,  # [B, C] int32: where the largest values are, -1 in an empty segment
    C,
    stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stripes = tl.cdiv(C, BLOCK_C)
    i_b, i_c = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
    begin, end = _segment(cu_seqlens, i_b, "max")
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_most = tl.full((BLOCK_N, BLOCK_C), -float("inf"), tl.float32)
    b_row = tl.full((BLOCK_N, BLOCK_C), _NO_ROW, tl.int32)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_tile = (o_n < end)[:, None] & m_c[None, :]
        p_x = x + (o_n * stride_x)[:, None] + o_c[None, :]
        b_x = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
        # NaN, once found, stays, and is found in the first row that has one.
        more = (b_x > b_most) | (b_row == _NO_ROW) | ((b_x != b_x) & (b_most == b_most))
        more = more & m_tile
        b_most = tl.where(more, b_x, b_most)
        b_row = tl.where(more, o_n.to(tl.int32)[:, None], b_row)
    is_nan = b_most != b_most
    most = tl.max(tl.where(is_nan, -float("inf"), b_most), 0)
    nan_row = tl.min(tl.where(is_nan, b_row, _NO_ROW), 0)
    row = tl.min(tl.where(b_most == most[None, :], b_row, _NO_ROW), 0)
    b_out = tl.where(nan_row < _NO_ROW, float("nan"), tl.where(begin < end, most, 0.0))
    row = tl.where(nan_row < _NO_ROW, nan_row, row)
    tl.store(out + i_b * C + o_c, b_out.to(out.dtype.element_ty), mask=m_c)
    tl.store(rows + i_b * C + o_c, tl.where(begin < end, row, -1), mask=m_c)


@triton.jit
def seg_pool_norm_kernel(
    pooled,  # [B, C] float32
    out,  # [B, C]
    norm,  # [B] float32
    C,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    b_squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = tl.load(pooled + i_b * C + o_c, mask=o_c < C, other=0.0)
        b_squares += b_x * b_x
    length = tl.sqrt_rn(tl.sum(b_squares, 0))
    tl.store(norm + i_b, length)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = tl.load(pooled + i_b * C + o_c, mask=o_c < C, other=0.0)
        b_out = tl.div_rn(b_x, tl.zeros_like(b_x) + tl.maximum(length, _EPS))
        tl.store(out + i_b * C + o_c, b_out.to(out.dtype.element_ty), mask=o_c < C)


@triton.jit
def seg_pool_grad_kernel(
    dout,  # [B, C]
    out,  # [B, C]
    norm,  # [B] float32
    grad,  # [B, C] float32: of what was normalised
    C,
    stride_dout,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    b_along = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_dout = tl.load(dout + i_b * stride_dout + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_along += b_dout * tl.load(out + i_b * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    length = tl.load(norm + i_b)
    # A row shorter than eps was divided by eps, whatever its direction.
    along = tl.where(length > _EPS, tl.sum(b_along, 0), 0.0)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_dout = tl.load(dout + i_b * stride_dout + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_out = tl.load(out + i_b * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_grad = (b_dout - along * b_out) / tl.maximum(length, _EPS)
        tl.store(grad + i_b * C + o_c, b_grad, mask=o_c < C)


@triton.jit
def seg_pool_rows_kernel(
    grad,  # [B, C]
    x,  # [N, C], read for dweights alone
    cu_seqlens,  # [B + 1]
    weights,  # [N] or None
    stats,  # [2, B] or None
    rows,  # [B, C] int32 or None
    dx,  # [N, C] or None
    products,  # [N] float32, <gradient, x> of each row, or None
    B,
    C,
    stride_grad,
    stride_x,
    HOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, first, start = find_slot(cu_seqlens, B, tl.program_id(0), BLOCK_N)
    i_b, begin = tl.cast(i_b, tl.int64), first.to(tl.int64)
    end = tl.load(cu_seqlens + i_b + 1).to(tl.int64)
    if begin + start >= end:
        return
    o_n = begin + start + tl.arange(0, BLOCK_N)
    m_n = o_n < end
    if HOW == "first":
        b_share = tl.where(o_n == begin, 1.0, 0.0)
    elif HOW == "last":
        b_share = tl.where(o_n == end - 1, 1.0, 0.0)
    elif weights is not None:
        b_share = _shares(weights, stats, i_b, B, o_n, m_n, HOW)
    elif HOW == "mean":
        b_share = tl.div_rn(1.0, tl.zeros((BLOCK_N,), tl.float32) + (end - begin).to(tl.float32))
    else:
        b_share = tl.full((BLOCK_N,), 1.0, tl.float32)
    b_product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for at in range(0, C, BLOCK_C):
        o_c = at + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        m_tile = m_n[:, None] & m_c[None, :]
        b_grad = tl.load(grad + i_b * stride_grad + o_c, mask=m_c, other=0.0).to(tl.float32)
        if dx is not None:
            if HOW == "max":
                b_row = tl.load(rows + i_b * C + o_c, mask=m_c, other=-1)
                b_dx = tl.where(b_row[None, :] == o_n[:, None], b_grad[None, :], 0.0)
            elif HOW == "first" or HOW == "last":
                b_dx = tl.where((b_share > 0)[:, None], b_grad[None, :], 0.0)
            else:
                b_dx = b_share[:, None] * b_grad[None, :]
            p_dx = dx + (o_n * C)[:, None] + o_c[None, :]
            tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_tile)
        if products is not None:
            p_x = x + (o_n * stride_x)[:, None] + o_c[None, :]
            b_x = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
            b_product += b_grad[None, :] * b_x
    if products is not None:
        tl.store(products + o_n, tl.sum(b_product, 1), mask=m_n)


@triton.jit
def seg_pool_weights_kernel(
    weights,  # [N]
    stats,  # [2, B]
    cu_seqlens,  # [B + 1]
    dweights,  # [N] float32: <gradient, x> of each row, then the gradient of its weight
    B,
    HOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A share takes from the others of its segment what it gains."""
    i_b = tl.program_id(0).to(tl.int64)
    begin, end = _segment(cu_seqlens, i_b, HOW)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_product = tl.load(dweights + o_n, mask=o_n < end, other=0.0)
        b_sum += _shares(weights, stats, i_b, B, o_n, o_n < end, HOW) * b_product
    mean = tl.sum(b_sum, 0)
    for start in range(begin, end, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_dw = tl.load(dweights + o_n, mask=o_n < end, other=0.0) - mean
        if HOW == "attention":
            b_dw *= _shares(weights, stats, i_b, B, o_n, o_n < end, HOW)
        else:
            b_dw *= tl.load(stats + B + i_b)
        tl.store(dweights + o_n, b_dw, mask=o_n < end)


def seg_pool(
    x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, how: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cu_seqlens, weights = rows_of(x), cu_seqlens.contiguous(), contiguous(weights)
    B, C = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty((B, C))
    chosen = x.new_empty((B, C) if how == "max" else 0, dtype=torch.int32)
    norm = x.new_empty(B if normalize else 0, dtype=torch.float32)
    if B == 0:
        return out, chosen, norm
    pooled = torch.empty_like(out, dtype=torch.float32) if normalize else out
    block_n, block_c, warps = _config.nearest(_TILES, _config.target())
    blocks = {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": warps}
    grid = (B * triton.cdiv(C, block_c),)
    if how == "max":
        seg_pool_max_kernel[grid](rows, cu_seqlens, pooled, chosen, C, rows.stride(0), **blocks)
    else:
        stats = _stats(weights, cu_seqlens, how)
        given = rows, cu_seqlens, weights, stats, pooled
        seg_pool_sum_kernel[grid](*given, B, C, rows.stride(0), HOW=how, **blocks)
    if normalize:
        seg_pool_norm_kernel[(B,)](pooled, out, norm, C, BLOCK_C=_row_block(C), num_warps=warps)
    return out, chosen, norm


def seg_pool_bwd(
    dout: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    out: Tensor,
    rows: Tensor,
    norm: Tensor,
    how: str,
    normalize: bool,
    want_dx: bool,
    want_dweights: bool,
) -> tuple[Tensor, Tensor]:
    (N, C), B = x.shape, cu_seqlens.shape[0] - 1
    dx = x.new_empty(x.shape if want_dx else 0)
    dweights = x.new_empty(N if want_dweights else 0, dtype=torch.float32)
    if N == 0:
        return dx, dweights
    x, grad, cu_seqlens, weights = (
        rows_of(x),
        rows_of(dout),
        cu_seqlens.contiguous(),
        contiguous(weights),
    )
    if normalize:
        grad = _through_norm(grad, out, norm)
    stats = _stats(weights, cu_seqlens, how)
    block_n, block_c, warps = _config.nearest(_TILES, _config.target())
    seg_pool_rows_kernel[(N // block_n + B,)](
        grad,
        x,
        cu_seqlens,
        weights,
        stats,
        rows if how == "max" else None,
        dx if want_dx else None,
        dweights if want_dweights else None,
        B,
        C,
        grad.stride(0),
        x.stride(0),
        HOW=how,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    if want_dweights and how != "sum":
        given = weights, stats, cu_seqlens, dweights, B
        seg_pool_weights_kernel[(B,)](*given, HOW=how, BLOCK=_WEIGHTS, num_warps=4)
    return dx, dweights


def _stats(weights: Tensor | None, cu_seqlens: Tensor, how: str) -> Tensor | None:
    """Of each segment [2, B], what makes its weights shares of 1."""
    if weights is None or how == "sum":
        return None
    B = cu_seqlens.shape[0] - 1
    stats = weights.new_empty((2, B), dtype=torch.float32)
    seg_pool_stats_kernel[(B,)](weights, cu_seqlens, stats, B, HOW=how, BLOCK=_WEIGHTS, num_warps=4)
    return stats


def _through_norm(dout: Tensor, out: Tensor, norm: Tensor) -> Tensor:
    """float32 [B, C], the gradient of what was divided by its length."""
    B, C = out.shape
    grad = torch.empty_like(out, dtype=torch.float32)
    given = dout, out, norm, grad, C, dout.stride(0)
    seg_pool_grad_kernel[(B,)](*given, BLOCK_C=_row_block(C), num_warps=4)
    return grad


def _row_block(C: int) -> int:
    """Columns of a step of a program that has a whole row: all of it up to 1024."""
    return min(triton.next_power_of_2(C), 1024)
