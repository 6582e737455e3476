"""Distillation of a teacher's ranking: encfast against the formula in plain PyTorch.

`plain` gathers K of all products and has reversed cumulative log-sum-exps and autograd do the rest.
`closed form` is the same with the gradient written out, which spares autograd's second pass over
the sums. Both are given the products of all rows by one matrix product, which at these K is far
faster than a gather of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, Gate, Setting, Variant, all_of, error_gate
from timing import short_name
from torch import Tensor

from encfast import ops, ref
from encfast.ref.partial_ranking import partial_ranking_bwd

Found = tuple[Tensor, ...]  # loss, and the gradients of a, b and logit_scale


@dataclass(frozen=True)
class Inputs:
    """Normalised features, each row's hardest rows in a teacher's order, and CLIP's first scale."""

    a: Tensor  # [B, D]
    b: Tensor  # [M, D]
    scale: Tensor
    candidates: Tensor  # [B, K]
    valid: Tensor  # [B]


def _inputs(n: int, m: int, d: int, k: int, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(n, d, generator=g), dim=-1).to(dtype)
    b = F.normalize(torch.randn(m, d, generator=g), dim=-1).to(dtype)
    mined = ops.hard_negatives(a, b, k)
    teacher = (a.float() @ b.float().T).gather(1, mined) + 0.1 * torch.randn(n, k, generator=g)
    candidates, valid = ops.teacher_order(mined, teacher, threshold=0.1)
    return Inputs(a, b, torch.tensor(1 / 0.07), candidates, valid)


def _by_autograd(loss: Callable[..., Tensor], i: Inputs) -> Found:
    leaves = [x.detach().requires_grad_() for x in (i.a, i.b, i.scale)]
    value = loss(*leaves, i.candidates, i.valid)
    return value.detach(), *torch.autograd.grad(value, leaves)


def _plain(a: Tensor, b: Tensor, scale: Tensor, candidates: Tensor, valid: Tensor) -> Tensor:
    x = scale * (a @ b.T).gather(1, candidates).float()
    sums = x.flip(1).logcumsumexp(1).flip(1)
    keep = torch.arange(x.shape[1]) < valid[:, None]
    return (sums - x).where(keep, 0).sum(1).mean()


def _closed_form(i: Inputs) -> Found:
    dots = (i.a @ i.b.T).gather(1, i.candidates).float()
    loss = ref.partial_ranking(dots, i.scale, i.valid)
    dloss = torch.full_like(loss, 1 / len(loss))
    ddots, dscale = partial_ranking_bwd(dloss, dots, i.scale, i.valid)
    g = torch.zeros(len(i.a), len(i.b)).scatter_add_(1, i.candidates, ddots).to(i.a.dtype)
    return loss.mean(), g @ i.b, g.T @ i.a, dscale


def _ours(a: Tensor, b: Tensor, scale: Tensor, candidates: Tensor, valid: Tensor) -> Tensor:
    return ops.partial_ranking(a, b, logit_scale=scale, candidates=candidates, valid=valid)


def _exact(i: Inputs) -> Found:
    wide = Inputs(i.a.double(), i.b.double(), i.scale.double(), i.candidates, i.valid)

    def loss(a: Tensor, b: Tensor, scale: Tensor, candidates: Tensor, valid: Tensor) -> Tensor:
        dots = (a @ b.T).gather(1, candidates)
        return ref.partial_ranking(dots, scale, valid).mean()

    return _by_autograd(loss, wide)


class _Verify:
    """encfast's loss and gradients by the tolerance rule; its peers, which round products to their
    dtype, need only be near."""

    def __init__(self) -> None:
        self._known: tuple[Found, Found] | None = None

    def __call__(self, i: Inputs, variant: Variant, found: Found) -> Gate:
        if self._known is None:
            self._known = _exact(i), _by_autograd(_plain, i)
        exact, plain = self._known
        if variant.ours:
            gates = [
                error_gate(variant.name, *three, 3.0)
                for three in zip(found, exact, plain, strict=True)
            ]
            return all_of(gates, shown=1)
        limit = 1e-4 if i.a.dtype == torch.float32 else 0.1
        errors = [
            ((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)
        ]
        return Gate(max(errors[:3]) < limit, f"relative error {max(errors[:3]):.1e}")


_VARIANTS: dict[str, Callable[[Inputs], Found]] = {
    "plain": functools.partial(_by_autograd, _plain),
    "closed form": _closed_form,
    "encfast": functools.partial(_by_autograd, _ours),
}


def _spec(shape: tuple[int, int, int, int], dtype: torch.dtype, setting: Setting) -> BenchSpec:
    n, m, d, k = shape

    def variant(name: str, run: Callable[[Inputs], Found]) -> Variant:
        make = lambda i: Call(functools.partial(run, i))  # noqa: E731
        ours = name == "encfast"
        return Variant(name, dtype, make, ours=ours, torch_products=not ours)

    return BenchSpec(
        name=f"partial_ranking/B{n}-M{m}-D{d}-K{k}-fwd+bwd-{short_name(dtype)}",
        title=f"ranking of {k} of {m} rows, fwd+bwd, B={n}, D={d}, {short_name(dtype)}",
        inputs=lambda: _inputs(n, m, d, k, dtype),
        variants=tuple(variant(name, run) for name, run in _VARIANTS.items()),
        verify=_Verify(),
        # What the formula needs: three products of B K D.
        flops=lambda i: 6.0 * n * k * d,
        pairs=tuple(("encfast", peer) for peer in _VARIANTS if peer != "encfast"),
        budget_s={"tiny": 0.1, "quick": 2.0, "full": 10.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite. Not in `quick`: a call takes a second."""
    if setting.device != "cpu" or setting.suite == "quick":
        return []
    shapes = [(1024, 8192, 256, 4096)] if setting.suite == "full" else [(40, 90, 16, 24)]
    dtypes = (torch.float32, torch.bfloat16)
    return [_spec(shape, dtype, setting) for shape in shapes for dtype in dtypes]
