"""varlen_attn's shared global key: one more row in front of each sequence's keys, moved by row ops.

The row moves of `encfast.ops.pad` make the gradients: those of a shared row are summed over the
sequences that see it, in their order.
"""

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, check_device, check_dtype, check_range, check_tensor
from .pad import gather_rows, scatter_rows


def check_global_kv(
    global_kv, k, cu_seqlens_q, causal, window, alibi_slopes, rel_bias, bias
) -> None:
    """Raises TypeError or ValueError for a malformed global_kv, or one beside a positional rule."""
    op = "varlen_attn"
    expected = "expected (k_g, v_g, group)"
    if not isinstance(global_kv, tuple | list):
        raise TypeError(f"{op}: global_kv is {type(global_kv).__name__}, {expected}")
    if len(global_kv) != 3:
        raise ValueError(f"{op}: global_kv has {len(global_kv)} parts, {expected}")
    for name, given in (
        ("causal", causal),
        ("window", tuple(window) != (-1, -1)),
        ("alibi_slopes", alibi_slopes is not None),
        ("rel_bias", rel_bias is not None),
        ("bias", bias is not None),
    ):
        if given:
            raise ValueError(
                f"{op}: global_kv does not go together with {name}; the shared key has no position"
            )
    k_g, v_g, group = global_kv
    for name, x in (("global_kv[0]", k_g), ("global_kv[1]", v_g)):
        check_tensor(op, name, x, 3, "[G, key heads, head size]")
        check_dtype(op, name, x, *FLOAT_DTYPES)
        check_device(op, name, x, "k", k)
    if k_g.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"{op}: global_kv[0] has shape {tuple(k_g.shape)}, expected (G, {k.shape[1]}, "
            f"{k.shape[2]})"
        )
    if v_g.shape != k_g.shape:
        raise ValueError(
            f"{op}: global_kv[1] has shape {tuple(v_g.shape)}, expected that of global_kv[0], "
            f"{tuple(k_g.shape)}"
        )
    _check_group(group, k_g, cu_seqlens_q.shape[0] - 1)


def _check_group(group: Tensor, k_g: Tensor, batch: int) -> None:
    op, name = "varlen_attn", "global_kv[2]"
    check_tensor(op, name, group, 1, "[B]")
    check_dtype(op, name, group, torch.int64)
    check_device(op, name, group, "global_kv[0]", k_g)
    if group.shape[0] != batch:
        raise ValueError(f"{op}: {name} has {group.shape[0]} entries, expected B, {batch}")
    rows = k_g.shape[0]
    check_range(op, name, group, 0, rows, lambda: f"expected 0 <= row < {rows}")


def with_global_kv(
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    k_g: Tensor,
    v_g: Tensor,
    group: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v [Nk + B, Hk, D] with row group[b] in front of sequence b, and their cu_seqlens."""
    ends = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    batch = group.shape[0]
    rows = torch.arange(k.shape[0], device=k.device)
    # A row moves down by one for each sequence that starts at or above it.
    own = rows + 1 + torch.searchsorted(ends[1:], rows.int(), right=True)
    shared = ends[:-1] + torch.arange(batch, device=k.device)
    place = torch.cat((shared, own))
    k, v = (
        scatter_rows(torch.cat((gather_rows(x_g, group), x)), place, k.shape[0] + batch)
        for x_g, x in ((k_g, k), (v_g, v))
    )
    return k, v, ends + torch.arange(batch + 1, dtype=torch.int32, device=k.device)
