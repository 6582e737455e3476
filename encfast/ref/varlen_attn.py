"""What varlen_attn means, in plain PyTorch: one dense softmax attention per sequence.

Differentiable and fp64-able. `varlen_attn_bwd` is its gradient written out (Dao, FlashAttention-2,
arXiv:2307.08691, section 3.1.2): the fallback backend needs it, because autograd does not record
inside an operator.
"""

import torch
from torch import Tensor


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
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out [Nq, H, D] in the promoted dtype of q, k, v and lse [H, Nq] in the compute dtype.

    Args are those of `encfast.ops.varlen_attn`. `compute_dtype` is the dtype of every intermediate;
    by default float32, or float64 when an input is float64.
    """
    out_dtype = _promoted(q, k, v)
    compute = compute_dtype or torch.promote_types(out_dtype, torch.float32)
    outs = [q[:0].to(compute)]  # B may be 0
    lses = [q.new_empty(q.shape[1], 0, dtype=compute)]
    for seq in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, compute):
        s, _ = _scores(seq, q.shape[-1], scale, causal, window, softcap)
        top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:2], 1)
        top = top.masked_fill(top == float("-inf"), 0)
        e = torch.exp(s - top)
        total = e.sum(-1, keepdim=True)
        empty = total == 0  # no visible key
        total = total.masked_fill(empty, 1)
        outs.append(torch.einsum("hij,jhd->ihd", e / total, seq["v"]))
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
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, each in the dtype of its own input."""
    compute = torch.promote_types(_promoted(q, k, v), torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    delta = (dout.to(compute) * out.to(compute)).sum(-1).T  # [H, Nq]
    if dlse is not None:
        delta = delta - dlse.to(compute)
    dq, dk, dv = (torch.zeros(x.shape, dtype=compute, device=x.device) for x in (q, k, v))
    group = (-1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])  # [Lk, Hk, H / Hk, D]
    for seq in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, compute):
        rows, keys = seq["rows"], seq["keys"]
        s, dcap = _scores(seq, q.shape[-1], scale, causal, window, softcap)
        row_lse = lse[:, rows].to(compute)
        p = torch.exp(s - row_lse.masked_fill(row_lse == float("-inf"), 0)[..., None])
        g = dout[rows].to(compute)
        ds = p * (torch.einsum("ihd,jhd->hij", g, seq["v"]) - delta[:, rows, None]) * dcap * scale
        dq[rows] = torch.einsum("hij,jhd->ihd", ds, seq["k"])
        dk[keys] = torch.einsum("hij,ihd->jhd", ds, seq["q"]).reshape(group).sum(2)
        dv[keys] = torch.einsum("hij,ihd->jhd", p, g).reshape(group).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _promoted(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, compute):
    """Yields each sequence's q [Lq, H, D], k and v [Lk, H, D], slopes [H], and its row ranges."""
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    group = q.shape[1] // k.shape[1]
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        slopes = alibi_slopes
        if slopes is not None:
            slopes = (slopes[b] if slopes.dim() == 2 else slopes).to(compute)
        yield {
            "rows": rows,
            "keys": keys,
            "q": q[rows].to(compute),
            "k": k[keys].to(compute).repeat_interleave(group, dim=1),
            "v": v[keys].to(compute).repeat_interleave(group, dim=1),
            "slopes": slopes,
        }


def _scores(seq, head_size, scale, causal, window, softcap):
    """Scores [H, Lq, Lk], -inf where a key is hidden, and the softcap's derivative."""
    q, k, slopes = seq["q"], seq["k"], seq["slopes"]
    s = torch.einsum("ihd,jhd->hij", q, k) * (head_size**-0.5 if scale is None else scale)
    dcap: Tensor | float = 1.0
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, dcap = softcap * t, 1 - t * t
    lq, lk = q.shape[0], k.shape[0]
    pos_q = torch.arange(lq, device=q.device)[:, None] + lk - lq  # the last rows are aligned
    offset = torch.arange(lk, device=q.device) - pos_q
    if slopes is not None:
        s = s - slopes[:, None, None] * offset.abs().to(s.dtype)
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(offset, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    return s.masked_fill(hidden, float("-inf")), dcap
