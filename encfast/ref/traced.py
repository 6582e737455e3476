"""Ops whose references read lengths or loop over sequences, in forms that a graph can hold.

Made of ATen operators alone, with every size known from the shapes of the arguments, so that other
runtimes can run them (`encfast.exportable`). Sequences are laid out on a grid [B, S]: rows behind
the end of a sequence are read and hidden. Rows behind the last sequence, which a grid packed under
`torch.export` has, count as rows of that sequence at its last place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .varlen_attn import LOWEST_SCORE

_INF = float("inf")


def segment_ids(cu_seqlens: Tensor, n: int) -> Tensor:
    """int64 [N]: the sequence of each row; 0 <= id < B."""
    rows = torch.arange(n, device=cu_seqlens.device)
    ids = count_up_to(cu_seqlens[1:], rows, right=True)
    return ids.clamp(max=cu_seqlens.shape[0] - 2)


def count_up_to(ends: Tensor, x: Tensor, *, right: bool) -> Tensor:
    """int64, shape of x: `torch.searchsorted` of sorted `ends` [B], by counting, O(B) each."""
    below = ends <= x[..., None] if right else ends < x[..., None]
    return below.sum(-1)


def varlen_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
    alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p, rng,
):  # fmt: skip
    """Arguments and results of the dispatcher op; scores [B, H, S, S] of the padded grid."""
    if rng is not None:
        raise NotImplementedError(
            f"varlen_attn: dropout_p is {dropout_p}, expected none in a graph for export; call "
            "model.eval() first"
        )
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    size_q = q.shape[0] if max_seqlen_q is None else max_seqlen_q
    size_k = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    rows_q, _ = _grid(cu_seqlens_q, size_q, q.shape[0])
    rows_k, inside = _grid(cu_seqlens_k, size_k, k.shape[0])
    group = q.shape[1] // k.shape[1]
    keys = k.to(compute)[rows_k].repeat_interleave(group, dim=2)  # [B, Sk, H, D]
    values = v.to(compute)[rows_k].repeat_interleave(group, dim=2)
    values = values.masked_fill(~inside[..., None, None], 0)  # another sequence's, maybe not finite
    s = q.to(compute)[rows_q].transpose(1, 2) @ keys.permute(0, 2, 3, 1)  # [B, H, Sq, Sk]
    s = s * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    offset = _offsets(cu_seqlens_q, cu_seqlens_k, size_q, size_k)  # [B, Sq, Sk]
    hidden = ~inside[:, None] | _outside(offset, window[0], 0 if causal else window[1])
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(compute)[..., None, None] * offset.abs()[:, None]
    if rel_bias is not None:
        s = s + _rel_bias(rel_bias.to(compute), offset, rows_q)
    hidden = hidden[:, None]
    if bias is not None:
        lengths = cu_seqlens_k.diff().long()
        matrix = _bias(bias, bias_offsets, lengths, size_q, size_k)
        if bias.dtype == torch.bool:
            hidden = hidden | ~matrix
        else:
            s = s + matrix.to(compute)
    s = s.masked_fill(hidden | (s < LOWEST_SCORE), -_INF)
    top = s.amax(-1, keepdim=True)
    top = top.masked_fill(top == -_INF, 0)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    empty = total == 0  # no visible key
    total = total.masked_fill(empty, 1)
    out = (e / total) @ values.transpose(1, 2)  # [B, H, Sq, D]
    lse = (top + total.log()).masked_fill(empty, -_INF)[..., 0]  # [B, H, Sq]
    place = _places(cu_seqlens_q, size_q, q.shape[0])
    out = out.transpose(1, 2).flatten(0, 1)[place]
    return out.to(dtype), lse.transpose(1, 2).flatten(0, 1)[place].T


def _grid(cu_seqlens: Tensor, size: int, n: int) -> tuple[Tensor, Tensor]:
    """[B, S]: the row at each place, one of n everywhere; and whether it is the sequence's."""
    place = torch.arange(size, device=cu_seqlens.device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    rows = (starts[:, None] + place).clamp(max=n - 1)
    return rows, place < lengths[:, None]


def _places(cu_seqlens: Tensor, size: int, n: int) -> Tensor:
    """int64 [N]: where each row stands in the flattened grid [B * S]."""
    ids = segment_ids(cu_seqlens, n)
    position = torch.arange(n, device=cu_seqlens.device) - cu_seqlens[:-1].long()[ids]
    return ids * size + position.clamp(max=size - 1)


def _offsets(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, size_q: int, size_k: int) -> Tensor:
    """[B, Sq, Sk]: position of key j minus that of query i; the last of both are aligned."""
    device = cu_seqlens_q.device
    shift = (cu_seqlens_k.diff() - cu_seqlens_q.diff()).long()[:, None, None]
    i = torch.arange(size_q, device=device)[:, None]
    return torch.arange(size_k, device=device) - i - shift


def _outside(offset: Tensor, left: int, right: int) -> Tensor:
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (offset < -left)
    if right >= 0:
        hidden = hidden | (offset > right)
    return hidden


def _rel_bias(rel_bias: Tensor, offset: Tensor, rows_q: Tensor) -> Tensor:
    """[B, H, Sq, Sk] from [H, R] or [Nq, H, R]."""
    r = rel_bias.shape[-1] // 2
    entry = offset.clamp(-r, r) + r  # [B, Sq, Sk]
    if rel_bias.dim() == 2:
        return rel_bias[:, entry].transpose(0, 1)
    tables = rel_bias[rows_q].transpose(1, 2)  # [B, H, Sq, R]
    return tables.gather(3, entry[:, None].expand(-1, tables.shape[1], -1, -1))


def _bias(bias: Tensor, offsets: Tensor, lengths_k: Tensor, size_q: int, size_k: int) -> Tensor:
    """[B, 1 or H, Sq, Sk] from [T] or [H, T]; anything where there is no pair."""
    i = torch.arange(size_q, device=bias.device)[:, None]
    j = torch.arange(size_k, device=bias.device)
    pair = offsets[:-1, None, None] + i * lengths_k[:, None, None] + j
    matrix = torch.atleast_2d(bias)[:, pair.clamp(max=bias.shape[-1] - 1)]
    return matrix.transpose(0, 1)


def seg_pool(x, cu_seqlens, weights, how, normalize):
    """Results of the dispatcher op; its last two, for the gradient, are empty."""
    compute = torch.promote_types(x.dtype, torch.float32)
    pooled = _pooled(x.to(compute), cu_seqlens, weights, how)
    if normalize:
        pooled = F.normalize(pooled, dim=1, eps=1e-12)
    nothing = x.new_empty(0, dtype=torch.float32)
    return pooled.to(x.dtype), nothing.int(), nothing.clone()


def _pooled(x: Tensor, cu_seqlens: Tensor, weights: Tensor | None, how: str) -> Tensor:
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()  # [B, 1]
    if how in ("first", "last"):
        row = begin if how == "first" else end - 1
        return x[row[:, 0].clamp(0, x.shape[0] - 1)].masked_fill(begin >= end, 0)
    rows = torch.arange(x.shape[0], device=x.device)
    member = (rows >= begin) & (rows < end)  # [B, N]
    if how == "max":
        most = x.masked_fill(~member[..., None], -_INF).amax(1)
        return most.masked_fill(begin >= end, 0)
    w = x.new_ones(1) if weights is None else weights.to(x.dtype)
    if how == "attention":
        w = w.expand(member.shape).masked_fill(~member, -_INF)
        top = w.amax(1, keepdim=True)
        w = torch.exp(w - top.masked_fill(top == -_INF, 0))
    w = member * w
    if how != "sum":
        total = w.sum(1, keepdim=True)
        w = w / total.masked_fill(total == 0, 1)
    return w @ x


def scatter_rows(x: Tensor, index: Tensor, n: int) -> Tensor:
    """out[index[i]] += x[i] from zeros; row n takes those with index -1 and is cut off."""
    compute = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    place = torch.where(index < 0, n, index)
    out = torch.zeros((n + 1, *x.shape[1:]), dtype=compute, device=x.device)
    return out.index_add(0, place, x.to(compute))[:n].to(x.dtype)


def find_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the entries of mask [B, S] that are not 0, then -1: [B * S]; and cu_seqlens."""
    keep = (mask != 0).flatten()
    n = keep.shape[0]
    place = torch.where(keep, keep.long().cumsum(0) - 1, n)
    indices = torch.full((n + 1,), -1, dtype=torch.int64, device=mask.device)
    indices = indices.scatter(0, place, torch.arange(n, device=mask.device))[:n]
    ends = (mask != 0).sum(1).cumsum(0)
    return indices, F.pad(ends, (1, 0)).int()
