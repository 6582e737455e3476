"""linear_seg_max on the CPU: PyTorch's products and sums of chosen rows, seg_pool's kernel between.

              V                                  V
      +------+------+                    +------+------+
   N  | slot | slot |  -- seg_pool -->  B | out, rows   |    one slot for all slices
      +------+------+                    +------+------+

The backward multiplies only what was chosen: V logits of a segment, not V of each row. Row v of
dweight is a sum of B rows of x, row i of dx one of those rows of the weight whose largest logit is
i's; both are `torch.embedding_bag`, whose sums belong to one task each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._vocab_slices import VocabSlices, product_dtype

# Entries of the vocabulary whose chosen rows are sorted at a time.
_COLUMNS = 2048


def forward(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(largest logits [B, V], their rows [B, V])."""
    shape = cu_seqlens.shape[0] - 1, weight.shape[0]
    if x.shape[0] == 0:
        out = x.new_zeros(shape, dtype=torch.float32)
        return out, torch.full_like(out, -1, dtype=torch.int32)
    out = x.new_empty(shape, dtype=torch.float32)
    rows = torch.empty_like(out, dtype=torch.int32)
    kept = x.new_empty(0, dtype=torch.float32)
    for columns, logits in VocabSlices(x, weight, kept, product_dtype(x)).forward():
        largest, chosen, _ = torch.ops.encfast.seg_pool(logits, cu_seqlens, None, "max", False)
        out[:, columns], rows[:, columns] = largest, chosen
    if bias is not None:
        # Behind the maximum: it is the same for all rows.
        out += bias.float()
        out.masked_fill_((cu_seqlens.diff() == 0)[:, None], 0)
    return out, rows


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, [0] where not wanted."""
    full = (rows[:, :1] >= 0).squeeze(1)  # segments that are not empty
    if not full.all():
        dout, rows = dout[full], rows[full]
    dweight = weight.new_empty(weight.shape if want_dweight else 0)
    dbias = dout.sum(0) if want_dbias else x.new_empty(0, dtype=torch.float32)
    if dout.shape[0] == 0:
        return x.new_zeros(x.shape if want_dx else 0), dweight.zero_(), dbias
    wide = x.float() if want_dweight else x
    dx = x.new_zeros(x.shape if want_dx else 0, dtype=torch.float32)
    for first in range(0, weight.shape[0], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        d, chosen = dout[:, columns], rows[:, columns].long()
        if want_dweight:
            dweight[columns] = _bags(wide, chosen.T, d.T)
        if want_dx:
            dx += _by_row(weight[columns].float(), chosen, d, x.shape[0])
    return dx.to(x.dtype), dweight, dbias


def _bags(table: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """Row i is the sum over j of factors_ij table[ids_ij]."""
    starts = torch.arange(0, ids.numel(), ids.shape[1])
    return _embedding_bag(table, ids.flatten(), starts, factors.flatten())


def _by_row(weight: Tensor, rows: Tensor, d: Tensor, n: int) -> Tensor:
    """[n, C], row i the sum of d_bv weight_v over all (b, v) with rows_bv = i, in order of v."""
    order = rows.flatten().argsort(stable=True)
    ends = torch.bincount(rows.flatten(), minlength=n).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    return _embedding_bag(weight, order % weight.shape[0], starts, d.flatten()[order])


def _embedding_bag(table: Tensor, ids: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
    scale, mode, sparse = False, 0, False  # 0: sums
    return torch.embedding_bag(table, ids, starts, scale, mode, sparse, factors)[0]
