"""KL divergence of a student's vocabulary from a teacher's, without holding either's logits.

    z_iv = (x_i . weight_v + bias_v) / temperature         of the student, t_iv of the teacher
    KL_i = sum over v of p_iv (log p_iv - log q_iv)        p = softmax(t_i), q = softmax(z_i)

Conventions. Forward KL(teacher || student); only the student has gradients. It is not multiplied
by temperature^2, which Hinton et al. do to keep the size of gradients. Entries with p = 0 add 0. A
mean over no rows, or over weights that are all 0, is 0 and so are its gradients.

Memory. As linear_cross_entropy in compiled graphs: on the CPU a slice of the vocabulary of each
head at a time, and up to 13 MiB of the logits of both stay for the backward, which computes the
others again.

Sources: Hinton et al. (arXiv:1503.02531); Hsu et al., Liger Kernel (arXiv:2410.10989).

Backends: on the CPU PyTorch's matrix products with linear_cross_entropy's C++ between them; Triton
on CUDA and HIP, on linear_cross_entropy's plan; elsewhere the reference, which holds all logits.
"""

import math

import torch
from torch import Tensor

from ..ref.linear_kl import linear_kl as _ref_fwd
from ..ref.linear_kl import linear_kl_bwd as _ref_bwd
from . import _backends
from . import _linear_kl_cpu as _cpu
from ._checks import check_device, check_dtype
from ._linear_cross_entropy_checks import (
    check_floats,
    check_head,
    check_reduction,
    check_weights,
)
from ._vocab_slices import kept_floats, new_kept
from .linear_cross_entropy import reduce_rows

DISPATCHER_OPS = ("linear_kl", "linear_kl_bwd")

# `kept` is memory for the backward, [0] without keep; what it holds is the backend's own affair.
torch.library.define(
    "encfast::linear_kl",
    "(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, Tensor? bias, "
    "Tensor? teacher_bias, float? temperature, bool keep) "
    "-> (Tensor loss, Tensor lse, Tensor kept)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Of the student; what is not wanted is [0]; dbias is float32.
torch.library.define(
    "encfast::linear_kl_bwd",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, "
    "Tensor? bias, Tensor? teacher_bias, float? temperature, Tensor lse, Tensor kept, "
    "bool want_dx, bool want_dweight, bool want_dbias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature) -> None:
    op = "linear_kl"
    check_head(op, x, weight, bias)
    check_head(op, teacher_x, teacher_weight, teacher_bias, "teacher_x", "teacher_")
    check_dtype(op, "teacher_x", teacher_x, x.dtype, hint=", the dtype of x; cast one of them")
    check_device(op, "teacher_x", teacher_x, "x", x)
    if teacher_x.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: teacher_x has shape {tuple(teacher_x.shape)}, expected {x.shape[0]} rows like x"
        )
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{op}: teacher_weight has shape {tuple(teacher_weight.shape)}, expected "
            f"{weight.shape[0]} rows, the vocabulary of weight"
        )
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}, expected a finite number > 0")


@torch.library.register_fake("encfast::linear_kl")
def _fake_fwd(x, weight, *options):
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    return (
        loss,
        loss.new_empty((2, x.shape[0])),
        new_kept(x, x.shape[0], weight.shape[0], options[-1]),
    )


@torch.library.register_fake("encfast::linear_kl_bwd")
def _fake_bwd(dloss, x, weight, *options):
    want_dx, want_dweight, want_dbias = options[-3:]
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dweight else 0),
        x.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, temperature, _keep = inputs
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.temperature = temperature
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, dlse, dkept):
    if dloss is None:
        return (None,) * 8
    *tensors, lse, kept = ctx.saved_tensors
    need_x, need_weight, _, _, need_bias, *_ = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.encfast.linear_kl_bwd(
        dloss, *tensors, ctx.temperature, lse, kept, need_x, need_weight, need_bias
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        None,
        None,
        dbias.to(tensors[4].dtype) if need_bias else None,
        None,
        None,
        None,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "linear_kl: double backward is not implemented; encfast.ref.linear_kl has one"
    )


