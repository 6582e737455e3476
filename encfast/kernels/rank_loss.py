"""Contrastive losses over all pairs of two sets of features, without the matrix of their logits.

Tiling. As the vocabulary's losses (`_logits`), whose statistics InfoNCE shares: candidates b stand
for the weight, positives for the targets. The sums along columns are those along rows of b against
a, a second product: kept beside the first they would be lines of partials for every tile of rows,
a sixty-fourth of the matrix of logits. Backward, a tile of logits turns into its part of the
gradient G of both directions at once, and of the scale's (and bias') sums.

    forward     a tile . b tiles -> row statistics         b tile . a tiles -> column statistics
    backward    a tile . b tile  -> G tile -> slot [B, slice of b] -> da += G b, db = G^T a
                                 -> a number a program -> dscale, dbias

Memory traffic beside the products' own. Forward 12 or 8 bytes a row and part; backward a slice of G
is written once and read twice.

Assumptions. Channels are contiguous, rows evenly spaced; others are copied first. Products of a and
b have the same bits in both orders, as those of tensor cores and of chains of fused multiply-adds
do. G is multiplied by the scale and rounded to the features' dtype once; in float16 what is below
6e-8 vanishes. No atomics: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._logits import (
    Slices,
    logits_tile,
    row_stats,
    shares_of,
    store_grad,
    tile_hits,
    tiles_of,
)
from ._product import tile_of_rows
from ._rows import contiguous, rows_of
from ._softmax import LOG2E, softplus

_ROWS, _COLUMNS = 128, 64  # of a step of the sums by column


@triton.jit
def column_sums_kernel(
    positives,  # [B] int64
    values,  # [B] float32
    out,  # [M] float32: of each column the sum of the values of the rows it is the positive of
    B,
    M,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Reads all rows for every block of columns: no sort, no atomics, no time beside B x M x D."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_sum = tl.zeros((BLOCK_B, BLOCK_M), tl.float32)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B)
        b_positive = tl.load(positives + o_b, mask=o_b < B, other=-1)
        b_value = tl.load(values + o_b, mask=o_b < B, other=0.0)
        b_sum += tl.where(b_positive[:, None] == o_m[None, :], b_value[:, None], 0.0)
    tl.store(out + o_m, tl.sum(b_sum, 0), mask=o_m < M)


@triton.jit
def _share(stats, size, o, m):
    """Largest logit and log of the sum of rows or columns o; beyond the last, such that p is 0."""
    return tl.load(stats + o, mask=m, other=0.0), tl.load(stats + size + o, mask=m, other=1e38)


@triton.jit
def info_nce_grad_kernel(
    a,  # [B, D]
    b,  # [n, D], a slice of the candidates
    scale,  # one number
    positives,  # [B] int64
    excluded,  # [B] int64 or None
    row_stats,  # [2, B] float32
    drow,  # [B] float32, like dcol and dpositive: gradients of what belongs to each row
    dcol,
    dpositive,
    col_stats,  # [2, n] float32 or None, rows `stats_apart` apart
    col_factors,  # [n] float32 or None
    grad,  # [B, n]
    partials,  # [programs] float32: of the scale's gradient
    B,
    n,
    D,
    stride_a,
    stride_b,
    stats_apart,
    first,  # column of the whole
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(B, BLOCK_X)
    i_x, i_y = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    b_product = logits_tile(
        a, b, None, None, None, i_x, i_y, B, n, D, stride_a, stride_b,
        C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
    )  # fmt: skip
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    o_y = i_y.to(tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    m_x, m_y = o_x < B, o_y < n
    scale = tl.load(scale).to(tl.float32)
    b_z = b_product * scale
    b_most, b_log = _share(row_stats, B, o_x, m_x)
    b_drow = tl.load(drow + o_x, mask=m_x, other=0.0)[:, None]
    m_hit = tile_hits(positives + o_x, m_x, first, i_y, BLOCK_Y)
    b_p = tl.exp2((b_z - b_most[:, None] - b_log[:, None]) * LOG2E)
    b_grad = b_drow * tl.where(m_hit, b_p - 1, b_p)
    b_hit = tl.load(dpositive + o_x, mask=m_x, other=0.0)
    if col_stats is not None:
        b_most, b_log = _share(col_stats, stats_apart, o_y, m_y)
        b_factor = tl.load(col_factors + o_y, mask=m_y, other=0.0)
        b_p = tl.exp2((b_z - b_most[None, :] - b_log[None, :]) * LOG2E)
        b_dcol = tl.load(dcol + o_x, mask=m_x, other=0.0)
        b_grad += b_factor[None, :] * b_p - tl.where(m_hit, b_dcol[:, None], 0.0)
    b_grad += tl.where(m_hit, b_hit[:, None], 0.0)
    m_tile = m_x[:, None] & m_y[None, :]
    if excluded is not None:
        b_grad = tl.where(tile_hits(excluded + o_x, m_x, first, i_y, BLOCK_Y), 0.0, b_grad)
    b_grad = tl.where(m_tile, b_grad, 0.0)
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(b_grad * b_product, 1), 0))
    store_grad(grad, b_grad * scale, i_x, i_y, B, n, BLOCK_X, BLOCK_Y)


@triton.jit
def siglip_kernel(
    a,  # [B, D]
    b,  # [M, D]
    scale,  # one number, float32
    bias,
    positives,  # [B] int64
    partials,  # [parts, B] float32: each row's loss
    B,
    M,
    D,
    stride_a,
    stride_b,
    steps,
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(B, BLOCK_X)
    i_x, i_part = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    b_sum = tl.zeros((BLOCK_X,), tl.float32)
    for i_y in range(i_part * steps, tl.minimum((i_part + 1) * steps, tl.cdiv(M, BLOCK_Y))):
        b_z = logits_tile(
            a, b, None, scale, None, i_x, i_y, B, M, D, stride_a, stride_b,
            C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
        )  # fmt: skip
        b_z += tl.load(bias)
        o_y = tl.cast(i_y, tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
        m_hit = tile_hits(positives + o_x, o_x < B, 0, i_y, BLOCK_Y)
        b_loss = softplus(tl.where(m_hit, -b_z, b_z))
        b_sum += tl.sum(tl.where(o_y[None, :] < M, b_loss, 0.0), 1)
    tl.store(partials + i_part.to(tl.int64) * B + o_x, b_sum, mask=o_x < B)


@triton.jit
def siglip_grad_kernel(
    a,  # [B, D]
    b,  # [n, D], a slice of b
    scale,  # one number, float32
    bias,
    positives,  # [B] int64
    dloss,  # [B] float32
    grad,  # [B, n]
    partials,  # [2, programs] float32: of the scale's gradient, of the bias'
    B,
    n,
    D,
    stride_a,
    stride_b,
    first,  # row of b
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(B, BLOCK_X)
    i_x, i_y = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    b_product = logits_tile(
        a, b, None, None, None, i_x, i_y, B, n, D, stride_a, stride_b,
        C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
    )  # fmt: skip
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    o_y = i_y.to(tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    m_x = o_x < B
    scale = tl.load(scale)
    b_z = b_product * scale + tl.load(bias)
    m_hit = tile_hits(positives + o_x, m_x, first, i_y, BLOCK_Y)
    b_slope = tl.sigmoid(tl.where(m_hit, -b_z, b_z))
    b_dloss = tl.load(dloss + o_x, mask=m_x, other=0.0)
    m_tile = m_x[:, None] & (o_y < n)[None, :]
    b_grad = tl.where(m_hit, -b_slope, b_slope) * b_dloss[:, None]
    b_grad = tl.where(m_tile, b_grad, 0.0)
    p_partial = partials + tl.program_id(0)
    tl.store(p_partial, tl.sum(tl.sum(b_grad * b_product, 1), 0))
    tl.store(p_partial + tl.num_programs(0), tl.sum(tl.sum(b_grad, 1), 0))
    store_grad(grad, b_grad * scale, i_x, i_y, B, n, BLOCK_X, BLOCK_Y)


def info_nce(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    positives: Tensor,
    excluded: Tensor | None,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, scale, positives = rows_of(a), rows_of(b), logit_scale.float(), positives.contiguous()
    excluded, has = contiguous(excluded), positives >= 0
    largest, exps, positive = row_stats(a, b, scale=scale, targets=positives, excluded=excluded)
    log = exps.log()
    row_loss = (largest - positive + log).where(has, 0)
    positive, stats = positive.where(has, 0), torch.stack((largest, log))
    if not both:
        none = row_loss.new_empty(0)
        return row_loss, none, positive, stats, row_loss.new_empty((2, 0))
    largest, exps = row_stats(b, a, scale=scale, excluded_of_y=excluded)
    col_stats, column = torch.stack((largest, exps.log())), positives.clamp(min=0)
    of_column = col_stats.index_select(1, column)
    col_loss = (of_column[0] - positive + of_column[1]).where(has, 0)
    return row_loss, col_loss, positive, stats, col_stats


def info_nce_bwd(
    drow: Tensor,
    dcol: Tensor,
    dpositive: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    positives: Tensor,
    excluded: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    both: bool,
    want_da: bool,
    want_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, scale, positives = rows_of(a), rows_of(b), logit_scale.float(), positives.contiguous()
    D, M, has, excluded = a.shape[1], b.shape[0], positives >= 0, contiguous(excluded)
    drow, dpositive = drow.where(has, 0), dpositive.where(has, 0)
    col_factors = None
    if both:
        dcol = dcol.where(has, 0)
        col_factors = _column_sums(positives, dcol, M)
    slices, tile = Slices(a, b, want_da, want_db), tile_of_rows((a, b), D)
    dscale = a.new_zeros((), dtype=torch.float32)
    for columns, grad in slices:
        programs = tiles_of(grad, tile)
        partials = a.new_empty(programs, dtype=torch.float32)
        info_nce_grad_kernel[(programs,)](
            a,
            b[columns],
            scale,
            positives,
            excluded,
            row_stats,
            drow,
            dcol if both else None,
            dpositive,
            col_stats[:, columns] if both else None,
            None if col_factors is None else col_factors[columns],
            grad,
            partials,
            *grad.shape,
            D,
            a.stride(0),
            b.stride(0),
            M,
            columns.start,
            **tile,
        )
        dscale += partials.sum()
    return slices.dx, slices.dy, dscale


def _column_sums(positives: Tensor, values: Tensor, M: int) -> Tensor:
    """Of each column [M] the sum of the values [B] of the rows whose positive it is."""
    out = values.new_empty(M)
    given, grid = (positives, values, out, positives.shape[0], M), (triton.cdiv(M, _COLUMNS),)
    column_sums_kernel[grid](*given, BLOCK_B=_ROWS, BLOCK_M=_COLUMNS, num_warps=4)
    return out


def siglip(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, positives: Tensor
) -> Tensor:
    a, b, (B, D), M = rows_of(a), rows_of(b), a.shape, b.shape[0]
    tile = tile_of_rows((a, b), D)
    tiles_x, parts, steps = shares_of(B, M, tile)
    partials = a.new_empty((parts, B), dtype=torch.float32)
    given = a, b, logit_scale.float(), logit_bias.float(), positives.contiguous(), partials
    sizes = B, M, D, a.stride(0), b.stride(0), steps
    siglip_kernel[(tiles_x * parts,)](*given, *sizes, **tile)
    return partials.sum(0)


def siglip_bwd(
    dloss: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor,
    want_da: bool,
    want_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, D = rows_of(a), rows_of(b), a.shape[1]
    scale, bias = logit_scale.float(), logit_bias.float()
    positives, dloss = positives.contiguous(), dloss.contiguous()
    slices, tile = Slices(a, b, want_da, want_db), tile_of_rows((a, b), D)
    scalars = a.new_zeros(2, dtype=torch.float32)
    for columns, grad in slices:
        programs = tiles_of(grad, tile)
        partials = a.new_empty((2, programs), dtype=torch.float32)
        given = a, b[columns], scale, bias, positives, dloss, grad, partials
        sizes = *grad.shape, D, a.stride(0), b.stride(0), columns.start
        siglip_grad_kernel[(programs,)](*given, *sizes, **tile)
        scalars += partials.sum(1)
    return slices.dx, slices.dy, scalars[0].clone(), scalars[1].clone()
