"""Largest logit of each vocabulary entry over a segment's rows, without holding a row's logits.

    out_bv = max over i of x_i . weight_v + bias_v        cu_seqlens[b] <= i < cu_seqlens[b + 1]

Conventions. A segment without rows gives 0 and no gradients. Of equal logits the first row's is the
largest, and its row gets the gradient; NaN is larger than any number. -inf in the bias stays.

Memory. A slice of the vocabulary at a time; what a call holds is of the size of the results, value
and row, and less than 20 MiB beside them.

Sources: Xiao et al., RetroMAE v2 (arXiv:2305.02564, section 3.2), whose bag of words is predicted
from these largest logits; Formal et al., SPLADE v2 (arXiv:2109.10086), who pool like this to
retrieve.

Backends: on the CPU PyTorch's matrix products with seg_pool's C++ between them; elsewhere the
reference, which holds all logits.
"""

import torch
from torch import Tensor

from ..ref.linear_seg_max import linear_seg_max as _ref_fwd
from ..ref.linear_seg_max import linear_seg_max_bwd as _ref_bwd
from . import _backends
from . import _linear_seg_max_cpu as _cpu
from ._checks import check_dtype, check_tensor, check_values
from ._linear_cross_entropy_checks import check_head
from .seg_pool import check_segments

DISPATCHER_OPS = ("linear_seg_max", "linear_seg_max_bwd")

# out is float32; rows int32, -1 for none.
torch.library.define(
    "encfast::linear_seg_max",
    "(Tensor x, Tensor weight, Tensor cu_seqlens, Tensor? bias) -> (Tensor out, Tensor rows)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is not wanted is [0]; dbias is float32.
torch.library.define(
    "encfast::linear_seg_max_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor rows, bool want_dx, bool want_dweight, "
    "bool want_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, weight, cu_seqlens, bias) -> None:
    check_head("linear_seg_max", x, weight, bias)
    check_segments("linear_seg_max", x, cu_seqlens)


@torch.library.register_fake("encfast::linear_seg_max")
def _fake_fwd(x, weight, cu_seqlens, bias):
    out = x.new_empty((cu_seqlens.shape[0] - 1, weight.shape[0]), dtype=torch.float32)
    return out, torch.empty_like(out, dtype=torch.int32)


@torch.library.register_fake("encfast::linear_seg_max_bwd")
def _fake_bwd(dout, x, weight, rows, want_dx, want_dweight, want_dbias):
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dweight else 0),
        x.new_empty(weight.shape[0] if want_dbias else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, bias = inputs
    ctx.mark_non_differentiable(output[1])
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(x, weight, output[1])
        ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dout, drows):
    need_x, need_weight, _, need_bias = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.encfast.linear_seg_max_bwd(
        dout, *ctx.saved_tensors, need_x, need_weight, need_bias
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "linear_seg_max: double backward is not implemented; encfast.ref.linear_seg_max has one"
    )


torch.library.register_autograd("encfast::linear_seg_max", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::linear_seg_max_bwd",
    _no_double_backward,
    setup_context=lambda ctx, inputs, output: None,
)


def _reference_fwd(x, weight, cu_seqlens, bias):
    _check(x, weight, cu_seqlens, bias)
    return _ref_fwd(x, weight, cu_seqlens, bias)


def _reference_bwd(dout, x, weight, rows, want_dx, want_dweight, want_dbias):
    grads = _ref_bwd(dout, x, weight, rows)
    return _backends.wanted_only(grads, (want_dx, want_dweight, want_dbias))


def _cpu_fwd(x, weight, cu_seqlens, bias):
    _check(x, weight, cu_seqlens, bias)
    return _cpu.forward(x, weight, cu_seqlens, bias)


def _cpu_bwd(dout, x, weight, rows, *wanted):
    _check_saved(dout, x, weight, rows)
    return _cpu.backward(dout, x, weight, rows, *wanted)


def _check_saved(dout: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> None:
    op = "linear_seg_max_bwd"
    check_head(op, x, weight, None)
    for name, t, dtype in (("dout", dout, torch.float32), ("rows", rows, torch.int32)):
        check_tensor(op, name, t, 2, "[B, V]")
        check_dtype(op, name, t, dtype)
        shape = rows.shape[0], weight.shape[0]
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")
    n = x.shape[0]
    check_values(
        op,
        "rows",
        rows,
        lambda r: (r < n) & (r >= -1) & ((r < 0) == (r[:, :1] < 0)),
        lambda: f"expected 0..{n - 1}, a row of x, or -1 in all of a segment without rows",
    )


_backends.register_reference("linear_seg_max", "linear_seg_max", _reference_fwd)
_backends.register_reference("linear_seg_max", "linear_seg_max_bwd", _reference_bwd)
_backends.register_around("seg_pool", "linear_seg_max", _cpu_fwd)
_backends.register_around("seg_pool", "linear_seg_max_bwd", _cpu_bwd)


def linear_seg_max(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Largest logits of each segment; the module docstring has the formula.

    Args:
        x: [N, C] float32, bfloat16 or float16, any strides.
        weight: [V, C] of x's dtype, the layout of `torch.nn.Linear`; a tied embedding as it is.
        cu_seqlens: int32 [B + 1], where segments begin: 0, never decreasing, N.
        bias: [V] of any of the three dtypes, or None.

    Returns:
        float32 [B, V], differentiable in x, weight and bias.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: products in bfloat16 where x is and the CPU has instructions for it, with logits
    rounded to bfloat16 once; else in float32. Everything else is float32, gradients are summed in
    order. The same bits in every run with the same number of threads; with another number, as far
    as PyTorch's products give the same. No atomics. Autocast casts nothing.

    Examples:
        >>> x, weight = torch.eye(3), torch.tensor([[1.0, 2.0, 3.0], [9.0, 0.0, -1.0]])
        >>> ops.linear_seg_max(x, weight, torch.tensor([0, 2, 3], dtype=torch.int32))
        tensor([[ 2.,  9.],
                [ 3., -1.]])
    """
    _check(x, weight, cu_seqlens, bias)
    return torch.ops.encfast.linear_seg_max(x, weight, cu_seqlens, bias)[0]


def backends() -> dict[str, str]:
    """Device type -> 'native', or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
