"""Contrastive losses over all pairs of two sets of features, without the matrix of their logits.

    x_ij = logit_scale a_i . b_j                                 (SigLIP: + logit_bias)
    InfoNCE:  rows_i    = log sum_j exp(x_ij) - x_ip             p = positives[i]
              columns_i = log sum_k exp(x_kp) - x_ip
              a row's own hard negatives h: exp(logit_scale a_i . h) joins the row's sum
              smoothed by e: + e (x_ip - mean of x over the row, or column)
    SigLIP:   loss_i    = sum over j != p of log(1 + exp(x_ij)) + log(1 + exp(-x_ip))

Conventions. InfoNCE adds the columns' loss of each row's positive, by "mean" or "sum" of the two
directions, or leaves it out ("rows"). positives[i] = -1: row i has no positive; its loss is 0 and
has no gradient, though the row remains a candidate in the columns of others. In SigLIP it has
negatives alone, which count. "mean" divides InfoNCE by the number of rows that have a positive (0
without any), SigLIP by the number of rows.
excluded[i] = k: row k of b is no candidate of row i (a row and itself, where a and b are the same
features). The pair counts in neither direction: j != k in row i, and row i is left out of the sums
along column k. Features are taken as they come: normalise them before.

Sources: van den Oord et al. (arXiv:1807.03748); Radford et al., CLIP (arXiv:2103.00020); Zhai et
al., SigLIP (arXiv:2303.15343).

Backends: C++ on the CPU, which computes logits twice and holds blocks of 960 x 960; Triton on CUDA
and HIP, which keeps logits in registers and stores 64 MiB of their gradient at a time; elsewhere
the reference, which holds them all.
"""

import torch
from torch import Tensor

from ..ref import rank_loss as _ref
from . import _backends
from ._rank_loss_checks import (
    DIRECTIONS,
    REDUCTIONS,
    check_choice,
    check_excluded,
    check_features,
    check_hard_negatives,
    check_positives,
    check_scalar,
    check_smoothing,
)

DISPATCHER_OPS = ("info_nce", "info_nce_bwd", "siglip", "siglip_bwd")

# *_stats: the largest logit of each row or column, and the log of the sum of exponentials relative
# to it. Those of columns and col_loss are empty without `both`; everything is float32.
torch.library.define(
    "encfast::info_nce",
    "(Tensor a, Tensor b, Tensor logit_scale, Tensor positives, Tensor? excluded, bool both) -> "
    "(Tensor row_loss, Tensor col_loss, Tensor positive, Tensor row_stats, Tensor col_stats)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is not wanted is [0]; dscale is float32.
torch.library.define(
    "encfast::info_nce_bwd",
    "(Tensor drow, Tensor dcol, Tensor dpositive, Tensor a, Tensor b, Tensor logit_scale, "
    "Tensor positives, Tensor? excluded, Tensor row_stats, Tensor col_stats, bool both, "
    "bool want_da, bool want_db) -> (Tensor da, Tensor db, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::siglip",
    "(Tensor a, Tensor b, Tensor logit_scale, Tensor logit_bias, Tensor positives) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::siglip_bwd",
    "(Tensor dloss, Tensor a, Tensor b, Tensor logit_scale, Tensor logit_bias, Tensor positives, "
    "bool want_da, bool want_db) -> (Tensor da, Tensor db, Tensor dscale, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("encfast::info_nce")
def _fake_info_nce(a, b, logit_scale, positives, excluded, both):
    n, m = a.shape[0], b.shape[0]
    sizes = ((n,), (n if both else 0,), (n,), (2, n), (2, m if both else 0))
    return tuple(a.new_empty(size, dtype=torch.float32) for size in sizes)


@torch.library.register_fake("encfast::info_nce_bwd")
def _fake_info_nce_bwd(
    drow,
    dcol,
    dpositive,
    a,
    b,
    scale,
    positives,
    excluded,
    row_stats,
    col_stats,
    both,
    want_da,
    want_db,
):
    return *_fake_grads(a, b, want_da, want_db), a.new_empty((), dtype=torch.float32)


@torch.library.register_fake("encfast::siglip")
def _fake_siglip(a, b, logit_scale, logit_bias, positives):
    return a.new_empty(a.shape[0], dtype=torch.float32)


@torch.library.register_fake("encfast::siglip_bwd")
def _fake_siglip_bwd(dloss, a, b, logit_scale, logit_bias, positives, want_da, want_db):
    scalars = (a.new_empty((), dtype=torch.float32) for _ in range(2))
    return *_fake_grads(a, b, want_da, want_db), *scalars


def _fake_grads(a, b, want_da, want_db):
    return a.new_empty(a.shape if want_da else 0), b.new_empty(b.shape if want_db else 0)


def _setup_info_nce(ctx, inputs, output) -> None:
    *tensors, ctx.both = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(True)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*tensors, *output[3:])


def _info_nce_backward(ctx, drow, dcol, dpositive, *_):
    a, b, scale, *rest = ctx.saved_tensors
    need_a, need_b, need_scale = ctx.needs_input_grad[:3]
    da, db, dscale = torch.ops.encfast.info_nce_bwd(
        drow, dcol, dpositive, a, b, scale, *rest, ctx.both, need_a, need_b
    )
    return (
        da if need_a else None,
        db if need_b else None,
        dscale.to(scale.dtype) if need_scale else None,
        *[None] * 3,
    )


def _setup_siglip(ctx, inputs, output) -> None:
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*inputs)


