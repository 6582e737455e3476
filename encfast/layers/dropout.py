"""Float attributes that ``torch.compile`` reads as constants, and a dropout that has one.

A float attribute of a module is a symbol under ``torch.compile(dynamic=True)``. That costs a second
pass of the compiler, and PyTorch (2.10 to 2.14) fails with "lift_tracked_freevar_to_input" when one
module is checkpointed twice, as in a stack that shares its weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class StaticFloat:
    """A float attribute, or None, kept as text, which compiled code takes for a constant."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        text = getattr(obj, self._name)
        return None if text is None else float(text)

    def __set__(self, obj: Any, value: float | None) -> None:
        setattr(obj, self._name, None if value is None else repr(float(value)))


class Dropout(nn.Dropout):
    """``nn.Dropout`` in a module that may be used more than once."""

    p = StaticFloat()  # type: ignore[assignment]
