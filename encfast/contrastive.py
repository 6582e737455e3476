"""Contrastive losses by classes, distances and margins, without the matrix of all pairs.

All take features as they come: normalise them before, where a loss is of cosines. Low-precision
features are compared in float32, float64 stays as it is where no op is asked.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast import ops
from encfast._precision import wide

Reduction = Literal["mean", "sum", "none"]

_TILE = 512  # rows whose distances or similarities to all others exist at once


def nt_xent(
    a: Tensor, b: Tensor, *, logit_scale: Tensor | float, reduction: Reduction = "mean"
) -> Tensor:
    """SimCLR's loss: each of 2B rows finds its other view among the 2B - 1 others.

    Source: Chen et al. 2020, arXiv 2002.05709, equation 1.

    Args:
        a, b: two views ``[B, D]`` of the same B things, float32, bfloat16 or float16.
        logit_scale: one over the temperature, a positive number or a 0-dim tensor, which gets a
            gradient.
        reduction: over the 2B rows; "none" has those of ``a`` first.

    Returns:
        fp32, 0-dim, or ``[2B]`` for "none".

    Raises:
        ValueError: for views of different shapes; and as :func:`encfast.ops.info_nce` does.

    Examples:
        >>> from encfast.contrastive import nt_xent
        >>> views = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
        >>> nt_xent(*views, logit_scale=10.0) > nt_xent(views[0], views[0], logit_scale=10.0)
        tensor(True)
    """
    if a.shape != b.shape:
        raise ValueError(
            f"nt_xent: b has shape {tuple(b.shape)}, expected {tuple(a.shape)} like the first view"
        )
    x = torch.cat([a, b])
    own = torch.arange(len(x), device=x.device)
    return ops.info_nce(
        x,
        x,
        logit_scale=logit_scale,
        positives=own.roll(len(a)),
        excluded=own,
        directions="rows",
        reduction=reduction,
    )


def sup_con(
    features: Tensor, labels: Tensor, *, logit_scale: Tensor | float, reduction: Reduction = "mean"
) -> Tensor:
    """SupCon: ``-mean over p in P(i) of x_ip + log sum over k != i of exp(x_ik)``.

    x are ``logit_scale`` times the products of rows, P(i) the other rows of row i's class. A row
    alone in its class has loss 0, counts for nothing in "mean", and remains what others differ
    from. The mean of x_ip is a product with the mean row of P(i), so that no pairs are listed.

    Source: Khosla et al. 2020, arXiv 2004.11362, equation 2.

    Args:
        features: ``[N, D]`` float32, bfloat16 or float16; several views of a thing are several
            rows of one label.
        labels: int64 ``[N]``, any numbers.
        logit_scale: as in :func:`nt_xent`.
        reduction: "mean" over the rows that are not alone, "sum", or "none".

    Returns:
        fp32, 0-dim, or ``[N]`` for "none".

    Raises:
        TypeError, ValueError: for labels of another shape or dtype; and as
            :func:`encfast.ops.info_nce` does.

    Examples:
        >>> from encfast.contrastive import sup_con
        >>> features = torch.eye(2).repeat(3, 1)  # rows 0, 2, 4 are equal, and 1, 3, 5
        >>> sup_con(features, torch.tensor([0, 1, 0, 1, 0, 1]), logit_scale=10.0).round(decimals=3)
        tensor(0.6930)
        >>> sup_con(features, torch.tensor([0, 1, 1, 0, 2, 3]), logit_scale=10.0) > 10
        tensor(True)
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"sup_con: labels is {labels.dtype}, expected int64")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"sup_con: labels has shape {tuple(labels.shape)}, features {tuple(features.shape)}; "
            "expected one label a row"
        )
    classes, other = _classes(labels)
    loss = ops.info_nce(
        features,
        features,
        logit_scale=logit_scale,
        positives=other,
        excluded=torch.arange(len(labels), device=labels.device),
        directions="rows",
        reduction="none",
    )
    # From one positive to the mean of all: the difference of the two rows, not of two logits.
    x = features.float()
    shift = x.index_select(0, other.clamp(min=0)) - _mean_of_others(x, classes)
    loss = (loss + logit_scale * (x * shift).sum(1)).where(other >= 0, 0)
    if reduction == "none":
        return loss
    return loss.sum() / ((other >= 0).sum().clamp(min=1) if reduction == "mean" else 1)


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class ``[N]`` of each row in [0, N), and the next row of its class, -1 where there is none.

    Sorting, not ``unique``, whose number of classes a GPU's host would have to wait for.
    """
    order = labels.argsort(stable=True)
    ordered, rank = labels[order], torch.arange(len(labels), device=labels.device)
    edge = ordered[1:] != ordered[:-1]
    first, last = F.pad(edge, (1, 0), value=True), F.pad(edge, (0, 1), value=True)
    start = rank.where(first, 0).cummax(0).values
    following = (rank + 1).where(~last, start)
    other = order[following].where(following != rank, -1)
    back = torch.empty_like(order).scatter(0, order, rank)
    return (first.long().cumsum(0) - 1)[back], other[back]


def _mean_of_others(x: Tensor, classes: Tensor) -> Tensor:
    """``[N, D]``: mean of the class's other rows, 0 without any."""
    sums = torch.zeros_like(x).index_add(0, classes, x).index_select(0, classes)
    counts = torch.zeros_like(classes).index_add(0, classes, torch.ones_like(classes))[classes]
    return (sums - x) / (counts - 1).clamp(min=1)[:, None]


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """``max(0, |a - p| - |a - n| + margin)`` with Euclidean distances; gradient 0 at distance 0.

    Source: Schroff et al. 2015, arXiv 1503.03832, with distances in the place of their squares, as
    Hermans et al. 2017, arXiv 1703.07737.

    Args:
        anchor, positive, negative: ``[B, D]``.
        margin: above 0.
        reduction: over the B triplets; the mean of none is 0.

    Returns:
        0-dim, or ``[B]`` for "none".

    Raises:
        ValueError: for shapes that differ, or a margin that is not positive and finite.

    Examples:
        >>> from encfast.contrastive import triplet_loss
        >>> anchor = torch.tensor([[0.0, 0.0]])
        >>> triplet_loss(anchor, torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]]), margin=2.5)
        tensor(0.5000)
    """
    _check_margin("triplet_loss", margin)
    for name, x in (("positive", positive), ("negative", negative)):
        if x.shape != anchor.shape:
            raise ValueError(
                f"triplet_loss: {name} has shape {tuple(x.shape)}, expected {tuple(anchor.shape)} "
                "like anchor"
            )
    near = torch.linalg.vector_norm(wide(anchor) - wide(positive), dim=-1)
    far = torch.linalg.vector_norm(wide(anchor) - wide(negative), dim=-1)
    loss = (near - far + margin).clamp(min=0)
    if reduction == "none":
        return loss
    return loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)


