"""A linear layer per group of rows: encfast against PyTorch's grouped_mm and a loop over experts.

The first product of Mixtral's experts at a smaller width: 512 tokens, each sent to 2 of E experts
by chance, which gives 1024 rows in groups of unlike sizes. `dense` is one product over as many
rows: equal work with one weight, a bound that no grouped product can be asked to reach.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, ReferenceGate, Setting, Variant
from timing import short_name
from torch import Tensor

from encfast import ops, ref

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Tokens, each in two groups, of E; the weights are [E, F, C]."""

    tokens: int
    E: int
    C: int
    F: int


@dataclass(frozen=True)
class Inputs:
    """Rows and weights, both leaves that need gradients, and the gradient of the result."""

    x: Tensor  # [N, C]
    weight: Tensor  # [E, F, C]
    cu_seqlens: Tensor  # int32 [E + 1]
    dout: Tensor  # [N, F]


def _inputs(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(s.tokens, s.E, generator=g).topk(2).indices.flatten()
    ends = torch.bincount(chosen, minlength=s.E).cumsum(0)
    n = chosen.numel()
    return Inputs(
        torch.randn(n, s.C, generator=g).to(device, dtype).requires_grad_(),
        (torch.randn(s.E, s.F, s.C, generator=g) * s.C**-0.5).to(device, dtype).requires_grad_(),
        F.pad(ends, (1, 0)).to(device, torch.int32),
        torch.randn(n, s.F, generator=g).to(device, dtype),
    )


def _loop(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    groups = enumerate(itertools.pairwise(cu_seqlens.tolist()))
    return torch.cat([F.linear(x[begin:end], weight[e]) for e, (begin, end) in groups])


def _torch_grouped(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=cu_seqlens[1:])


def _dense(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    return F.linear(x, weight[0])


def _call(i: Inputs, product: Product, backward: bool) -> Call:
    if not backward:
        x, weight = i.x.detach(), i.weight.detach()
        return Call(lambda: (product(x, weight, i.cu_seqlens),))
    return Call(
        lambda: torch.autograd.grad(product(i.x, i.weight, i.cu_seqlens), (i.x, i.weight), i.dout)
    )


class _Verify(ReferenceGate):
    """All but `dense`, which computes something else."""

    def __init__(self, backward: bool) -> None:
        super().__init__(functools.partial(_known, backward=backward), 3.0 if backward else 2.0)

    def __call__(self, inputs: Inputs, variant: Variant, found: Sequence[Tensor]) -> Gate:
        if variant.name == "dense":
            return Gate(True, "other maths of equal work")
        return super().__call__(inputs, variant, found)


def _known(i: Inputs, backward: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    exact, plain = (_call(x, ref.grouped_mm, backward).run() for x in (_wide(i), i))
    return exact, plain


def _wide(i: Inputs) -> Inputs:
    x, weight = (t.detach().double().requires_grad_() for t in (i.x, i.weight))
    return Inputs(x, weight, i.cu_seqlens, i.dout.double())


def _spec(s: Shape, backward: bool, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    products = {
        "F.linear loop": _loop,
        "F.grouped_mm": _torch_grouped,
        "dense": _dense,
        "encfast": ops.grouped_mm,
    }
    what = "fwd+bwd" if backward else "fwd"
    return BenchSpec(
        name=f"grouped_mm/{what}-E{s.E}-N{2 * s.tokens}-C{s.C}-F{s.F}-{short_name(dtype)}",
        title=f"grouped_mm {what}, {2 * s.tokens} rows of {s.E} experts, C={s.C}, F={s.F}, "
        f"{short_name(dtype)}",
        inputs=lambda: _inputs(s, dtype, setting.device),
        variants=tuple(
            Variant(
                name,
                dtype,
                functools.partial(_call, product=product, backward=backward),
                ours=name == "encfast",
                torch_products=name != "encfast",
            )
            for name, product in products.items()
        ),
        verify=_Verify(backward),
        flops=lambda i: (6.0 if backward else 2.0) * i.dout.numel() * s.C,
        pairs=(("encfast", "F.grouped_mm"), ("encfast", "F.linear loop")),
        budget_s={"tiny": 0.1, "quick": 1.0, "full": 5.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    experts = {"tiny": (), "quick": (64,), "full": (8, 64, 128)}[setting.suite]
    shapes = [Shape(512, e, 768, 1536) for e in experts] or [Shape(12, 4, 24, 16)]
    # The gradient of 64 weights alone takes 300 MB, and each of its calls on a CPU a third of a
    # second.
    forward_only = setting.suite == "quick" and setting.device == "cpu"
    phases = (False,) if forward_only else (False, True)
    return [
        _spec(s, backward, dtype, setting)
        for s in shapes
        for backward in phases
        for dtype in (torch.float32, torch.bfloat16)
    ]
