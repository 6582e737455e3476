"""LayerNorm or RMSNorm of a residual sum, forward and backward.

    total = residual + branch_scale * x
    y     = (total - mean) * rstd * weight + bias      rstd = 1 / sqrt(variance + eps)

with mean and (biased) variance over the last dimension. RMSNorm has mean 0: its variance is the
mean square. Without residual and branch_scale, total is x; weight and bias default to 1 and 0.

Conventions. Rows promote, parameters do not: total and y have the dtype that x and residual promote
to, whatever weight, bias and branch_scale are. total is rounded to that dtype, as memory would hold
it, before its norm is taken. Statistics and arithmetic are in float32 for every dtype. No rows
yield no rows, and gradients 0 for the parameters.

Sources: Ba et al., Layer Normalization (arXiv:1607.06450); Zhang and Sennrich, RMSNorm
(arXiv:1910.07467); branch_scale is the LayerScale of Touvron et al. (arXiv:2103.17239).

Backends: C++ on the CPU and Triton on CUDA and HIP, one pass over memory each way; elsewhere the
reference.
"""

import math

import torch
from torch import Tensor

from ..ref.add_norm import add_norm as _ref_fwd
from ..ref.add_norm import add_norm_bwd as _ref_bwd
from ..ref.add_norm import residual_sum
from . import _backends
from ._checks import FLOAT_DTYPES, check_device, check_dtype, check_tensor

DISPATCHER_OPS = ("add_norm", "add_norm_bwd")
KINDS = ("layernorm", "rmsnorm")

