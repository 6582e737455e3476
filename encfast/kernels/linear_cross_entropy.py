"""Cross entropy of a linear layer's output: its statistics, and its gradient a slice at a time.

Tiling, memory traffic and why the backward's products are PyTorch's: `_logits`. A program of the
backward owns one tile of a slice of the logits' gradient.

             forward                                     backward, per slice of V
    x  -> z tiles of BLOCK_X x BLOCK_Y       x, weight -> z tile -> p -> G tile -> slot [M, slice]
    weight    in registers -> 4 sums a row   slot -> dx += G weight, dweight = G^T x, dbias = sum G

Assumptions. Channels are contiguous, rows evenly spaced; others are copied first, and so are rows
chosen by `rows`. Rows whose target is ignored are computed and dropped: leaving them out would need
their number on the host, which would wait for the device. Offsets of tiles are 64-bit. float32
multiplies in IEEE precision here, in the backward's products as PyTorch is set to. G is rounded to
the dtype of x once; in float16 what is below 6e-8 vanishes, as it does in any training in float16
that does not scale its loss. No atomics: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._logits import Slices, logits_tile, row_stats, store_grad, tile_hits, tiles_of
from ._product import tile_of_rows
from ._rows import contiguous, rows_of
from ._softmax import LOG2E


@triton.jit
def vocab_grad_kernel(
    x,  # [M, C]
    weight,  # [n, C], a slice of columns
    bias,  # [n] or None
    softcap,  # a number or None
    targets,  # [M] int64
    lse,  # [M] float32
    factors,  # [3, M] float32: of p, of every entry, at the target
    grad,  # [M, n]
    M,
    n,
    C,
    stride_x,
    stride_w,
    first,  # column of the vocabulary
    C_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(M, BLOCK_X)
    i_x, i_y = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    b_z = logits_tile(
        x, weight, bias, None, softcap, i_x, i_y, M, n, C, stride_x, stride_w,
        C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
    )  # fmt: skip
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < M
    b_lse = tl.load(lse + o_x, mask=m_x, other=float("inf"))
    b_factor = tl.load(factors + o_x, mask=m_x, other=0.0)
    b_spread = tl.load(factors + M + o_x, mask=m_x, other=0.0)
    b_hit = tl.load(factors + 2 * M + o_x, mask=m_x, other=0.0)
    m_hit = tile_hits(targets + o_x, m_x, first, i_y, BLOCK_Y)
    b_p = tl.exp2((b_z - b_lse[:, None]) * LOG2E)
    b_grad = b_factor[:, None] * b_p + b_spread[:, None]
    b_grad += tl.where(m_hit, b_hit[:, None], 0.0)
    if softcap is not None:
        b_t = b_z / softcap
        b_grad *= 1 - b_t * b_t
    store_grad(grad, b_grad, i_x, i_y, M, n, BLOCK_X, BLOCK_Y)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    ignore_index: int,
    label_smoothing: float | None,
    z_loss: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(loss [M], log-sum-exp [M])."""
    if targets.numel() == 0:
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    weight, targets, bias = rows_of(weight), targets.contiguous(), contiguous(bias)
    eps, active = label_smoothing or 0.0, targets != ignore_index
    largest, exps, at_target, *total = row_stats(
        _taken(x, rows, active),
        weight,
        bias=bias,
        softcap=softcap,
        targets=targets,
        total=eps > 0,
    )
    lse = largest + exps.log()
    loss = lse - (1 - eps) * at_target
    if z_loss:
        loss += z_loss * lse.square()
    if eps:
        loss -= eps / weight.shape[0] * total[0]
    return loss.where(active, 0), lse.where(active, 0)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float | None,
    z_loss: float | None,
    softcap: float | None,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows that `rows` chooses, of weight and of bias, [0] where not wanted."""
    V = weight.shape[0]
    dbias = x.new_zeros(V if want_dbias else 0, dtype=torch.float32)
    if targets.numel() == 0:
        dx = x.new_empty((0, x.shape[1]) if want_dx else 0)
        return dx, weight.new_zeros(weight.shape if want_dweight else 0), dbias
    weight, targets, bias = rows_of(weight), targets.contiguous(), contiguous(bias)
    active, eps = targets != ignore_index, label_smoothing or 0.0
    taken = _taken(x, rows, active)
    # Of an ignored row logits are those of zeros: finite, or hidden as in all rows.
    d = dloss.where(active, 0)
    factors = torch.stack((d * (1 + 2 * (z_loss or 0.0) * lse), d * (-eps / V), d * (eps - 1)))
    lse = lse.where(active, torch.inf)
    slices = Slices(taken, weight, want_dx, want_dweight)
    tile = tile_of_rows((taken, weight), x.shape[1])
    for columns, grad in slices:
        part = weight[columns]
        part_of_bias = None if bias is None else bias[columns]
        given = taken, part, part_of_bias, softcap, targets, lse, factors, grad
        sizes = *grad.shape, x.shape[1], taken.stride(0), weight.stride(0), columns.start
        vocab_grad_kernel[(tiles_of(grad, tile),)](*given, *sizes, **tile)
        if want_dbias:
            torch.sum(grad, 0, dtype=torch.float32, out=dbias[columns])
    return slices.dx, slices.dy, dbias


def _taken(x: Tensor, rows: Tensor | None, active: Tensor) -> Tensor:
    """The rows to be predicted, 0 where they are ignored, whatever they hold."""
    taken = x if rows is None else x.index_select(0, rows)
    return taken.where(active[:, None], 0)
