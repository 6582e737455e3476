"""Argument checks of `encfast.ops.rank_loss`."""

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

DIRECTIONS = ("mean", "sum", "rows")
REDUCTIONS = ("mean", "sum", "none")


def check_features(op: str, a: Tensor, name: str, b: Tensor) -> None:
    check_tensor(op, "a", a, 2, "[B, D]")
    check_dtype(op, "a", a, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.rank_loss")
    check_tensor(op, name, b, 2, "[M, D]")
    check_dtype(op, name, b, a.dtype, hint=", the dtype of a; cast one of them")
    check_device(op, name, b, "a", a)
    for each, x in (("a", a), (name, b)):
        if x.shape[0] < 1 or x.shape[1] < 1:
            raise ValueError(f"{op}: {each} has shape {tuple(x.shape)}, expected at least one row")
    if b.shape[1] != a.shape[1]:
        raise ValueError(f"{op}: {name} has {b.shape[1]} channels, a has {a.shape[1]}")


def check_scalar(op: str, name: str, x: Tensor, a: Tensor, positive: bool) -> None:
    check_tensor(op, name, x, 0, "(one number)")
    check_dtype(op, name, x, *FLOAT_DTYPES)
    check_device(op, name, x, "a", a)
    rule = f"expected a {'positive ' if positive else ''}finite number"
    check_values(
        op,
        name,
        x.detach()[None],
        lambda v: v.isfinite() & (v > 0) if positive else v.isfinite(),
        lambda: rule,
    )


def check_positives(op: str, positives: Tensor, a: Tensor, b: Tensor) -> None:
    _check_rows_of_b(op, "positives", positives, a, b)


def check_excluded(
    op: str, excluded: Tensor | None, positives: Tensor, a: Tensor, b: Tensor
) -> None:
    if excluded is None:
        return
    _check_rows_of_b(op, "excluded", excluded, a, b)
    rule = "expected another row of b than the positive"
    check_values(op, "excluded", excluded, lambda k: (k < 0) | (k != positives), lambda: rule)


def _check_rows_of_b(op: str, name: str, chosen: Tensor, a: Tensor, b: Tensor) -> None:
    check_tensor(op, name, chosen, 1, "[B]")
    check_dtype(op, name, chosen, torch.int64)
    check_device(op, name, chosen, "a", a)
    if chosen.shape[0] != a.shape[0]:
        raise ValueError(f"{op}: {name} has {chosen.shape[0]} entries, a has {a.shape[0]} rows")
    rule = "expected -1 (none) or one of the {} rows of b"
    check_range(op, name, chosen, -1, b.shape[0], lambda: rule.format(b.shape[0]))


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(choices)}")


def check_smoothing(op: str, label_smoothing: float | None, excluded: Tensor | None) -> None:
    if label_smoothing is not None and not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected within [0, 1)")
    if label_smoothing and excluded is not None:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0 with excluded")
