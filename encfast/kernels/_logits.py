"""What the losses over all pairs of two sets of rows share: logits a tile at a time, their sums.

    z = softcap tanh((scale x y^T + bias) / softcap)         [M, V] of rows x and candidates y

Statistics (`row_stats`). A program owns BLOCK_X rows and walks over `steps` tiles of candidates:
their logits live in registers, from the product to the running maximum, and nothing of them is
stored but a line of sums per program and row. Neighbours in the grid have other rows and the same
candidates, which they share in L2.

                  y   steps x BLOCK_Y
                +------+------+--..--+
     BLOCK_X x  |  z --> largest, .. |  --> partials [parts, sums, M], added up in their order
                +------+------+--..--+

Gradients. Those of x and y are products with the gradient G of z: G y and G^T x, each a sum over
all of the other side. To keep all three products in one kernel, either G is multiplied into sums
in memory by atomics, whose order differs from run to run, or computed twice, for rows and for
columns, which makes four products of three; and a sum of BLOCK_X rows by C channels exceeds the
registers from C = 256 on. So G goes through memory, a slice of columns at a time: a kernel computes
logits again in registers and stores the slice of G once, in the dtype of x, and PyTorch's own
products, the fastest there are, read it (`Slices`). No more than `SLOT_BYTES` of it exist at a
time, or 512 columns.

Memory traffic beside the products' own: forward 16 bytes a row and part; backward a slice of G is
written once and read twice, 6 bytes an element in half precision.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._product import product_of_rows, tile_of_rows, tile_offsets
from ._softmax import LOWEST, add_exponentials, tanh

# A slice of G: some thousand columns for some thousand rows, which make whole waves of tiles of any
# product, and little beside the parameters and rows of such a call.
SLOT_BYTES = 64 * 2**20
_LEAST_COLUMNS, _COLUMN_STEP = 512, 128
# Programs that statistics are given out to, where there are as many tiles: several for each
# multiprocessor of any GPU; then no more tiles to each than are worth saving lines of partials.
_PROGRAMS, _MOST_STEPS = 1024, 32


@triton.jit
def logits_tile(
    x,  # [M, C]
    y,  # [V, C]
    bias,  # [V] or None
    scale,  # float32, one number, or None
    softcap,  # a number or None
    i_x,
    i_y,
    M,
    V,
    C,
    stride_x,
    stride_y,
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z of tile (i_x, i_y); rows and columns beyond the last repeat that one."""
    at_x, at_y = tl.cast(i_x, tl.int64) * BLOCK_X, tl.cast(i_y, tl.int64) * BLOCK_Y
    p_x, p_y = x + at_x * stride_x, y + at_y * stride_y
    b_z = product_of_rows(
        p_x, M - at_x, stride_x, p_y, V - at_y, stride_y, C, C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C
    )
    if scale is not None:
        b_z *= tl.load(scale)
    if bias is not None:
        o_y = tl.minimum(at_y + tl.arange(0, BLOCK_Y), V - 1)
        b_z += tl.load(bias + o_y).to(tl.float32)[None, :]
    if softcap is not None:
        b_z = tanh(b_z / softcap) * softcap
    return b_z


@triton.jit
def hidden_pairs(excluded, excluded_of_y, o_x, o_y, M, V):
    """Which pairs are no candidates, [rows, columns]: column excluded[i] of row i, or row
    excluded_of_y[j] of column j, where one of them is given."""
    if excluded is not None:
        return tl.load(excluded + o_x, mask=o_x < M, other=-1)[:, None] == o_y[None, :]
    else:
        return tl.load(excluded_of_y + o_y, mask=o_y < V, other=-1)[None, :] == o_x[:, None]


