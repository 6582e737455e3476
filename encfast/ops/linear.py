"""A linear layer whose weight changes from call to call: that of training.

    y = x W^T + bias

Conventions. A row of the result depends on its own row of x alone, a row of x's gradient on its own
row of the result's; nothing depends on the number of threads, to the bit. No rows yield none, no
channels the bias.

Sources: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (ACM TOMS 34(3),
2008), for the blocks and the packing.

Backends: C++ on the CPU, by the core of grouped_mm; elsewhere the reference, which is PyTorch's own
product.
"""

import torch
from torch import Tensor

from ..ref.linear import linear as _ref_fwd
from ..ref.linear import linear_bwd as _ref_bwd
from . import _backends
from ._checks import FLOAT_DTYPES, check_device, check_dtype, check_tensor

DISPATCHER_OPS = ("linear", "linear_bwd")

torch.library.define(
    "encfast::linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What is not wanted is [0]; dbias is float32.
torch.library.define(
    "encfast::linear_bwd",
    "(Tensor dout, Tensor x, Tensor weight, bool want_dx, bool want_dweight, bool want_dbias) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, weight, bias) -> None:
    op = "linear"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x, *FLOAT_DTYPES, hint="; for float64 use torch.nn.functional.linear")
    if x.ndim == 0:
        raise ValueError(f"{op}: x is a scalar, expected [..., C]")
    check_tensor(op, "weight", weight, 2, "[F, C]")
    check_dtype(op, "weight", weight, x.dtype, hint=", the dtype of x; cast one of them")
    check_device(op, "weight", weight, "x", x)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [F, {x.shape[-1]}] for the "
            f"{x.shape[-1]} channels of x"
        )
    if bias is None:
        return
    check_tensor(op, "bias", bias, 1, "[F]")
    check_dtype(op, "bias", bias, *FLOAT_DTYPES)
    check_device(op, "bias", bias, "x", x)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
        )


@torch.library.register_fake("encfast::linear")
def _fake_fwd(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("encfast::linear_bwd")
def _fake_bwd(dout, x, weight, want_dx, want_dweight, want_dbias):
    return (
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dweight else 0),
        x.new_empty(weight.shape[:1] if want_dbias else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dout):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx, dweight, dbias = torch.ops.encfast.linear_bwd(
        dout, x, weight, need_x, need_weight, need_bias
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias.to(ctx.bias_dtype) if need_bias else None,
    )


def _setup_double_backward(ctx, inputs, output) -> None:
    dout, x, weight, *ctx.wanted = inputs
    ctx.save_for_backward(dout, x, weight)


def _double_backward(ctx, g_dx, g_dweight, g_dbias):
    """Of dx = dout W, dweight = dout^T x and dbias = sum of dout: products again."""
    dout, x, weight = ctx.saved_tensors
    want_dx, want_dweight, want_dbias = ctx.wanted
    need_dout, need_x, need_weight, *_ = ctx.needs_input_grad
    g_dout, g_x, g_weight = torch.zeros_like(dout), None, None
    if want_dx:
        g_dout = g_dout + g_dx @ weight.mT
        g_weight = dout.mT @ g_dx if need_weight else None
    if want_dweight:
        g_dout = g_dout + x @ g_dweight.mT
        g_x = dout @ g_dweight if need_x else None
    if want_dbias:
        g_dout = g_dout + g_dbias.to(dout.dtype)
    return g_dout if need_dout else None, g_x, g_weight, None, None, None


torch.library.register_autograd("encfast::linear", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::linear_bwd", _double_backward, setup_context=_setup_double_backward
)


def _reference_fwd(x, weight, bias):
    _check(x, weight, bias)
    return _ref_fwd(x, weight, bias)


def _reference_bwd(dout, x, weight, want_dx, want_dweight, want_dbias):
    grads = _ref_bwd(dout, x, weight)
    return _backends.wanted_only(grads, (want_dx, want_dweight, want_dbias))


_backends.register_reference("linear", "linear", _reference_fwd)
_backends.register_reference("linear", "linear_bwd", _reference_bwd)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for training on the CPU; the module docstring has the formula.

    It pays from some hundred rows on, where packing the weight costs little beside the product, and
    on CPUs that MKL serves below their peak, AMD's among them: `encfast.layers.Linear` chooses.

    Args:
        x: [..., C] float32, bfloat16 or float16. Any strides; read in place where the channels are
            contiguous and the rows evenly spaced.
        weight: [F, C] of x's dtype, the layout of `torch.nn.Linear`. Any strides; read in place
            where the channels are contiguous.
        bias: [F] of any of the three dtypes, or None.

    Returns:
        [..., F], contiguous, of x's dtype.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: products are added in float32 and rounded once; the bias is added before. Sums run
    over blocks of 384 to 1536 terms. Gradients of gradients are those of the same products.

    Examples:
        >>> layer, x = torch.nn.Linear(8, 16), torch.randn(2, 3, 8)
        >>> y = ops.linear(x, layer.weight, layer.bias)
        >>> torch.allclose(y, layer(x), atol=1e-6)
        True
    """
    _check(x, weight, bias)
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return torch.ops.encfast.linear(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def backends() -> dict[str, str]:
    """Device type -> 'native' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
