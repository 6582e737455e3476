"""Distillation of a teacher's order of hard negatives: mining, products with the mined, the loss.

    x_j    = logit_scale a_i . b_{c_ij}                c_i1 .. c_iK in the teacher's order
    R_j    = log sum_{k >= j} exp(x_k)
    loss_i = sum_{j <= v_i} (R_j - x_j)                v_i: how many of them are valid

Conventions. Each valid candidate is the right one among those ranked behind it, invalid ones
included: a truncated Plackett-Luce likelihood, ListMLE for v = K. A row without a valid candidate
has a loss of 0 and no gradient. "mean_query" divides by the number of rows, "mean_term" by that of
valid candidates (0 without any). No gradient goes to the choice of candidates or to their order.
Features are taken as they come: normalise them before.

Sources: Chen et al., CVPR 2024 (arXiv:2407.07479), CPRD; Xia et al. 2008, ListMLE.

Backends: C++ on the CPU, which keeps [B, K] products and never a [B, M] or [B, K, K] matrix;
elsewhere the reference, whose gather is [B, K, D].
"""

import torch
from torch import Tensor

from ..ref.partial_ranking import candidate_dots as _ref_dots
from ..ref.partial_ranking import candidate_dots_bwd as _ref_dots_bwd
from ..ref.partial_ranking import hard_negatives as _ref_hard_negatives
from ..ref.partial_ranking import partial_ranking as _ref_ranking
from ..ref.partial_ranking import partial_ranking_bwd as _ref_ranking_bwd
from . import _backends
from ._checks import check_device, check_dtype, check_range, check_tensor, check_values
from ._rank_loss_checks import check_choice, check_features, check_positives, check_scalar
from .rank_loss import positives_of, scalar_of

DISPATCHER_OPS = (
    "hard_negatives",
    "candidate_dots",
    "candidate_dots_bwd",
    "partial_ranking",
    "partial_ranking_bwd",
)
REDUCTIONS = ("mean_query", "mean_term", "sum", "none")

