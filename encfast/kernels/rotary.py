"""Rotary positions: q and k turned in one pass over the tables.

Tiling. A program owns BLOCK_N rows and all their heads. It loads the lines of cos and sin for its
rows once, [BLOCK_N, BLOCK_P] with BLOCK_P >= R / 2 pairs, keeps them in registers, and walks over
the heads of q, then of k. Interleaved pairs are loaded as they lie and parted in registers. What
is not turned is copied, at most D - R elements of a head. No shared memory of its own.

Memory traffic per row: 2 (H + Hk) D elements, R of the tables and one position.

Assumptions. Heads are contiguous inside (else the input is copied first), their strides arbitrary,
tables too are contiguous in their last dimension. Row offsets are 64-bit. Positions lie within the
tables: `encfast.ops` checks that, on a GPU when asked to.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _config

# Elements of a tile of one half of a head, and warps: 4 pairs a thread, which is 16 rows of a head
# of 64, so that 8 192 rows give 512 programs.
_TILES = {
    "sm_80": (512, 4),
    "gfx90a": (512, 2),
    "interpreter": (256, 1),
}


@triton.jit
def _turn_heads(
    x,
    out,
    b_cos,
    b_sin,
    o_n,
    m_n,
    H,
    D,
    P,
    stride_n,
    stride_h,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Turns the heads of the rows o_n of one tensor into the contiguous `out`."""
    dtype = out.dtype.element_ty
    p_in = x + (o_n * stride_n)[:, None]
    p_out = out + (o_n * (H * D))[:, None]
    o_p = tl.arange(0, BLOCK_P)[None, :]
    m_pair = m_n[:, None] & (o_p < P)
    o_flat = tl.arange(0, 2 * BLOCK_P)[None, :]
    m_flat = m_n[:, None] & (o_flat < 2 * P)
    for _ in range(H):
        if INTERLEAVED:
            b_x = tl.load(p_in + o_flat, mask=m_flat, other=0.0).to(tl.float32)
            b_1, b_2 = tl.split(tl.reshape(b_x, (BLOCK_N, BLOCK_P, 2)))
        else:
            b_1 = tl.load(p_in + o_p, mask=m_pair, other=0.0).to(tl.float32)
            b_2 = tl.load(p_in + P + o_p, mask=m_pair, other=0.0).to(tl.float32)
        b_out_1 = b_1 * b_cos - b_2 * b_sin
        b_out_2 = b_2 * b_cos + b_1 * b_sin
        if INTERLEAVED:
            b_out = tl.reshape(tl.join(b_out_1, b_out_2), (BLOCK_N, 2 * BLOCK_P))
            tl.store(p_out + o_flat, b_out.to(dtype), mask=m_flat)
        else:
            tl.store(p_out + o_p, b_out_1.to(dtype), mask=m_pair)
            tl.store(p_out + P + o_p, b_out_2.to(dtype), mask=m_pair)
        if BLOCK_REST > 0:
            o_rest = 2 * P + tl.arange(0, BLOCK_REST)[None, :]
            m_rest = m_n[:, None] & (o_rest < D)
            tl.store(p_out + o_rest, tl.load(p_in + o_rest, mask=m_rest), mask=m_rest)
        p_in += stride_h
        p_out += D


@triton.jit
def rotary_kernel(
    q,  # [N, H, D]
    k,  # [N, Hk, D] or None
    cos,  # [S, P]
    sin,
    positions,  # [N], or None: row i takes row i of the tables
    out_q,
    out_k,
    N,
    H,
    Hk,
    D,
    P,  # pairs of a head
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_cos,
    stride_sin,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_pos = o_n
    if positions is not None:
        b_pos = tl.load(positions + o_n, mask=m_n, other=0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)[None, :]
    m_pair = m_n[:, None] & (o_p < P)
    p_cos = cos + (b_pos * stride_cos)[:, None] + o_p
    p_sin = sin + (b_pos * stride_sin)[:, None] + o_p
    b_cos = tl.load(p_cos, mask=m_pair, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=m_pair, other=0.0).to(tl.float32)
    if CONJUGATE:
        b_sin = -b_sin
    _turn_heads(
        q,
        out_q,
        b_cos,
        b_sin,
        o_n,
        m_n,
        H,
        D,
        P,
        stride_qn,
        stride_qh,
        INTERLEAVED,
        BLOCK_N,
        BLOCK_P,
        BLOCK_REST,
    )
    if k is not None:
        _turn_heads(
            k,
            out_k,
            b_cos,
            b_sin,
            o_n,
            m_n,
            Hk,
            D,
            P,
            stride_kn,
            stride_kh,
            INTERLEAVED,
            BLOCK_N,
            BLOCK_P,
            BLOCK_REST,
        )


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, Tensor]:
    out_q = q.new_empty(q.shape)
    out_k = q.new_empty((0,) if k is None else k.shape)
    N, H, D = q.shape
    if N == 0:
        return out_q, out_k
    q, cos, sin = (_contiguous_lines(t) for t in (q, cos, sin))
    k = None if k is None else _contiguous_lines(k)
    pairs = cos.shape[1]
    rest = D - 2 * pairs
    elements, warps = _config.nearest(_TILES, _config.target())
    block_p = triton.next_power_of_2(pairs)
    block_n = max(1, elements // block_p)
    rotary_kernel[(triton.cdiv(N, block_n),)](
        q,
        k,
        cos,
        sin,
        None if positions is None else positions.contiguous(),
        out_q,
        out_k,
        N,
        H,
        0 if k is None else k.shape[1],
        D,
        pairs,
        *q.stride()[:2],
        *(q if k is None else k).stride()[:2],
        cos.stride(0),
        sin.stride(0),
        INTERLEAVED=interleaved,
        CONJUGATE=conjugate,
        BLOCK_N=block_n,
        BLOCK_P=block_p,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=warps,
    )
    return out_q, out_k


def _contiguous_lines(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
