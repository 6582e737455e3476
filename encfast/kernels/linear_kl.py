"""KL divergence of two heads over one vocabulary: statistics, and the gradient a slice at a time.

Tiling. As linear_cross_entropy's (`_logits` says why), with a tile of each head's logits in
registers at once: half as many rows a program, so that both fit.

    x, weight                  -> z tile \\
                                           -> 5 sums a row; or G = p - q -> slot -> dx, dweight
    teacher_x, teacher_weight  -> t tile /

Memory traffic. Both heads' products are computed once forward and once backward; beside them 20
bytes a row and part forward, and backward a slice of G, of the student alone, written and read.

Assumptions. As linear_cross_entropy's. The difference of the two softmaxes is taken in float32 and
rounded after: where both agree, little is left. No atomics: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._logits import Slices, logits_tile, shares_of, store_grad, tiles_of
from ._product import tile_of_rows
from ._rows import rows_of
from ._softmax import LOG2E, LOWEST, add_exponentials


@triton.jit
def _both_tiles(
    x, weight, bias, teacher_x, teacher_weight, teacher_bias, scale, i_x, i_y, M, V, C, C_teacher,
    strides, C_WHOLE: tl.constexpr, TEACHER_WHOLE: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Logits of the student and of the teacher."""
    b_z = logits_tile(
        x, weight, bias, scale, None, i_x, i_y, M, V, C, strides[0], strides[1],
        C_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
    )  # fmt: skip
    b_t = logits_tile(
        teacher_x, teacher_weight, teacher_bias, scale, None, i_x, i_y, M, V, C_teacher,
        strides[2], strides[3], TEACHER_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
    )  # fmt: skip
    return b_z, b_t


