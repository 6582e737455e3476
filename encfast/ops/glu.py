"""Activations of the feed-forward layer, gated or plain, with the bias in front, both ways.

    gated:  out = act(a) * b with the halves [a, b] of x + bias   (activated="second": [b, a])
    plain:  out = act(x + bias)

Conventions. gelu is x Phi(x) by the error function, gelu_tanh its tanh form, silu is x sigmoid(x),
and relu has slope 0 at 0. The output has x's dtype, whatever that of bias; x + bias is not rounded
in between. The backward evaluates the activation again: only x and bias are kept. No rows yield no
rows, and gradient 0 for the bias.

Sources: Hendrycks and Gimpel, GELU (arXiv:1606.08415); Shazeer, GLU variants (arXiv:2002.05202).

Backends: C++ on the CPU and Triton on CUDA and HIP, one pass over memory each way; elsewhere the
reference.
"""

import torch
from torch import Tensor

from ..ref.glu import glu as _ref_fwd
from ..ref.glu import glu_bwd as _ref_bwd
from . import _backends
from ._checks import FLOAT_DTYPES, check_device, check_dtype, check_tensor

DISPATCHER_OPS = ("glu", "glu_bwd")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")

torch.library.define(
    "encfast::glu",
    "(Tensor x, Tensor? bias, str activation, bool gated, bool activate_second) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# dbias is float32, [0] where it is not wanted.
torch.library.define(
    "encfast::glu_bwd",
    "(Tensor dout, Tensor x, Tensor? bias, str activation, bool gated, bool activate_second, "
    "bool want_dbias) -> (Tensor dx, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x, bias, activation, gated, activated) -> None:
    op = "glu"
    check_tensor(op, "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [..., F] or [..., 2F]")
    check_dtype(op, "x", x, *FLOAT_DTYPES, hint="; for float64 use encfast.ref.glu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if activated not in ("first", "second"):
        raise ValueError(f"{op}: activated is {activated!r}, expected 'first' or 'second'")
    if gated and x.shape[-1] % 2:
        raise ValueError(f"{op}: x has {x.shape[-1]} channels, expected two halves (gated=True)")
    if bias is not None:
        check_tensor(op, "bias", bias, 1, "[channels of x]")
        check_dtype(op, "bias", bias, *FLOAT_DTYPES)
        check_device(op, "bias", bias, "x", x)
        if bias.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{op}: bias has {bias.shape[0]} entries, x has {x.shape[-1]} channels"
            )


@torch.library.register_fake("encfast::glu")
def _fake_fwd(x, bias, activation, gated, activate_second):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1]))


@torch.library.register_fake("encfast::glu_bwd")
def _fake_bwd(dout, x, bias, activation, gated, activate_second, want_dbias):
    dbias = x.new_empty(x.shape[-1] if want_dbias else 0, dtype=torch.float32)
    return x.new_empty(x.shape), dbias


def _setup_context(ctx, inputs, output) -> None:
    x, bias, *ctx.options = inputs
    if any(ctx.needs_input_grad[:2]):
        ctx.save_for_backward(x, bias)


def _backward(ctx, dout):
    x, bias = ctx.saved_tensors
    need_x, need_bias = ctx.needs_input_grad[:2]
    dx, dbias = torch.ops.encfast.glu_bwd(dout, x, bias, *ctx.options, need_bias)
    return dx if need_x else None, dbias.to(bias.dtype) if need_bias else None, None, None, None


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("glu: double backward is not implemented; encfast.ref.glu has one")


torch.library.register_autograd("encfast::glu", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "encfast::glu_bwd", _no_double_backward, setup_context=lambda ctx, inputs, output: None
)


def _half(activate_second: bool) -> str:
    return "second" if activate_second else "first"


def _reference_fwd(x, bias, activation, gated, activate_second):
    _check(x, bias, activation, gated, _half(activate_second))
    out = _ref_fwd(
        x, activation=activation, gated=gated, activated=_half(activate_second), bias=bias
    )
    return out.contiguous()


def _reference_bwd(dout, x, bias, activation, gated, activate_second, want_dbias):
    dx, dbias = _ref_bwd(
        dout, x, bias, activation=activation, gated=gated, activated=_half(activate_second)
    )
    return dx.contiguous(), dbias if want_dbias else dbias.new_empty(0)


def _triton_fwd(x, bias, activation, gated, activate_second):
    from ..kernels import glu as kernels

    _check(x, bias, activation, gated, _half(activate_second))
    return kernels.glu(x, bias, activation, gated, activate_second)


def _triton_bwd(dout, x, bias, activation, gated, activate_second, want_dbias):
    from ..kernels import glu as kernels

    return kernels.glu_bwd(dout, x, bias, activation, gated, activate_second, want_dbias)


_backends.register_reference("glu", "glu", _reference_fwd)
_backends.register_reference("glu", "glu_bwd", _reference_bwd)
_backends.register_triton("glu", "glu", _triton_fwd, _reference_fwd)
_backends.register_triton("glu", "glu_bwd", _triton_bwd, _reference_bwd)


def glu(
    x: Tensor,
    *,
    activation: str = "gelu",
    gated: bool = True,
    activated: str = "first",
    bias: Tensor | None = None,
) -> Tensor:
    """An activation, gated or plain; the module docstring has the formula.

    Args:
        x: [..., 2F], or [..., F] with gated=False; float32, bfloat16 or float16. Any strides; rows
            that lie evenly spaced with contiguous channels are read in place.
        activation: "gelu", "gelu_tanh", "silu" or "relu".
        gated: multiply the activated half by the other one.
        activated: which half is activated, "first" or "second"; without meaning where not gated.
        bias: of x's last dimension, of any of the three dtypes, or None.

    Returns:
        [..., F], contiguous, of x's dtype.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.

    Numerics: float32 inside, rounded once. The gradient of bias is summed in float32 over groups of
    rows, then over the groups in their order. Bit-equal from run to run and for any number of
    threads; no atomics. Autocast casts nothing.

    Examples:
        >>> ops.glu(torch.tensor([[-1.0, 2.0, 10.0, 10.0]]), activation="relu")
        tensor([[ 0., 20.]])
        >>> ops.glu(torch.tensor([[-1.0, 2.0]]), activation="relu", gated=False)
        tensor([[0., 2.]])
    """
    _check(x, bias, activation, gated, activated)
    return torch.ops.encfast.glu(x, bias, activation, gated, activated == "second")


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
