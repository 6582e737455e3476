"""A linear layer per group of rows: what the experts of a mixture compute.

    out_i = x_i W[e]^T + bias[e]     for cu_seqlens[e] <= i < cu_seqlens[e + 1]

Conventions. The rows of a group are consecutive, and groups may be empty. Rows at and beyond
cu_seqlens[E] belong to none: they may hold anything, NaN too, give 0 and get gradient 0, so that N
is an upper bound and the lengths need not be known to the host. The gradient of an empty group's
weight and bias is 0. No rows yield none.

Sources: Gale et al., MegaBlocks (arXiv:2211.15841); Jiang et al., Mixtral (arXiv:2401.04088).

Backends: C++ on the CPU, which reads each weight once where groups are small, and Triton on CUDA
and HIP; elsewhere the reference.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..ref.grouped_mm import grouped_mm as _ref_fwd
from ..ref.grouped_mm import grouped_mm_bwd as _ref_bwd
from . import _backends
from ._checks import (
    FLOAT_DTYPES,
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_device,
    check_dtype,
    check_tensor,
)

DISPATCHER_OPS = ("grouped_mm", "grouped_mm_bwd")

torch.library.define(
    "encfast::grouped_mm",
    "(Tensor x, Tensor weight, Tensor cu_seqlens, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is not wanted is [0]; dbias is float32.
torch.library.define(
    "encfast::grouped_mm_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor cu_seqlens, bool want_dx, bool want_dweight, "
    "bool want_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, weight, cu_seqlens, bias) -> None:
    op = "grouped_mm"
    check_tensor(op, "x", x, 2, "[N, C]")
    check_dtype(op, "x", x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.grouped_mm")
    check_tensor(op, "weight", weight, 3, "[E, F, C]")
    check_dtype(op, "weight", weight, x.dtype, hint=", the dtype of x; cast one of them")
    check_device(op, "weight", weight, "x", x)
    if weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [E, F, {x.shape[1]}] for the "
            f"{x.shape[1]} channels of x"
        )
    check_tensor(op, "cu_seqlens", cu_seqlens, 1, "[E + 1]")
    check_dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    check_device(op, "cu_seqlens", cu_seqlens, "x", x)
    if cu_seqlens.shape[0] != weight.shape[0] + 1:
        raise ValueError(
            f"{op}: cu_seqlens has {cu_seqlens.shape[0]} entries, expected "
            f"{weight.shape[0] + 1}, one more than weight has groups"
        )
    _check_ends(cu_seqlens, x.shape[0])
    if bias is not None:
        check_tensor(op, "bias", bias, 2, "[E, F]")
        check_dtype(op, "bias", bias, *FLOAT_DTYPES)
        check_device(op, "bias", bias, "x", x)
        if bias.shape != weight.shape[:2]:
            raise ValueError(
                f"{op}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:2])}"
            )


def _check_ends(cu_seqlens: Tensor, n: int) -> None:
    """0, never decreasing, at most n: unlike elsewhere the last need not be the number of rows."""
    op = "grouped_mm"
    if can_read_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0:
            raise ValueError(f"{op}: cu_seqlens starts at {ends[0]}, expected 0")
        for e, (begin, end) in enumerate(pairwise(ends)):
            if end < begin:
                raise ValueError(
                    f"{op}: cu_seqlens decreases from {begin} to {end} at group {e}, expected the "
                    "running sum of the groups' lengths"
                )
        if ends[-1] > n:
            raise ValueError(f"{op}: cu_seqlens ends at {ends[-1]}, but x has {n} rows")
    elif can_assert_values(cu_seqlens):
        assert_on_device(cu_seqlens[0] == 0, f"{op}: cu_seqlens does not start at 0")
        assert_on_device(cu_seqlens.diff() >= 0, f"{op}: cu_seqlens decreases")
        assert_on_device(cu_seqlens[-1] <= n, f"{op}: cu_seqlens ends beyond the {n} rows of x")


@torch.library.register_fake("encfast::grouped_mm")
def _fake_fwd(x, weight, cu_seqlens, bias):
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.register_fake("encfast::grouped_mm_bwd")
def _fake_bwd(dout, x, weight, cu_seqlens, want_dx, want_dweight, want_dbias):
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dweight else 0),
        x.new_empty(weight.shape[:2] if want_dbias else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, cu_seqlens, bias = inputs
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(x, weight, cu_seqlens)
        ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dout):
    x, weight, cu_seqlens = ctx.saved_tensors
    need_x, need_weight, _, need_bias = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.encfast.grouped_mm_bwd(
        dout, x, weight, cu_seqlens, need_x, need_weight, need_bias
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "grouped_mm: double backward is not implemented; encfast.ref.grouped_mm has one"
    )


torch.library.register_autograd("encfast::grouped_mm", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::grouped_mm_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _reference_fwd(x, weight, cu_seqlens, bias):
    _check(x, weight, cu_seqlens, bias)
    return _ref_fwd(x, weight, cu_seqlens, bias)


def _reference_bwd(dout, x, weight, cu_seqlens, want_dx, want_dweight, want_dbias):
    grads = _ref_bwd(dout, x, weight, cu_seqlens)
    return _backends.wanted_only(grads, (want_dx, want_dweight, want_dbias))


def _triton_fwd(x, weight, cu_seqlens, bias):
    from ..kernels import grouped_mm as kernels

    _check(x, weight, cu_seqlens, bias)
    return kernels.grouped_mm(x, weight, cu_seqlens, bias)


def _triton_bwd(dout, x, weight, cu_seqlens, want_dx, want_dweight, want_dbias):
    from ..kernels import grouped_mm as kernels

    return kernels.grouped_mm_bwd(dout, x, weight, cu_seqlens, want_dx, want_dweight, want_dbias)


_backends.register_reference("grouped_mm", "grouped_mm", _reference_fwd)
_backends.register_reference("grouped_mm", "grouped_mm_bwd", _reference_bwd)
_backends.register_triton("grouped_mm", "grouped_mm", _triton_fwd, _reference_fwd)
_backends.register_triton("grouped_mm", "grouped_mm_bwd", _triton_bwd, _reference_bwd)


def grouped_mm(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """A linear layer per group of rows; the module docstring has the formula.

    Args:
        x: [N, C] float32, bfloat16 or float16, the groups one after another. Any strides; rows are
            read in place where the channels are contiguous.
        weight: [E, F, C] of x's dtype, the layout of `torch.nn.Linear` for each group. Any strides;
            read in place where the channels are contiguous.
        cu_seqlens: int32 [E + 1], where groups begin: 0, never decreasing, at most N.
        bias: [E, F] of any of the three dtypes, or None.

    Returns:
        [N, F], contiguous, of x's dtype; 0 for rows beyond the last group.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: products are added in float32 and rounded once; the bias is added before. Gradients
    likewise. Bit-equal from run to run and for any number of threads; no atomics. Autocast casts
    nothing.

    Examples:
        >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 5 * torch.eye(2)])
        >>> ops.grouped_mm(x, weight, torch.tensor([0, 1, 3], dtype=torch.int32))
        tensor([[1., 1.],
                [5., 5.],
                [5., 5.]])
    """
    _check(x, weight, cu_seqlens, bias)
    return torch.ops.encfast.grouped_mm(x, weight, cu_seqlens, bias)


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
