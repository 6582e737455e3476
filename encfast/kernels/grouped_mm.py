"""A linear layer per group of rows, both ways: matrix products whose tiles keep to one group.

Tiling. Forward, a program owns BLOCK_N rows of one group by BLOCK_F columns of the result and walks
down the C terms; the gradient of x is the same product with the weight's strides swapped. Rows are
given out in slots (`_ragged`), where what lies beyond the last group counts as a group without
terms, which yields its zeros. Slots are taken eight at a time and column by column, so that the
programs that run at once share both their rows and their weights in L2.

              terms of C                                  rows of the group
             +----+----+--..--+                          +----+----+--..--+
    BLOCK_N  | x W[e]^T -> acc|                 BLOCK_F  | doutT x -> acc |
    rows     +----+----+--..--+                 columns  +----+----+--..--+
             BLOCK_C                                     BLOCK_N
             acc [BLOCK_N, BLOCK_F]                      acc [BLOCK_F, BLOCK_C] of dweight[e]

    dweight    a program owns a tile of one group's gradient and walks down the group's rows; an
               empty group's zeros are stored like any result
    dbias      likewise, a program owns columns of a group

Sums stay in registers (Blackwell: tensor memory); operands pass through a pipeline of `stages`
blocks in shared memory.

Memory traffic. Forward a weight is read once per slot of its group, from L2 mostly where there are
several, a row once per BLOCK_F columns: with groups of at most BLOCK_N rows, the weights once. The
backward's dweight reads rows once per tile of the other side and writes each gradient once. No
partial sums: where one group has all rows, dweight has no more programs than one weight has tiles.

Assumptions. Channels are contiguous, rows evenly spaced, a weight's rows or columns contiguous;
others are copied first. Rows, groups and terms are stepped over in 64 bits, offsets inside of a
tile have 32. The tile depends on N / E, which the host knows, never on lengths. float32 multiplies
in IEEE precision: TF32 would not meet the tolerance of `encfast.testing`. No atomics: bit-equal
from run to run.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config, _tune
from ._product import add_product, inside, is_odd, load_tile, tile_offsets
from ._ragged import find_slot
from ._rows import contiguous, rows_of

# By bytes of an element and kind of call: rows, columns and terms of a step, warps, stages. MANY
# rows keep the tensor cores busy. With FEW, 32 a group on average or less, a product waits for its
# weights: fewer rows idle, and more loads are under way. ODD rows, at no multiple of 16 elements
# from each other, move element by element, with an address in registers for each.
MANY, FEW, ODD = range(3)
_FEW_ROWS = 32
_AMPERE = {
    2: ((128, 128, 32, 4, 4), (32, 128, 64, 4, 4), (64, 64, 32, 8, 1)),
    4: ((64, 64, 32, 8, 2), (32, 64, 32, 4, 2), (64, 64, 16, 8, 1)),
}
# Of less shared memory.
_SMALL = _AMPERE | {2: ((128, 128, 32, 4, 3), (32, 128, 64, 4, 3), (64, 64, 32, 8, 1))}
_HOPPER = _AMPERE | {2: ((128, 128, 64, 4, 3), (32, 128, 64, 4, 4), (64, 64, 32, 8, 1))}
_TILES = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_90": _HOPPER,
    "sm_120": _SMALL,
    "gfx90a": {
        2: ((128, 128, 32, 4, 2), (32, 128, 64, 4, 2), (64, 64, 32, 4, 1)),
        4: ((64, 64, 32, 4, 2), (32, 64, 32, 4, 2), (64, 64, 16, 4, 1)),
    },
    "interpreter": dict.fromkeys(
        (2, 4), ((32, 32, 64, 1, 1), (16, 64, 32, 1, 1), (32, 64, 32, 1, 1))
    ),
}
_TOGETHER = tl.constexpr(8)  # slots that share weights in L2
_SUM_ROWS, _SUM_COLUMNS = 32, 64  # of a step of dbias: lines of 128 bytes or more


@triton.jit
def grouped_mm_kernel(
    x,  # [N, C]
    weight,  # [E, F, C]
    cu_seqlens,  # [E + 1]
    bias,  # [E, F] or None
    out,  # [N, F]
    N,
    E,
    F,
    C,
    stride_x,
    stride_e,
    stride_f,
    stride_c,
    F_WHOLE: tl.constexpr,
    C_WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slots, stripes = N // BLOCK_N + E + 1, tl.cdiv(F, BLOCK_F)
    i = tl.program_id(0)
    i_slot, i_f = tl.swizzle2d(i // stripes, i % stripes, slots, stripes, _TOGETHER)
    i_e, first, start = find_slot(cu_seqlens, E + 1, i_slot, BLOCK_N)
    n = tl.load(cu_seqlens + i_e + 1, mask=i_e < E, other=N) - first - start
    if n <= 0:
        return
    terms = tl.where(i_e < E, C, 0)
    row, column = (first + start).to(tl.int64), i_f * BLOCK_F
    # Rows behind the last are that one again: loads of x need no mask, and the store has one.
    o_n, o_f, o_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)
    o_x = tile_offsets(tl.minimum(o_n, n - 1), stride_x, o_c, 1)
    o_w = tile_offsets(o_c, stride_c, o_f, stride_f)
    m_f = inside(column, BLOCK_F, F, F_WHOLE)
    p_x = x + row * stride_x
    p_w = weight + tl.cast(i_e, tl.int64) * stride_e + column.to(tl.int64) * stride_f
    step = tl.cast(stride_c, tl.int64) * BLOCK_C
    b_out = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for _ in range(terms // BLOCK_C):
        b_w = load_tile(p_w + o_w, None, m_f)
        b_out = add_product(b_out, tl.load(p_x + o_x), b_w)
        p_x += BLOCK_C
        p_w += step
    if not C_WHOLE:
        m_c = o_c < terms % BLOCK_C
        b_w = load_tile(p_w + o_w, m_c, m_f)
        b_out = add_product(b_out, load_tile(p_x + o_x, None, m_c), b_w)
    m_column = column + o_f < F
    if bias is not None:
        p_bias = bias + tl.cast(i_e, tl.int64) * F + column
        b_bias = tl.load(p_bias + o_f, mask=m_column & (i_e < E), other=0.0)
        b_out += b_bias.to(tl.float32)[None, :]
    p_out = out + row * F + column + tile_offsets(o_n, F, o_f, 1)
    m_tile = (o_n < n)[:, None] & m_column[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def grouped_mm_dweight_kernel(
    dout,  # [N, F]
    x,  # [N, C]
    cu_seqlens,  # [E + 1]
    dweight,  # [E, F, C]
    F,
    C,
    stride_dout,
    stride_x,
    F_WHOLE: tl.constexpr,
    C_WHOLE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_f, tiles_c = tl.cdiv(F, BLOCK_F), tl.cdiv(C, BLOCK_C)
    i_e, i_tile = tl.program_id(0) // (tiles_f * tiles_c), tl.program_id(0) % (tiles_f * tiles_c)
    at_f, at_c = i_tile // tiles_c * BLOCK_F, i_tile % tiles_c * BLOCK_C
    first = tl.load(cu_seqlens + i_e)
    n = tl.load(cu_seqlens + i_e + 1) - first
    o_n, o_f, o_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)
    o_dout = tile_offsets(o_f, 1, o_n, stride_dout)
    o_x = tile_offsets(o_n, stride_x, o_c, 1)
    m_f, m_c = inside(at_f, BLOCK_F, F, F_WHOLE), inside(at_c, BLOCK_C, C, C_WHOLE)
    p_dout = dout + first.to(tl.int64) * stride_dout + at_f
    p_x = x + first.to(tl.int64) * stride_x + at_c
    step_dout = tl.cast(stride_dout, tl.int64) * BLOCK_N
    step_x = tl.cast(stride_x, tl.int64) * BLOCK_N
    b_dw = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    for _ in range(n // BLOCK_N):
        b_dout, b_x = load_tile(p_dout + o_dout, m_f, None), load_tile(p_x + o_x, None, m_c)
        b_dw = add_product(b_dw, b_dout, b_x)
        p_dout += step_dout
        p_x += step_x
    if n % BLOCK_N:
        m_n = o_n < n % BLOCK_N
        b_dout, b_x = load_tile(p_dout + o_dout, m_f, m_n), load_tile(p_x + o_x, m_n, m_c)
        b_dw = add_product(b_dw, b_dout, b_x)
    p_dw = dweight + (tl.cast(i_e, tl.int64) * F + at_f) * C + at_c + tile_offsets(o_f, C, o_c, 1)
    m_tile = (at_f + o_f < F)[:, None] & (at_c + o_c < C)[None, :]
    tl.store(p_dw, b_dw.to(dweight.dtype.element_ty), mask=m_tile)


@triton.jit
def grouped_mm_dbias_kernel(
    dout,  # [N, F]
    cu_seqlens,  # [E + 1]
    dbias,  # [E, F] float32
    F,
    stride_dout,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    stripes = tl.cdiv(F, BLOCK_F)
    i_e, i_f = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
    first = tl.load(cu_seqlens + i_e).to(tl.int64)
    n = tl.load(cu_seqlens + i_e + 1) - first
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_sum = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        p_dout = dout + ((first + o_n) * stride_dout)[:, None] + o_f[None, :]
        b_sum += load_tile(p_dout, o_n < n, m_f).to(tl.float32)
    tl.store(dbias + i_e * F + o_f, tl.sum(b_sum, 0), mask=m_f)


def grouped_mm(x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[1]))
    if out.numel() == 0:
        return out
    rows, weight = rows_of(x), _with_contiguous_side(weight)
    (N, C), (E, F, _) = rows.shape, weight.shape
    tensors = rows, weight, cu_seqlens.contiguous(), contiguous(bias), out
    sizes = N, E, F, C, rows.stride(0), *weight.stride()

    def run(tile: _tune.Tile) -> None:
        block_n, block_f, block_c, warps, stages = tile
        grouped_mm_kernel[((N // block_n + E + 1) * triton.cdiv(F, block_f),)](
            *tensors,
            *sizes,
            F_WHOLE=F % block_f == 0,
            C_WHOLE=C % block_c == 0,
            BLOCK_N=block_n,
            BLOCK_F=block_f,
            BLOCK_C=block_c,
            num_warps=warps,
            num_stages=stages,
        )

    kind = _kind((rows, weight, out), few=N <= _FEW_ROWS * E)
    _launch(run, grouped_mm_kernel.__name__, x.dtype, kind, (F, C, weight.stride(2) == 1))
    return out


def grouped_mm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens, dout = cu_seqlens.contiguous(), rows_of(dout)
    return (
        grouped_mm(dout, weight.mT, cu_seqlens, None) if want_dx else x.new_empty(0),
        _dweight(dout, x, weight, cu_seqlens) if want_dweight else x.new_empty(0),
        _dbias(dout, weight.shape[0], cu_seqlens) if want_dbias else dout.new_empty(0).float(),
    )


def _dweight(dout: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    dweight = weight.new_empty(weight.shape)
    if dweight.numel() == 0:
        return dweight
    rows, (E, F, C) = rows_of(x), weight.shape
    args = dout, rows, cu_seqlens, dweight, F, C, dout.stride(0), rows.stride(0)

    def run(tile: _tune.Tile) -> None:
        block_f, block_c, block_n, warps, stages = tile
        grouped_mm_dweight_kernel[(E * triton.cdiv(F, block_f) * triton.cdiv(C, block_c),)](
            *args,
            F_WHOLE=F % block_f == 0,
            C_WHOLE=C % block_c == 0,
            BLOCK_F=block_f,
            BLOCK_C=block_c,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )

    kind = _kind((dout, rows, dweight), few=False)
    _launch(run, grouped_mm_dweight_kernel.__name__, x.dtype, kind, (F, C))
    return dweight


def _dbias(dout: Tensor, E: int, cu_seqlens: Tensor) -> Tensor:
    F = dout.shape[1]
    dbias = dout.new_empty((E, F), dtype=torch.float32)
    if dbias.numel():
        grouped_mm_dbias_kernel[(E * triton.cdiv(F, _SUM_COLUMNS),)](
            dout,
            cu_seqlens,
            dbias,
            F,
            dout.stride(0),
            BLOCK_N=_SUM_ROWS,
            BLOCK_F=_SUM_COLUMNS,
            num_warps=4,
        )
    return dbias


def _kind(tensors: Sequence[Tensor], few: bool) -> int:
    """Of a call."""
    if is_odd(tensors):
        return ODD
    return FEW if few else MANY


def _launch(
    run: Callable[[_tune.Tile], None], name: str, dtype: torch.dtype, kind: int, sizes: tuple
) -> None:
    """Runs a kernel with the tile of the table, or the one that measured fastest."""
    tile = _config.nearest(_TILES, _config.target())[dtype.itemsize][kind]
    run(_tune.fastest((name, dtype, kind, *sizes), tile, lambda: _candidates(dtype), run))


def _candidates(dtype: torch.dtype) -> list[_tune.Tile]:
    """What the table holds for the dtype on GPUs of this vendor."""
    vendor = _config.target()[:3]
    tables = (table for arch, table in _TILES.items() if arch.startswith(vendor))
    return list(dict.fromkeys(tile for table in tables for tile in table[dtype.itemsize]))


def _with_contiguous_side(weight: Tensor) -> Tensor:
    return weight if 1 in weight.stride()[1:] else weight.contiguous()
