"""What the benches of integrations share: a library as it comes, then with encfast inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import Call, Gate, Variant, cosine_gate
from timing import short_name

FP32, BF16 = torch.float32, torch.bfloat16
_MIN_COSINE = {FP32: 0.999999, BF16: 0.999}


def variants(
    ways: Sequence[tuple[str, Any]],
    make: Callable[[Any, Any, torch.dtype], Call],
    dtype: torch.dtype,
) -> tuple[Variant, ...]:
    """One model in several ways.

    Args:
        ways: the name of each and what `make` is told of it; the first is the library as it comes.
        make: (inputs, way, dtype) -> its call.
        dtype: of all.
    """
    return tuple(
        Variant(
            f"{name} {short_name(dtype)}",
            dtype,
            lambda inputs, way=way: make(inputs, way, dtype),
            ours=i > 0,
            torch_products=True,
        )
        for i, (name, way) in enumerate(ways)
    )


def against_the_first(of: Sequence[Variant]) -> tuple[tuple[str, str], ...]:
    """The pairs that are compared: each with encfast inside, and the library as it comes."""
    return tuple((v.name, of[0].name) for v in of[1:])


def alike(found: torch.Tensor, expected: torch.Tensor, variant: Variant) -> Gate:
    """Whether the least cosine of rows is what the variant's dtype allows."""
    cosine = torch.nn.functional.cosine_similarity(found.float(), expected).min().item()
    return cosine_gate(cosine, _MIN_COSINE[variant.dtype])
