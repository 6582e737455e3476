"""A linear layer for inference over a weight packed once, with what follows it in one pass.

    y   = x W^T + bias
    out = act(y) + residual                    or, gated, with y = [a; b]:  act(a) * b + residual
    out = norm(out) over the row               if a norm is asked for

Formats. `fp32`: fp32 products. `bf16`: x and W rounded to bfloat16, products added in fp32.
`int8`: W quantised per output channel when packed, symmetrically (scale = largest magnitude / 127),
x per row in the call, from its least to its greatest value (0 included, scale = span / 255, with a
zero point); both rounded half to even, the integer sums exact. Everything behind the products is
fp32; there is one rounding, to x's dtype.

A row of the result depends on its own row of x and residual alone, to the bit: not on the other
rows, their number or the number of threads. An int8 row that holds NaN or infinity yields NaN. No
rows yield none.

There is no gradient: training keeps `nn.Linear`. The packed buffer fits the instruction set of this
process and must not be saved; save the weight.

Sources: Dettmers et al., LLM.int8() (arXiv:2208.07339), section 2, for scales per row of x and per
column of the product, and zero points.

Backends: C++ on the CPU (AMX, AVX-512 BF16 and VNNI, AVX-512, AVX2, portable); elsewhere the
reference.
"""

import math

import torch
from torch import Tensor

from ..ref.packed_linear import ACTIVATIONS, ELEMENT_BYTES, LAYOUT, packed_bytes
from ..ref.packed_linear import pack_linear as _ref_pack
from ..ref.packed_linear import packed_linear as _ref_linear
from . import _backends
from ._checks import (
    FLOAT_DTYPES,
    assert_on_device,
    can_assert_values,
    can_read_values,
    check_device,
    check_dtype,
    check_tensor,
    check_values,
)

FORMATS = tuple(ELEMENT_BYTES)
NORMS = ("layernorm", "rmsnorm")
DISPATCHER_OPS = ("pack_linear", "packed_linear")

torch.library.define(
    "encfast::pack_linear",
    "(Tensor weight, str format) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "encfast::packed_linear",
    "(Tensor x, Tensor packed, SymInt out_features, str format, Tensor? bias, str? activation, "
    "bool gated, Tensor? residual, str? norm, Tensor? norm_weight, Tensor? norm_bias, "
    "float? norm_eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {wanted}")


def _check_weight(weight: Tensor, format: str) -> None:
    op = "pack_linear"
    check_tensor(op, "weight", weight, 2, "[F, C]")
    check_dtype(op, "weight", weight, *FLOAT_DTYPES)
    _check_choice(op, "format", format, FORMATS)
    if format == "int8":
        check_values(op, "weight", weight, torch.isfinite, lambda: "int8 needs finite values")


def _check_no_grad(op: str, **tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but there is no gradient here; call it under "
                "torch.inference_mode() or torch.no_grad(), or train with torch.nn.Linear"
            )


def _check(
    x, packed, out_features, format, bias, activation, gated, residual, norm, norm_weight,
    norm_bias, norm_eps,
) -> None:  # fmt: skip
    op = "packed_linear"
    check_tensor(op, "x", x, 2, "[N, C]")
    check_dtype(op, "x", x, *FLOAT_DTYPES)
    _check_choice(op, "format", format, FORMATS)
    _check_packed(x, packed, out_features, format)
    if activation is not None:
        _check_choice(op, "activation", activation, tuple(ACTIVATIONS))
    if not isinstance(gated, bool):
        raise TypeError(f"{op}: gated is {type(gated).__name__}, expected a bool")
    if gated and out_features % 2:
        raise ValueError(
            f"{op}: out_features is {out_features}, expected an even number for gated=True"
        )
    width = out_features // 2 if gated else out_features
    _check_operand("bias", bias, (out_features,), x)
    _check_operand("residual", residual, (x.shape[0], width), x)
    _check_norm(norm, norm_weight, norm_bias, norm_eps)
    _check_operand("norm_weight", norm_weight, (width,), x)
    _check_operand("norm_bias", norm_bias, (width,), x)
    _check_no_grad(
        op, x=x, bias=bias, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias
    )


def _check_packed(x: Tensor, packed: Tensor, out_features: int, format: str) -> None:
    op = "packed_linear"
    check_tensor(op, "packed", packed, 1, "as pack_linear gave it")
    check_dtype(op, "packed", packed, torch.uint8)
    check_device(op, "packed", packed, "x", x)
    if not isinstance(out_features, int | torch.SymInt) or isinstance(out_features, bool):
        raise TypeError(f"{op}: out_features is {type(out_features).__name__}, expected an int")
    if out_features < 0:
        raise ValueError(f"{op}: out_features is {out_features}, expected >= 0")
    expected = packed_bytes(out_features, x.shape[1], format)
    if packed.shape[0] != expected:
        raise ValueError(
            f"{op}: packed has {packed.shape[0]} bytes, expected {expected} for a {format} weight "
            f"({out_features}, {x.shape[1]}); is this the layer that x belongs to?"
        )