@torch.no_grad()
def hardest_triplets(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its farthest row of the same class, and its nearest one of another class.

    Source: Hermans et al. 2017, arXiv 1703.07737, equation 5. Distances exist for 512 rows at once.

    Args:
        features: ``[N, D]``.
        labels: ``[N]``.

    Returns:
        int64 ``[M]`` each: anchors, which have both, in order; positives; negatives. For
        ``triplet_loss(x[anchors], x[positives], x[negatives])``.

    Examples:
        >>> from encfast.contrastive import hardest_triplets
        >>> features, labels = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> anchor, positive, negative = hardest_triplets(features, labels)
        >>> bool((labels[anchor] == labels[positive]).all())
        True
        >>> bool((labels[anchor] == labels[negative]).any())
        False
    """
    x, rows = wide(features), torch.arange(len(labels), device=labels.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for at in rows.split(_TILE):
        # Not by products, which lose all digits of small distances.
        distance = torch.cdist(x[at], x, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[at, None] == labels
        positive = distance.masked_fill(~same | (at[:, None] == rows), -torch.inf)
        negative = distance.masked_fill(same, torch.inf)
        (farthest, p), (nearest, n) = positive.max(1), negative.min(1)
        both = (farthest >= 0) & nearest.isfinite()
        found.append((at[both], p[both], n[both]))
    anchors, positives, negatives = (torch.cat(x) for x in zip(*found, strict=True))
    return anchors, positives, negatives


def max_margin_loss(
    a: Tensor, b: Tensor, *, margin: float = 0.2, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Sum over i != j of ``max(0, m + s_ij - s_ii) + max(0, m + s_ji - s_ii)``, s = a b^T.

    "mean" is over these 2 B (B - 1) terms. Both passes take 512 rows of s at a time; the gradients
    are made with the loss, and there is no double backward.

    Source: Karpathy and Fei-Fei 2015, arXiv 1412.2306, equation 9.

    Args:
        a, b: ``[B, D]`` of one dtype: pairs.
        margin: m, above 0.
        reduction: "mean" or "sum" of the terms.

    Returns:
        0-dim, fp32 or wider.

    Raises:
        ValueError: for shapes that differ, or a margin that is not positive and finite.

    Examples:
        >>> from encfast.contrastive import max_margin_loss
        >>> max_margin_loss(torch.eye(3), torch.eye(3), margin=0.2)
        tensor(0.)
        >>> max_margin_loss(torch.eye(3), torch.eye(3).flip(0), margin=0.2) > 0
        tensor(True)
    """
    _check_margin("max_margin_loss", margin)
    if a.shape != b.shape:
        raise ValueError(
            f"max_margin_loss: b has shape {tuple(b.shape)}, expected {tuple(a.shape)} like a"
        )
    total: Tensor = _MaxMargin.apply(a, b, margin)
    return total / max(2 * len(a) * (len(a) - 1), 1) if reduction == "mean" else total


class _MaxMargin(torch.autograd.Function):
    """The sum, whose derivatives by s are counts of the terms above 0."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, margin: float) -> Tensor:
        x, y = wide(a), wide(b)
        right, total = (x * y).sum(1), x.new_zeros(())
        da, db, counts = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(right)
        rows = torch.arange(len(x), device=x.device)
        for at in rows.split(_TILE):
            s = (x[at] @ y.T + margin).masked_fill(at[:, None] == rows, -torch.inf)
            along, across = s - right[at, None], s - right
            total = total + along.clamp(min=0).sum() + across.clamp(min=0).sum()
            if any(ctx.needs_input_grad):
                along, across = (along > 0).to(x.dtype), (across > 0).to(x.dtype)
                counts[at] += along.sum(1)
                counts += across.sum(0)
                g = along + across
                da[at] = g @ y
                db += g.T @ x[at]
        if any(ctx.needs_input_grad):
            # Wide: the gradient of a mean, 1e-6 of a sum's, is none in float16.
            ctx.save_for_backward(da - counts[:, None] * y, db - counts[:, None] * x)
            ctx.dtypes = a.dtype, b.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        da, db = (
            (grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return da, db, None


def _check_margin(op: str, margin: float) -> None:
    if not 0 < margin < float("inf"):
        raise ValueError(f"{op}: margin is {margin}, expected a positive finite number")