@triton.jit
def kl_stats_kernel(
    x,  # [M, C]
    weight,  # [V, C]
    bias,  # [V] float32, divided by the temperature like the teacher's, or None
    teacher_x,  # [M, C_teacher]
    teacher_weight,  # [V, C_teacher]
    teacher_bias,
    scale,  # float32, one over the temperature, or None
    partials,  # [parts, 5, M] float32: maximum and exponentials of each head; e^(t - max) (t - z)
    M,
    V,
    C,
    C_teacher,
    strides,
    steps,
    C_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(M, BLOCK_X)
    i_x, i_part = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    b_most = tl.full((BLOCK_X,), LOWEST, tl.float32)
    b_exps = tl.zeros((BLOCK_X,), tl.float32)
    b_most_t = tl.full((BLOCK_X,), LOWEST, tl.float32)
    b_exps_t = tl.zeros((BLOCK_X,), tl.float32)
    b_cross = tl.zeros((BLOCK_X,), tl.float32)
    for i_y in range(i_part * steps, tl.minimum((i_part + 1) * steps, tl.cdiv(V, BLOCK_Y))):
        b_z, b_t = _both_tiles(
            x, weight, bias, teacher_x, teacher_weight, teacher_bias, scale, i_x, i_y, M, V, C,
            C_teacher, strides, C_WHOLE, TEACHER_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
        )  # fmt: skip
        m_y = tl.cast(i_y, tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)[None, :] < V
        b_t = tl.where(m_y, b_t, -float("inf"))
        before = b_most_t
        b_most_t, b_exps_t = add_exponentials(b_t, b_most_t, b_exps_t)
        b_e = tl.exp2((b_t - b_most_t[:, None]) * LOG2E)
        b_apart = tl.where(b_e > 0, b_t - b_z, 0.0)  # 0 times an infinity is 0
        b_cross = b_cross * tl.exp2((before - b_most_t) * LOG2E) + tl.sum(b_e * b_apart, 1)
        b_z = tl.where(m_y, b_z, -float("inf"))
        b_most, b_exps = add_exponentials(b_z, b_most, b_exps)
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    p_line = partials + i_part.to(tl.int64) * 5 * M + o_x
    tl.store(p_line, b_most, mask=o_x < M)
    tl.store(p_line + M, b_exps, mask=o_x < M)
    tl.store(p_line + 2 * M, b_most_t, mask=o_x < M)
    tl.store(p_line + 3 * M, b_exps_t, mask=o_x < M)
    tl.store(p_line + 4 * M, b_cross, mask=o_x < M)


@triton.jit
def kl_grad_kernel(
    x,  # as above, of a slice of n columns
    weight,
    bias,
    teacher_x,
    teacher_weight,
    teacher_bias,
    scale,
    lse,  # [2, M] float32
    factors,  # [M] float32
    grad,  # [M, n]
    M,
    n,
    C,
    C_teacher,
    strides,
    C_WHOLE: tl.constexpr,
    TEACHER_WHOLE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_x = tl.cdiv(M, BLOCK_X)
    i_x, i_y = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    b_z, b_t = _both_tiles(
        x, weight, bias, teacher_x, teacher_weight, teacher_bias, scale, i_x, i_y, M, n, C,
        C_teacher, strides, C_WHOLE, TEACHER_WHOLE, BLOCK_X, BLOCK_Y, BLOCK_C,
    )  # fmt: skip
    o_x = i_x.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < M
    b_lse = tl.load(lse + o_x, mask=m_x, other=float("inf"))
    b_lse_t = tl.load(lse + M + o_x, mask=m_x, other=float("inf"))
    b_q = tl.exp2((b_z - b_lse[:, None]) * LOG2E)
    b_p = tl.exp2((b_t - b_lse_t[:, None]) * LOG2E)
    b_grad = tl.load(factors + o_x, mask=m_x, other=0.0)[:, None] * (b_q - b_p)
    store_grad(grad, b_grad, i_x, i_y, M, n, BLOCK_X, BLOCK_Y)


def linear_kl(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """(KL [M], log-sum-exps of student and teacher [2, M])."""
    M, V = x.shape[0], weight.shape[0]
    if M == 0:
        return x.new_empty(0, dtype=torch.float32), x.new_empty((2, 0), dtype=torch.float32)
    x, weight, teacher_x, teacher_weight = map(rows_of, (x, weight, teacher_x, teacher_weight))
    scale, biases = _tempered(x, (bias, teacher_bias), temperature)
    tile = _tile(x, weight, teacher_x, teacher_weight)
    tiles_x, parts, steps = shares_of(M, V, tile)
    partials = x.new_empty((parts, 5, M), dtype=torch.float32)
    kl_stats_kernel[(tiles_x * parts,)](
        x,
        weight,
        biases[0],
        teacher_x,
        teacher_weight,
        biases[1],
        scale,
        partials,
        M,
        V,
        x.shape[1],
        teacher_x.shape[1],
        _strides(x, weight, teacher_x, teacher_weight),
        steps,
        **tile,
    )
    most, exps, teacher_most, teacher_exps, cross = partials.unbind(1)  # [parts, M] each
    largest, teacher_largest = most.amax(0), teacher_most.amax(0)
    shrink = (teacher_most - teacher_largest).exp()
    exps = (exps * (most - largest).exp()).sum(0)
    teacher_exps, cross = (teacher_exps * shrink).sum(0), (cross * shrink).sum(0)
    lse = torch.stack((largest + exps.log(), teacher_largest + teacher_exps.log()))
    # The difference of the two log-sum-exps, without the roundings of either.
    apart = largest - teacher_largest + (exps / teacher_exps).log()
    return apart + cross / teacher_exps, lse


def linear_kl_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    temperature: float | None,
    lse: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's x, weight and bias, [0] where not wanted."""
    dbias = x.new_zeros(weight.shape[0] if want_dbias else 0, dtype=torch.float32)
    if x.shape[0] == 0:
        dx = x.new_empty(x.shape if want_dx else 0)
        return dx, weight.new_zeros(weight.shape if want_dweight else 0), dbias
    x, weight, teacher_x, teacher_weight = map(rows_of, (x, weight, teacher_x, teacher_weight))
    scale, biases = _tempered(x, (bias, teacher_bias), temperature)
    factors = dloss.contiguous() / (temperature or 1.0)
    slices = Slices(x, weight, want_dx, want_dweight)
    tile = _tile(x, weight, teacher_x, teacher_weight)
    for columns, grad in slices:
        parts = [None if b is None else b[columns] for b in biases]
        kl_grad_kernel[(tiles_of(grad, tile),)](
            x,
            weight[columns],
            parts[0],
            teacher_x,
            teacher_weight[columns],
            parts[1],
            scale,
            lse,
            factors,
            grad,
            *grad.shape,
            x.shape[1],
            teacher_x.shape[1],
            _strides(x, weight, teacher_x, teacher_weight),
            **tile,
        )
        if want_dbias:
            torch.sum(grad, 0, dtype=torch.float32, out=dbias[columns])
    return slices.dx, slices.dy, dbias


def _tempered(
    x: Tensor, biases: tuple[Tensor | None, ...], temperature: float | None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What products are multiplied by, and the biases, in float32, by that."""
    if temperature is None:
        return None, [None if b is None else b.contiguous() for b in biases]
    scale = x.new_full((), 1 / temperature, dtype=torch.float32)
    return scale, [None if b is None else b.float() * scale for b in biases]


def _tile(*rows: Tensor) -> dict[str, int]:
    """Options of the kernels, which hold a tile of each head."""
    x, _, teacher_x, _ = rows
    tile = tile_of_rows(rows, x.shape[1], products=2)
    return tile | {"TEACHER_WHOLE": teacher_x.shape[1] % tile["BLOCK_C"] == 0}


def _strides(*rows: Tensor) -> tuple[int, ...]:
    return tuple(t.stride(0) for t in rows)
