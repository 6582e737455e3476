"""linear_cross_entropy on the CPU: PyTorch's matrix products, compiled kernels between them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._vocab_slices import (
    VocabSlices,
    add_product,
    product_dtype,
)


def forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    ignore_index: int,
    label_smoothing: float | None,
    z_loss: float | None,
    softcap: float | None,
    *,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss [M], log-sum-exp [M]); logits for the backward go to `kept`."""
    vocab = weight.shape[0]
    loss, lse = (x.new_zeros(targets.shape, dtype=torch.float32) for _ in range(2))
    active, taken = active_rows(targets, rows, ignore_index)
    if active.numel() == 0:
        return loss, lse
    eps, targets, bias = label_smoothing or 0.0, targets[active], _float32(bias)
    stats = x.new_zeros((4, active.numel()), dtype=torch.float32)
    largest, exps, total, at_target = stats  # views
    largest.fill_(-torch.inf)
    slices = VocabSlices(x[taken], weight, kept, product_dtype(x))
    for columns, logits in slices.forward():
        torch.ops.encfast.vocab_scan(
            logits, part(bias, columns), targets, columns.start, softcap or 0.0, stats
        )
    lse_of_active = largest + exps.log()
    value = lse_of_active - (1 - eps) * at_target
    if z_loss:
        value += z_loss * lse_of_active.square()
    if eps:
        value -= eps / vocab * total
    return loss.index_copy_(0, active, value), lse.index_copy_(0, active, lse_of_active)


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    lse: Tensor,
    kept: Tensor,
    ignore_index: int,
    label_smoothing: float | None,
    z_loss: float | None,
    softcap: float | None,
    *,
    dweight: Tensor,
    want_dx: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias, [0] where not wanted.

    That of the weight goes to `dweight` [V, C], [0] where not wanted; it may be the memory of
    `kept`, whose logits are lost then.
    """
    active, taken = active_rows(targets, rows, ignore_index)
    dbias = x.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32)
    if active.numel() == 0:
        dweight.zero_()
        return x.new_zeros(x.shape if want_dx else 0), dbias.zero_()
    targets, bias = targets[active], _float32(bias)
    slices = VocabSlices(x[taken], weight, kept, product_dtype(x))
    of_rows = _coefficients(
        dloss[active], lse[active], label_smoothing or 0.0, z_loss or 0.0, weight.shape[0]
    )
    dtaken = x.new_zeros(slices.x.shape, dtype=torch.float32)
    memory = torch.empty_like(slices.x)
    for columns, logits, grad, w in slices.backward():
        torch.ops.encfast.vocab_grad(
            logits, part(bias, columns), targets, columns.start, softcap or 0.0, of_rows, grad
        )
        if want_dx:
            add_product(dtaken, grad, w, memory)
        if dweight.numel():
            slices.put_grad(grad, dweight[columns])
        if want_dbias:
            torch.sum(grad, 0, dtype=torch.float32, out=dbias[columns])
    return _of_all_rows(dtaken, taken, x) if want_dx else x.new_empty(0), dbias


def active_rows(
    targets: Tensor, rows: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | slice]:
    """Where targets count, int64 [M'], and which rows of x those are."""
    active = (targets != ignore_index).nonzero().squeeze(1)
    if rows is not None:
        return active, rows[active]
    return active, active if active.numel() < targets.numel() else slice(None)


def part(bias: Tensor | None, columns: slice) -> Tensor | None:
    """The bias of these columns, if there is one."""
    return None if bias is None else bias[columns]


def _of_all_rows(dtaken: Tensor, taken: Tensor | slice, x: Tensor) -> Tensor:
    dtaken = dtaken.to(x.dtype)
    if isinstance(taken, slice):
        return dtaken
    return torch.ops.encfast.scatter_rows(dtaken, taken, x.shape[0])


def _coefficients(
    dloss: Tensor, lse: Tensor, label_smoothing: float, z_loss: float, vocab: int
) -> Tensor:
    """float32 [4, M'], of csrc/cpu/linear_cross_entropy.h's `VocabCoefficient`."""
    d = dloss.float()
    factor = d * (1 + 2 * z_loss * lse)
    return torch.stack((lse, factor, -label_smoothing / vocab * d, (label_smoothing - 1) * d))


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