torch.library.register_autograd("encfast::linear_kl", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::linear_kl_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _reference_fwd(*args):
    *operands, keep = args
    _check(*operands)
    x, weight, *_ = operands
    return *_ref_fwd(*operands), new_kept(x, x.shape[0], weight.shape[0], keep)


def _reference_bwd(dloss, *args):
    *operands, _lse, _kept, want_dx, want_dweight, want_dbias = args
    grads = _ref_bwd(dloss, *operands)
    return _backends.wanted_only(grads, (want_dx, want_dweight, want_dbias))


def _cpu_fwd(*args):
    *operands, keep = args
    _check(*operands)
    return _cpu.forward(_cpu.Operands(*operands), keep)


def _cpu_bwd(dloss, *args):
    *operands, lse, kept, want_dx, want_dweight, want_dbias = args
    _check(*operands)
    x, weight, *_ = operands
    op, m = "linear_kl_bwd", x.shape[0]
    check_floats(op, "dloss", dloss, (m,))
    check_floats(op, "lse", lse, (2, m))
    check_floats(op, "kept", kept, (kept_floats(x, m, weight.shape[0]),), (0,))
    wanted = want_dx, want_dweight, want_dbias
    return _cpu.backward(dloss, _cpu.Operands(*operands), lse, kept, *wanted)


def _triton_fwd(*args):
    from ..kernels import linear_kl as kernels

    *operands, keep = args
    _check(*operands)
    x, weight, *_ = operands
    # Kept logits are left as they are: the backward computes all of them again.
    return *kernels.linear_kl(*operands), new_kept(x, x.shape[0], weight.shape[0], keep)


def _triton_bwd(dloss, *args):
    from ..kernels import linear_kl as kernels

    *operands, lse, _kept, want_dx, want_dweight, want_dbias = args
    given = [*operands, lse, want_dx, want_dweight, want_dbias]
    return kernels.linear_kl_bwd(dloss, *given)


_backends.register_reference("linear_kl", "linear_kl", _reference_fwd)
_backends.register_reference("linear_kl", "linear_kl_bwd", _reference_bwd)
_backends.register_triton("linear_kl", "linear_kl", _triton_fwd, _reference_fwd)
_backends.register_triton("linear_kl", "linear_kl_bwd", _triton_bwd, _reference_bwd)
_backends.register_around("vocab_scan", "linear_kl", _cpu_fwd)
_backends.register_around("vocab_grad", "linear_kl_bwd", _cpu_bwd)


def linear_kl(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL(teacher || student) of two linear layers' softmax; the module docstring has the formula.

    Args:
        x: [M, C] float32, bfloat16 or float16, any strides.
        weight: [V, C] of x's dtype, the student's.
        teacher_x: [M, Ct] of x's dtype, the rows of the teacher; Ct may differ from C.
        teacher_weight: [V, Ct] of x's dtype.
        bias: [V] of any of the three dtypes, or None.
        teacher_bias: likewise.
        temperature: > 0, what both heads' logits are divided by; 1 by default.
        weights: one for each row, finite and >= 0, of any of the three dtypes; 1 by default.
        reduction: "mean" (by the sum of weights), "sum", or "none" for weights_i KL_i.

    Returns:
        float32, a scalar or [M] for "none".

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: as linear_cross_entropy. Gradients of x, weight, bias and weights, none of the
    teacher's.

    Examples:
        >>> x, weight = torch.randn(5, 8), torch.randn(100, 8)
        >>> abs(ops.linear_kl(x, weight, x, weight).item()) < 1e-5
        True
        >>> ops.linear_kl(x, weight, torch.randn(5, 8), weight) > 0
        tensor(True)
    """
    _check(x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature)
    check_weights("linear_kl", weights, x, x.shape[0])
    check_reduction("linear_kl", reduction)
    student = (t for t in (x, weight, bias) if t is not None)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in student)
    operands = x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature
    loss, _, _ = torch.ops.encfast.linear_kl(*operands, keep)
    return reduce_rows(loss, torch.ones_like(loss, dtype=torch.bool), weights, reduction)


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
