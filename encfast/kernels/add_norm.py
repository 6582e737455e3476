"""LayerNorm or RMSNorm of a residual sum, forward and backward.

Tiling. A tile is BLOCK_N rows of BLOCK_C channels and lives in registers. Rows of up to _WIDEST
channels are as wide as a tile, so that each is read once.

    forward    one program per tile; a wider row has a program of its own, which goes over it three
               times (mean, variance, result) and finds it in the caches from the second time on
    backward   one program per group of rows, which walks down them, writes dtotal and dx and keeps
               the sums of the parameters' gradients, which it stores once as its lines of partials;
               wider rows are cut into stripes, a program each, after a kernel that takes means
    sum        see _rows.py

Memory traffic per row, in elements: forward reads C of x and of residual and writes C of y and of
total; backward reads C of dy, total, dtotal_in and x and writes C of dtotal and dx; of these, what
there is. The partials add 8 C bytes per gradient and group of at least 16 rows. Rows too wide for
registers are read twice in the backward, dy and total only.

Numerics. float32 in registers. The variance is the mean square of what is left of a row without its
mean. A parameter's gradient is summed over a group's rows, then over the groups.

Assumptions. Channels are contiguous, rows evenly spaced; others are copied first. Row offsets are
64-bit. The number of groups depends on N and C alone, so the gradients of parameters have the same
bits on every GPU of one entry of the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._rows import contiguous, lines_of, rows_of, sum_partials

# By bytes of an element of the sum, elements of one warp's part of a tile and warps of a program at
# least, forward and backward. Forward, a thread loads 64 bytes of an operand, and a row of 1024 in
# half precision has a warp to itself, whose means need no shared memory. Backward, a thread keeps 8
# elements of each of three sums and up to four operands, in at most 128 registers where rows are
# aligned: a multiprocessor holds four programs of 4 warps, and about 128 hold all groups at once.
_TILES = {
    "sm_80": {2: ((1024, 1), (256, 4)), 4: ((512, 1), (256, 4))},
    "gfx90a": {2: ((1024, 1), (512, 4)), 4: ((1024, 1), (512, 4))},
    "interpreter": {2: ((512, 1), (512, 1)), 4: ((512, 1), (512, 1))},
}
_MOST_ROWS = 64  # of a tile: addresses take two registers a row
_WIDEST = (8192, 4096)  # channels of a row in registers, in programs of at most 16 warps
_STRIPE = 2048  # columns of a tile of wider rows
# A group has 16 rows or more, so that the traffic of the partials is a sixth of that of the rows or
# less, and more where there would be over 512 groups: from 8192 rows on it falls.
_MIN_ROWS = 16
_MAX_GROUPS = 512


@triton.jit
def _load_rows(x, o_n, stride, o_c, m_tile):
    """Columns o_c of the rows o_n, in float32."""
    p_x = x + (o_n * stride)[:, None] + o_c
    return tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _load_parameter(parameter, o_c, m_c):
    return tl.load(parameter + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _residual_sum(
    x, residual, branch_scale, o_n, o_c, m_tile, m_c, stride_x, stride_r, dtype: tl.constexpr
):
    """residual + branch_scale * x, rounded as memory holds it, in float32; 0 where masked."""
    b_total = _load_rows(x, o_n, stride_x, o_c, m_tile)
    if branch_scale is not None:
        b_total *= _load_parameter(branch_scale, o_c, m_c)
    if residual is not None:
        b_total += _load_rows(residual, o_n, stride_r, o_c, m_tile)
    return b_total.to(dtype).to(tl.float32)


@triton.jit
def _store_norm(y, b_centred, b_rstd, weight, bias, o_n, o_c, m_tile, m_c, C):
    b_y = b_centred * b_rstd[:, None]
    if weight is not None:
        b_y *= _load_parameter(weight, o_c, m_c)
    if bias is not None:
        b_y += _load_parameter(bias, o_c, m_c)
    tl.store(y + (o_n * C)[:, None] + o_c, b_y.to(y.dtype.element_ty), mask=m_tile)


@triton.jit
def add_norm_kernel(
    x,  # [N, C]
    residual,  # [N, C] or None
    weight,  # [C] or None, like bias and branch_scale
    bias,
    branch_scale,
    y,  # [N, C]
    total,  # [N, C], or None: not kept
    mean,  # [N], or None: RMSNorm
    rstd,  # [N]
    N,
    C,
    stride_x,
    stride_r,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)[None, :]
    m_n, m_c = o_n < N, o_c < C
    m_tile = m_n[:, None] & m_c
    dtype: tl.constexpr = y.dtype.element_ty
    b_s = _residual_sum(x, residual, branch_scale, o_n, o_c, m_tile, m_c, stride_x, stride_r, dtype)
    if total is not None:
        tl.store(total + (o_n * C)[:, None] + o_c, b_s.to(dtype), mask=m_tile)
    if mean is not None:
        b_mean = tl.sum(b_s, 1) / C
        tl.store(mean + o_n, b_mean, mask=m_n)
        b_s = tl.where(m_c, b_s - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_s * b_s, 1) / C + eps)
    tl.store(rstd + o_n, b_rstd, mask=m_n)
    _store_norm(y, b_s, b_rstd, weight, bias, o_n, o_c, m_tile, m_c, C)


@triton.jit
def add_norm_wide_kernel(
    x,  # arguments as above
    residual,
    weight,
    bias,
    branch_scale,
    y,
    total,
    mean,
    rstd,
    N,
    C,
    stride_x,
    stride_r,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    dtype: tl.constexpr = y.dtype.element_ty
    b_mean = tl.zeros((BLOCK_N,), tl.float32)
    if total is not None or mean is not None:
        b_sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)[None, :]
            m_c = o_c < C
            m_tile = m_n[:, None] & m_c
            b_s = _residual_sum(
                x, residual, branch_scale, o_n, o_c, m_tile, m_c, stride_x, stride_r, dtype
            )
            if total is not None:
                tl.store(total + (o_n * C)[:, None] + o_c, b_s.to(dtype), mask=m_tile)
            b_sum += b_s
        if mean is not None:
            b_mean = tl.sum(b_sum, 1) / C
            tl.store(mean + o_n, b_mean, mask=m_n)
    b_squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)[None, :]
        m_c = o_c < C
        m_tile = m_n[:, None] & m_c
        b_s = _residual_sum(
            x, residual, branch_scale, o_n, o_c, m_tile, m_c, stride_x, stride_r, dtype
        )
        b_s = tl.where(m_c, b_s - b_mean[:, None], 0.0)
        b_squares += b_s * b_s
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_squares, 1) / C + eps)
    tl.store(rstd + o_n, b_rstd, mask=m_n)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)[None, :]
        m_c = o_c < C
        m_tile = m_n[:, None] & m_c
        b_s = _residual_sum(
            x, residual, branch_scale, o_n, o_c, m_tile, m_c, stride_x, stride_r, dtype
        )
        _store_norm(y, b_s - b_mean[:, None], b_rstd, weight, bias, o_n, o_c, m_tile, m_c, C)


@triton.jit
def _load_moments(mean, rstd, o_n, m_n):
    """Columns [BLOCK_N, 1]; 0 in rows beyond the last one, whose gradients are then 0."""
    b_rstd = tl.load(rstd + o_n, mask=m_n, other=0.0)
    b_mean = tl.zeros_like(b_rstd)
    if mean is not None:
        b_mean = tl.load(mean + o_n, mask=m_n, other=0.0)
    return b_mean[:, None], b_rstd[:, None]


@triton.jit
def add_norm_bwd_means_kernel(
    dy,  # [N, C]
    total,  # [N, C]
    mean,  # [N], or None: RMSNorm
    rstd,  # [N]
    weight,  # [C] or None
    along,  # [N]: the mean over the row of g times the norm, g = dy * weight
    direct,  # [N]: the mean of g, or None: RMSNorm
    N,
    C,
    stride_dy,
    stride_t,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_mean, b_rstd = _load_moments(mean, rstd, o_n, m_n)
    b_along = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_direct = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)[None, :]
        m_c = o_c < C
        m_tile = m_n[:, None] & m_c
        b_g = _load_rows(dy, o_n, stride_dy, o_c, m_tile)
        if weight is not None:
            b_g *= _load_parameter(weight, o_c, m_c)
        b_along += b_g * ((_load_rows(total, o_n, stride_t, o_c, m_tile) - b_mean) * b_rstd)
        b_direct += b_g
    tl.store(along + o_n, tl.sum(b_along, 1) / C, mask=m_n)
    if direct is not None:
        tl.store(direct + o_n, tl.sum(b_direct, 1) / C, mask=m_n)


@triton.jit
def add_norm_bwd_kernel(
    dy,  # [N, C]
    dtotal_in,  # [N, C] or None
    total,  # [N, C]
    mean,  # [N], or None: RMSNorm
    rstd,  # [N]
    x,  # [N, C], or None: no branch_scale
    weight,  # [C] or None
    branch_scale,  # [C] or None
    along,  # [N], the row means of a wider row, or None: a tile holds whole rows
    direct,
    dtotal,  # [N, C]
    dx,  # [N, C] or None
    dweight,  # [groups, C] float32, or None: not wanted; also the other two
    dbias,
    dbranch_scale,
    N,
    C,
    stride_dy,
    stride_in,
    stride_t,
    stride_x,
    steps,  # tiles of a group
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stripes = tl.cdiv(C, BLOCK_C)
    i_group, i_c = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_c = o_c < C
    if weight is not None:
        b_weight = _load_parameter(weight, o_c, m_c)
    if branch_scale is not None:
        b_scale = _load_parameter(branch_scale, o_c, m_c)
    b_dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_dscale = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for step in range(steps):
        o_n = (i_group * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m_tile = m_n[:, None] & m_c
        # dy is 0 where masked, and adds 0 to every sum.
        b_g = _load_rows(dy, o_n, stride_dy, o_c, m_tile)
        b_mean, b_rstd = _load_moments(mean, rstd, o_n, m_n)
        b_norm = (_load_rows(total, o_n, stride_t, o_c, m_tile) - b_mean) * b_rstd
        if dweight is not None:
            b_dweight += b_g * b_norm
        if dbias is not None:
            b_dbias += b_g
        if weight is not None:
            b_g *= b_weight
        if along is not None:
            b_along = tl.load(along + o_n, mask=m_n, other=0.0)
        else:
            b_along = tl.sum(b_g * b_norm, 1) / C
        b_d = b_g - b_norm * b_along[:, None]
        if mean is not None:
            if direct is not None:
                b_direct = tl.load(direct + o_n, mask=m_n, other=0.0)
            else:
                b_direct = tl.sum(b_g, 1) / C
            b_d -= b_direct[:, None]
        b_d *= b_rstd
        if dtotal_in is not None:
            b_d += _load_rows(dtotal_in, o_n, stride_in, o_c, m_tile)
        o_out = (o_n * C)[:, None] + o_c
        tl.store(dtotal + o_out, b_d.to(dtotal.dtype.element_ty), mask=m_tile)
        if branch_scale is not None:
            tl.store(dx + o_out, (b_d * b_scale).to(dx.dtype.element_ty), mask=m_tile)
            b_dscale += b_d * _load_rows(x, o_n, stride_x, o_c, m_tile)
    o_partial = i_group * C + i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_partial = i_c * BLOCK_C + tl.arange(0, BLOCK_C) < C
    if dweight is not None:
        tl.store(dweight + o_partial, tl.sum(b_dweight, 0), mask=m_partial)
    if dbias is not None:
        tl.store(dbias + o_partial, tl.sum(b_dbias, 0), mask=m_partial)
    if dbranch_scale is not None:
        tl.store(dbranch_scale + o_partial, tl.sum(b_dscale, 0), mask=m_partial)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_scale: Tensor | None,
    kind: str,
    eps: float | None,
    keep_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    has_total = keep_total and (residual is not None or branch_scale is not None)
    layernorm = kind == "layernorm"
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(x.shape if has_total else 0, dtype=dtype)
    mean = x.new_empty(x.shape[:-1] if layernorm else 0, dtype=torch.float32)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows = rows_of(x)
    residual_rows = None if residual is None else rows_of(residual)
    N, C = rows.shape
    if N == 0:
        return y, total, mean, rstd
    block_n, block_c, warps = _tile(C, dtype, 0)
    kernel = add_norm_kernel if block_c >= C else add_norm_wide_kernel
    kernel[(triton.cdiv(N, block_n),)](
        rows,
        residual_rows,
        contiguous(weight),
        contiguous(bias),
        contiguous(branch_scale),
        y,
        total if has_total else None,
        mean if layernorm else None,
        rstd,
        N,
        C,
        rows.stride(0),
        _stride(residual_rows),
        1e-5 if eps is None else eps,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return y, total, mean, rstd


def add_norm_bwd(
    dy: Tensor,
    dtotal_in: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    branch_scale: Tensor | None,
    kind: str,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtotal = total.new_empty(total.shape)
    dx = total.new_empty(0) if x is None else x.new_empty(x.shape)
    wanted = (want_dweight, want_dbias, branch_scale is not None)
    total_rows, dy_rows = rows_of(total), rows_of(dy)
    in_rows, x_rows = (None if t is None else rows_of(t) for t in (dtotal_in, x))
    weight = contiguous(weight)
    moments = (mean.contiguous() if kind == "layernorm" else None, rstd.contiguous())
    N, C = total_rows.shape
    block_n, block_c, warps = _tile(C, total.dtype, 1)
    steps = max(triton.cdiv(_MIN_ROWS, block_n), triton.cdiv(N, block_n * _MAX_GROUPS))
    groups = triton.cdiv(N, block_n * steps)
    partials = total.new_empty((sum(wanted), groups, C), dtype=torch.float32)
    if N:
        whole = block_c >= C
        means = (None, None) if whole else _row_means(dy_rows, total_rows, *moments, weight)
        add_norm_bwd_kernel[(groups * triton.cdiv(C, block_c),)](
            dy_rows,
            in_rows,
            total_rows,
            *moments,
            x_rows,
            weight,
            contiguous(branch_scale),
            *means,
            dtotal,
            None if x is None else dx,
            *lines_of(partials, wanted),
            N,
            C,
            dy_rows.stride(0),
            _stride(in_rows),
            total_rows.stride(0),
            _stride(x_rows),
            steps,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=warps,
        )
    dweight, dbias, dbranch_scale = sum_partials(partials, wanted)
    return dtotal, dx, dweight, dbias, dbranch_scale


def _row_means(
    dy: Tensor, total: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Over each row, the mean of g times the norm and, for LayerNorm, of g = dy * weight."""
    (N, C), (block_n, block_c, warps) = dy.shape, _tile(dy.shape[1], total.dtype, 0)
    along = torch.empty_like(rstd)
    direct = None if mean is None else torch.empty_like(rstd)
    add_norm_bwd_means_kernel[(triton.cdiv(N, block_n),)](
        dy,
        total,
        mean,
        rstd,
        weight,
        along,
        direct,
        N,
        C,
        dy.stride(0),
        total.stride(0),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return along, direct


def _tile(C: int, dtype: torch.dtype, direction: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_C and warps for sums of `dtype`; direction 0 is forward, 1 backward."""
    table = _config.nearest(_TILES, _config.target())
    per_warp, least_warps = table[dtype.itemsize][direction]
    block_c = triton.next_power_of_2(C) if _WIDEST[direction] >= C else _STRIPE
    block_n = min(_MOST_ROWS, max(1, per_warp * least_warps // block_c))
    return block_n, block_c, max(1, block_n * block_c // per_warp)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
