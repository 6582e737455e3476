"""What packed_linear means, in plain PyTorch: a linear layer over a packed weight, and an epilogue.

The buffer of the reference is the weight itself behind a header: fp32 and bf16 the values, int8 the
scale of each row, then the integers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
HEADER_BYTES = 64
LAYOUT = 0x656E632D726566  # "enc-ref": the first word of a buffer packed here
TINY = 1e-30  # rows of magnitudes up to this quantise to zeros: their inverse would overflow

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def packed_bytes(out_features: int, in_features: int, format: str) -> int:
    """Size of the buffer, the same for every backend: whole panels of 32 rows, 64-byte columns."""
    rows = (out_features + 31) // 32 * 32
    row_bytes = (in_features * ELEMENT_BYTES[format] + 63) // 64 * 64
    return HEADER_BYTES + rows * (row_bytes + (8 if format == "int8" else 0))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of each row: (integers -127..127, fp32 scales [F, 1])."""
    weight = weight.float()
    top = (
        weight.abs().amax(1, keepdim=True) if weight.shape[1] else weight.new_zeros(len(weight), 1)
    )
    inverse = torch.where(top > TINY, top.new_tensor(127.0) / top, 0)
    return (weight * inverse).round().to(torch.int8), torch.where(top > TINY, top / 127, 0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8 bits of each row, from its least to its greatest value and 0: (0..255, zero, fp32 scale).

    x is about (integer - zero) * scale. A row that holds NaN or infinity, or that spans more than
    float32, has a scale of NaN.
    """
    x = torch.cat([x.float(), x.new_zeros(x.shape[0], 1, dtype=torch.float32)], 1)
    low = x.amin(1, keepdim=True)
    span = x.amax(1, keepdim=True) - low
    wide = (span > TINY) & span.isfinite()
    inverse = torch.where(wide, span.new_tensor(255.0) / span, 0)
    zero = torch.where(wide, -low * inverse, 0).round()
    q = ((x[:, :-1] * inverse).nan_to_num(0, 0, 0).round() + zero).clamp(0, 255)
    return q, zero, torch.where(wide, span / 255, (span - span) * 0)


def pack_linear(weight: Tensor, format: str) -> Tensor:
    """weight [F, C] to a uint8 buffer. Args are those of `encfast.ops.pack_linear`."""
    rows, columns = weight.shape
    if format == "int8":
        q, scale = quantize_weight(weight)
        parts = [scale.contiguous().view(torch.uint8), q.contiguous().view(torch.uint8)]
    else:
        dtype = torch.float32 if format == "fp32" else torch.bfloat16
        parts = [weight.to(dtype).contiguous().view(torch.uint8)]
    code = list(ELEMENT_BYTES).index(format)
    header = torch.tensor([LAYOUT, code, rows, columns, 0, 0, 0, 0], device=weight.device)
    out = weight.new_zeros(packed_bytes(rows, columns, format), dtype=torch.uint8)
    payload = torch.cat([header.view(torch.uint8), *(part.flatten() for part in parts)])
    out[: payload.shape[0]] = payload
    return out


def unpack_linear(
    packed: Tensor, out_features: int, in_features: int, format: str
) -> tuple[Tensor, Tensor | None]:
    """(weight [F, C], scales [F, 1] of int8) of a buffer that `pack_linear` made."""
    shape = (out_features, in_features)
    data = packed[HEADER_BYTES:]
    if format != "int8":
        dtype = torch.float32 if format == "fp32" else torch.bfloat16
        return _take(data, dtype, shape), None
    scale = _take(data, torch.float32, (out_features, 1))
    return _take(data[4 * out_features :], torch.int8, shape), scale


def _take(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = shape[0] * shape[1] * dtype.itemsize
    return data[:count].clone().view(dtype).reshape(shape)


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
    """Args are those of `encfast.ops.packed_linear`; float64 x is computed in float64."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight, scale = unpack_linear(packed, out_features, x.shape[1], format)
    if scale is not None:
        q, zero, x_scale = quantize_rows(x)
        # float64 holds the integer sums exactly.
        sums = (q - zero).double() @ weight.double().mT
        y = sums.to(compute) * (x_scale * scale.mT).to(compute)
    else:
        rounded = x.to(weight.dtype) if format == "bf16" else x
        y = rounded.to(compute) @ weight.to(compute).mT
    if bias is not None:
        y = y + bias.to(compute)
    act = ACTIVATIONS[activation] if activation else lambda y: y
    if gated:
        a, b = y.chunk(2, dim=1)
        y = act(a) * b
    else:
        y = act(y)
    if residual is not None:
        y = y + residual.to(compute)
    return _norm(y, norm, norm_weight, norm_bias, norm_eps).to(x.dtype)


def _norm(
    y: Tensor, kind: str | None, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> Tensor:
    if kind is None:
        return y
    eps = 1e-5 if eps is None else eps
    if kind == "layernorm":
        y = y - y.mean(1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)
