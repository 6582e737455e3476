"""What the kernels of varlen_attn share: which rows of the other side a program visits, and what
turns q k into a score. Whose rows it has itself is said in `_ragged`.

Full tiles and edges. Of the other side's rows a tile sees those from `lo` to `hi`. In the blocks
between `full_lo` and `full_hi` all of its rows see all of them: nothing is masked there. Edges are
the blocks before and behind.

    lo        full_lo                       full_hi       hi
    | edge edge |  full   full   full   full  | edge edge .|

Every tensor is [tile rows, 1] or [1, tile rows] where it is named for one side, so the same
functions serve tiles of queries by keys and of keys by queries.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._ragged import find_slot
from ._softmax import tanh

# Weights of rules: scores are scale q k; or also ALiBi and a window; or anything else.
PLAIN, POSITIONAL, BIASED = range(3)

# A bias that takes a score below -1e38 hides the pair.
_LOWEST_SCORE = tl.constexpr(-1e38)


class Heads(NamedTuple):
    """[N, heads, D] whose last dimension is contiguous."""

    data: Tensor
    stride_n: int
    stride_h: int


class Rule(NamedTuple):
    """What decides about the scores and probabilities besides q and k. None: there is none."""

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    slopes: Tensor | None  # [B, H]
    slopes_stride_b: int
    rel_bias: Tensor | None  # [N, H, R]
    rel_stride_n: int  # 0: one table for all rows
    rel_stride_h: int
    rel_stride_r: int
    rel_radius: int
    bias: Tensor | None  # [H, T]
    bias_offsets: Tensor | None
    bias_stride_h: int  # 0: one matrix for all heads
    bias_stride_t: int
    rng: Tensor | None
    drop_below: int  # of 65536 equally likely draws, those below are dropped


def heads_of(x: Tensor) -> Heads:
    x = x if x.stride(2) == 1 else x.contiguous()
    return Heads(x, x.stride(0), x.stride(1))


def make_rule(
    head_size, scale, causal, window, alibi_slopes, rel_bias, bias, bias_offsets, softcap,
    dropout_p, rng,
) -> Rule:  # fmt: skip
    """The arguments of the op, as the kernels take them."""
    left, right = window[0], 0 if causal else window[1]
    slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    drops = min(int((dropout_p or 0) * 65536 + 0.5), 65535)
    rel_strides = (0, 0, 0) if rel_bias is None else (0, *rel_bias.stride())[-3:]
    bias_strides = (0, 0) if bias is None else (0, *bias.stride())[-2:]
    return Rule(
        scale=head_size**-0.5 if scale is None else scale,
        softcap=softcap,
        left=None if left < 0 else left,
        right=None if right < 0 else right,
        slopes=slopes,
        slopes_stride_b=slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0,
        rel_bias=rel_bias,
        rel_stride_n=rel_strides[0],
        rel_stride_h=rel_strides[1],
        rel_stride_r=rel_strides[2],
        rel_radius=0 if rel_bias is None else rel_bias.shape[-1] // 2,
        bias=bias,
        bias_offsets=None if bias_offsets is None else bias_offsets.contiguous(),
        bias_stride_h=bias_strides[0],
        bias_stride_t=bias_strides[1],
        rng=rng.contiguous() if drops else None,
        drop_below=drops,
    )


def weight(rule: Rule) -> int:
    """How many registers the scores of a tile take, which its sizes must leave free."""
    if any(x is not None for x in (rule.softcap, rule.rel_bias, rule.bias, rule.rng)):
        return BIASED
    if any(x is not None for x in (rule.slopes, rule.left, rule.right)):
        return POSITIONAL
    return PLAIN


@triton.jit
def find_tile(cu_seqlens, B, i_slot, BLOCK: tl.constexpr):
    """Sequence, its first row, its length, and the slot's first row inside of it.

    The last may be beyond the length: the slot is not used.
    """
    i_b, first, start = find_slot(cu_seqlens, B, i_slot, BLOCK)
    return i_b, first, tl.load(cu_seqlens + i_b + 1) - first, start


@triton.jit
def visited(x_first, x_last, before, after, n, BLOCK: tl.constexpr):
    """lo, full_lo, full_hi, hi for positions x_first..x_last, which each see x - before..x + after
    of n rows (None: all on that side)."""
    lo = 0
    full_lo = 0
    hi = n
    full_hi = n
    if before is not None:
        lo = tl.minimum(tl.maximum(x_first - before, 0), n) // BLOCK * BLOCK
        full_lo = tl.minimum(tl.cdiv(tl.maximum(x_last - before, 0), BLOCK) * BLOCK, n)
    if after is not None:
        hi = tl.maximum(tl.minimum(x_last + after + 1, n), lo)
        full_hi = tl.maximum(tl.minimum(x_first + after + 1, n), 0)
    full_lo = tl.minimum(full_lo, lo + tl.cdiv(hi - lo, BLOCK) * BLOCK) // BLOCK * BLOCK
    return lo, full_lo, tl.maximum(full_hi // BLOCK * BLOCK, full_lo), hi


@triton.jit
def count_edges(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    return (full_lo - lo) // BLOCK + tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK)


@triton.jit
def edge_start(i_edge, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """First row of an edge block: those before the full ones, then those behind."""
    left = (full_lo - lo) // BLOCK
    return tl.where(i_edge < left, lo + i_edge * BLOCK, full_hi + (i_edge - left) * BLOCK)


@triton.jit
def head_at(x, first_row, i_h):
    """Pointer to row first_row of one head."""
    return x.data + tl.cast(first_row, tl.int64) * x.stride_n + tl.cast(i_h, tl.int64) * x.stride_h


@triton.jit
def row_at(p_first, stride_n, row):
    return p_first + row * tl.cast(stride_n, tl.int64)


@triton.jit
def tile_at(p_head, stride_n, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to the rows start .. start + BLOCK - 1 of a head: a 64-bit base, 32-bit offsets."""
    o_tile = tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]
    if o_tile.dtype == tl.int32:  # unsigned: no register per row for the upper half of its sign
        o_tile = o_tile.to(tl.uint32)
    return row_at(p_head, stride_n, start) + o_tile


