"""The attention function that transformers calls under the name "encfast".

Hidden keys are left out rather than masked, so what stands in them reaches nothing. Two routes:

    packed   keys, where a window or a causal rule counts positions also queries, are gathered row
             by row: for 2-D padding masks and for inputs that are packed already
    grid     every pair has an entry in a bias: for 4-D masks and for biases that arrive dense

No value of a tensor is read on the host, except of positions, and in a graph none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import ops

# Arguments other attention functions honour and this one does not.
_REFUSED = {
    "output_attentions": "the weights are never built",
    "head_mask": "single heads cannot be switched off",
    "layer_head_mask": "single heads cannot be switched off",
    "cross_attn_head_mask": "single heads cannot be switched off",
    "s_aux": "there are no attention sinks",
}


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``AttentionInterface`` calls.

    Args:
        module: the attention module; ``is_causal`` is read from it unless given.
        query: ``[B, H, Sq, D]``, any strides; float32, bfloat16 or float16.
        key: ``[B, Hk, Sk, D]``, H a multiple of Hk.
        value: ``[B, Hk, Sk, D]``.
        attention_mask: None, bool ``[B, Sk]`` of the keys to see, or ``[B, H, Sq, Sk]`` of which
            all but Sk may be 1: bool, or floating to be added to the scores. A 4-D mask says all:
            neither the window nor the causal rule are applied besides.
        scaling: of the scores, 1 / sqrt(D) by default.
        dropout: probability for a weight to be zeroed.
        is_causal: a query sees no later key; queries and keys are aligned at their ends.
        sliding_window: w: a query sees the w - 1 keys at each side and its own.
        softcap: of the scores.
        position_bias: floating, of the shapes of a 4-D mask, added to the scores; differentiable.
        position_ids: ``[1, S]`` of sequences one after another, all starting with one number.
        cu_seq_lens_q: int32 running sum of the lengths of packed sequences.
        cu_seq_lens_k: the same for the keys.
        max_length_q: the longest of them.
        max_length_k: the same for the keys.
        kwargs: what other functions need; those that would change the result are refused.

    Returns:
        ``[B, Sq, H, D]`` and None. A query that sees no key gets zeros.

    Raises:
        ValueError: for a mask or an argument that cannot be honoured, naming it.
    """
    _refuse(module, kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False))
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    rule: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout or None}
    order: dict[str, Any] = {"causal": is_causal, "window": window}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, H, D]
    _check_mask(attention_mask, q, k)
    if cu_seq_lens_q is not None:
        _check_packed(attention_mask, position_bias)
        lengths = _packed_lengths(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _attend(q, k, v, **lengths, **order, **rule), None
    if attention_mask is not None and attention_mask.dim() == 4:
        bias = _added(attention_mask, position_bias)
        if attention_mask.dtype == torch.bool:
            k, v = _without(attention_mask.any(2).any(1), k, v)
        return _attend(q, k, v, **_on_grid(q, k, bias), **rule), None
    if position_bias is not None:
        if attention_mask is not None:
            position_bias = _added(attention_mask[:, None, None], position_bias)
            k, v = _without(attention_mask, k, v)
        return _attend(q, k, v, **_on_grid(q, k, position_bias), **order, **rule), None
    if attention_mask is not None:
        return _attend_masked(q, k, v, attention_mask, order, rule), None
    texts = _restarts(q, position_ids) if k.shape[1] == q.shape[1] else None
    return _attend(q, k, v, **(texts or _on_grid(q, k)), **order, **rule), None


# ---- what cannot be honoured ----


def _refuse(module: Any, kwargs: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"{name} reached {type(module).__name__}, whose attention is encfast's: {why}; "
                'load the model with attn_implementation="eager" for it'
            )


def _check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    if mask is None:
        return
    shape, keys, grid = tuple(mask.shape), k.shape[:2], (q.shape[0], q.shape[2], q.shape[1])
    if mask.dim() == 2:
        if mask.shape != keys:
            raise ValueError(f"attention_mask has shape {shape}, expected {tuple(keys)}, the keys")
        if mask.dtype != torch.bool:
            raise ValueError(f"attention_mask [B, Sk] is {mask.dtype}, expected torch.bool")
        return
    fits = mask.dim() == 4 and mask.shape[3] == k.shape[1]
    if not fits or any(n not in (1, full) for n, full in zip(shape, grid, strict=False)):
        raise ValueError(
            f"attention_mask has shape {shape}, expected [B, Sk], or [B, H, Sq, Sk] = "
            f"{(*grid, k.shape[1])} of which all but Sk may be 1"
        )


def _check_packed(mask: Tensor | None, bias: Tensor | None) -> None:
    for name, given in (("attention_mask", mask), ("position_bias", bias)):
        if given is not None:
            raise ValueError(
                f"{name} {tuple(given.shape)} came together with cu_seq_lens_q, which says where "
                "packed sequences start; pass one of them"
            )


# ---- lengths, in the order of the arguments of varlen_attn ----


def _packed_lengths(cu_q: Tensor, cu_k: Tensor | None, max_q: Any, max_k: Any) -> dict[str, Any]:
    cu_q = cu_q.to(torch.int32)
    cu_k = cu_q if cu_k is None else cu_k.to(torch.int32)
    longest = (
        int(cu.diff().max()) if n is None else int(n) for n, cu in ((max_q, cu_q), (max_k, cu_k))
    )
    max_q, max_k = longest
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
    }


