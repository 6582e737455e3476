"""Argument checks of `encfast.ops.linear_cross_entropy`, of which other heads take some."""

import math

import torch
from torch import Tensor

from ._checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_range,
    check_tensor,
    check_values,
)

REDUCTIONS = ("none", "mean", "sum")


def check_operands(
    x, weight, targets, bias, rows, ignore_index, label_smoothing, z_loss, softcap
) -> None:
    """What the op's docstring asks of its arguments."""
    op = "linear_cross_entropy"
    check_head(op, x, weight, bias)
    check_tensor(op, "targets", targets, 1, "[M]")
    check_dtype(op, "targets", targets, torch.int64)
    check_device(op, "targets", targets, "x", x)
    _check_rows(op, x, targets, rows)
    v = weight.shape[0]
    check_values(
        op,
        "targets",
        targets,
        lambda t: (t == ignore_index) | ((t >= 0) & (t < v)),
        lambda: f"expected 0..{v - 1}, an entry of the vocabulary, or ignore_index {ignore_index}",
    )
    if label_smoothing is not None and not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0..1")
    if z_loss is not None and not 0 <= z_loss < math.inf:
        raise ValueError(f"{op}: z_loss is {z_loss}, expected a finite number >= 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected a finite number > 0")


def check_head(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, x_name: str = "x", prefix: str = ""
) -> None:
    """Rows [N, C], weight [V, C] of their dtype and bias [V], with V > 0."""
    w_name, b_name = f"{prefix}weight", f"{prefix}bias"
    check_tensor(op, x_name, x, 2, "[N, C]")
    check_dtype(op, x_name, x, *FLOAT_DTYPES, hint=f"; for float64 use encfast.ref.{op}")
    check_tensor(op, w_name, weight, 2, "[V, C]")
    check_dtype(op, w_name, weight, x.dtype, hint=f", the dtype of {x_name}; cast one of them")
    check_device(op, w_name, weight, x_name, x)
    if weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: {w_name} has shape {tuple(weight.shape)}, expected [V, {x.shape[1]}] for the "
            f"{x.shape[1]} channels of {x_name}, V > 0"
        )
    if bias is not None:
        check_tensor(op, b_name, bias, 1, "[V]")
        check_dtype(op, b_name, bias, *FLOAT_DTYPES)
        check_device(op, b_name, bias, x_name, x)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: {b_name} has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), one "
                f"for each row of {w_name}"
            )


def _check_rows(op: str, x: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    n, per = x.shape[0], "row of x"
    if rows is not None:
        check_tensor(op, "rows", rows, 1, "[M]")
        check_dtype(op, "rows", rows, torch.int64)
        check_device(op, "rows", rows, "x", x)
        check_range(op, "rows", rows, 0, n, lambda: f"expected 0..{n - 1}, a row of x")
    m = n if rows is None else rows.shape[0]
    if targets.shape[0] != m:
        per = "row of x" if rows is None else "entry of rows"
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)}, expected ({m},), one for each {per}"
        )


def check_weights(op: str, weights: Tensor | None, x: Tensor, m: int) -> None:
    """One for each of m rows on the device of x, finite and not negative."""
    if weights is None:
        return
    check_tensor(op, "weights", weights, 1, "[M]")
    check_dtype(op, "weights", weights, *FLOAT_DTYPES)
    check_device(op, "weights", weights, "x", x)
    if weights.shape[0] != m:
        raise ValueError(
            f"{op}: weights has shape {tuple(weights.shape)}, expected ({m},), one for each loss"
        )
    check_values(
        op,
        "weights",
        weights.detach(),
        lambda w: (w >= 0) & (w < torch.inf),
        lambda: "expected finite numbers >= 0",
    )


def check_reduction(op: str, reduction: str) -> None:
    """One of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, expected one of {REDUCTIONS}")


def check_floats(op: str, name: str, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """float32 of one of these shapes; the first is what the message says."""
    check_tensor(op, name, x, len(shapes[0]))
    check_dtype(op, name, x, torch.float32)
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {shapes[0]}")
