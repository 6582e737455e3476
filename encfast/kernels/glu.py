"""Activations of the feed-forward layer, gated or plain, with the bias in front, both ways.

Tiling. x [N, C] is cut into tiles of BLOCK_N rows by BLOCK_F columns of the result; a gated tile
reads the same columns of both halves. Tiles live in registers; a sum over rows goes through
a few KiB of shared memory.

    forward    one program per tile, neighbours in memory next to each other in the grid
    backward   one program per group of rows and stripe of BLOCK_F columns: it walks down its rows,
               writes dx and keeps the sums of dbias, which it stores once as its line of partials
    sum        see _rows.py

Memory traffic per row, in elements, with F results: forward reads C and writes F; backward reads
C + F and writes C. The partials add 8 C bytes per group of at least 8 BLOCK_N rows.

Assumptions. Channels are contiguous, rows evenly spaced; other x and dout are copied first. Row
offsets are 64-bit. The number of groups depends on N alone, so dbias has the same bits on every
GPU of one entry of the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._rows import contiguous, lines_of, rows_of, sum_partials

# BLOCK_N, BLOCK_F, warps. A thread holds eight neighbours of each operand, 16 bytes of half
# precision in one load, which keeps the backward with its two sums below 100 registers.
_TILES = {
    "sm_80": (4, 256, 4),
    "gfx90a": (4, 256, 4),
    "interpreter": (16, 64, 1),
}
# A group is 8 steps or more, which keeps the traffic of the partials at a few percent, and longer
# where there would be more than 256 groups, which with some stripes of columns fill any GPU.
_MIN_STEPS = 8
_MAX_GROUPS = 256

# In a product they stand on the right: the interpreter's constexpr does not yield to a tensor.
_INV_SQRT_2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gelu_tanh_gate(a):
    """s and 2 u', where gelu_tanh(a) = a (1 + tanh u) / 2 = a s with s = sigmoid(2 u).

    Beyond |a| = 100, s is 0 or 1 to the last bit: a square held below 1e4 changes nothing there,
    and keeps the slope s + a s (1 - s) 2 u' from 0 times infinity.
    """
    square = tl.minimum(a * a, 1e4)
    s = tl.sigmoid(a * _TWO_SQRT_2_PI * (1 + square * _CUBIC))
    return s, (1 + 3 * (square * _CUBIC)) * _TWO_SQRT_2_PI


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    """act(a) and act'(a) in float32; the compiler drops the one that is not used."""
    if ACTIVATION == "gelu":
        phi = 0.5 * (1 + tl.erf(a * _INV_SQRT_2))
        out = a * phi
        slope = phi + a * (tl.exp(-0.5 * a * a) * _INV_SQRT_2PI)
    elif ACTIVATION == "gelu_tanh":
        s, twice_du = _gelu_tanh_gate(a)
        out = a * s
        slope = s + a * (s * (1 - s)) * twice_du
    elif ACTIVATION == "silu":
        s = tl.sigmoid(a)
        out = a * s
        slope = s * (1 + a * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "relu")
        out = tl.where(a <= 0, 0.0, a)  # NaN stays NaN
        slope = tl.where(a > 0, 1.0, 0.0)
    return out, slope


