"""Attention over grids ``[B, S, H, D]``, which is how other libraries hand it over.

Hidden keys are left out rather than masked, so what stands in them reaches nothing. Two routes:

    packed   keys, where a window or a causal rule counts positions also queries, are gathered row
             by row: for 2-D masks of the keys
    grid     every pair has an entry in a bias: for 4-D masks and for biases that arrive dense

No value of a tensor is read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import ops

UNBOUNDED = (-1, -1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = UNBOUNDED,
    **rule: Any,
) -> Tensor:
    """``[B, Sq, H, D]``; a query that sees no key gets zeros.

    Args:
        q: ``[B, Sq, H, D]``, any strides; float32, bfloat16 or float16.
        k: ``[B, Sk, Hk, D]``, H a multiple of Hk.
        v: ``[B, Sk, Hk, D]``.
        mask: None, bool ``[B, Sk]`` of the keys to see, or ``[B, H, Sq, Sk]`` of which all but Sk
            may be 1: bool, or floating to be added. A 4-D mask says all: neither ``causal`` nor
            ``window`` apply besides.
        bias: of the shapes of a 4-D mask, added to the scores (bool: of the pairs to see).
        causal: a query sees no later key; queries and keys are aligned at their ends.
        window: keys to the left and right, inclusive.
        rule: ``scale``, ``softcap`` and ``dropout_p`` of :func:`encfast.ops.varlen_attn`.

    Raises:
        ValueError: for a mask of another shape, and one that hides keys of other positions than
            the queries have, where positions count.
    """
    check_mask(mask, q, k)
    order: dict[str, Any] = {"causal": causal, "window": window}
    if mask is not None and mask.dim() == 4:
        if mask.dtype == torch.bool:
            k, v = without(mask.any(2).any(1), k, v)
        return attend_rows(q, k, v, **on_grid(q, k, added(mask, bias)), **rule)
    if bias is not None:
        if mask is not None:
            bias = added(mask[:, None, None], bias)
            k, v = without(mask, k, v)
        return attend_rows(q, k, v, **on_grid(q, k, bias), **order, **rule)
    if mask is not None:
        return _attend_masked(q, k, v, mask, order, rule)
    return attend_rows(q, k, v, **on_grid(q, k), **order, **rule)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """``[B, Sq, H, D]``; the rows are those of the grids, one after another."""
    out: Any = ops.varlen_attn(*(x.flatten(0, 1) for x in (q, k, v)), **arguments)
    return out.unflatten(0, q.shape[:2])


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless the mask is one that :func:`attend` takes."""
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


def check_positions(mask: Tensor, queries: int) -> None:
    """Raises ValueError unless queries stand where the keys do, which a rule about them needs."""
    if queries != mask.shape[1]:
        raise ValueError(
            f"attention_mask hides keys of {mask.shape[1]} while there are {queries} queries, and "
            "the attention is causal or has a window; pass a 4-D mask"
        )


def on_grid(q: Tensor, k: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    """Arguments of ``varlen_attn`` under which every row is part of a sequence."""
    lengths = {
        "cu_seqlens_q": starts(q),
        "cu_seqlens_k": starts(k),
        "max_seqlen_q": q.shape[1],
        "max_seqlen_k": k.shape[1],
    }
    return lengths if bias is None else lengths | {"bias": _matrices(q, k, bias)}


def starts(x: Tensor) -> Tensor:
    """int32 ``[B + 1]`` of a grid ``[B, S, ...]``."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def added(mask: Tensor, bias: Tensor | None) -> Tensor:
    """A 4-D mask and a bias as one."""
    if bias is None:
        return mask
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def without(seen: Tensor, *rows: Tensor) -> list[Tensor]:
    """``[B, Sk, H, D]`` with zeros where bool ``[B or 1, Sk]`` says that nobody sees a key."""
    return [x.masked_fill(~seen[:, :, None, None], 0) for x in rows]


def _matrices(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """``[T]`` or ``[H, T]`` from a bias that is broadcast to ``[B, H, Sq, Sk]``."""
    size = (q.shape[0], bias.shape[1], q.shape[1], k.shape[1])
    by_head = bias.expand(size).transpose(0, 1).flatten(1)
    return by_head[0] if bias.shape[1] == 1 else by_head


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
    if not order["causal"] and order["window"] == UNBOUNDED:
        rule["cu_seqlens_q"] = _running(none + q.shape[1], none)
        rule["cu_seqlens_k"] = _running(seen, hidden)
        out = ops.varlen_attn(q.flatten(0, 1), k, v, **rule)
        return out.unflatten(0, (batch, q.shape[1]))
    check_positions(mask, q.shape[1])
    rule["cu_seqlens_q"] = _running(seen, hidden, none)
    rule["cu_seqlens_k"] = _running(seen, none, hidden)
    out = ops.varlen_attn(ops.gather_rows(q.flatten(0, 1), index), k, v, **order, **rule)
    grid = torch.ops.encfast.scatter_rows(out, index, batch * longest)
    return grid.unflatten(0, (batch, longest))


def _running(*lengths: Tensor) -> Tensor:
    return F.pad(torch.cat(lengths).cumsum(0), (1, 0)).int()
