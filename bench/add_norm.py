"""Residual add and norm in one pass: encfast against add and norm of PyTorch.

Forward as inference runs it, and forward with backward into rows and parameters. Parameters are
float32, as under autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, error_gate
from timing import short_name
from torch import Tensor

from encfast import ops, ref

SHAPES = ((8192, 384), (8192, 768), (4096, 3072))
# Tensors of the rows' size that must move: x, residual and y; for the backward also the sum, out
# and in again, dy, and one gradient for both addends.
FORWARD, BOTH = 3, 7


@dataclass(frozen=True)
class Inputs:
    """Rows, parameters and the gradient of the result; leaves that need gradients."""

    leaves: tuple[Tensor, ...]  # x, residual [N, C], weight, bias [C]
    dy: Tensor  # [N, C]

    @property
    def detached(self) -> tuple[Tensor, ...]:
        """The leaves without their gradients."""
        return tuple(x.detach() for x in self.leaves)


def _inputs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    rows = (x.to(device, dtype), residual.to(device, dtype))
    parameters = (weight.to(device), bias.to(device))
    leaves = tuple(t.requires_grad_() for t in (*rows, *parameters))
    return Inputs(leaves, dy.to(device, dtype))


def _encfast(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.add_norm(x, residual, weight, bias)


def _plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias)


def _reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ref.add_norm(x, residual, weight, bias)[0]


Norm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _forward(i: Inputs, norm: Norm) -> Call:
    inputs = i.detached
    return Call(lambda: norm(*inputs))


def _both(i: Inputs, norm: Norm) -> Call:
    return Call(
        lambda: torch.autograd.grad(norm(*i.leaves), i.leaves, i.dy), collect=lambda grads: grads[0]
    )


def _verify(i: Inputs, variant: Variant, found: Tensor, *, backward: bool) -> Gate:
    wide = tuple(x.double().requires_grad_() for x in i.detached)
    exact, plain = _reference(*wide), _plain(*i.leaves)
    if backward:
        (exact,) = torch.autograd.grad(exact, wide[:1], i.dy.double())
        (plain,) = torch.autograd.grad(plain, i.leaves[:1], i.dy)
    return error_gate("add_norm", found, exact.detach(), plain.detach(), 3.0 if backward else 2.0)


def _spec(
    what: str, shape: tuple[int, int], dtype: torch.dtype, setting: Setting, budget_s: float
) -> BenchSpec:
    backward = what == "fwd+bwd"
    bind = _both if backward else _forward
    variants = (
        Variant("layer_norm(x + residual)", dtype, functools.partial(bind, norm=_plain)),
        Variant("encfast", dtype, functools.partial(bind, norm=_encfast), ours=True),
    )
    moved = BOTH if backward else FORWARD
    size = f"{shape[0]}x{shape[1]}"
    return BenchSpec(
        name=f"add_norm/{what}-{size}-{short_name(dtype)}",
        title=f"add_norm {what}, LayerNorm, [{shape[0]}, {shape[1]}], {short_name(dtype)}",
        inputs=lambda: _inputs(shape, dtype, setting.device),
        variants=variants,
        verify=functools.partial(_verify, backward=backward),
        bytes=lambda i: float(moved * i.dy.nbytes),
        pairs=(("encfast", "layer_norm(x + residual)"),),
        budget_s=budget_s,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    if setting.suite == "tiny":
        return [_spec(w, (5, 24), torch.float32, setting, 0.1) for w in ("fwd", "fwd+bwd")]
    quick = setting.suite == "quick"
    shapes = SHAPES[1:2] if quick else SHAPES
    return [
        _spec(what, shape, dtype, setting, 0.5 if quick else 2.0)
        for what in (("fwd+bwd",) if quick else ("fwd", "fwd+bwd"))
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
