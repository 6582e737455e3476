"""Attention that also hands out its weights: plain maths, a matrix of all pairs for each head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast.integrations._grids import UNBOUNDED, check_mask, check_positions, without

_HIDDEN = -1e38  # a score below hides its pair, as in varlen_attn


def attend_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: dict[str, Any] | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = UNBOUNDED,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`encfast.integrations._grids.attend` computes, and how it weighs the keys.

    Args:
        q, k, v, mask, bias, causal, window, scale, softcap, dropout_p: those of ``attend``.
        lengths: ``cu_seqlens_q`` and ``cu_seqlens_k`` of packed sequences in one row (B = 1).

    Returns:
        ``[B, Sq, H, D]`` and the weights ``[B, H, Sq, Sk]`` in q's dtype, after dropout as in the
        eager functions of transformers. A query that sees no key has weights of zero.
    """
    check_mask(mask, q, k)
    seen = _pairs(q, k, mask, lengths, causal, window)
    if mask is not None and mask.dtype == torch.bool:
        keys = mask if mask.dim() == 2 else mask.any(2).any(1)
        k, v = without(keys, k, v)
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).float()
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (bias, mask if mask is not None and mask.dim() == 4 else None):
        if added is not None:
            pairs = added.dtype == torch.bool
            scores = scores.masked_fill(~added, -torch.inf) if pairs else scores + added
    hidden = scores < _HIDDEN
    if seen is not None:
        hidden = hidden | ~seen
    # The least finite number: a row of -inf alone would make gradients NaN.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0).to(q.dtype)
    weights = F.dropout(weights, dropout_p or 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v), weights


def _pairs(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    lengths: dict[str, Any] | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor | None:
    """bool ``[B or 1, 1, Sq or 1, Sk]`` of the pairs that see each other; None: all.

    Positions count from the ends, where queries and keys are aligned; under a 2-D mask they count
    what can be seen.
    """
    if mask is not None and mask.dim() == 4:
        return None
    ordered = causal or window != UNBOUNDED
    i, j = (torch.arange(-x.shape[1], 0, device=x.device)[None] for x in (q, k))
    pairs = None
    if lengths is not None:
        cu_q, cu_k = lengths["cu_seqlens_q"], lengths["cu_seqlens_k"]
        owner_q, owner_k = _owners(cu_q, q), _owners(cu_k, k)
        pairs = owner_q[:, :, None] == owner_k[:, None]  # [1, Sq, Sk]
        i, j = i + q.shape[1] - cu_q[1:][owner_q], j + k.shape[1] - cu_k[1:][owner_k]
    elif mask is not None:
        pairs = mask[:, None]  # [B, 1, Sk]
        if ordered:
            check_positions(mask, q.shape[1])
            i = j = mask.cumsum(1)
            pairs = pairs & mask[:, :, None]
    if ordered:
        near = _near(j[:, None] - i[:, :, None], causal, window)
        pairs = near if pairs is None else pairs & near
    return None if pairs is None else pairs[:, None]


def _owners(cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """int64 ``[1, N]``: the sequence of each row of a packed batch."""
    if rows.shape[0] != 1 or int(cu_seqlens[-1]) != rows.shape[1]:
        raise ValueError(
            f"cu_seq_lens end at {int(cu_seqlens[-1])}, expected the rows of one packed row "
            f"[1, N, ...], got [{rows.shape[0]}, {rows.shape[1]}, ...]; attentions of packed "
            "sequences are a matrix over one row"
        )
    sequences = torch.arange(cu_seqlens.shape[0] - 1, device=rows.device)
    return sequences.repeat_interleave(cu_seqlens.diff())[None]


def _near(offset: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """Whether a key at this offset from its query lies within the rules."""
    left, right = window[0], 0 if causal else window[1]
    near = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        near = near & (offset >= -left)
    return near & (offset <= right) if right >= 0 else near
