"""The argument checks of varlen_attn: the public function runs all, a direct call what it must."""

import math

import torch
from torch import Tensor

from ._checks import (
    FLOAT_DTYPES,
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_cu_seqlens_values,
    check_device,
    check_dtype,
    check_tensor,
    check_values,
)

MAX_HEAD_SIZE = 256


def check_arguments(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, window,
    alibi_slopes, rel_bias, bias, bias_offsets, softcap, dropout_p,
) -> None:  # fmt: skip
    """Raises TypeError or ValueError for what the public function was given, naming it."""
    op = "varlen_attn"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x, 3, "[N, heads, head size]")
        check_dtype(op, name, x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.varlen_attn")
        check_device(op, name, x, "q", q)
    _check_shapes(q, k, v)
    check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_score_rule(scale, causal, window, softcap)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, q, cu_seqlens_q.shape[0] - 1)
    check_biases(q, cu_seqlens_q, cu_seqlens_k, rel_bias, bias, bias_offsets)
    _check_dropout(dropout_p)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    heads, head_size = q.shape[1:]
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"varlen_attn: q has head size {head_size}, expected 1..{MAX_HEAD_SIZE}")
    if k.shape[2] != head_size:
        raise ValueError(f"varlen_attn: k has head size {k.shape[2]}, q has {head_size}")
    if v.shape != k.shape:
        raise ValueError(
            f"varlen_attn: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}"
        )
    if heads < 1 or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            f"varlen_attn: q has {heads} heads and k has {k.shape[1]}; expected a multiple"
        )


def check_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    """Lengths against rows, and against their bounds; values where they can be read."""
    op = "varlen_attn"
    _check_lengths("q", cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is not None:
        _check_lengths("k", cu_seqlens_k, max_seqlen_k, k)
        if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
            raise ValueError(
                f"{op}: cu_seqlens_k has {cu_seqlens_k.shape[0]} entries, cu_seqlens_q has "
                f"{cu_seqlens_q.shape[0]}; expected B + 1 in both"
            )
    elif k.shape[0] != q.shape[0]:
        raise ValueError(
            f"{op}: k has {k.shape[0]} rows and q has {q.shape[0]}; pass cu_seqlens_k unless keys "
            "and queries have the same lengths"
        )
    elif max_seqlen_k is not None:
        _check_lengths("k", cu_seqlens_q, max_seqlen_k, k)


def _check_lengths(side: str, cu_seqlens: Tensor, max_seqlen: int | None, rows: Tensor) -> None:
    op, name, max_name = "varlen_attn", f"cu_seqlens_{side}", f"max_seqlen_{side}"
    check_tensor(op, name, cu_seqlens, 1, "[B + 1]")
    check_dtype(op, name, cu_seqlens, torch.int32)
    check_device(op, name, cu_seqlens, side, rows)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: {name} is empty, expected B + 1 entries, the first of them 0")
    if max_seqlen is None:
        if rows.device.type == "cuda":
            raise ValueError(
                f"{op}: {max_name} is None; pass it as an int, on {rows.device} reading it from "
                f"{name} would wait for the device"
            )
    elif not isinstance(max_seqlen, int | torch.SymInt) or isinstance(max_seqlen, bool):
        raise TypeError(f"{op}: {max_name} is {type(max_seqlen).__name__}, expected an int")
    elif max_seqlen < 0:
        raise ValueError(f"{op}: {max_name} is {max_seqlen}, expected >= 0")
    check_cu_seqlens_values(op, name, cu_seqlens, rows.shape[0], max_name, max_seqlen)


def _check_score_rule(scale, causal, window, softcap) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"varlen_attn: causal is {type(causal).__name__}, expected a bool")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not isinstance(number, int | float | torch.SymFloat):
            raise TypeError(f"varlen_attn: {name} is {type(number).__name__}, expected a float")
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"varlen_attn: window is {window!r}, expected (left, right)")
    for bound in window:
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise TypeError(f"varlen_attn: window is {window!r}, expected two ints")
        if bound < -1:
            raise ValueError(f"varlen_attn: window is {window!r}, expected bounds >= -1")
    if torch.compiler.is_compiling():
        return  # a guard on a float's value would compile once per value
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"varlen_attn: scale is {scale}, expected a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"varlen_attn: softcap is {softcap}, expected a number > 0 or None")


def _check_slopes(slopes: Tensor, q: Tensor, batch: int) -> None:
    op, name = "varlen_attn", "alibi_slopes"
    check_tensor(op, name, slopes)
    check_dtype(op, name, slopes, torch.float32)
    check_device(op, name, slopes, "q", q)
    heads = q.shape[1]
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):
        raise ValueError(
            f"{op}: {name} has shape {tuple(slopes.shape)}, expected ({heads},) or "
            f"({batch}, {heads})"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} has no gradient; pass {name}.detach()")
    check_values(op, name, slopes, torch.isfinite, lambda: "expected finite")


