"""Cross entropy with label smoothing, a logit scale and the square of the log-sum-exp (z-loss).

For a row x of logits with label y, with z = logit_scale * x, s the smoothing and V labels:

    loss = lse(z) - (1 - s) z_y - s mean(z) + lse_square_scale * lse(z)^2

Rows labelled `ignore_index` have loss and gradient 0. float32 inside (float64 stays); logits are
widened a few rows at a time, and the gradient is written in the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encfast.ops._checks import check_values

from .._arguments import refuse, require

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]

_CHUNK = 2**20  # logits that are widened to float32 at a time: 4 MiB, within a core's L2 cache


def _chunks(logits: Tensor) -> int:
    """Rows per chunk."""
    return max(1, _CHUNK // max(1, logits.shape[1]))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, known_lse, smoothing, scale, lse_square_scale, ignored, reuse):
        keep = labels != ignored
        at = labels.where(keep, 0).long()[:, None]
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty(logits.shape[0], dtype=wide)
        if known_lse is not None:
            lse.copy_(known_lse)
        loss = torch.empty_like(lse)
        parts = (logits, at, lse, loss)
        for x, y, row_lse, row_loss in zip(*(p.split(_chunks(logits)) for p in parts), strict=True):
            z = x.to(wide) * scale
            if known_lse is None:
                row_lse.copy_(z.logsumexp(1))
            row_loss.copy_(-(1 - smoothing) * z.gather(1, y)[:, 0])
            if smoothing:
                row_loss.sub_(smoothing * z.mean(1))
        z_loss = (lse_square_scale * lse.square()).where(keep, 0)
        ctx.save_for_backward(logits, at, lse, keep)
        ctx.numbers = (smoothing, scale, lse_square_scale)
        ctx.reuse = reuse
        ctx.mark_non_differentiable(z_loss)
        return (loss + lse).where(keep, 0) + z_loss, z_loss

    @staticmethod
    def backward(ctx, dloss, _):
        logits, at, lse, keep = ctx.saved_tensors
        smoothing, scale, lse_square_scale = ctx.numbers
        dlogits = logits if ctx.reuse else torch.empty_like(logits)
        weight = (dloss * scale).where(keep, 0)[:, None]
        parts = (logits, dlogits, at, lse[:, None], weight)
        for x, dx, y, row_lse, w in zip(*(p.split(_chunks(logits)) for p in parts), strict=True):
            # Not exp(z - lse): lse is rounded at its own magnitude, softmax at 1.
            g = (x.to(lse.dtype) * scale).softmax(1) * (1 + 2 * lse_square_scale * row_lse)
            if smoothing:
                g -= smoothing / x.shape[1]
            g.scatter_add_(1, y, g.new_full(y.shape, smoothing - 1))
            dx.copy_((g * w).masked_fill_(w == 0, 0))
        return dlogits, *(None,) * 7


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group=None,
) -> tuple[Tensor, Tensor]:
    """Losses of rows, see the module.

    Args:
        logits: [N, V], any floating dtype.
        labels: int [N] in 0..V - 1, or `ignore_index`.
        precomputed_lse: [N], log-sum-exp of the scaled logits, where it is known.
        label_smoothing: s, in [0, 1].
        logit_scale: multiplies the logits.
        lse_square_scale: of the z-loss.
        ignore_index: rows with this label do not count.
        inplace_backward: the gradient overwrites the logits.
        process_group: refused.

    Returns:
        (losses [N], float32 for half types, their z-loss part [N], which has no gradient).

    Raises:
        TypeError, ValueError: a malformed argument.
        NotImplementedError: process_group is given.
    """
    op = "cross_entropy_loss"
    refuse(op, "process_group", process_group, "gather the vocabulary onto each process")
    require(op, "logits", logits, 2, "[N, V]")
    require(op, "labels", labels, 1, "[N]")
    if not logits.is_floating_point():
        raise TypeError(f"{op}: logits are {logits.dtype}, expected a floating dtype")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels are {labels.dtype}, expected int64 or int32")
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(f"{op}: {labels.shape[0]} labels for {logits.shape[0]} rows of logits")
    if labels.device != logits.device:
        raise ValueError(f"{op}: labels are on {labels.device}, logits on {logits.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0..1")
    classes = logits.shape[1]
    check_values(
        op,
        "labels",
        labels,
        lambda label: (label == ignore_index) | ((label >= 0) & (label < classes)),
        lambda: f"expected 0..{classes - 1} or ignore_index, {ignore_index}",
    )
    return _CrossEntropy.apply(
        logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale,
        ignore_index, inplace_backward,
    )  # fmt: skip


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` with a reduction.

    Args:
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward: see
            `cross_entropy_loss`.
        reduction: "mean" over the rows that count, "sum" or "none".
        process_group: refused.
        return_z_loss: return (loss, z-loss part) instead of the loss.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group=None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise NotImplementedError(
                f"CrossEntropyLoss: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'"
            )
        refuse("CrossEntropyLoss", "process_group", process_group, "gather the vocabulary first")
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.logit_scale = label_smoothing, logit_scale
        self.lse_square_scale, self.inplace_backward = lse_square_scale, inplace_backward
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input [N, V] and target [N] -> float32, a scalar or [N]."""
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
        )
        loss, z_loss = (self._reduce(x, target) for x in losses)
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduce(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / (target != self.ignore_index).sum() if self.reduction == "mean" else total
