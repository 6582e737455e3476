"""What the kernels over rows share: rows read in place, and sums over all rows.

A sum over rows, such as the gradient of a bias, is taken by programs over their own rows. Each
stores what it found as its line of partials [groups, C]; `sum_partials` adds the lines, always in
the same order. No atomics: the bits are the same from run to run.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Lines and columns of a tile of the sum: columns of 128 bytes, and a program per 32 of them, so
# that there are as many programs as multiprocessors from a few thousand columns on.
_LINES, _COLUMNS = 32, 32


@triton.jit
def sum_partials_kernel(
    partials,  # [sums, groups, C] float32
    outs,  # a tuple of [C], one per sum
    groups,
    C,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stripes = tl.cdiv(C, BLOCK_C)
    i_sum, i_c = (tl.program_id(0) // stripes).to(tl.int64), tl.program_id(0) % stripes
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_sum = partials + i_sum * groups * C + o_c[None, :]
    b_sum = tl.zeros((BLOCK_G, BLOCK_C), tl.float32)
    for start in range(0, groups, BLOCK_G):
        o_g = (start + tl.arange(0, BLOCK_G)).to(tl.int64)
        m_tile = (o_g < groups)[:, None] & m_c[None, :]
        b_sum += tl.load(p_sum + (o_g * C)[:, None], mask=m_tile, other=0.0)
    b_out = tl.sum(b_sum, 0)
    for i in tl.static_range(len(outs)):
        if i_sum == i:
            tl.store(outs[i] + o_c, b_out, mask=m_c)


def lines_of(partials: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """For each sum that may be wanted its part [groups, C] of `partials`, None where it is not."""
    lines = iter(partials)
    return tuple(next(lines) if want else None for want in wanted)


def sum_partials(partials: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """The sums [C] over the groups of `partials` [sums, groups, C], and [0] for each not wanted."""
    sums, groups, C = partials.shape
    outs = tuple(partials.new_empty(C if want else 0) for want in wanted)
    if sums:
        sum_partials_kernel[(sums * triton.cdiv(C, _COLUMNS),)](
            partials,
            tuple(out for out, want in zip(outs, wanted, strict=True) if want),
            groups,
            C,
            BLOCK_G=_LINES,
            BLOCK_C=_COLUMNS,
            num_warps=4,
        )
    return outs


def rows_of(x: Tensor) -> Tensor:
    """x as [N, C] with contiguous channels: a view where the rows lie evenly spaced."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
