"""flash_attn_with_kvcache: attention of new queries to a cache that is updated in place.

The keys of a sequence are the first rows of its part of the cache. `varlen_attn` reads them where
they lie: each sequence is followed by another without queries, the unused rest of its part.

    cache      |keys of 0 ....|rest|keys of 1 ..|rest ..|
    queries     of 0           none  of 1        none
"""

from __future__ import annotations

import torch
from torch import Tensor

from encfast import ops
from encfast.ops._checks import (
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_range,
)

from ._arguments import refuse, require, score_rule
from .ops.triton.rotary import apply_rotary

_OP = "flash_attn_with_kvcache"


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k and v behind what the caches hold, then attends to all of it. Without gradients.

    Args:
        q: [B, Sq, H, D]; the last query is aligned with the last key.
        k_cache, v_cache: [Bc, Sc, Hk, D], changed in place where k and v are given.
        k, v: [B, Sn, Hk, D] in the dtype of the caches, or None.
        rotary_cos, rotary_sin: [S, R / 2]: k is rotated by the angles of its positions before it is
            written. So is q where it is causal or has a window; otherwise all of its rows stand at
            the position of the first new key. Needs k and v.
        cache_seqlens: rows in use before the call, int or int32 [B]; None: all of the cache.
        cache_batch_idx: int32 [B], which part of the cache belongs to a sequence; the parts are
            copied together then.
        cache_leftpad, block_table: refused.
        rotary_interleaved: pairs are neighbours (the default here) instead of halves.
        num_splits: accepted; the work is always divided by cost.
        softmax_scale, causal, window_size, softcap, alibi_slopes: see the module.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out [B, Sq, H, D]; with `return_softmax_lse` also float32 [B, H, Sq].

    Raises:
        TypeError, ValueError: a malformed argument, or a cache without room for the new rows.
        NotImplementedError: block_table or cache_leftpad is given.
    """
    refuse(_OP, "block_table", block_table, "gather the pages into k_cache and v_cache")
    refuse(_OP, "cache_leftpad", cache_leftpad, "move the keys to the start of the cache")
    rule = score_rule(_OP, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    _check_caches(q, k_cache, v_cache)
    _check_new_rows(q, k_cache, k, v, rotary_cos, rotary_sin, cache_seqlens)
    batch, capacity = q.shape[0], k_cache.shape[1]
    used = _lengths(cache_seqlens, batch, capacity, q.device)
    parts = _parts(cache_batch_idx, q, k_cache)
    if k is not None and v is not None:
        _check_room(used, k.shape[1], capacity)
        if rotary_cos is not None and rotary_sin is not None:
            tables = (rotary_cos, rotary_sin)
            k = apply_rotary(k, *tables, used, interleaved=rotary_interleaved)
            moving = rule["causal"] or rule["window"] != (-1, -1)
            q = _rotate_queries(q, *tables, used, rotary_interleaved, moving)
        rows = used[:, None] + torch.arange(k.shape[1], device=used.device)
        k_cache[parts[:, None], rows] = k
        v_cache[parts[:, None], rows] = v
        used = used + k.shape[1]
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache[parts], v_cache[parts]
    out, lse = _attend(q, k_cache[:batch], v_cache[:batch], used, rule)
    return (out, lse) if return_softmax_lse else out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, used: Tensor, rule) -> tuple:
    """out [B, Sq, H, D] and lse [B, H, Sq]."""
    (batch, seqlen_q), capacity = q.shape[:2], k_cache.shape[1]
    starts = torch.arange(batch + 1, device=q.device)
    ends_k = torch.stack((starts[:-1] * capacity, starts[:-1] * capacity + used), dim=1)
    ends_q = torch.stack((starts[:-1], starts[1:]), dim=1) * seqlen_q
    slopes = rule["alibi_slopes"]
    if slopes is not None and slopes.dim() == 2:
        rule = rule | {"alibi_slopes": slopes.repeat_interleave(2, dim=0)}
    out, lse = ops.varlen_attn(
        q.flatten(0, 1),
        k_cache.flatten(0, 1),
        v_cache.flatten(0, 1),
        torch.cat((ends_q.flatten(), starts[-1:] * seqlen_q)).int(),
        cu_seqlens_k=torch.cat((ends_k.flatten(), starts[-1:] * capacity)).int(),
        max_seqlen_q=seqlen_q,
        max_seqlen_k=capacity,
        return_lse=True,
        **rule,
    )
    lse = lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1).contiguous()
    return out.unflatten(0, (batch, seqlen_q)), lse


def _rotate_queries(q, cos, sin, used: Tensor, interleaved: bool, moving: bool) -> Tensor:
    if moving:
        return apply_rotary(q, cos, sin, used, interleaved=interleaved)
    heads = q.flatten(1, 2)[:, None]  # [B, 1, Sq * H, D]: every row at one position
    return apply_rotary(heads, cos, sin, used, interleaved=interleaved).view(q.shape)


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    require(_OP, "q", q, 4, "[B, Sq, H, D]")
    require(_OP, "k_cache", k_cache, 4, "[B, S, Hk, D]")
    require(_OP, "v_cache", v_cache, 4, "[B, S, Hk, D]")
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"{_OP}: v_cache has shape {tuple(v_cache.shape)}, expected that of k_cache, "
            f"{tuple(k_cache.shape)}"
        )


def _check_new_rows(q, k_cache, k, v, rotary_cos, rotary_sin, cache_seqlens) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: {'k' if k is None else 'v'} is None; pass both k and v or none")
    if (rotary_cos is None) != (rotary_sin is None):
        missing = "rotary_cos" if rotary_cos is None else "rotary_sin"
        raise ValueError(f"{_OP}: {missing} is None; pass both tables or none")
    if k is None:
        if rotary_cos is not None:
            raise ValueError(f"{_OP}: rotary_cos needs new keys; pass k and v, or rotate q before")
        return
    if cache_seqlens is None:
        raise ValueError(f"{_OP}: cache_seqlens is None; with k and v pass the rows in use")
    for name, x in (("k", k), ("v", v)):
        require(_OP, name, x, 4, "[B, Sn, Hk, D]")
        expected = (q.shape[0], k.shape[1], *k_cache.shape[2:])
        if x.shape != expected:
            raise ValueError(f"{_OP}: {name} has shape {tuple(x.shape)}, expected {expected}")
        if x.dtype != k_cache.dtype:
            raise TypeError(f"{_OP}: {name} is {x.dtype}, the caches are {k_cache.dtype}")


def _lengths(cache_seqlens, batch: int, capacity: int, device) -> Tensor:
    """int64 [B], checked where that costs nothing."""
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, device=device)
    require(_OP, "cache_seqlens", cache_seqlens, 1, f"an int or [{batch}]")
    if cache_seqlens.shape[0] != batch:
        raise ValueError(
            f"{_OP}: cache_seqlens has {cache_seqlens.shape[0]} entries, q has {batch} sequences"
        )
    if cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: cache_seqlens is {cache_seqlens.dtype}, expected int32")
    check_range(
        _OP,
        "cache_seqlens",
        cache_seqlens,
        0,
        capacity + 1,
        lambda: f"the caches have {capacity} rows",
    )
    return cache_seqlens.long()


def _check_room(used: Tensor, new: int, capacity: int) -> None:
    if can_read_values(used) and used.numel() and used.max() + new > capacity:
        raise ValueError(
            f"{_OP}: k_cache has {capacity} rows, {int(used.max())} in use and {new} new ones do "
            "not fit; allocate a longer cache"
        )
    if can_assert_values(used):
        assert_on_device(
            used + new <= capacity,
            f"{_OP}: k_cache has {capacity} rows, those in use and {new} new ones do not fit; "
            "allocate a longer cache",
        )


def _parts(cache_batch_idx: Tensor | None, q: Tensor, k_cache: Tensor) -> Tensor:
    """int64 [B]: which part of the cache belongs to each sequence."""
    batch, parts = q.shape[0], k_cache.shape[0]
    if cache_batch_idx is None:
        if parts < batch:
            raise ValueError(f"{_OP}: k_cache has {parts} sequences, q has {batch}")
        return torch.arange(batch, device=q.device)
    require(_OP, "cache_batch_idx", cache_batch_idx, 1, f"[{batch}]")
    if cache_batch_idx.shape[0] != batch:
        raise ValueError(
            f"{_OP}: cache_batch_idx has {cache_batch_idx.shape[0]} entries, q has {batch} "
            "sequences"
        )
    check_range(
        _OP,
        "cache_batch_idx",
        cache_batch_idx,
        0,
        parts,
        lambda: f"the caches have {parts} sequences",
    )
    return cache_batch_idx.long()