torch.library.define(
    "encfast::hard_negatives",
    "(Tensor a, Tensor b, SymInt k, Tensor positives) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Products and what follows of them are float32.
torch.library.define(
    "encfast::candidate_dots",
    "(Tensor a, Tensor b, Tensor candidates) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is not wanted is [0].
torch.library.define(
    "encfast::candidate_dots_bwd",
    "(Tensor ddots, Tensor a, Tensor b, Tensor candidates, bool want_da, bool want_db) "
    "-> (Tensor da, Tensor db)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::partial_ranking",
    "(Tensor dots, Tensor logit_scale, Tensor valid) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::partial_ranking_bwd",
    "(Tensor dloss, Tensor dots, Tensor logit_scale, Tensor valid) "
    "-> (Tensor ddots, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_k(op: str, k: int, b: Tensor, positives: Tensor) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{op}: k is {type(k).__name__}, expected int")
    if not 1 <= k <= b.shape[0]:
        raise ValueError(f"{op}: k is {k}, expected 1..{b.shape[0]}, the number of candidates")
    if k == b.shape[0]:
        rule = f"which leaves {b.shape[0] - 1} candidates, k is {k}"
        check_values(op, "positives", positives, lambda p: p < 0, lambda: rule)


def _check_candidates(op: str, candidates: Tensor, a: Tensor, b: Tensor) -> None:
    check_tensor(op, "candidates", candidates, 2, "[B, K]")
    check_dtype(op, "candidates", candidates, torch.int64)
    check_device(op, "candidates", candidates, "a", a)
    shape = tuple(candidates.shape)
    if shape[0] != a.shape[0] or shape[1] < 1:
        raise ValueError(
            f"{op}: candidates has shape {shape}, expected [{a.shape[0]}, K] with K >= 1"
        )
    rule = "expected one of the {} rows of b"
    check_range(op, "candidates", candidates, 0, b.shape[0], lambda: rule.format(b.shape[0]))


def _check_valid(op: str, valid: Tensor, like: Tensor, count: int) -> None:
    check_tensor(op, "valid", valid, 1, "[B]")
    check_dtype(op, "valid", valid, torch.int64)
    check_device(op, "valid", valid, "the scores", like)
    if valid.shape[0] != like.shape[0]:
        raise ValueError(
            f"{op}: valid has {valid.shape[0]} entries, expected one for each of "
            f"{like.shape[0]} rows"
        )
    rule = "expected 0..{}, the number of candidates"
    check_range(op, "valid", valid, 0, count + 1, lambda: rule.format(count))


def _check_dots(op: str, dots: Tensor) -> None:
    check_tensor(op, "dots", dots, 2, "[B, K]")
    check_dtype(op, "dots", dots, torch.float32, hint="; for float64 use encfast.ref")
    if dots.shape[0] < 1 or dots.shape[1] < 1:
        raise ValueError(
            f"{op}: dots has shape {tuple(dots.shape)}, expected at least one row and candidate"
        )


@torch.library.register_fake("encfast::hard_negatives")
def _fake_hard_negatives(a, b, k, positives):
    return a.new_empty((a.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("encfast::candidate_dots")
def _fake_candidate_dots(a, b, candidates):
    return a.new_empty(candidates.shape, dtype=torch.float32)


@torch.library.register_fake("encfast::candidate_dots_bwd")
def _fake_candidate_dots_bwd(ddots, a, b, candidates, want_da, want_db):
    return a.new_empty(a.shape if want_da else 0), b.new_empty(b.shape if want_db else 0)


@torch.library.register_fake("encfast::partial_ranking")
def _fake_partial_ranking(dots, logit_scale, valid):
    return dots.new_empty(dots.shape[0])


@torch.library.register_fake("encfast::partial_ranking_bwd")
def _fake_partial_ranking_bwd(dloss, dots, logit_scale, valid):
    return dots.new_empty(dots.shape), dots.new_empty(())


def _save_inputs(ctx, inputs, output) -> None:
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*inputs)


def _candidate_dots_backward(ctx, ddots):
    need_a, need_b = ctx.needs_input_grad[:2]
    grads = torch.ops.encfast.candidate_dots_bwd(ddots, *ctx.saved_tensors, need_a, need_b)
    return grads[0] if need_a else None, grads[1] if need_b else None, None


def _partial_ranking_backward(ctx, dloss):
    dots, scale, valid = ctx.saved_tensors
    ddots, dscale = torch.ops.encfast.partial_ranking_bwd(dloss, dots, scale, valid)
    need_dots, need_scale = ctx.needs_input_grad[:2]
    return ddots if need_dots else None, dscale.to(scale.dtype) if need_scale else None, None


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "partial_ranking: double backward is not implemented; encfast.ref.partial_ranking has one"
    )


for _op, _backward in (
    ("candidate_dots", _candidate_dots_backward),
    ("partial_ranking", _partial_ranking_backward),
):
    torch.library.register_autograd(f"encfast::{_op}", _backward, setup_context=_save_inputs)
    torch.library.register_autograd(
        f"encfast::{_op}_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
    )


def _reference_hard_negatives(a, b, k, positives):
    check_features("hard_negatives", a, "b", b)
    check_positives("hard_negatives", positives, a, b)
    _check_k("hard_negatives", k, b, positives)
    return _ref_hard_negatives(a, b, k, positives)


def _reference_candidate_dots(a, b, candidates):
    check_features("candidate_dots", a, "b", b)
    _check_candidates("candidate_dots", candidates, a, b)
    return _ref_dots(a, b, candidates)


def _reference_candidate_dots_bwd(ddots, a, b, candidates, want_da, want_db):
    da, db = _ref_dots_bwd(ddots, a, b, candidates)
    return da if want_da else a.new_empty(0), db if want_db else b.new_empty(0)


def _reference_partial_ranking(dots, logit_scale, valid):
    _check_dots("partial_ranking", dots)
    check_scalar("partial_ranking", "logit_scale", logit_scale, dots, positive=True)
    _check_valid("partial_ranking", valid, dots, dots.shape[1])
    return _ref_ranking(dots, logit_scale, valid)


_backends.register_reference("partial_ranking", "hard_negatives", _reference_hard_negatives)
_backends.register_reference("partial_ranking", "candidate_dots", _reference_candidate_dots)
_backends.register_reference("partial_ranking", "candidate_dots_bwd", _reference_candidate_dots_bwd)
_backends.register_reference("partial_ranking", "partial_ranking", _reference_partial_ranking)
_backends.register_reference("partial_ranking", "partial_ranking_bwd", _ref_ranking_bwd)


def hard_negatives(
    a: Tensor, b: Tensor, k: int, positives: Tensor | None = None, *, offset: int = 0
) -> Tensor:
    """The k rows of b with the largest product with each row of a, the largest first.

    Args:
        a: [B, D] float32, bfloat16 or float16.
        b: [M, D] of a's dtype.
        k: at least 1; at most M, or M - 1 where a row has a positive.
        positives: int64 [B], the row of b that is never chosen, -1 for none. None: row i has row
            offset + i.
        offset: of the positives where they are not given.

    Returns:
        int64 [B, k], without a gradient. Ties go to the lower row of b; products of NaN come last.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. RuntimeError for
            values in a compiled graph.

    Numerics: products in float32. Equal for any number of threads. The CPU needs 960 D floats and,
    for each of its 192 rows per thread, 2 k + 256 entries of 8 bytes, beside inputs and result.

    Examples:
        >>> a, b = torch.eye(3), torch.tensor([[1.0, 0.9, 0.0], [0.5, 1.0, 0.2], [0.1, 0.3, 1.0]])
        >>> ops.hard_negatives(a, b, 2)
        tensor([[1, 2],
                [0, 2],
                [1, 0]])
    """
    op = "hard_negatives"
    check_features(op, a, "b", b)
    positives = positives_of(op, positives, offset, a, b)
    _check_k(op, k, b, positives)
    return torch.ops.encfast.hard_negatives(a.detach(), b.detach(), k, positives)


def candidate_dots(a: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """Products of each row of a with its own K rows of b.

    Args:
        a: [B, D] float32, bfloat16 or float16. Any strides; rows are read in place where the
            channels are contiguous.
        b: [M, D] of a's dtype.
        candidates: int64 [B, K], rows of b; a row may stand there more than once.

    Returns:
        float32 [B, K], with gradients to a and b.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. RuntimeError for
            values in a compiled graph.

    Numerics: float32 sums, bit-equal for any number of threads; no atomics. From 8 K >= M on the
    CPU computes all M products, 96 rows of a at a time, in 96 M floats per thread and M D of
    workspace (backward: 192 M + 2 M D); below, those asked for.

    Examples:
        >>> a, b = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> ops.candidate_dots(a, b, torch.tensor([[0, 2], [1, 1]]))
        tensor([[1., 5.],
                [4., 4.]])
    """
    check_features("candidate_dots", a, "b", b)
    _check_candidates("candidate_dots", candidates, a, b)
    return torch.ops.encfast.candidate_dots(a, b, candidates)


def partial_ranking(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor | float,
    candidates: Tensor,
    valid: Tensor,
    reduction: str = "mean_query",
) -> Tensor:
    """Loss of the teacher's order of each row's candidates; the module docstring has the formula.

    Args:
        a: [B, D] float32, bfloat16 or float16, as in :func:`candidate_dots`.
        b: [M, D] of a's dtype.
        logit_scale: one over the temperature, a positive number or a 0-dim tensor, which gets a
            gradient.
        candidates: int64 [B, K], rows of b in the teacher's order, as :func:`teacher_order` has
            them.
        valid: int64 [B] in 0..K, how many of them count; the others stand behind them.
        reduction: "mean_query", "mean_term", "sum" or "none".

    Returns:
        float32, 0-dim, or [B] for "none".

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. RuntimeError for
            values in a compiled graph.

    Numerics: products in float32, sums of exponentials in float64 relative to a reference that
    follows the largest logit, their logarithms in two floats; finite at any finite logits. Memory
    is 2 [B, K] floats beside that of :func:`candidate_dots`. Deterministic.

    Examples:
        >>> a, b = torch.randn(2, 8), torch.randn(5, 8)
        >>> mined = ops.hard_negatives(a, b, 3)
        >>> candidates, valid = ops.teacher_order(mined, torch.randn(2, 3), top_m=2)
        >>> loss = ops.partial_ranking(a, b, logit_scale=10.0, candidates=candidates, valid=valid)
        >>> loss.shape
        torch.Size([])
    """
    op = "partial_ranking"
    check_features(op, a, "b", b)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    scale = scalar_of(op, "logit_scale", logit_scale, a, positive=True)
    _check_candidates(op, candidates, a, b)
    _check_valid(op, valid, a, candidates.shape[1])
    dots = torch.ops.encfast.candidate_dots(a, b, candidates)
    loss = torch.ops.encfast.partial_ranking(dots, scale, valid)
    return _reduced(loss, reduction, valid)


def _reduced(loss: Tensor, reduction: str, valid: Tensor) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "mean_query":
        return loss.mean()
    return loss.sum() / (valid.sum().clamp(min=1) if reduction == "mean_term" else 1)


@torch.no_grad()
def teacher_order(
    candidates: Tensor,
    scores: Tensor,
    *,
    threshold: float | None = None,
    top_m: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Candidates in falling order of the teacher's scores, and how many of the first are valid.

    The first invalid candidate ends the valid prefix. Without a rule all are valid.

    Args:
        candidates: int64 [B, K], as :func:`hard_negatives` returns them.
        scores: floating [B, K], the teacher's; best logits, which do not saturate as probabilities
            do. Ties keep the order of the candidates.
        threshold: a candidate is valid if its score is at least this.
        top_m: the first so many are valid, at least 0.
        mask: bool [B, K], True where a candidate is valid.

    Returns:
        int64 [B, K] and [B]. No gradient goes through either.

    Raises:
        TypeError, ValueError: an argument is malformed, a score is NaN, or there is more than one
            rule.

    Examples:
        >>> candidates, scores = torch.tensor([[7, 8, 9]]), torch.tensor([[0.1, 0.9, 0.5]])
        >>> ops.teacher_order(candidates, scores, threshold=0.4)
        (tensor([[8, 9, 7]]), tensor([2]))
    """
    _check_order(candidates, scores, threshold, top_m, mask)
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    good = torch.ones_like(order, dtype=torch.bool)
    if threshold is not None:
        good = ranked >= threshold
    elif top_m is not None:
        good = (torch.arange(order.shape[1], device=order.device) < top_m).expand_as(order)
    elif mask is not None:
        good = mask.gather(1, order)
    return candidates.gather(1, order), good.long().cumprod(1).sum(1)


def _check_order(candidates, scores, threshold, top_m, mask) -> None:
    op = "teacher_order"
    check_tensor(op, "candidates", candidates, 2, "[B, K]")
    check_dtype(op, "candidates", candidates, torch.int64)
    check_tensor(op, "scores", scores, 2, "[B, K]")
    for name, x in (("scores", scores), ("mask", mask)):
        if x is not None and x.shape != candidates.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}, candidates has {tuple(candidates.shape)}"
            )
    if not scores.is_floating_point():
        raise TypeError(f"{op}: scores is {scores.dtype}, expected floating numbers")
    check_values(op, "scores", scores, lambda x: ~x.isnan(), lambda: "which has no place")
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
    given = {"threshold": threshold, "top_m": top_m, "mask": mask}
    names = [name for name, rule in given.items() if rule is not None]
    if len(names) > 1:
        raise ValueError(f"{op}: {' and '.join(names)} are given, expected one rule at most")
    if threshold is not None and threshold != threshold:
        raise ValueError(f"{op}: threshold is {threshold}, expected a number")
    if top_m is not None and top_m < 0:
        raise ValueError(f"{op}: top_m is {top_m}, expected at least 0")


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