@triton.jit
def load_rows(
    p_head,
    stride_n,
    start,
    n,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A tile [BLOCK, BLOCK_D]; 0 beyond D, and on edges beyond row n."""
    p_tile = tile_at(p_head, stride_n, start, BLOCK, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    if EDGE:
        m_rows = (start + tl.arange(0, BLOCK) < n)[:, None]
        return tl.load(p_tile, mask=m_rows if D == BLOCK_D else m_rows & (o_d < D), other=0.0)
    elif D < BLOCK_D:
        return tl.load(p_tile, mask=o_d < D, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_rows(
    x, first_row, i_h, start, n, b_tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores a tile's rows before row n of a head, as far as D."""
    p_tile = tile_at(head_at(x, first_row, i_h), x.stride_n, start, BLOCK, BLOCK_D)
    m_tile = (start + tl.arange(0, BLOCK) < n)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(p_tile, b_tile.to(x.data.dtype.element_ty), mask=m_tile)


@triton.jit
def scores(b_qk, rule, i_b, i_h, first_q, o_q, n_q, o_k, n_k, EDGE: tl.constexpr):
    """Scores of a tile, -inf where the key is hidden, and the softcap's derivative.

    Rows beyond the lengths read the biases of the last row, so that no load needs a mask.
    """
    b_dcap = 1.0
    if rule.softcap is None:
        b_s = b_qk * rule.scale
    else:
        b_t = tanh(b_qk * (rule.scale / rule.softcap))
        b_s = b_t * rule.softcap
        b_dcap = 1 - b_t * b_t
    o_p = o_q + (n_k - n_q)
    if rule.slopes is not None:
        slope = tl.load(rule.slopes + i_b * rule.slopes_stride_b + i_h)
        b_s -= tl.abs(o_k.to(tl.float32) - o_p.to(tl.float32)) * slope
    o_row = tl.minimum(o_q, n_q - 1).to(tl.int64)
    if rule.rel_bias is not None:
        p_rel = rule.rel_bias + tl.cast(i_h, tl.int64) * rule.rel_stride_h
        p_rel += (first_q + o_row) * rule.rel_stride_n
        b_s += tl.load(p_rel + rel_entry(rule, o_p, o_k) * rule.rel_stride_r).to(tl.float32)
    if rule.bias is not None:
        p_bias = rule.bias + bias_at(rule, i_b, i_h, o_row, tl.minimum(o_k, n_k - 1), n_k)
        if rule.bias.dtype.element_ty == tl.int1:
            b_s = tl.where(tl.load(p_bias) != 0, b_s, float("-inf"))
        else:
            b_s += tl.load(p_bias).to(tl.float32)
    if (rule.rel_bias is not None) or (rule.bias is not None):
        b_s = tl.where(b_s < _LOWEST_SCORE, float("-inf"), b_s)
    if EDGE:
        m_seen = (o_q < n_q) & (o_k < n_k)
        if rule.left is not None:
            m_seen &= o_k >= o_p - rule.left
        if rule.right is not None:
            m_seen &= o_k <= o_p + rule.right
        b_s = tl.where(m_seen, b_s, float("-inf"))
    return b_s, b_dcap


@triton.jit
def rel_entry(rule, o_p, o_k):
    """Which of the 2 r + 1 entries stands for the key as seen from the position."""
    return tl.minimum(tl.maximum(o_k - o_p, -rule.rel_radius), rule.rel_radius) + rule.rel_radius


@triton.jit
def bias_at(rule, i_b, i_h, o_q, o_k, n_k):
    """Where the pairs' entries stand in the packed bias."""
    o_pair = tl.load(rule.bias_offsets + i_b) + o_q.to(tl.int64) * n_k + o_k
    return tl.cast(i_h, tl.int64) * rule.bias_stride_h + o_pair * rule.bias_stride_t


@triton.jit
def kept(rule, i_b, i_h, o_q, first_k, BLOCK_K: tl.constexpr):
    """Whether dropout keeps the pairs of the queries o_q with BLOCK_K keys from first_k on, a
    multiple of 8: [queries, BLOCK_K]. `encfast.ref.philox` defines the draws."""
    key = (tl.load(rule.rng) & 0xFFFFFFFF) | (tl.load(rule.rng + 1) << 32)
    o_eight = (first_k // 8 + tl.arange(0, BLOCK_K // 8))[None, :]
    o_row = o_q[:, None]
    zero = (o_row + o_eight) * 0
    w0, w1, w2, w3 = tl.philox(
        key.to(tl.uint64, bitcast=True), zero + o_eight, zero + o_row, zero + i_h, zero + i_b
    )
    # Keys 0..7 take the halves of the four words, low before high; joined, the last axis is the
    # lowest bit of the key.
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    b_draw = tl.reshape(tl.join(even, odd), (o_q.shape[0], BLOCK_K))
    return b_draw.to(tl.int32) >= rule.drop_below


@triton.jit
def multiplier(rule):
    """What the pairs that dropout kept are multiplied by."""
    return 65536 / (65536 - rule.drop_below)
