"""linear_kl on the CPU: both heads' slices side by side, between PyTorch's matrix products the
kernels of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._vocab_slices import (
    VocabSlices,
    add_product,
    columns_per_slice,
    new_kept,
    new_weight_grad,
    product_dtype,
)


class Operands(NamedTuple):
    """The op's arguments that both passes read."""

    x: Tensor
    weight: Tensor
    teacher_x: Tensor
    teacher_weight: Tensor
    bias: Tensor | None
    teacher_bias: Tensor | None
    temperature: float | None


@dataclass
class _Head:
    """Rows and weight of student or teacher, their logits divided by the temperature."""

    slices: VocabSlices
    bias: Tensor | None  # float32, divided too
    nowhere: Tensor  # int64 [M], targets that are in no slice

    def scan(self, columns: slice, logits: Tensor, stats: Tensor) -> None:
        """Brings maximum and sum of exponentials up to date, rows 0 and 1 of `stats` [4, M]."""
        bias = self._part(columns)
        torch.ops.encfast.vocab_scan(logits, bias, self.nowhere, columns.start, 0.0, stats)

    def exp_minus(
        self, columns: slice, logits: Tensor, minus: Tensor, factor: Tensor, memory: Tensor
    ) -> Tensor:
        """float32 factor_i e^(z_iv - minus_i), in `memory` if that is float32."""
        logits, none = logits.float(), torch.zeros_like(minus)
        out = memory if memory.dtype == torch.float32 else torch.empty_like(logits)
        of_rows = torch.stack((minus, factor, none, none))
        bias = self._part(columns)
        torch.ops.encfast.vocab_grad(logits, bias, self.nowhere, columns.start, 0.0, of_rows, out)
        return out

    def biased(self, columns: slice, logits: Tensor) -> Tensor:
        """The logits in float32."""
        bias = self._part(columns)
        return logits.float() if bias is None else logits + bias

    def _part(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]


def _heads(o: Operands, kept: Tensor) -> Iterator[_Head]:
    """Student and teacher, the same columns in the same slice."""
    dtype, m, scale = product_dtype(o.x), o.x.shape[0], 1 / (o.temperature or 1.0)
    channels = max(o.x.shape[1], o.teacher_x.shape[1])
    columns = columns_per_slice(m, channels, o.x.dtype, dtype)
    nowhere = torch.full((m,), -1, dtype=torch.int64)
    half = kept.numel() // 2
    for rows, w, b, memory in (
        (o.x, o.weight, o.bias, kept[:half]),
        (o.teacher_x, o.teacher_weight, o.teacher_bias, kept[half : 2 * half]),
    ):
        slices = VocabSlices(rows, w, memory, dtype, scale, columns)
        yield _Head(slices, None if b is None else b.float() * scale, nowhere)


def forward(operands: Operands, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(KL [M], log-sum-exps [2, M], logits for the backward)."""
    x, weight, *_ = operands
    m = x.shape[0]
    kept = new_kept(x, m, weight.shape[0], keep)
    if m == 0:
        loss = x.new_zeros(0, dtype=torch.float32)
        return loss, loss.new_zeros(2, 0), kept
    student, teacher = _heads(operands, kept)
    stats = x.new_zeros((2, 4, m), dtype=torch.float32)
    stats[:, 0] = torch.finfo(torch.float32).min  # finite: a slice may hold -inf alone
    cross, one = x.new_zeros(m, dtype=torch.float32), x.new_ones(m, dtype=torch.float32)
    pairs = zip(student.slices.forward(), teacher.slices.forward(), strict=True)
    for (columns, of_student), (_, of_teacher) in pairs:
        before = stats[1, 0].clone()
        student.scan(columns, of_student, stats[0])
        teacher.scan(columns, of_teacher, stats[1])
        e = teacher.exp_minus(columns, of_teacher, stats[1, 0], one, torch.empty_like(of_teacher))
        apart = teacher.biased(columns, of_teacher) - student.biased(columns, of_student)
        terms = (e * apart).where(e > 0, 0)  # 0 times an infinity is 0
        cross = cross * (before - stats[1, 0]).exp() + terms.sum(1)
    (largest, exps, _, _), (teacher_largest, teacher_exps, _, _) = stats
    # The difference of two log-sum-exps, without the roundings of either.
    apart = largest - teacher_largest + (exps / teacher_exps).log()
    return apart + cross / teacher_exps, stats[:, 0] + stats[:, 1].log(), kept


def backward(
    dloss: Tensor,
    operands: Operands,
    lse: Tensor,
    kept: Tensor,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's x, weight and bias, [0] where not wanted."""
    x, weight, *_ = operands
    dweight = new_weight_grad(weight, want_dweight)
    dbias = x.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32)
    if x.shape[0] == 0:
        return x.new_zeros(x.shape if want_dx else 0), dweight.zero_(), dbias.zero_()
    student, teacher = _heads(operands, kept)
    factor = dloss.float() / (operands.temperature or 1.0)
    dx = x.new_zeros(x.shape, dtype=torch.float32)
    memory = torch.empty_like(student.slices.x)
    pairs = zip(student.slices.backward(), teacher.slices.backward(), strict=True)
    for (columns, of_student, slot, w), (_, of_teacher, other, _) in pairs:
        # In float32 up to here: where both agree, little is left.
        p = student.exp_minus(columns, of_student, lse[0], factor, slot)
        grad = p.sub_(teacher.exp_minus(columns, of_teacher, lse[1], factor, other)).to(w.dtype)
        if want_dx:
            add_product(dx, grad, w, memory)
        if want_dweight:
            student.slices.put_grad(grad, dweight[columns])
        if want_dbias:
            torch.sum(grad, 0, dtype=torch.float32, out=dbias[columns])
    return dx.to(x.dtype) if want_dx else x.new_empty(0), dweight, dbias