@triton.jit
def row_stats_kernel(
    x,  # as above
    y,
    bias,
    scale,
    softcap,
    targets,  # [M] int64, a column of each row, or None
    excluded,  # [M] int64 or None, a column that counts in no sum
    excluded_of_y,  # [V] int64 or None, likewise a row
    partials,  # [parts, sums, M] float32: maximum, exponentials; at the target; of all z
    M,
    V,
    C,
    stride_x,
    stride_y,
    steps,
    sums,
    TOTAL: tl.constexpr,
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(M, BLOCK_X)
    i_x, i_part = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    b_most = tl.full((BLOCK_X,), LOWEST, tl.float32)
    b_exps = tl.zeros((BLOCK_X,), tl.float32)
    b_at = tl.zeros((BLOCK_X,), tl.float32)
    b_total = tl.zeros((BLOCK_X,), tl.float32)
    for i_y in range(i_part * steps, tl.minimum((i_part + 1) * steps, tl.cdiv(V, BLOCK_Y))):
        b_z = logits_tile(
            x, y, bias, scale, softcap, i_x, i_y, M, V, C, stride_x, stride_y,
            C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
        )  # fmt: skip
        o_y = tl.cast(i_y, tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
        if targets is not None:
            m_hit = tile_hits(targets + o_x, o_x < M, 0, i_y, BLOCK_Y)
            b_at += tl.sum(tl.where(m_hit, b_z, 0.0), 1)
        if TOTAL:
            b_total += tl.sum(tl.where(o_y[None, :] < V, b_z, 0.0), 1)
        if excluded is not None or excluded_of_y is not None:
            m_hidden = hidden_pairs(excluded, excluded_of_y, o_x, o_y, M, V)
            b_z = tl.where(m_hidden, LOWEST, b_z)
        b_z = tl.where(o_y[None, :] < V, b_z, -float("inf"))
        b_most, b_exps = add_exponentials(b_z, b_most, b_exps)
    p_line = partials + i_part.to(tl.int64) * sums * M + o_x
    tl.store(p_line, b_most, mask=o_x < M)
    tl.store(p_line + M, b_exps, mask=o_x < M)
    if targets is not None:
        tl.store(p_line + 2 * M, b_at, mask=o_x < M)
    if TOTAL:
        tl.store(p_line + 3 * M, b_total, mask=o_x < M)


@triton.jit
def tile_hits(p_targets, m_x, first, i_y, BLOCK_Y: tl.constexpr):
    """Where the rows' targets are in a tile; int32, as 64 bits each would fill the registers."""
    b_target = tl.load(p_targets, mask=m_x, other=-1) - first - tl.cast(i_y, tl.int64) * BLOCK_Y
    return b_target.to(tl.int32)[:, None] == tl.arange(0, BLOCK_Y)[None, :]


@triton.jit
def store_grad(
    grad, b_grad, i_x, i_y, M, n, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr
):  # fmt: skip
    """Tile (i_x, i_y) of a slice of G [M, n], whose offsets inside have 32 bits."""
    at_x, at_y = tl.cast(i_x, tl.int64) * BLOCK_X, tl.cast(i_y, tl.int64) * BLOCK_Y
    o_x, o_y = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_Y)
    p_tile = grad + at_x * n + at_y + tile_offsets(o_x, n, o_y, 1)
    m_tile = (o_x < M - at_x)[:, None] & (o_y < n - at_y)[None, :]
    tl.store(p_tile, b_grad.to(grad.dtype.element_ty), mask=m_tile)


def row_stats(
    x: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    softcap: float | None = None,
    targets: Tensor | None = None,
    excluded: Tensor | None = None,
    excluded_of_y: Tensor | None = None,
    total: bool = False,
) -> list[Tensor]:
    """Of each row float32 [M]: its largest logit, sum of e^(z - that), and where asked for the
    target's logit and the sum of all logits; `total` needs targets."""
    (M, C), V = x.shape, y.shape[0]
    tile = tile_of_rows((x, y), C)
    tiles_x, parts, steps = shares_of(M, V, tile)
    sums = 2 + (targets is not None) + total
    partials = x.new_empty((parts, sums, M), dtype=torch.float32)
    given = x, y, bias, scale, softcap, targets, excluded, excluded_of_y, partials
    sizes = M, V, C, x.stride(0), y.stride(0), steps, sums
    row_stats_kernel[(tiles_x * parts,)](*given, *sizes, TOTAL=total, **tile)
    largest = partials[:, 0].amax(0)
    exps = (partials[:, 1] * (partials[:, 0] - largest).exp()).sum(0)
    return [largest, exps, *partials[:, 2:].sum(0)]


def shares_of(M: int, V: int, tile: dict[str, int]) -> tuple[int, int, int]:
    """Tiles of rows, parts that their columns are cut into, and tiles of columns of a part."""
    tiles_x, tiles_y = triton.cdiv(M, tile["BLOCK_X"]), triton.cdiv(V, tile["BLOCK_Y"])
    steps = min(max(tiles_x * tiles_y // _PROGRAMS, 1), _MOST_STEPS)
    return tiles_x, triton.cdiv(tiles_y, steps), steps


def tiles_of(grad: Tensor, tile: dict[str, int]) -> int:
    """Programs that own one tile each of a slice of G."""
    return triton.cdiv(grad.shape[0], tile["BLOCK_X"]) * triton.cdiv(grad.shape[1], tile["BLOCK_Y"])


class Slices:
    """The gradients of rows x and y, from slices of the gradient of their logits.

    Args:
        x: [M, C], M > 0.
        y: [V, C].
        want_dx, want_dy: which are computed; [0] where not.
    """

    def __init__(self, x: Tensor, y: Tensor, want_dx: bool, want_dy: bool) -> None:
        self._x, self._y = x, y
        self._dx = x.new_zeros(x.shape, dtype=torch.float32) if want_dx else None
        self.dy = y.new_empty(y.shape if want_dy else 0)
        fit = SLOT_BYTES // (x.shape[0] * x.element_size())
        self._width = max(fit // _COLUMN_STEP * _COLUMN_STEP, _LEAST_COLUMNS)
        self._slot = x.new_empty(x.shape[0] * min(self._width, y.shape[0]))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, memory for their part of G [M, columns], to be filled before the next)."""
        (M, _), V = self._x.shape, self._y.shape[0]
        for start in range(0, V, self._width):
            columns = slice(start, min(start + self._width, V))
            n = columns.stop - start
            grad = self._slot[: M * n].view(M, n)
            yield columns, grad
            if self._dx is not None:
                _add_product(self._dx, grad, self._y[columns])
            if self.dy.numel():
                torch.mm(grad.mT, self._x, out=self.dy[columns])

    @property
    def dx(self) -> Tensor:
        """After the last slice."""
        return self._x.new_empty(0) if self._dx is None else self._dx.to(self._x.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, `total` in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))