def _siglip_backward(ctx, dloss):
    need = ctx.needs_input_grad[:4]
    grads = torch.ops.encfast.siglip_bwd(dloss, *ctx.saved_tensors, need[0], need[1])
    return *(
        g.to(x.dtype) if needed else None
        for g, x, needed in zip(grads, ctx.saved_tensors, need, strict=False)
    ), None


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "rank_loss: double backward is not implemented; encfast.ref.rank_loss has one"
    )


torch.library.register_autograd(
    "encfast::info_nce", _info_nce_backward, setup_context=_setup_info_nce
)
torch.library.register_autograd("encfast::siglip", _siglip_backward, setup_context=_setup_siglip)
for _op in ("info_nce_bwd", "siglip_bwd"):
    torch.library.register_autograd(
        f"encfast::{_op}", _no_double_backward, setup_context=lambda ctx, inputs, output: None
    )


def _check_info_nce(a, b, logit_scale, positives, excluded):
    check_features("info_nce", a, "b", b)
    check_scalar("info_nce", "logit_scale", logit_scale, a, positive=True)
    check_positives("info_nce", positives, a, b)
    check_excluded("info_nce", excluded, positives, a, b)


def _check_siglip(a, b, logit_scale, logit_bias, positives):
    check_features("siglip", a, "b", b)
    check_scalar("siglip", "logit_scale", logit_scale, a, positive=True)
    check_scalar("siglip", "logit_bias", logit_bias, a, positive=False)
    check_positives("siglip", positives, a, b)


def _reference_info_nce(a, b, logit_scale, positives, excluded, both):
    _check_info_nce(a, b, logit_scale, positives, excluded)
    return _ref.info_nce_parts(a, b, logit_scale, positives, excluded, both)


def _reference_info_nce_bwd(*args):
    return _wanted(*_ref.info_nce_bwd(*args[:-2]), want=args[-2:])


def _reference_siglip(a, b, logit_scale, logit_bias, positives):
    _check_siglip(a, b, logit_scale, logit_bias, positives)
    options = {"logit_scale": logit_scale, "logit_bias": logit_bias, "positives": positives}
    return _ref.siglip(a, b, **options, reduction="none")


def _reference_siglip_bwd(*args):
    return _wanted(*_ref.siglip_bwd(*args[:-2]), want=args[-2:])


def _wanted(da, db, *scalars, want):
    return da if want[0] else da.new_empty(0), db if want[1] else db.new_empty(0), *scalars


def _triton_info_nce(a, b, logit_scale, positives, excluded, both):
    from ..kernels import rank_loss as kernels

    _check_info_nce(a, b, logit_scale, positives, excluded)
    return kernels.info_nce(a, b, logit_scale, positives, excluded, both)