def _check_operand(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if value is None:
        return
    op = "packed_linear"
    check_tensor(op, name, value)
    check_dtype(op, name, value, *FLOAT_DTYPES)
    check_device(op, name, value, "x", x)
    if value.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")


def _check_norm(norm, norm_weight, norm_bias, norm_eps) -> None:
    op = "packed_linear"
    if norm is not None:
        _check_choice(op, "norm", norm, NORMS)
    elif not (norm_weight is None and norm_bias is None and norm_eps is None):
        raise ValueError(
            f"{op}: norm is None, but a norm_weight, norm_bias or norm_eps was given; name the "
            f"norm, one of {', '.join(map(repr, NORMS))}"
        )
    if norm_eps is None:
        return
    if not isinstance(norm_eps, int | float | torch.SymFloat):
        raise TypeError(f"{op}: norm_eps is {type(norm_eps).__name__}, expected a float")
    if not torch.compiler.is_compiling() and not (math.isfinite(norm_eps) and norm_eps >= 0):
        raise ValueError(f"{op}: norm_eps is {norm_eps}, expected a finite number >= 0")


@torch.library.register_fake("encfast::pack_linear")
def _fake_pack(weight, format):
    rows, columns = weight.shape
    return weight.new_empty(packed_bytes(rows, columns, format), dtype=torch.uint8)


@torch.library.register_fake("encfast::packed_linear")
def _fake_linear(x, packed, out_features, format, bias, activation, gated, *_):
    return x.new_empty((x.shape[0], out_features // 2 if gated else out_features))


def _no_backward(ctx, *grads):
    raise NotImplementedError(
        "packed_linear: there is no gradient; train with torch.nn.Linear and pack its weight after"
    )


for _op in DISPATCHER_OPS:
    torch.library.register_autograd(
        f"encfast::{_op}", _no_backward, setup_context=lambda ctx, inputs, output: None
    )


def _reference_pack(weight, format):
    _check_weight(weight, format)
    return _ref_pack(weight, format)


def _reference_linear(
    x, packed, out_features, format, bias, activation, gated, residual, norm, norm_weight,
    norm_bias, norm_eps,
):  # fmt: skip
    with torch.no_grad():  # what needs a gradient fails in the backward, as on the CPU
        _check(
            x, packed, out_features, format, bias, activation, gated, residual, norm, norm_weight,
            norm_bias, norm_eps,
        )  # fmt: skip
    _check_header(packed, [LAYOUT, FORMATS.index(format), out_features, x.shape[1]])
    return _ref_linear(
        x,
        packed,
        out_features,
        format=format,
        bias=bias,
        activation=activation,
        gated=gated,
        residual=residual,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
    )


def _check_header(packed: Tensor, expected: list[int]) -> None:
    message = (
        "packed_linear: packed was not made by pack_linear on this device for this format and "
        "shape; pack the weight again where it is used"
    )
    header = packed[:32].clone().view(torch.int64)  # the clone is aligned
    if can_read_values(packed) and header.tolist() != expected:
        raise ValueError(message)
    if can_assert_values(packed):
        for field, value in zip(header, expected, strict=True):
            assert_on_device(field == value, message)


_backends.register_reference("packed_linear", "pack_linear", _reference_pack)
_backends.register_reference("packed_linear", "packed_linear", _reference_linear)


def pack_linear(weight: Tensor, *, format: str) -> Tensor:
    """Packs a weight for `packed_linear`, once.

    Args:
        weight: [F, C] float32, bfloat16 or float16, as in `torch.nn.Linear`; any strides.
        format: "fp32", "bf16" (rounded to nearest even) or "int8" (a symmetric scale per row).

    Returns:
        A 1-D uint8 buffer, opaque: its layout belongs to this process and device. Not to be saved.

    Raises:
        TypeError, ValueError: a malformed argument, a non-finite weight for int8 (on the CPU), or a
            weight that requires grad outside of no_grad.

    Examples:
        >>> weight = torch.randn(16, 8)
        >>> packed = ops.pack_linear(weight, format="fp32")
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(ops.packed_linear(x, packed, 16, format="fp32"), x @ weight.T, atol=1e-5)
        True
    """
    _check_weight(weight, format)
    _check_no_grad("pack_linear", weight=weight)
    return torch.ops.encfast.pack_linear(weight, format)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    *,
    format: str,
    bias: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """x W^T with bias, activation or gate, residual and norm; the module docstring has the formula.

    Args:
        x: [N, C] float32, bfloat16 or float16. Any strides: rows are read in place as long as the
            last dimension is contiguous.
        packed: the weight [F, C], as `pack_linear` returned it.
        out_features: F, the rows of the weight.
        format: what the weight was packed as: "fp32", "bf16" or "int8".
        bias: [F].
        activation: "gelu" (exact), "gelu_tanh", "silu", "relu" or None.
        gated: the weight holds [a; b], F = 2 * ffn, and the result is act(a) * b.
        residual: [N, F], or [N, F / 2] if gated; added behind the activation.
        norm: "layernorm" or "rmsnorm" over each row of the result, or None.
        norm_weight, norm_bias: as wide as the result; None for ones and zeros.
        norm_eps: >= 0; 1e-5 by default.

    Returns:
        [N, F], or [N, F / 2] if gated, contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: a malformed argument, a buffer of another shape or format, or a
            tensor that requires grad outside of no_grad.

    Numerics: module docstring. bias, residual, norm_weight and norm_bias may be of any of the three
    dtypes and are used in float32. Bit-equal for any number of threads and rows.

    Examples:
        >>> layer, x = torch.nn.Linear(8, 16), torch.randn(3, 8)
        >>> with torch.no_grad():
        ...     packed = ops.pack_linear(layer.weight, format="fp32")
        ...     options = {"format": "fp32", "bias": layer.bias, "activation": "relu"}
        ...     out = ops.packed_linear(x, packed, 16, **options)
        ...     torch.allclose(out, layer(x).relu(), atol=1e-5)
        True
    """
    _check(
        x, packed, out_features, format, bias, activation, gated, residual, norm, norm_weight,
        norm_bias, norm_eps,
    )  # fmt: skip
    return torch.ops.encfast.packed_linear(
        x, packed, out_features, format, bias, activation, gated, residual, norm, norm_weight,
        norm_bias, norm_eps,
    )  # fmt: skip


def backends() -> dict[str, str]:
    """Device type -> 'native', 'triton' or 'reference: why'."""
    return _backends.describe(DISPATCHER_OPS)
