"""Cross entropy of a linear layer's output, computed without holding that output.

    z_iv   = cap(x_i . weight_v + bias_v)                 cap(z) = softcap tanh(z / softcap), or z
    lse_i  = log sum over v of exp(z_iv)
    loss_i = lse_i - (1 - eps) z_i,target - eps / V sum over v of z_iv + z_loss lse_i^2

with eps = label_smoothing. `mean` is the sum of weights_i loss_i by the sum of weights_i.

Conventions. Rows whose target is ignore_index are taken out before the first product: they cost
nothing, have loss 0 and gradient 0, and count for no mean. (On GPUs, where counting them would
wait, they cost what others do: choose by `rows` there.) A mean over no rows, or over weights
that are all 0, is 0 and so are its gradients (F.cross_entropy has NaN there). Finite where exp
would overflow; -inf in the bias takes an entry out of the vocabulary, unless smoothing reads it.

Memory. On the CPU a slice of the vocabulary at a time. Where the weight is trained in eager mode,
the forward takes the memory of its gradient, [V, C], and leaves the logits in it for the backward:
all of them for up to C rows, or C / 2 of bfloat16 or float16 multiplied in float32, else as many as
fit. Otherwise, as in compiled graphs, up to 13 MiB of logits stay. The backward computes the others
again. Beyond the gradients a call needs less than 25 MiB for up to a thousand rows, and for more
about 2 KB a row.

Sources: Szegedy et al. (label smoothing, arXiv:1512.00567); Chowdhery et al., PaLM (z-loss,
arXiv:2204.02311); Hsu et al., Liger Kernel (arXiv:2410.10989) and Wijmans et al., Cut Your Losses
(arXiv:2411.09009), who stream this loss on GPUs.

Backends: on the CPU PyTorch's matrix products with C++ between them; on CUDA and HIP Triton, which
keeps logits in registers and stores 64 MiB of their gradient at a time; elsewhere the reference,
which holds all logits.
"""

import torch
from torch import Tensor

from ..ref.linear_cross_entropy import linear_cross_entropy as _ref_fwd
from ..ref.linear_cross_entropy import linear_cross_entropy_bwd as _ref_bwd
from . import _backends
from . import _linear_cross_entropy_cpu as _cpu
from . import _linear_cross_entropy_in_place as _in_place
from ._linear_cross_entropy_checks import (
    check_floats,
    check_operands,
    check_reduction,
    check_weights,
)
from ._vocab_slices import kept_floats, new_kept, new_weight_grad

DISPATCHER_OPS = ("linear_cross_entropy", "linear_cross_entropy_bwd")