# mean is [0] for RMSNorm; total is [0] where it is x, or not asked for.
torch.library.define(
    "encfast::add_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? branch_scale, str kind, "
    "float? eps, bool keep_total) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# dtotal_in: what reaches the sum past the norm. x and dx only with branch_scale. Gradients of
# parameters are float32, [0] where they are not wanted.
torch.library.define(
    "encfast::add_norm_bwd",
    "(Tensor dy, Tensor? dtotal_in, Tensor total, Tensor mean, Tensor rstd, Tensor? x, "
    "Tensor? weight, Tensor? branch_scale, str kind, bool want_dweight, bool want_dbias) "
    "-> (Tensor dtotal, Tensor dx, Tensor dweight, Tensor dbias, Tensor dbranch_scale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, residual, weight, bias, branch_scale, kind, eps) -> None:
    op = "add_norm"
    check_tensor(op, "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [..., C] with C >= 1")
    check_dtype(op, "x", x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.add_norm")
    if residual is not None:
        check_tensor(op, "residual", residual)
        check_dtype(op, "residual", residual, *FLOAT_DTYPES)
        check_device(op, "residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}; "
                "expand one of them"
            )
    for name, parameter in (("weight", weight), ("bias", bias), ("branch_scale", branch_scale)):
        if parameter is not None:
            _check_parameter(name, parameter, x)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}, expected 'layernorm' or 'rmsnorm'")
    _check_eps(eps)


def _check_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    op, channels = "add_norm", x.shape[-1]
    check_tensor(op, name, parameter, 1, "[C]")
    check_dtype(op, name, parameter, *FLOAT_DTYPES)
    check_device(op, name, parameter, "x", x)
    if parameter.shape[0] != channels:
        raise ValueError(
            f"{op}: {name} has {parameter.shape[0]} entries, x has {channels} channels"
        )


def _check_eps(eps: float | None) -> None:
    if eps is None:
        return
    if not isinstance(eps, int | float | torch.SymFloat) or isinstance(eps, bool):
        raise TypeError(f"add_norm: eps is {type(eps).__name__}, expected a float or None")
    if torch.compiler.is_compiling():
        return  # a guard on a float's value would compile once per value
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"add_norm: eps is {eps}, expected a finite number >= 0")


def _sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _has_total(residual: Tensor | None, branch_scale: Tensor | None, keep_total: bool) -> bool:
    return keep_total and (residual is not None or branch_scale is not None)


@torch.library.register_fake("encfast::add_norm")
def _fake_fwd(x, residual, weight, bias, branch_scale, kind, eps, keep_total):
    dtype, rows = _sum_dtype(x, residual), x.shape[:-1]
    has_total = _has_total(residual, branch_scale, keep_total)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape if has_total else 0, dtype=dtype),
        x.new_empty(rows if kind == "layernorm" else 0, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@torch.library.register_fake("encfast::add_norm_bwd")
def _fake_bwd(
    dy, dtotal_in, total, mean, rstd, x, weight, branch_scale, kind, want_dweight, want_dbias
):
    def parameter(wanted):
        return total.new_empty(total.shape[-1] if wanted else 0, dtype=torch.float32)

    return (
        total.new_empty(total.shape),
        total.new_empty(0) if x is None else x.new_empty(x.shape),
        parameter(want_dweight),
        parameter(want_dbias),
        parameter(branch_scale is not None),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, branch_scale, ctx.kind, _, _ = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    kept = total.shape == x.shape
    ctx.mark_non_differentiable(mean, rstd, *([] if kept else [total]))
    if not any(ctx.needs_input_grad):
        return
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.x_dtype = x.dtype
    if kept:  # the branch itself is needed for the gradient of its scale only
        x, residual = (None if branch_scale is None else x), None
    else:
        total = None
    ctx.save_for_backward(x, residual, total, mean, rstd, weight, branch_scale)


def _backward(ctx, dy, dtotal_in, *_):
    if dy is None and dtotal_in is None:
        return (None,) * 8
    x, residual, total, mean, rstd, weight, branch_scale = ctx.saved_tensors
    if total is None:
        total = residual_sum(x, residual, branch_scale)
    need_x, need_residual, need_weight, need_bias, need_scale = ctx.needs_input_grad[:5]
    dtotal, dx, dweight, dbias, dscale = torch.ops.encfast.add_norm_bwd(
        torch.zeros_like(total) if dy is None else dy,
        dtotal_in,
        total,
        mean,
        rstd,
        None if branch_scale is None else x,
        weight,
        branch_scale,
        ctx.kind,
        need_weight,
        need_bias,
    )
    if branch_scale is None:
        dx = dtotal
    return (
        dx.to(ctx.x_dtype) if need_x else None,
        dtotal.to(ctx.residual_dtype) if need_residual else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
        dscale.to(branch_scale.dtype) if need_scale else None,
        None,
        None,
        None,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "add_norm: double backward is not implemented; encfast.ref.add_norm has one"
    )


torch.library.register_autograd("encfast::add_norm", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::add_norm_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _reference_fwd(x, residual, weight, bias, branch_scale, kind, eps, keep_total):
    _check(x, residual, weight, bias, branch_scale, kind, eps)
    y, total, mean, rstd = _ref_fwd(
        x, residual, weight, bias, kind=kind, eps=eps, branch_scale=branch_scale
    )
    if not _has_total(residual, branch_scale, keep_total):
        total = total.new_empty(0)
    return y, total, mean if kind == "layernorm" else mean.new_empty(0), rstd


def _reference_bwd(
    dy, dtotal_in, total, mean, rstd, x, weight, branch_scale, kind, want_dweight, want_dbias
):
    if kind == "rmsnorm":
        mean = torch.zeros_like(rstd)
    dtotal, dx, dweight, dbias, dscale = _ref_bwd(
        dy, dtotal_in, total, mean, rstd, x, weight, branch_scale, kind=kind
    )
    nothing = dweight.new_empty(0)
    return (
        dtotal.contiguous(),
        total.new_empty(0) if dx is None else dx.contiguous(),
        dweight if want_dweight else nothing,
        dbias if want_dbias else nothing.clone(),
        nothing.clone() if dscale is None else dscale,
    )


def _triton_fwd(x, residual, weight, bias, branch_scale, kind, eps, keep_total):
    from ..kernels import add_norm as kernels

    _check(x, residual, weight, bias, branch_scale, kind, eps)
    return kernels.add_norm(x, residual, weight, bias, branch_scale, kind, eps, keep_total)


def _triton_bwd(
    dy, dtotal_in, total, mean, rstd, x, weight, branch_scale, kind, want_dweight, want_dbias
):
    from ..kernels import add_norm as kernels

    return kernels.add_norm_bwd(
        dy, dtotal_in, total, mean, rstd, x, weight, branch_scale, kind, want_dweight, want_dbias
    )


_backends.register_reference("add_norm", "add_norm", _reference_fwd)
_backends.register_reference("add_norm", "add_norm_bwd", _reference_bwd)
_backends.register_triton("add_norm", "add_norm", _triton_fwd, _reference_fwd)
_backends.register_triton("add_norm", "add_norm_bwd", _triton_bwd, _reference_bwd)


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layernorm",
    eps: float | None = None,
    branch_scale: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of a residual sum; the module docstring has the formula.

    Args:
        x: [..., C] float32, bfloat16 or float16, C >= 1: the branch. Any strides; rows that lie
            evenly spaced with contiguous channels are read in place.
        residual: of x's shape, or None: the stream the branch is added to.
        weight: [C] or None. Parameters may be of another dtype than the rows.
        bias: [C] or None.
        kind: "layernorm" or "rmsnorm".
        eps: added to the variance, >= 0; 1e-5 by default.
        branch_scale: [C] or None, multiplies x.
        return_sum: also return the sum, as a pre-norm block hands it on.

    Returns:
        y [..., C], contiguous, in the dtype that x and residual promote to; with `return_sum` also
        the sum, of the same shape and dtype. Both are differentiable. Without residual and
        branch_scale the sum is x itself.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: float32 inside, the variance by a second pass over the row. Gradients of parameters
    are summed in float32 over groups of rows, then over the groups in their order. Bit-equal from
    run to run and for any number of threads; no atomics. Autocast casts nothing.

    Examples:
        >>> x, residual = torch.randn(3, 8), torch.randn(3, 8)
        >>> normed = ops.add_norm(x, residual, torch.ones(8), kind="rmsnorm")
        >>> torch.allclose(normed.square().mean(1), torch.ones(3), atol=1e-3)
        True
    """
    _check(x, residual, weight, bias, branch_scale, kind, eps)
    plain = residual is None and branch_scale is None
    keep_total = not plain and (
        return_sum or _will_differentiate(x, residual, weight, bias, branch_scale)
    )
    y, total, _, _ = torch.ops.encfast.add_norm(
        x, residual, weight, bias, branch_scale, kind, eps, keep_total
    )
    return (y, x if plain else total) if return_sum else y


def _will_differentiate(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