def check_biases(q, cu_seqlens_q, cu_seqlens_k, rel_bias, bias, bias_offsets) -> None:
    """Shapes, dtypes and devices of the biases; the offsets against the lengths."""
    if rel_bias is not None:
        _check_rel_bias(rel_bias, q)
    if bias is not None:
        pairs = pairs_per_sequence(cu_seqlens_q, cu_seqlens_k)
        _check_bias(bias, q, pairs)
        if bias_offsets is not None:
            _check_bias_offsets(bias_offsets, q, pairs)
    elif bias_offsets is not None:
        raise ValueError("varlen_attn: bias_offsets is given without bias; pass both or neither")


def pairs_per_sequence(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """int64 [B]: Lq * Lk, the entries of each sequence's matrix in bias."""
    lens_q = cu_seqlens_q.diff().long()
    return lens_q * (lens_q if cu_seqlens_k is None else cu_seqlens_k.diff().long())


def _check_rel_bias(rel_bias: Tensor, q: Tensor) -> None:
    op, name = "varlen_attn", "rel_bias"
    check_tensor(op, name, rel_bias)
    check_dtype(op, name, rel_bias, *FLOAT_DTYPES)
    check_device(op, name, rel_bias, "q", q)
    rows, heads = q.shape[:2]
    shape = tuple(rel_bias.shape)
    if shape[:-1] not in ((heads,), (rows, heads)):
        raise ValueError(
            f"{op}: {name} has shape {shape}, expected ({heads}, R) or ({rows}, {heads}, R)"
        )
    if shape[-1] % 2 == 0:
        raise ValueError(
            f"{op}: {name} has {shape[-1]} entries in its last dimension, expected an odd number, "
            "2 r + 1 for the offsets -r .. r"
        )


def _check_bias(bias: Tensor, q: Tensor, pairs: Tensor) -> None:
    op, name = "varlen_attn", "bias"
    check_tensor(op, name, bias)
    check_dtype(op, name, bias, torch.bool, *FLOAT_DTYPES)
    check_device(op, name, bias, "q", q)
    heads = q.shape[1]
    if bias.dim() not in (1, 2) or (bias.dim() == 2 and bias.shape[0] != heads):
        raise ValueError(
            f"{op}: {name} has shape {tuple(bias.shape)}, expected (T,) or ({heads}, T), T the sum "
            "of Lq * Lk"
        )
    if can_read_values(pairs) and bias.shape[-1] != pairs.sum():
        raise ValueError(
            f"{op}: {name} has {bias.shape[-1]} entries per head, expected the sum of Lq * Lk, "
            f"{pairs.sum()}"
        )
    if can_assert_values(pairs):
        assert_on_device(
            pairs.sum() == bias.shape[-1],
            f"{op}: {name} has {bias.shape[-1]} entries per head, expected the sum of Lq * Lk",
        )


def _check_bias_offsets(offsets: Tensor, q: Tensor, pairs: Tensor) -> None:
    op, name = "varlen_attn", "bias_offsets"
    check_tensor(op, name, offsets, 1, "[B + 1]")
    check_dtype(op, name, offsets, torch.int64)
    check_device(op, name, offsets, "q", q)
    batch = pairs.shape[0]
    if offsets.shape[0] != batch + 1:
        raise ValueError(
            f"{op}: {name} has {offsets.shape[0]} entries, expected B + 1, {batch + 1}"
        )
    if can_read_values(offsets):
        _read_bias_offsets(offsets, pairs)
    elif can_assert_values(offsets):
        assert_on_device(offsets[0] == 0, f"{op}: {name} does not start at 0")
        assert_on_device(offsets.diff() == pairs, f"{op}: {name} is not the running sum of Lq * Lk")


def _read_bias_offsets(offsets: Tensor, pairs: Tensor) -> None:
    op, name = "varlen_attn", "bias_offsets"
    if offsets[0] != 0:
        raise ValueError(f"{op}: {name} starts at {offsets[0]}, expected 0")
    wrong = (offsets.diff() != pairs).nonzero()
    if len(wrong):
        b = int(wrong[0])
        raise ValueError(
            f"{op}: {name} goes from {offsets[b]} to {offsets[b + 1]} at sequence {b}, expected a "
            f"step of Lq * Lk, {pairs[b]}"
        )


def _check_dropout(dropout_p: float | None) -> None:
    if dropout_p is None:
        return
    if not isinstance(dropout_p, int | float | torch.SymFloat):
        raise TypeError(f"varlen_attn: dropout_p is {type(dropout_p).__name__}, expected a float")
    # The value of a symbol would be guarded, one graph per value; the kernel checks it again.
    if not torch.compiler.is_compiling() and not 0 <= dropout_p < 1:
        raise ValueError(f"varlen_attn: dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")


def check_rng(rng, dropout_p, q) -> None:
    """rng of a direct call: the public function draws it."""
    _check_dropout(dropout_p)
    if not dropout_p:
        return
    op, name = "varlen_attn", "rng"
    check_tensor(op, name, rng, 1, "[2]")
    check_dtype(op, name, rng, torch.int64)
    check_device(op, name, rng, "q", q)
    if rng.shape[0] != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(rng.shape)}, expected (2,)")
