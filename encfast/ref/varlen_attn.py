"""What varlen_attn means, in plain PyTorch: one dense softmax attention per sequence.

Differentiable and fp64-able. `varlen_attn_bwd` is its gradient written out (Dao, FlashAttention-2,
arXiv:2307.08691, section 3.1.2): the fallback backend needs it, because autograd does not record
inside an operator.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import dropout_keep


def varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    bias: Tensor | None = None,
    bias_offsets: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float | None = None,
    rng: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out [Nq, H, D] in the promoted dtype of q, k, v and lse [H, Nq] in the compute dtype.

    Args are those of `encfast.ops.varlen_attn`, and `rng`, int64 [2], which keys the dropout.
    `compute_dtype` is the dtype of every intermediate; by default float32, or float64 when an input
    is float64.
    """
    out_dtype = _promoted(q, k, v)
    compute = compute_dtype or torch.promote_types(out_dtype, torch.float32)
    dropout = _dropout(dropout_p, rng)
    terms = _Terms(scale, causal, window, alibi_slopes, rel_bias, bias, softcap, dropout)
    outs = [q[:0].to(compute)]  # B may be 0
    lses = [q.new_empty(q.shape[1], 0, dtype=compute)]
    for seq in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, bias_offsets, compute):
        s, _ = _scores(seq, terms)
        top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:2], 1)
        top = top.masked_fill(top == float("-inf"), 0)
        e = torch.exp(s - top)
        total = e.sum(-1, keepdim=True)
        empty = total == 0  # no visible key
        total = total.masked_fill(empty, 1)
        p = _dropped(e / total, seq, terms)
        outs.append(torch.einsum("hij,jhd->ihd", p, seq.v))
        lses.append((top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1))
    return torch.cat(outs).to(out_dtype), torch.cat(lses, dim=1)