def _triton_info_nce_bwd(*args):
    from ..kernels import rank_loss as kernels

    return kernels.info_nce_bwd(*args)


def _triton_siglip(a, b, logit_scale, logit_bias, positives):
    from ..kernels import rank_loss as kernels

    _check_siglip(a, b, logit_scale, logit_bias, positives)
    return kernels.siglip(a, b, logit_scale, logit_bias, positives)


def _triton_siglip_bwd(*args):
    from ..kernels import rank_loss as kernels

    return kernels.siglip_bwd(*args)


for _op, _triton, _reference in (
    ("info_nce", _triton_info_nce, _reference_info_nce),
    ("info_nce_bwd", _triton_info_nce_bwd, _reference_info_nce_bwd),
    ("siglip", _triton_siglip, _reference_siglip),
    ("siglip_bwd", _triton_siglip_bwd, _reference_siglip_bwd),
):
    _backends.register_reference("rank_loss", _op, _reference)
    _backends.register_triton("rank_loss", _op, _triton, _reference)


def info_nce(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor | float,
    positives: Tensor | None = None,
    offset: int = 0,
    excluded: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    directions: str = "mean",
    label_smoothing: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the right pairs among all; the module docstring has the formula.

    Args:
        a: [B, D] float32, bfloat16 or float16. Any strides; rows are read in place where the
            channels are contiguous.
        b: [M, D] of a's dtype, the candidates of every row.
        logit_scale: one over the temperature, a positive number or a 0-dim tensor, which gets a
            gradient.
        positives: int64 [B], the row of b that belongs to each row of a, -1 for none. None: row i
            has row offset + i.
        offset: of the positives where they are not given: rank * B for features gathered from
            processes of B rows each.
        excluded: int64 [B], the row of b that is no candidate of each row of a, -1 for none; never
            its positive. Rows of `negatives` count on from those of b. Not with label smoothing.
        negatives: [Q, D] of a's dtype, candidates of all rows as well, a queue; they are copied
            behind b.
        hard_negatives: [B, H, D] of a's dtype, H more candidates of each row alone. A copy in
            float32 is made of 16 bits. Not with label smoothing.
        directions: "mean" (CLIP) or "sum" of the losses along rows and columns, or "rows" alone.
        label_smoothing: e of the formula, in [0, 1); None is 0.
        reduction: "mean" over the rows that have a positive, "sum", or "none".

    Returns:
        float32, 0-dim, or [B] for "none".

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. RuntimeError for
            values in a compiled graph.

    Numerics: products and sums in float32, exponentials relative to the largest logit. On GPUs, and
    in bfloat16 on CPUs with instructions for it, the gradient of the logits is rounded to a's dtype
    once, for products of that dtype. Bit-equal from run to run and for any number of threads; no
    atomics. Autocast casts nothing. Beside inputs and gradients the CPU needs about (4 D + 960) 960
    floats, and D floats a row of a for gradients in 16 bits.

    Examples:
        >>> a = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
        >>> loss = ops.info_nce(a, a.detach(), logit_scale=10.0)
        >>> logits = 10.0 * a @ a.T
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits, torch.arange(4)))
        True
        >>> loss.backward()
    """
    op = "info_nce"
    check_features(op, a, "b", b)
    check_choice(op, "directions", directions, DIRECTIONS)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_smoothing(op, label_smoothing, excluded=excluded, hard_negatives=hard_negatives)
    scale = scalar_of(op, "logit_scale", logit_scale, a, positive=True)
    positives = positives_of(op, positives, offset, a, b)
    if negatives is not None:
        check_features(op, a, "negatives", negatives)
        b = torch.cat([b, negatives])
    check_excluded(op, excluded, positives, a, b)
    both = directions != "rows"
    row, col, positive, _, _ = torch.ops.encfast.info_nce(a, b, scale, positives, excluded, both)
    if label_smoothing:
        row, col = _smoothed(row, col, positive, a, b, scale, positives, label_smoothing)
    if hard_negatives is not None:
        row = _with_hard_negatives(row, positive, a, hard_negatives, scale, positives >= 0)
    loss = row + col if both else row
    return _reduced(loss / 2 if directions == "mean" else loss, reduction, positives)


def siglip(
    a: Tensor,
    b: Tensor,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    positives: Tensor | None = None,
    offset: int = 0,
    negative_only: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy of every pair; the module docstring has the formula.

    Args:
        a: [B, D] float32, bfloat16 or float16, as in `info_nce`.
        b: [M, D] of a's dtype.
        logit_scale: a positive number or a 0-dim tensor, which gets a gradient.
        logit_bias: a number or a 0-dim tensor, which gets a gradient; None is 0.
        positives: int64 [B], the row of b that belongs to each row of a, -1 for none. None: row i
            has row offset + i.
        offset: of the positives where they are not given.
        negative_only: no pair is right: b comes from another process.
        reduction: "mean" over the rows of a, "sum", or "none".

    Returns:
        float32, 0-dim, or [B] for "none": sums over the rows of b.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it. RuntimeError for
            values in a compiled graph.

    Numerics: as `info_nce`.

    Examples:
        >>> a = torch.eye(3)
        >>> ops.siglip(a, a, logit_scale=20.0, logit_bias=-10.0) < 0.01
        tensor(True)
    """
    op = "siglip"
    check_features(op, a, "b", b)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    scale = scalar_of(op, "logit_scale", logit_scale, a, positive=True)
    bias = scalar_of(op, "logit_bias", 0.0 if logit_bias is None else logit_bias, a, positive=False)
    if negative_only and positives is not None:
        raise ValueError(f"{op}: positives are given, expected none with negative_only=True")
    if negative_only:
        positives = torch.full((a.shape[0],), -1, device=a.device)
    loss = torch.ops.encfast.siglip(a, b, scale, bias, positives_of(op, positives, offset, a, b))
    return _reduced(loss, reduction)