@triton.jit
def _load_half(p_row, o_c, m_tile, bias, m_f):
    """Columns o_c of the rows at p_row plus those of the bias, in float32."""
    b_x = tl.load(p_row + o_c[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if bias is not None:
        b_x += tl.load(bias + o_c, mask=m_f, other=0.0).to(tl.float32)[None, :]
    return b_x


@triton.jit
def glu_kernel(
    x,  # [N, C]
    bias,  # [C] or None
    out,  # [N, F]
    N,
    F,
    stride_x,
    at_a,  # first column of the activated half
    at_b,  # and of the other
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    stripes = tl.cdiv(F, BLOCK_F)
    i_n, i_f = tl.program_id(0) // stripes, tl.program_id(0) % stripes
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    m_tile = (o_n < N)[:, None] & m_f[None, :]
    p_row = x + (o_n * stride_x)[:, None]
    b_a = _load_half(p_row, at_a + o_f, m_tile, bias, m_f)
    b_out, _ = _activate(b_a, ACTIVATION)
    if GATED:
        b_out *= _load_half(p_row, at_b + o_f, m_tile, bias, m_f)
    p_out = out + (o_n * F)[:, None] + o_f[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def glu_bwd_kernel(
    dout,  # [N, F]
    x,  # [N, C]
    bias,  # [C] or None
    dx,  # [N, C]
    partials,  # [groups, C] float32, or None: no gradient of bias
    N,
    F,
    C,
    stride_dout,
    stride_x,
    at_a,
    at_b,
    steps,  # tiles of a group
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    stripes = tl.cdiv(F, BLOCK_F)
    i_group, i_f = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_sum_a = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    b_sum_b = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for step in range(steps):
        o_n = (i_group * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_tile = (o_n < N)[:, None] & m_f[None, :]
        p_row = x + (o_n * stride_x)[:, None]
        p_dx = dx + (o_n * C)[:, None] + o_f[None, :]
        p_dout = dout + (o_n * stride_dout)[:, None] + o_f[None, :]
        # Masked elements of dout are 0, and add 0 to the sums.
        b_dout = tl.load(p_dout, mask=m_tile, other=0.0).to(tl.float32)
        b_a = _load_half(p_row, at_a + o_f, m_tile, bias, m_f)
        b_act, b_slope = _activate(b_a, ACTIVATION)
        if GATED:
            b_db = b_dout * b_act
            tl.store(p_dx + at_b, b_db.to(dx.dtype.element_ty), mask=m_tile)
            b_sum_b += b_db
            b_dout *= _load_half(p_row, at_b + o_f, m_tile, bias, m_f)
        b_da = b_dout * b_slope
        tl.store(p_dx + at_a, b_da.to(dx.dtype.element_ty), mask=m_tile)
        b_sum_a += b_da
    if partials is not None:
        p_partial = partials + i_group * C + o_f
        tl.store(p_partial + at_a, tl.sum(b_sum_a, 0), mask=m_f)
        if GATED:
            tl.store(p_partial + at_b, tl.sum(b_sum_b, 0), mask=m_f)


def glu(
    x: Tensor, bias: Tensor | None, activation: str, gated: bool, activate_second: bool
) -> Tensor:
    rows, F, halves = rows_of(x), *_columns(x, gated, activate_second)
    out = x.new_empty((*x.shape[:-1], F))
    if out.numel():
        block_n, block_f, warps = _config.nearest(_TILES, _config.target())
        grid = (triton.cdiv(rows.shape[0], block_n) * triton.cdiv(F, block_f),)
        glu_kernel[grid](
            rows,
            contiguous(bias),
            out,
            rows.shape[0],
            F,
            rows.stride(0),
            *halves,
            ACTIVATION=activation,
            GATED=gated,
            BLOCK_N=block_n,
            BLOCK_F=block_f,
            num_warps=warps,
        )
    return out


def glu_bwd(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    activate_second: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor]:
    rows, F, halves = rows_of(x), *_columns(x, gated, activate_second)
    (N, C), d_rows = rows.shape, rows_of(dout)
    dx = x.new_empty(x.shape)
    if N == 0:
        return dx, x.new_zeros(C if want_dbias else 0, dtype=torch.float32)
    block_n, block_f, warps = _config.nearest(_TILES, _config.target())
    steps = max(_MIN_STEPS, triton.cdiv(N, block_n * _MAX_GROUPS))
    groups = triton.cdiv(N, block_n * steps)
    wanted = (want_dbias,)
    partials = x.new_empty((sum(wanted), groups, C), dtype=torch.float32)
    glu_bwd_kernel[(groups * triton.cdiv(F, block_f),)](
        d_rows,
        rows,
        contiguous(bias),
        dx,
        *lines_of(partials, wanted),
        N,
        F,
        C,
        d_rows.stride(0),
        rows.stride(0),
        *halves,
        steps,
        ACTIVATION=activation,
        GATED=gated,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        num_warps=warps,
    )
    (dbias,) = sum_partials(partials, wanted)
    return dx, dbias


def _columns(x: Tensor, gated: bool, activate_second: bool) -> tuple[int, tuple[int, int]]:
    """Columns of the result, and where the activated half and the other begin in x."""
    if not gated:
        return x.shape[-1], (0, 0)
    F = x.shape[-1] // 2
    return F, (F, 0) if activate_second else (0, F)
