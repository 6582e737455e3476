"""What rank_loss means, in plain PyTorch with all logits at hand, and what its kernels return.

`info_nce` and `siglip` are the losses. `*_parts` and `*_bwd` are what the dispatcher ops compute,
for the fallback.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -1e38  # finite: a row or column of nothing else has a log-sum-exp and no NaN


def info_nce(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor,
    positives: Tensor,
    excluded: Tensor | None = None,
    negatives: Tensor | None = None,
    directions: str = "mean",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy along rows, and along columns. Args of `encfast.ops.info_nce`."""
    x = _logits(a, b if negatives is None else torch.cat([b, negatives]), logit_scale)
    x = _hidden(x, excluded)
    has, column = positives >= 0, positives.clamp(min=0)
    along = [x.log_softmax(1)] + ([] if directions == "rows" else [x.log_softmax(0)])
    uniform = [along[0].mean(1), *(log_p.mean(0)[column] for log_p in along[1:])]
    losses = [
        -(1 - label_smoothing) * log_p.gather(1, column[:, None])[:, 0] - label_smoothing * mean
        for log_p, mean in zip(along, uniform, strict=True)
    ]
    loss = torch.stack(losses).sum(0) / (len(losses) if directions == "mean" else 1)
    loss = loss.where(has, 0)
    if reduction == "none":
        return loss
    return loss.sum() / (has.sum().clamp(min=1) if reduction == "mean" else 1)


def siglip(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    positives: Tensor,
    reduction: str = "mean",
) -> Tensor:
    """A binary cross entropy for each pair, summed by row. Args of `encfast.ops.siglip`."""
    x = _logits(a, b, logit_scale, logit_bias)
    loss = -F.logsigmoid(_signs(x, positives) * x).sum(1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


def info_nce_parts(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    positives: Tensor,
    excluded: Tensor | None,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows and columns, positives' logits, and (maximum, log of sum) of each."""
    x = _hidden(_logits(a, b, logit_scale), excluded)
    has, column = positives >= 0, positives.clamp(min=0)
    positive = x.gather(1, column[:, None])[:, 0]
    rows = _log_sums(x, 1)
    row_loss = ((rows[0] - positive) + rows[1]).where(has, 0)
    if both:
        columns = _log_sums(x, 0)
        col_loss = ((columns[0, column] - positive) + columns[1, column]).where(has, 0)
    else:
        columns, col_loss = x.new_empty(2, 0), x.new_empty(0)
    return row_loss, col_loss, positive.where(has, 0), rows, columns


def info_nce_bwd(
    drow: Tensor,
    dcol: Tensor,
    dpositive: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    positives: Tensor,
    excluded: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and logit_scale, the last in the compute dtype."""
    products = _logits(a, b, torch.ones_like(logit_scale))
    x = products * logit_scale.to(products.dtype)
    has, column = positives >= 0, positives.clamp(min=0)
    one_hot = F.one_hot(column, x.shape[1]).to(x.dtype)
    drow, dpositive = drow.where(has, 0), dpositive.where(has, 0)
    g = ((x - row_stats[0, :, None] - row_stats[1, :, None]).exp() - one_hot) * drow[:, None]
    g = g + one_hot * dpositive[:, None]
    if both:
        dcol = dcol.where(has, 0)
        dcolumn = x.new_zeros(x.shape[1]).index_add(0, column, dcol)
        g = g + (x - col_stats[0] - col_stats[1]).exp() * dcolumn - one_hot * dcol[:, None]
    g = _hidden(g, excluded, 0.0)
    return *_feature_grads(g, a, b, logit_scale), (g * products).sum()


def siglip_bwd(
    dloss: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, logit_scale and logit_bias, the last two in the compute dtype."""
    products = _logits(a, b, torch.ones_like(logit_scale))
    x = products * logit_scale.to(products.dtype) + logit_bias.to(products.dtype)
    sign = _signs(x, positives)
    g = -sign * (-sign * x).sigmoid() * dloss[:, None]
    return *_feature_grads(g, a, b, logit_scale), (g * products).sum(), g.sum()


def _logits(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    compute = torch.promote_types(a.dtype, torch.float32)
    x = scale.to(compute) * (a.to(compute) @ b.to(compute).mT)
    return x if bias is None else x + bias.to(compute)


def _hidden(x: Tensor, excluded: Tensor | None, value: float = HIDDEN) -> Tensor:
    """x with `value` at the pairs that are no candidates."""
    if excluded is None:
        return x
    return x.masked_fill(torch.arange(x.shape[1], device=x.device) == excluded[:, None], value)


def _log_sums(x: Tensor, dim: int) -> Tensor:
    largest = x.amax(dim, keepdim=True)
    return torch.stack([largest.squeeze(dim), (x - largest).exp().sum(dim).log()])


def _signs(x: Tensor, positives: Tensor) -> Tensor:
    """1 at each row's positive, -1 elsewhere."""
    hit = torch.arange(x.shape[1], device=x.device) == positives[:, None]
    return 2 * hit.to(x.dtype) - 1


def _feature_grads(g: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    g = g * scale.to(g.dtype)
    return (g @ b.to(g.dtype)).to(a.dtype), (g.mT @ a.to(g.dtype)).to(b.dtype)