def scalar_of(op: str, name: str, x: Tensor | float, a: Tensor, positive: bool) -> Tensor:
    """A scale or bias as the checked 0-dim tensor that the dispatcher's op takes."""
    if isinstance(x, (int, float)):
        x = torch.full((), x, dtype=torch.float32, device=a.device)
    check_scalar(op, name, x, a, positive)
    return x


def positives_of(op: str, positives: Tensor | None, offset: int, a: Tensor, b: Tensor) -> Tensor:
    """int64 ``[B]``: the row of b that belongs to each of a; row i + offset unless given."""
    if positives is not None:
        check_positives(op, positives, a, b)
        return positives
    if offset < 0 or offset + a.shape[0] > b.shape[0]:
        raise ValueError(
            f"{op}: offset is {offset}, but a has {a.shape[0]} rows and b {b.shape[0]}; give "
            "positives where rows do not correspond"
        )
    return torch.arange(a.shape[0], device=a.device) + offset


def _with_hard_negatives(row, positive, a, hard, scale, has) -> Tensor:
    """The rows' losses with more terms in their sums; 0 stays 0."""
    check_hard_negatives("info_nce", a, hard)
    x = scale.float() * (hard.float() @ a.float()[:, :, None])[..., 0]  # [B, H]
    more = (x - positive[:, None]).logsumexp(1)
    return torch.logaddexp(row, more).where(has, 0)


def _smoothed(row, col, positive, a, b, scale, positives, e) -> tuple[Tensor, Tensor]:
    """Losses whose target is mixed with the uniform distribution; 0 stays 0."""
    has, column = positives >= 0, positives.clamp(min=0)
    of_row = scale.float() * (a.float() @ b.mean(0, dtype=torch.float32))
    row = row + (e * (positive - of_row)).where(has, 0)
    if col.shape[0]:
        of_column = scale.float() * (b.float() @ a.mean(0, dtype=torch.float32))
        col = col + (e * (positive - of_column[column])).where(has, 0)
    return row, col


def _reduced(loss: Tensor, reduction: str, positives: Tensor | None = None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if positives is None else loss.sum() / (positives >= 0).sum().clamp(min=1)


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
