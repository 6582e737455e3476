"""flash-attn's attention functions. Shapes: B sequences of S rows or N packed rows, H heads of D.

q is [B, S, H, D] or, in the varlen functions, [N, H, D]; k and v have Hk heads, H a multiple of Hk.
Options are the same everywhere, and `flash_attn_func` says what they mean.

Errors that concern tensors come from `encfast.ops.varlen_attn`, which names them the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from encfast import ops

from ._arguments import max_length, refuse, require, require_stack, score_rule
from ._kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _dense(op, q, k, v, rule, return_attn_probs):
    """A batch of equal lengths is packed as it lies."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(op, name, x, 4, "[B, S, heads, D]")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{op}: {name} has {x.shape[0]} sequences, q has {q.shape[0]}")
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if v.shape[1] != seqlen_k:
        raise ValueError(f"{op}: v has {v.shape[1]} rows per sequence, k has {seqlen_k}")
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = ops.varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        counts * seqlen_q,
        cu_seqlens_k=counts * seqlen_k,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        return_lse=True,
        **rule,
    )
    out = out.unflatten(0, (batch, seqlen_q))
    if not return_attn_probs:
        return out
    return out, lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1).contiguous(), None


def _varlen(op, q, k, v, cu_q, cu_k, max_q, max_k, rule, return_attn_probs):
    out, lse = ops.varlen_attn(
        q,
        k,
        v,
        cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_length(op, "max_seqlen_q", max_q),
        max_seqlen_k=max_length(op, "max_seqlen_k", max_k),
        return_lse=True,
        **rule,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of q to k and v, batches of equal lengths.

    Args:
        q: [B, Sq, H, D].
        k, v: [B, Sk, Hk, D].
        dropout_p: of the attention probabilities, 0 in evaluation.
        softmax_scale: multiplies q k; 1 / sqrt(D) by default.
        causal: the last query and the last key of a sequence are aligned.
        window_size: (left, right), inclusive, -1 for no bound, around the aligned position.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        alibi_slopes: float32 [H] or [B, H]; slope * distance to the aligned position is subtracted.
        deterministic: accepted; results always are.
        return_attn_probs: return (out, log-sum-exp, None) instead of out.

    Returns:
        [B, Sq, H, D]. The log-sum-exp is float32 [B, H, Sq].

    Raises:
        TypeError, ValueError: as `encfast.ops.varlen_attn`, which names the arguments the same way.

    Examples:
        >>> from encfast.compat.flash_attn import flash_attn_func
        >>> q, k, v = torch.randn(3, 2, 5, 4, 16)  # 2 sequences of 5, 4 heads of 16
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 5, 4, 16])
    """
    op = "flash_attn_func"
    rule = score_rule(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _dense(op, q, k, v, rule, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Self-attention within qkv [B, S, 3, H, D], read in place: [B, S, H, D].

    Options as in `flash_attn_func`.
    """
    op = "flash_attn_qkvpacked_func"
    require_stack(op, "qkv", qkv, 5, 2, 3, "[B, S, 3, H, D]")
    rule = score_rule(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = qkv.unbind(2)
    return _dense(op, q, k, v, rule, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of q [B, Sq, H, D] to kv [B, Sk, 2, Hk, D], read in place: [B, Sq, H, D].

    Options as in `flash_attn_func`.
    """
    op = "flash_attn_kvpacked_func"
    require_stack(op, "kv", kv, 5, 2, 2, "[B, S, 2, Hk, D]")
    rule = score_rule(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = kv.unbind(2)
    return _dense(op, q, k, v, rule, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of q to k and v within packed sequences.

    Options as in `flash_attn_func`.

    Args:
        q: [Nq, H, D].
        k, v: [Nk, Hk, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], running sums of the lengths from 0 to the number
            of rows.
        max_seqlen_q, max_seqlen_k: bounds of the lengths.
        block_table: of paged caches, refused.

    Returns:
        [Nq, H, D]. The log-sum-exp of `return_attn_probs` is float32 [H, Nq].

    Raises:
        TypeError, ValueError: as `encfast.ops.varlen_attn`.
        NotImplementedError: for a block table.

    Examples:
        >>> from encfast.compat.flash_attn import flash_attn_varlen_func
        >>> q, k, v = torch.randn(3, 5, 4, 16)
        >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 3, 3).shape
        torch.Size([5, 4, 16])
    """
    op = "flash_attn_varlen_func"
    refuse(op, "block_table", block_table, "gather the pages into k and v and pass None")
    rule = score_rule(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _varlen(op, q, k, v, *lengths, rule, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Self-attention within packed sequences of qkv [N, 3, H, D], read in place: [N, H, D].

    cu_seqlens and max_seqlen as in `flash_attn_varlen_func`, options as in `flash_attn_func`.
    """
    op = "flash_attn_varlen_qkvpacked_func"
    require_stack(op, "qkv", qkv, 4, 1, 3, "[N, 3, H, D]")
    rule = score_rule(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths = (cu_seqlens, None, max_seqlen, None)
    q, k, v = qkv.unbind(1)
    return _varlen(op, q, k, v, *lengths, rule, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of q [Nq, H, D] and kv [Nk, 2, Hk, D], read in place.

    Options as in `flash_attn_func`.
    """
    op = "flash_attn_varlen_kvpacked_func"
    require_stack(op, "kv", kv, 4, 1, 2, "[N, 2, Hk, D]")
    rule = score_rule(op, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k, v = kv.unbind(1)
    return _varlen(op, q, k, v, *lengths, rule, return_attn_probs)