# `kept` is memory for the backward, [0] without keep; what it holds is the backend's own affair.
torch.library.define(
    "encfast::linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, Tensor? bias, Tensor? rows, int ignore_index, "
    "float? label_smoothing, float? z_loss, float? softcap, bool keep) "
    "-> (Tensor loss, Tensor lse, Tensor kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is not wanted is [0]; dbias is float32.
torch.library.define(
    "encfast::linear_cross_entropy_bwd",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor? bias, Tensor? rows, "
    "Tensor lse, Tensor kept, int ignore_index, float? label_smoothing, float? z_loss, "
    "float? softcap, bool want_dx, bool want_dweight, bool want_dbias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("encfast::linear_cross_entropy")
def _fake_fwd(x, weight, targets, *options):
    keep = options[-1]
    loss, lse = (x.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    return loss, lse, new_kept(x, targets.shape[0], weight.shape[0], keep)


@torch.library.register_fake("encfast::linear_cross_entropy_bwd")
def _fake_bwd(dloss, x, weight, *options):
    want_dx, want_dweight, want_dbias = options[-3:]
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dweight else 0),
        x.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, bias, rows, *options, _keep = inputs
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(x, weight, targets, bias, rows, *output[1:])
        ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, dlse, dkept):
    if dloss is None:
        return (None,) * 10
    x, weight, targets, bias, rows, lse, kept = ctx.saved_tensors
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    wanted = need_x, need_weight, need_bias
    dx, dweight, dbias = torch.ops.encfast.linear_cross_entropy_bwd(
        dloss, x, weight, targets, bias, rows, lse, kept, *ctx.options, *wanted
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        None,
        dbias.to(bias.dtype) if need_bias else None,
        *(None,) * 6,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "linear_cross_entropy: double backward is not implemented; "
        "encfast.ref.linear_cross_entropy has one"
    )


torch.library.register_autograd(
    "encfast::linear_cross_entropy", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "encfast::linear_cross_entropy_bwd",
    _no_double_backward,
    setup_context=lambda ctx, inputs, output: None,
)


def _reference_fwd(x, weight, targets, bias, rows, *options_and_keep):
    *options, keep = options_and_keep
    check_operands(x, weight, targets, bias, rows, *options)
    loss, lse = _ref_fwd(x, weight, targets, bias, rows, *options)
    return loss, lse, new_kept(x, targets.shape[0], weight.shape[0], keep)


def _reference_bwd(dloss, x, weight, targets, bias, rows, lse, kept, *options_and_wanted):
    *options, want_dx, want_dweight, want_dbias = options_and_wanted
    grads = _ref_bwd(dloss, x, weight, targets, bias, rows, *options)
    return _backends.wanted_only(grads, (want_dx, want_dweight, want_dbias))


def _cpu_fwd(x, weight, targets, bias, rows, *options_and_keep):
    *options, keep = options_and_keep
    check_operands(x, weight, targets, bias, rows, *options)
    kept = new_kept(x, targets.shape[0], weight.shape[0], keep)
    return *_cpu.forward(x, weight, targets, bias, rows, *options, kept=kept), kept


def _cpu_bwd(dloss, x, weight, targets, bias, rows, lse, kept, *options_and_wanted):
    *options, want_dx, want_dweight, want_dbias = options_and_wanted
    op, m = "linear_cross_entropy_bwd", targets.shape[0]
    check_operands(x, weight, targets, bias, rows, *options)
    check_floats(op, "dloss", dloss, (m,))
    check_floats(op, "lse", lse, (m,))
    check_floats(op, "kept", kept, (kept_floats(x, m, weight.shape[0]),), (0,))
    dweight = new_weight_grad(weight, want_dweight)
    operands = dloss, x, weight, targets, bias, rows, lse
    dx, dbias = _cpu.backward(
        *operands, kept, *options, dweight=dweight, want_dx=want_dx, want_dbias=want_dbias
    )
    return dx, dweight, dbias


def _triton_fwd(x, weight, targets, *options_and_keep):
    from ..kernels import linear_cross_entropy as kernels

    *options, keep = options_and_keep
    check_operands(x, weight, targets, *options)
    loss, lse = kernels.linear_cross_entropy(x, weight, targets, *options)
    # Left as it is: the backward computes all logits again.
    return loss, lse, new_kept(x, targets.shape[0], weight.shape[0], keep)


def _triton_bwd(dloss, x, weight, targets, bias, rows, lse, kept, *options_and_wanted):
    from ..kernels import linear_cross_entropy as kernels

    dx, dweight, dbias = kernels.linear_cross_entropy_bwd(
        dloss, x, weight, targets, bias, rows, lse, *options_and_wanted
    )
    if rows is not None and options_and_wanted[-3]:
        dx = torch.ops.encfast.scatter_rows(dx, rows, x.shape[0])
    return dx, dweight, dbias


_backends.register_reference("linear_cross_entropy", "linear_cross_entropy", _reference_fwd)
_backends.register_reference("linear_cross_entropy", "linear_cross_entropy_bwd", _reference_bwd)
_backends.register_triton(
    "linear_cross_entropy", "linear_cross_entropy", _triton_fwd, _reference_fwd
)
_backends.register_triton(
    "linear_cross_entropy", "linear_cross_entropy_bwd", _triton_bwd, _reference_bwd
)
_backends.register_around("vocab_scan", "linear_cross_entropy", _cpu_fwd)
_backends.register_around("vocab_grad", "linear_cross_entropy_bwd", _cpu_bwd)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float | None = None,
    z_loss: float | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of x weight^T + bias; the module docstring has the formula.

    Args:
        x: [N, C] float32, bfloat16 or float16, any strides.
        weight: [V, C] of x's dtype, the layout of `torch.nn.Linear`; a tied embedding as it is.
        targets: int64 [N], or [M] with `rows`: 0..V-1, or ignore_index.
        bias: [V] of any of the three dtypes, or None.
        rows: int64 [M], the rows of x to be predicted, in any order; all by default.
        weights: one for each target, finite and >= 0, of any of the three dtypes; 1 by default.
            They need not sum to 1: `mean` divides by the sum of those that count.
        ignore_index: the target of rows that are left out.
        label_smoothing: share of the target in 0..1 that is spread evenly over all V.
        z_loss: factor >= 0 of the squared log-sum-exp.
        softcap: > 0, what logits are bounded by.
        reduction: "mean", "sum", or "none" for weights_i loss_i.

    Returns:
        float32, a scalar or [M] for "none".

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: products in bfloat16 where x is and the CPU has instructions for it, with logits
    rounded to bfloat16 once; else in float32. On GPUs products of x's dtype, logits in float32 and
    their gradient rounded to x's dtype once. Everything else is float32. The same bits in every
    run with the same number of threads; with another number, as far as PyTorch's products give the
    same. Gradients of x, weight, bias and weights; no atomics. Autocast casts nothing.

    Examples:
        >>> x, head = torch.randn(5, 8), torch.nn.Linear(8, 100)
        >>> targets = torch.tensor([3, -100, 7, -100, 99])  # two rows that cost nothing
        >>> loss = ops.linear_cross_entropy(x, head.weight, targets, head.bias)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(head(x), targets))
        True
    """
    check_operands(x, weight, targets, bias, rows, ignore_index, label_smoothing, z_loss, softcap)
    check_weights("linear_cross_entropy", weights, x, targets.shape[0])
    check_reduction("linear_cross_entropy", reduction)
    tensors = x, weight, targets, bias, rows
    options = ignore_index, label_smoothing, z_loss, softcap
    if _in_place.is_for(*tensors):
        loss = _in_place.InPlace.apply(*tensors, *options)
    else:
        keep = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias)
        )
        loss, _, _ = torch.ops.encfast.linear_cross_entropy(*tensors, *options, keep)
    return reduce_rows(loss, targets != ignore_index, weights, reduction)


def reduce_rows(loss: Tensor, counted: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Losses [M] by weights: all, their sum, or that by the weights of the rows that count."""
    if weights is not None:
        weights = weights.float()
        loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = counted.sum() if weights is None else (weights * counted).sum()
    return loss.sum() / total.where(total > 0, 1)


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
