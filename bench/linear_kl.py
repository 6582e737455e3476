"""Distillation over a vocabulary: encfast against both heads' logits, whole or in chunks.

Rows of student and teacher, ModernBERT's vocabulary, forward and backward with the gradients of the
student's rows and weight. `all logits` is how it is written: both heads, then the divergence of
their softmax. `chunks, checkpoint` does that for 64 rows at a time and once more for the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from harness import BenchSpec, Call, ReferenceGate, Setting, Variant
from timing import short_name
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encfast import ops, ref

# Rows and weight of the student, rows and weight of the teacher -> mean divergence.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ROWS_PER_CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """Rows, entries of the vocabulary, channels of student and teacher."""

    N: int
    V: int
    C: int
    teacher_C: int


@dataclass(frozen=True)
class Inputs:
    """What both heads multiply; the student's are leaves that need gradients."""

    x: Tensor  # [N, C]
    weight: Tensor  # [V, C]
    teacher_x: Tensor  # [N, teacher_C]
    teacher_weight: Tensor  # [V, teacher_C]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of a `Loss`."""
        return self.x, self.weight, self.teacher_x, self.teacher_weight


def _inputs(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def random(rows: int, channels: int, scale: float) -> Tensor:
        return (torch.randn(rows, channels, generator=g) * scale).to(device, dtype)

    return Inputs(
        random(s.N, s.C, 1).requires_grad_(),
        random(s.V, s.C, s.C**-0.5).requires_grad_(),
        random(s.N, s.teacher_C, 1),
        random(s.V, s.teacher_C, s.teacher_C**-0.5),
    )


def _sum_of_kl(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    student = F.linear(x, weight).log_softmax(1)
    teacher = F.linear(teacher_x, teacher_weight).log_softmax(1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def _all_logits(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    return _sum_of_kl(x, weight, teacher_x, teacher_weight) / len(x)


def _chunks(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    pairs = zip(x.split(ROWS_PER_CHUNK), teacher_x.split(ROWS_PER_CHUNK), strict=True)
    parts = [
        checkpoint(_sum_of_kl, rows, weight, of_teacher, teacher_weight, use_reentrant=False)
        for rows, of_teacher in pairs
    ]
    return torch.stack(parts).sum() / len(x)


def _reference(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor) -> Tensor:
    return ref.linear_kl(x, weight, teacher_x, teacher_weight)[0].mean()


def _call(i: Inputs, loss: Loss) -> Call:
    return Call(lambda: torch.autograd.grad(loss(*i.tensors()), (i.x, i.weight)))


def _known(i: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    wide = {f.name: getattr(i, f.name).detach().double() for f in fields(i)}
    exact = Inputs(**wide | {k: wide[k].requires_grad_() for k in ("x", "weight")})
    return _call(exact, _reference).run(), _call(i, _all_logits).run()


_VARIANTS: dict[str, Loss] = {
    "all logits": _all_logits,
    "chunks, checkpoint": _chunks,
    "encfast": ops.linear_kl,
}


def _spec(s: Shape, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    return BenchSpec(
        name=f"linear_kl/N{s.N}-V{s.V}-C{s.C}-teacher{s.teacher_C}-{short_name(dtype)}",
        title=f"KL of two heads fwd+bwd, {s.N} rows, V={s.V}, C={s.C}, teacher's {s.teacher_C}, "
        f"{short_name(dtype)}",
        inputs=lambda: _inputs(s, dtype, setting.device),
        variants=tuple(
            Variant(
                name,
                dtype,
                functools.partial(_call, loss=loss),
                ours=name == "encfast",
                torch_products=name != "encfast",
            )
            for name, loss in _VARIANTS.items()
        ),
        verify=ReferenceGate(_known, 3.0),
        # The student's three products and the teacher's one.
        flops=lambda i: 2.0 * s.N * s.V * (3 * s.C + s.teacher_C),
        pairs=tuple(("encfast", peer) for peer in _VARIANTS if peer != "encfast"),
        budget_s=0.1 if setting.suite == "tiny" else 20.0,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of this op in a suite. Not in `quick`: a call takes a second."""
    if setting.suite == "quick":
        return []
    tiny = setting.suite == "tiny"
    shape = Shape(40, 300, 16, 24) if tiny else Shape(512, 50368, 384, 768)
    return [_spec(shape, dtype, setting) for dtype in (torch.float32, torch.bfloat16)]
