"""Products of tiles: their addresses, masks and sums, and the tiles of x y^T for rows x and y."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _config

# By bytes of an element: rows of x, rows of y, terms of a step, warps, stages; then of rows at no
# multiple of 16 elements from each other, which move element by element. The sum takes 64 registers
# of a thread, which leaves as many for what becomes of it.
_AMPERE = {
    2: ((128, 128, 32, 8, 4), (64, 64, 32, 8, 1)),
    4: ((64, 64, 32, 8, 2), (64, 64, 16, 8, 1)),
}
_SMALL = _AMPERE | {2: ((128, 128, 32, 8, 3), (64, 64, 32, 8, 1))}  # of less shared memory
_HOPPER = _AMPERE | {2: ((128, 128, 64, 8, 3), (64, 64, 32, 8, 1))}
_TILES = {
    "sm_80": _AMPERE,
    "sm_86": _SMALL,
    "sm_90": _HOPPER,
    "sm_120": _SMALL,
    "gfx90a": {
        2: ((128, 128, 32, 8, 2), (64, 64, 32, 4, 1)),
        4: ((64, 64, 32, 4, 2), (64, 64, 16, 4, 1)),
    },
    "interpreter": dict.fromkeys((2, 4), ((32, 32, 64, 1, 1), (32, 32, 32, 1, 1))),
}


@triton.jit
def tile_offsets(o_row, stride_row, o_column, stride_column):
    o_tile = o_row[:, None] * stride_row + o_column[None, :] * stride_column
    if o_tile.dtype == tl.int32:  # unsigned: no register per row for the upper half of its sign
        o_tile = o_tile.to(tl.uint32)
    return o_tile


@triton.jit
def load_tile(p_tile, m_row, m_column):
    """A tile, 0 where it is masked; None: no row, or no column, is."""
    if m_row is None and m_column is None:
        return tl.load(p_tile)
    elif m_row is None:
        return tl.load(p_tile, mask=m_column[None, :], other=0.0)
    elif m_column is None:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def inside(start, BLOCK: tl.constexpr, size, WHOLE: tl.constexpr):
    """Which of the BLOCK entries from `start` on there are; None: all, as every block is whole."""
    if WHOLE:
        return None
    else:
        return start + tl.arange(0, BLOCK) < size


@triton.jit
def add_product(b_sum, b_x, b_y):
    """b_sum + b_x b_y.

    In float32 a step's own sum is added as a whole: one chain over thousands of terms would have
    several times the error of plain PyTorch. A limit of imprecise terms, which means nothing for
    float32, keeps the compiler from starting the step's chain with b_sum.
    """
    if b_x.dtype == tl.float32:
        return b_sum + tl.dot(b_x, b_y, input_precision="ieee", max_num_imprecise_acc=b_x.shape[1])
    else:
        return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def product_of_rows(
    p_x,
    n_x,
    stride_x,
    p_y,
    n_y,
    stride_y,
    C,
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x y^T [BLOCK_X, BLOCK_Y] in float32 of the rows at p_x and at p_y.

    Rows behind the last of n_x or n_y are that one again: no load along rows has a mask.
    """
    o_c = tl.arange(0, BLOCK_C)
    # Sizes within a tile have 32 bits.
    o_x = tl.minimum(tl.arange(0, BLOCK_X), tl.minimum(n_x - 1, BLOCK_X).to(tl.int32))
    o_y = tl.minimum(tl.arange(0, BLOCK_Y), tl.minimum(n_y - 1, BLOCK_Y).to(tl.int32))
    o_x, o_y = tile_offsets(o_x, stride_x, o_c, 1), tile_offsets(o_c, 1, o_y, stride_y)
    b_sum = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for _ in range(C // BLOCK_C):
        b_sum = add_product(b_sum, tl.load(p_x + o_x), tl.load(p_y + o_y))
        p_x += BLOCK_C
        p_y += BLOCK_C
    if not C_WHOLE:
        m_c = o_c < C % BLOCK_C
        b_sum = add_product(b_sum, load_tile(p_x + o_x, None, m_c), load_tile(p_y + o_y, m_c, None))
    return b_sum


def tile_of_rows(tensors: Sequence[Tensor], C: int, products: int = 1) -> dict[str, int]:
    """Options of a kernel that holds `products` tiles of C terms at once, of these rows."""
    tiles = _config.nearest(_TILES, _config.target())[tensors[0].dtype.itemsize]
    block_x, block_y, block_c, warps, stages = tiles[is_odd(tensors)]
    return {
        "C_WHOLE": C % block_c == 0,
        "BLOCK_X": block_x // products,
        "BLOCK_Y": block_y,
        "BLOCK_C": block_c,
        "num_warps": warps,
        "num_stages": stages,
    }


def is_odd(tensors: Sequence[Tensor]) -> bool:
    """What Triton knows to be multiples of 16 decides how wide an access may be."""
    return any(
        x.data_ptr() % 16 != 0 or any(stride % 16 for stride in x.stride() if stride != 1)
        for x in tensors
    )
