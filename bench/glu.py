"""Activations of the feed-forward layer: encfast against the same in two or three calls of PyTorch.

Forward as inference runs it, and forward with backward. The bias is float32, as under autocast.
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

SHAPES = ((8192, 384), (8192, 768), (4096, 3072))  # of the result


@dataclass(frozen=True)
class Form:
    """One way to use the op, the same in PyTorch, and what must move."""

    name: str
    encfast: Callable[[Tensor, Tensor | None], Tensor]
    plain: Callable[[Tensor, Tensor | None], Tensor]
    reference: Callable[[Tensor, Tensor | None], Tensor]
    peer: str
    halves: int
    biased: bool = False

    @property
    def moved(self) -> tuple[int, int]:
        """Tensors of the result's size: forward, and forward with backward."""
        forward = self.halves + 1
        return forward, forward + 2 * self.halves + 1  # x again, dout, dx


def _plain_gated(x: Tensor, bias: Tensor | None) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return F.gelu(a) * b


def _plain_biased(x: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return F.gelu(x + bias.to(x.dtype))


FORMS = (
    Form(
        "geglu",
        lambda x, bias: ops.glu(x),
        _plain_gated,
        lambda x, bias: ref.glu(x),
        "gelu(a) * b",
        halves=2,
    ),
    Form(
        "bias_gelu",
        lambda x, bias: ops.glu(x, gated=False, bias=bias),
        _plain_biased,
        lambda x, bias: ref.glu(x, gated=False, bias=bias),
        "gelu(x + bias)",
        halves=1,
        biased=True,
    ),
    Form(
        "gelu",
        lambda x, bias: ops.glu(x, gated=False),
        lambda x, bias: F.gelu(x),
        lambda x, bias: ref.glu(x, gated=False),
        "gelu(x)",
        halves=1,
    ),
)


@dataclass(frozen=True)
class Inputs:
    """Rows and bias, both leaves that need gradients, and the gradient of the result."""

    x: Tensor  # [N, F] or [N, 2F]
    bias: Tensor | None  # of x's width
    dout: Tensor  # [N, F]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What is differentiated for."""
        return (self.x,) if self.bias is None else (self.x, self.bias)


def _inputs(form: Form, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    width = form.halves * shape[1]
    x = torch.randn(shape[0], width, generator=generator).to(device, dtype)
    bias = torch.randn(width, generator=generator).to(device) if form.biased else None
    dout = torch.randn(shape, generator=generator).to(device, dtype)
    return Inputs(x.requires_grad_(), None if bias is None else bias.requires_grad_(), dout)


def _forward(i: Inputs, act: Callable[[Tensor, Tensor | None], Tensor]) -> Call:
    x, bias = i.x.detach(), None if i.bias is None else i.bias.detach()
    return Call(lambda: act(x, bias))


def _both(i: Inputs, act: Callable[[Tensor, Tensor | None], Tensor]) -> Call:
    return Call(
        lambda: torch.autograd.grad(act(i.x, i.bias), i.leaves, i.dout),
        collect=lambda grads: grads[0],
    )


def _verify(i: Inputs, variant: Variant, found: Tensor, *, form: Form, backward: bool) -> Gate:
    wide = i.x.detach().double().requires_grad_()
    exact = form.reference(wide, None if i.bias is None else i.bias.detach().double())
    plain = form.plain(i.x, i.bias)
    if backward:
        (exact,) = torch.autograd.grad(exact, wide, i.dout.double())
        (plain,) = torch.autograd.grad(plain, i.x, i.dout)
    return error_gate(form.name, found, exact.detach(), plain.detach(), 3.0 if backward else 2.0)


def _spec(
    form: Form, backward: bool, shape: tuple[int, int], dtype: torch.dtype, setting: Setting
) -> BenchSpec:
    bind = _both if backward else _forward
    what = "fwd+bwd" if backward else "fwd"
    return BenchSpec(
        name=f"glu/{form.name}-{what}-{shape[0]}x{shape[1]}-{short_name(dtype)}",
        title=f"{form.name} {what}, to [{shape[0]}, {shape[1]}], {short_name(dtype)}",
        inputs=lambda: _inputs(form, shape, dtype, setting.device),
        variants=(
            Variant(form.peer, dtype, functools.partial(bind, act=form.plain)),
            Variant("encfast", dtype, functools.partial(bind, act=form.encfast), ours=True),
        ),
        verify=functools.partial(_verify, form=form, backward=backward),
        bytes=lambda i: float(form.moved[backward] * i.dout.nbytes),
        pairs=(("encfast", form.peer),),
        budget_s=0.1 if setting.suite == "tiny" else 0.5,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite."""
    tiny, quick = setting.suite == "tiny", setting.suite == "quick"
    shapes = ((5, 24),) if tiny else SHAPES[1:2] if quick else SHAPES
    return [
        _spec(form, backward, shape, dtype, setting)
        for form in (FORMS[:1] if quick else FORMS)
        for backward in ((True,) if quick else (False, True))
        for shape in shapes
        for dtype in ((torch.float32,) if tiny else (torch.float32, torch.bfloat16))
    ]
