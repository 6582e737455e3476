"""What glu means, in plain PyTorch; `glu_bwd` is its gradient written out for the fallback."""

import torch
import torch.nn.functional as F
from torch import Tensor


def glu(
    x: Tensor,
    *,
    activation: str = "gelu",
    gated: bool = True,
    activated: str = "first",
    bias: Tensor | None = None,
) -> Tensor:
    """act(a) * b with the halves a, b of x + bias, or act(x + bias). Args of `encfast.ops.glu`."""
    a, b = _halves(_biased(x, bias), gated, activated)
    out = _ACTIVATIONS[activation](a)
    return (out if b is None else out * b).to(x.dtype)


def glu_bwd(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "gelu",
    gated: bool = True,
    activated: str = "first",
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias, the latter in the compute dtype."""
    a, b = _halves(_biased(x, bias), gated, activated)
    grad = dout.to(a.dtype)
    dx = (grad if b is None else grad * b) * _SLOPES[activation](a)
    if b is not None:
        other = grad * _ACTIVATIONS[activation](a)
        dx = torch.cat((dx, other) if activated == "first" else (other, dx), dim=-1)
    leading = tuple(range(dx.dim() - 1))
    return dx.to(x.dtype), dx.sum(leading) if leading else dx


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.to(compute) if bias is None else x.to(compute) + bias.to(compute)


def _halves(x: Tensor, gated: bool, activated: str) -> tuple[Tensor, Tensor | None]:
    if not gated:
        return x, None
    first, second = x.chunk(2, dim=-1)
    return (first, second) if activated == "first" else (second, first)


def _gelu_tanh(a: Tensor) -> Tensor:
    return F.gelu(a, approximate="tanh")


def _gelu_slope(a: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a * a) / (2 * torch.pi) ** 0.5
    return 0.5 * (1 + torch.erf(a / 2**0.5)) + a * density


def _gelu_tanh_slope(a: Tensor) -> Tensor:
    root, cubic = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(root * (a + cubic * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * root * (1 + 3 * cubic * a * a)


def _silu_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _relu_slope(a: Tensor) -> Tensor:
    return (a > 0).to(a.dtype)


_ACTIVATIONS: dict = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
}
_SLOPES: dict = {
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": _silu_slope,
    "relu": _relu_slope,
}
