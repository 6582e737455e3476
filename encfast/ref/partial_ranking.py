"""What partial_ranking means, in plain PyTorch, and what its kernels return.

`hard_negatives`, `candidate_dots` and `partial_ranking` are the ops; `*_bwd` are what the ops
of their gradients compute, for the fallback.
"""

import torch
from torch import Tensor


def hard_negatives(a: Tensor, b: Tensor, k: int, positives: Tensor) -> Tensor:
    """int64 [B, k]: the rows of b with the largest products with each row of a, the best first.

    The row in positives [B] is left out, -1 for none. Ties go to the lower row, NaN comes last.
    """
    products = (_wide(a) @ _wide(b).mT).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    order = products.sort(dim=1, descending=True, stable=True).indices
    own = (order == positives[:, None]).int()  # to go behind all others
    return order.gather(1, own.sort(dim=1, stable=True).indices)[:, :k].contiguous()


def candidate_dots(a: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """[B, K]: products of rows of a with the rows candidates [B, K] of b, in float32 or wider."""
    return torch.einsum("bd,bkd->bk", _wide(a), _wide(b)[candidates])


def candidate_dots_bwd(
    ddots: Tensor, a: Tensor, b: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a and b."""
    da = torch.einsum("bk,bkd->bd", ddots, _wide(b)[candidates])
    of_b = ddots[..., None] * _wide(a)[:, None]  # [B, K, D]
    db = torch.zeros_like(_wide(b)).index_add(0, candidates.flatten(), of_b.flatten(0, 1))
    return da.to(a.dtype), db.to(b.dtype)


def partial_ranking(dots: Tensor, logit_scale: Tensor, valid: Tensor) -> Tensor:
    """[B]: sums of log sum_{k >= j} exp(x_k) - x_j over the first `valid`, x = logit_scale dots."""
    x, keep = _logits(dots, logit_scale), _prefix(dots, valid)
    return (_suffix_sums(x) - x).where(keep, 0).sum(1)


def partial_ranking_bwd(
    dloss: Tensor, dots: Tensor, logit_scale: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of dots and of logit_scale."""
    x, keep = _logits(dots, logit_scale), _prefix(dots, valid)
    # log sum_{j <= min(k, v)} exp(-R_j). A row of -inf alone would be NaN in some versions.
    of_terms = (-_suffix_sums(x)).where(keep | (valid == 0)[:, None], -torch.inf)
    p = (x + of_terms.logcumsumexp(1)).exp().where((valid > 0)[:, None], 0)
    dx = (p - keep.to(p.dtype)) * dloss[:, None]
    return dx * logit_scale.to(dx.dtype), (dx * dots).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(dots: Tensor, scale: Tensor) -> Tensor:
    return dots * scale.to(dots.dtype)


def _prefix(dots: Tensor, valid: Tensor) -> Tensor:
    return torch.arange(dots.shape[1], device=dots.device) < valid[:, None]


def _suffix_sums(x: Tensor) -> Tensor:
    """R_j = log sum_{k >= j} exp(x_k)."""
    return x.flip(1).logcumsumexp(1).flip(1)