def _on_grid(q: Tensor, k: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    """Every row is part of a sequence."""
    lengths = {
        "cu_seqlens_q": _starts(q),
        "cu_seqlens_k": _starts(k),
        "max_seqlen_q": q.shape[1],
        "max_seqlen_k": k.shape[1],
    }
    return lengths if bias is None else lengths | {"bias": _matrices(q, k, bias)}


def _starts(x: Tensor) -> Tensor:
    """int32 ``[B + 1]`` of a grid ``[B, S, ...]``."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def _matrices(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """``[T]`` or ``[H, T]`` from a bias that is broadcast to ``[B, H, Sq, Sk]``."""
    size = (q.shape[0], bias.shape[1], q.shape[1], k.shape[1])
    by_head = bias.expand(size).transpose(0, 1).flatten(1)
    return by_head[0] if bias.shape[1] == 1 else by_head


def _restarts(q: Tensor, position_ids: Tensor | None) -> dict[str, Any] | None:
    """The lengths of the sequences in one row, or None if it is one sequence.

    Positions that rise by one are within a sequence; the others must start as the first does. All
    else, constant positions included, says nothing of sequences.
    """
    if position_ids is None or q.shape[0] != 1 or position_ids.shape != q.shape[:2]:
        return None
    positions, rows = position_ids[0], q.shape[1]
    new = positions.diff() != 1
    known = (~new | (positions[1:] == positions[0])).all() & (positions != positions[0]).any()
    new = F.pad(new & known, (1, 0))
    if torch.compiler.is_compiling():  # their number is not known
        owner = new.cumsum(0)
        return _on_grid(q, q, (owner[:, None] == owner)[None, None])
    if not new.any():
        return None
    starts = F.pad(new.nonzero()[:, 0].int(), (1, 0))
    cu_seqlens = F.pad(starts, (0, 1), value=rows)
    return _packed_lengths(cu_seqlens, None, None, None)


# ---- attention ----


def _attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """``[B, Sq, H, D]``; the rows are those of the grids, one after another."""
    out: Any = ops.varlen_attn(*(x.flatten(0, 1) for x in (q, k, v)), **arguments)
    return out.unflatten(0, q.shape[:2])


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, order: dict[str, Any], rule: dict[str, Any]
) -> Tensor:
    """Without the keys that the mask hides.

    Their number stays on the device: they follow behind, where they belong to sequences without
    queries. Queries stay in place, as they may be of another sequence than the keys; only a rule
    about positions, which both then share, takes them along.
    """
    batch, longest = mask.shape
    index, cu_seqlens = ops.find_rows(mask)
    seen, none = cu_seqlens.diff(), torch.zeros_like(cu_seqlens[1:])
    hidden = longest - seen
    k, v = (ops.gather_rows(x.flatten(0, 1), index) for x in (k, v))
    rule = rule | {"max_seqlen_q": q.shape[1], "max_seqlen_k": longest}
    out: Any
    if not order["causal"] and order["window"] == (-1, -1):
        rule["cu_seqlens_q"] = _running(none + q.shape[1], none)
        rule["cu_seqlens_k"] = _running(seen, hidden)
        out = ops.varlen_attn(q.flatten(0, 1), k, v, **rule)
        return out.unflatten(0, (batch, q.shape[1]))
    if q.shape[1] != longest:
        raise ValueError(
            f"attention_mask hides keys of {longest} while there are {q.shape[1]} queries, and the "
            "attention is causal or has a window; pass a 4-D mask"
        )
    rule["cu_seqlens_q"] = _running(seen, hidden, none)
    rule["cu_seqlens_k"] = _running(seen, none, hidden)
    out = ops.varlen_attn(ops.gather_rows(q.flatten(0, 1), index), k, v, **order, **rule)
    grid = torch.ops.encfast.scatter_rows(out, index, batch * longest)
    return grid.unflatten(0, (batch, longest))


def _running(*lengths: Tensor) -> Tensor:
    return F.pad(torch.cat(lengths).cumsum(0), (1, 0)).int()


def _added(mask: Tensor, bias: Tensor | None) -> Tensor:
    """A 4-D mask and a bias as one."""
    if bias is None:
        return mask
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _without(seen: Tensor, *rows: Tensor) -> list[Tensor]:
    """``[B, Sk, H, D]`` with zeros where bool ``[B or 1, Sk]`` says that nobody sees a key."""
    return [x.masked_fill(~seen[:, :, None, None], 0) for x in rows]