def varlen_attn_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    rel_bias: Tensor | None = None,
    bias: Tensor | None = None,
    bias_offsets: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float | None = None,
    rng: Tensor | None = None,
    rel_bias_grad: bool = False,
    bias_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Returns dq, dk, dv, drel_bias and dbias, each in the dtype of its own input.

    The last two are empty, shape (0,), unless asked for.
    """
    compute = torch.promote_types(_promoted(q, k, v), torch.float32)
    dropout = _dropout(dropout_p, rng)
    terms = _Terms(scale, causal, window, alibi_slopes, rel_bias, bias, softcap, dropout)
    # Dropout changes nothing here: rowsum(dP * P) over what was kept is rowsum(dO * O) as well.
    delta = (dout.to(compute) * out.to(compute)).sum(-1).T  # [H, Nq]
    if dlse is not None:
        delta = delta - dlse.to(compute)
    dq, dk, dv = (torch.zeros(x.shape, dtype=compute, device=x.device) for x in (q, k, v))
    drel = _zeros(rel_bias, compute) if rel_bias_grad else None
    dbias = _zeros(bias, compute) if bias_grad else None
    group = (-1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])  # [Lk, Hk, H / Hk, D]
    for seq in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, bias_offsets, compute):
        s, dcap = _scores(seq, terms)
        row_lse = lse[:, seq.rows].to(compute)
        p = torch.exp(s - row_lse.masked_fill(row_lse == float("-inf"), 0)[..., None])
        g = dout[seq.rows].to(compute)
        dp = _dropped(torch.einsum("ihd,jhd->hij", g, seq.v), seq, terms)
        ds = p * (dp - delta[:, seq.rows, None])
        if drel is not None:
            _add_rel_bias_grad(drel, ds, seq)
        if dbias is not None:
            _set_bias_grad(dbias, ds, seq)
        ds = ds * dcap * _scale(seq, scale)
        dq[seq.rows] = torch.einsum("hij,jhd->ihd", ds, seq.k)
        dk[seq.keys] = torch.einsum("hij,ihd->jhd", ds, seq.q).reshape(group).sum(2)
        kept = _dropped(p, seq, terms)
        dv[seq.keys] = torch.einsum("hij,ihd->jhd", kept, g).reshape(group).sum(2)
    dtypes = (x if x is None else x.dtype for x in (q, k, v, rel_bias, bias))
    grads = zip((dq, dk, dv, drel, dbias), dtypes, strict=True)
    return tuple(q.new_empty(0) if g is None else g.to(dtype) for g, dtype in grads)


class _Terms(NamedTuple):
    """What, besides q and k, decides about the scores and probabilities."""

    scale: float | None
    causal: bool
    window: tuple[int, int]
    alibi_slopes: Tensor | None
    rel_bias: Tensor | None
    bias: Tensor | None
    softcap: float | None
    dropout: tuple[float, Tensor] | None  # probability and key


class _Sequence(NamedTuple):
    """One sequence in the compute dtype, key heads repeated, and where it stands in the batch."""

    b: int
    rows: slice  # of q
    keys: slice  # of k and v
    pairs: slice  # of bias
    q: Tensor  # [Lq, H, D]
    k: Tensor  # [Lk, H, D]
    v: Tensor  # [Lk, H, D]

    def offset(self) -> Tensor:
        """[Lq, Lk]: position of key j minus that of query i; the last of both are aligned."""
        lq, lk = self.q.shape[0], self.k.shape[0]
        pos_q = torch.arange(lq, device=self.q.device)[:, None] + lk - lq
        return torch.arange(lk, device=self.q.device) - pos_q


def _promoted(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device)


def _dropout(p: float | None, rng: Tensor | None) -> tuple[float, Tensor] | None:
    if not p:
        return None
    if rng is None:
        raise ValueError(f"varlen_attn: rng is None, expected int64 [2] with dropout_p {p}")
    return p, rng


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    bias_offsets: Tensor | None,
    compute: torch.dtype,
) -> Iterator[_Sequence]:
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    starts = None if bias_offsets is None else bias_offsets.tolist()
    group = q.shape[1] // k.shape[1]
    pairs = 0
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        start = pairs if starts is None else starts[b]
        count = (rows.stop - rows.start) * (keys.stop - keys.start)
        pairs += count
        yield _Sequence(
            b,
            rows,
            keys,
            slice(start, start + count),
            q[rows].to(compute),
            k[keys].to(compute).repeat_interleave(group, dim=1),
            v[keys].to(compute).repeat_interleave(group, dim=1),
        )


def _scale(seq: _Sequence, scale: float | None) -> float:
    return seq.q.shape[-1] ** -0.5 if scale is None else scale


LOWEST_SCORE = -1e38


def _scores(seq: _Sequence, terms: _Terms) -> tuple[Tensor, Tensor | float]:
    """Scores [H, Lq, Lk], -inf where a key is hidden, and the softcap's derivative."""
    s = torch.einsum("ihd,jhd->hij", seq.q, seq.k) * _scale(seq, terms.scale)
    dcap: Tensor | float = 1.0
    if terms.softcap is not None:
        t = torch.tanh(s / terms.softcap)
        s, dcap = terms.softcap * t, 1 - t * t
    offset = seq.offset()
    if terms.alibi_slopes is not None:
        slopes = terms.alibi_slopes[seq.b] if terms.alibi_slopes.dim() == 2 else terms.alibi_slopes
        s = s - slopes.to(s.dtype)[:, None, None] * offset.abs().to(s.dtype)
    if terms.rel_bias is not None:
        s = s + _rel_bias(terms.rel_bias, seq).to(s.dtype)
    hidden = _outside(offset, terms.window[0], 0 if terms.causal else terms.window[1])
    if terms.bias is not None:
        matrix = terms.bias[..., seq.pairs].reshape(*terms.bias.shape[:-1], *offset.shape)
        if matrix.dtype == torch.bool:
            hidden = hidden | ~matrix
        else:
            s = s + matrix.to(s.dtype)
    # The lowest finite number of float32 or bfloat16 as a bias means hidden, also to a whole row.
    return s.masked_fill(hidden | (s < LOWEST_SCORE), float("-inf")), dcap


def _outside(offset: Tensor, left: int, right: int) -> Tensor:
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    return hidden


def _rel_bias(rel_bias: Tensor, seq: _Sequence) -> Tensor:
    """[H, Lq, Lk] from [H, R] or [Nq, H, R]."""
    entry = _rel_entry(rel_bias, seq)
    if rel_bias.dim() == 2:
        return rel_bias[:, entry]
    rows = rel_bias[seq.rows]
    return rows.gather(2, entry[:, None].expand(-1, rows.shape[1], -1)).transpose(0, 1)


def _rel_entry(rel_bias: Tensor, seq: _Sequence) -> Tensor:
    r = rel_bias.shape[-1] // 2
    return seq.offset().clamp(-r, r) + r


def _add_rel_bias_grad(drel: Tensor, ds: Tensor, seq: _Sequence) -> None:
    entry = _rel_entry(drel, seq)
    if drel.dim() == 2:
        drel.index_add_(1, entry.flatten(), ds.flatten(1))
    else:
        rows = drel[seq.rows]
        rows.scatter_add_(2, entry[:, None].expand(-1, rows.shape[1], -1), ds.transpose(0, 1))


def _set_bias_grad(dbias: Tensor, ds: Tensor, seq: _Sequence) -> None:
    dbias[..., seq.pairs] = (ds if dbias.dim() == 2 else ds.sum(0)).flatten(-2)


def _dropped(p: Tensor, seq: _Sequence, terms: _Terms) -> Tensor:
    """p [H, Lq, Lk] with dropout, if there is any: the same entries zeroed at every call."""
    if terms.dropout is None:
        return p
    keep, multiplier = dropout_keep(*terms.dropout, seq.b, p.shape)
    return (p * multiplier).masked_fill(~keep, 0)
