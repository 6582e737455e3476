"""Arguments in flash-attn's conventions, checked under its names and turned into those of ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def score_rule(
    op: str, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
) -> dict[str, Any]:
    """Keyword arguments of `encfast.ops.varlen_attn`. 0 is no dropout, softcap <= 0 is none."""
    for name, number in (
        ("dropout_p", dropout_p),
        ("softmax_scale", softmax_scale),
        ("softcap", softcap),
    ):
        if number is None and name == "softmax_scale":
            continue
        if not isinstance(number, int | float | torch.SymFloat):
            raise TypeError(f"{op}: {name} is {type(number).__name__}, expected a float")
        if not torch.compiler.is_compiling() and not math.isfinite(number):
            raise ValueError(f"{op}: {name} is {number}, expected a finite number")
    rule = {
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": window(op, window_size),
        "alibi_slopes": alibi_slopes,
        "softcap": softcap if softcap > 0 else None,
    }
    return rule | {"dropout_p": dropout_p} if dropout_p else rule


def window(op: str, window_size) -> tuple[int, int]:
    """(left, right) with -1 for any negative bound: there it means no bound."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"{op}: window_size is {window_size!r}, expected (left, right)")
    if not all(isinstance(bound, int) for bound in window_size):
        raise TypeError(f"{op}: window_size is {window_size!r}, expected two ints, -1 for no bound")
    left, right = (max(bound, -1) for bound in window_size)
    return left, right


def max_length(op: str, name: str, value) -> int:
    """An int as it is; the value of a 0-dim tensor, which unpadding code often leaves."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{op}: {name} has shape {tuple(value.shape)}, expected an int")
        return int(value.item())
    return value


def require(op: str, name: str, x, dim: int, shape: str) -> None:
    """`x` is a tensor of `dim` dimensions; `shape` is what the message shows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {shape}")


def require_stack(op: str, name: str, x, dim: int, at: int, count: int, shape: str) -> None:
    """`x` holds `count` tensors stacked along dimension `at`."""
    require(op, name, x, dim, shape)
    if x.shape[at] != count:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {shape}")


def refuse(op: str, name: str, value, why: str) -> None:
    """NotImplementedError unless the argument was left out."""
    if value is not None:
        raise NotImplementedError(f"{op}: {name} is given; {why}")
