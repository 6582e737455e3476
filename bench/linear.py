"""A linear layer of training: encfast against ``F.linear``, forward and both gradients.

Rows and layers of ViT-B/16 under MAE with 16 images: what the encoder sees of each, and what its
narrower decoder sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, ReferenceGate, Setting, Variant
from timing import short_name
from torch import Tensor

from encfast import ops, ref

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """N rows of C channels to F features."""

    N: int
    C: int
    F: int


@dataclass(frozen=True)
class Inputs:
    """Leaves that need gradients, and the gradient of the result."""

    x: Tensor  # [N, C]
    weight: Tensor  # [F, C]
    bias: Tensor  # [F]
    dout: Tensor  # [N, F]


def _inputs(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(device, dtype).requires_grad_()

    dout = torch.randn(s.N, s.F, generator=g).to(device, dtype)
    return Inputs(leaf(s.N, s.C), leaf(s.F, s.C, scale=s.C**-0.5), leaf(s.F), dout)


def _call(i: Inputs, product: Product, backward: bool) -> Call:
    if not backward:
        x, weight, bias = i.x.detach(), i.weight.detach(), i.bias.detach()
        return Call(lambda: (product(x, weight, bias),))
    leaves = (i.x, i.weight, i.bias)
    return Call(lambda: torch.autograd.grad(product(*leaves), leaves, i.dout))


def _known(i: Inputs, backward: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    exact, plain = (_call(x, ref.linear, backward).run() for x in (_wide(i), i))
    return exact, plain


def _wide(i: Inputs) -> Inputs:
    x, weight, bias = (t.detach().double().requires_grad_() for t in (i.x, i.weight, i.bias))
    return Inputs(x, weight, bias, i.dout.double())


def _spec(s: Shape, backward: bool, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    products: dict[str, Product] = {"F.linear": F.linear, "encfast": ops.linear}
    what = "fwd+bwd" if backward else "fwd"
    return BenchSpec(
        name=f"linear/{what}-N{s.N}-C{s.C}-F{s.F}-{short_name(dtype)}",
        title=f"linear {what}, {s.N} rows, {s.C} to {s.F} channels, {short_name(dtype)}",
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
        verify=ReferenceGate(
            functools.partial(_known, backward=backward), 3.0 if backward else 2.0, shown=0
        ),
        flops=lambda i: (6.0 if backward else 2.0) * i.dout.numel() * s.C,
        pairs=(("encfast", "F.linear"),),
        budget_s={"tiny": 0.1, "quick": 1.0, "full": 4.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite; the quick one has it inside of training and MAE."""
    layers = {
        "tiny": [Shape(12, 24, 16)],
        "quick": [],
        "full": [
            Shape(800, 768, 2304),
            Shape(800, 768, 3072),
            Shape(800, 3072, 768),
            Shape(3152, 512, 2048),
            Shape(3152, 2048, 512),
        ],
    }[setting.suite]
    return [
        _spec(s, backward, dtype, setting)
        for s in layers
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
