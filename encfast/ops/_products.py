"""Matrix products into given memory, by the faster of PyTorch and the core of `linear`."""

import functools

import torch
from torch import Tensor

from .. import _load

# out = a b^T, a b or a^T b, as `product` says; all contiguous along their last dimension.
torch.library.define(
    "encfast::multiply_into", "(Tensor a, Tensor b, int product, Tensor(a!) out) -> ()"
)
_NT, _NN, _TN = range(3)

# Fewer are multiplied in less time than the other operand is packed.
_LEAST_ROWS = 64


@functools.cache
def torch_is_below_peak() -> bool:
    """Whether PyTorch's products leave much of this CPU idle: on AMD's, from AVX2 on.

    MKL multiplies float32 there at 85 % of what Zen 4 could, the core of `linear` at 92 %; on
    Intel's MKL reaches the peak.
    """
    if _load.error is not None or torch.ops.encfast.cpu_isa() == "base":
        return False
    return torch.ops.encfast.cpu_vendor() == "AuthenticAMD"


def multiply_nt(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a [M, K] times the transpose of b [N, K] into out [M, N], which is returned."""
    return _multiply(a, b, _NT, out) if _is_ours(a) else torch.mm(a, b.mT, out=out)


def multiply_nn(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a [M, K] times b [K, N] into out [M, N], which is returned."""
    return _multiply(a, b, _NN, out) if _is_ours(a) else torch.mm(a, b, out=out)


def multiply_tn(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The transpose of a [K, M] times b [K, N] into out [M, N], which is returned."""
    return _multiply(a, b, _TN, out) if _is_ours(a) else torch.mm(a.mT, b, out=out)


def _is_ours(a: Tensor) -> bool:
    return a.shape[0] >= _LEAST_ROWS and torch_is_below_peak()


def _multiply(a: Tensor, b: Tensor, product: int, out: Tensor) -> Tensor:
    torch.ops.encfast.multiply_into(a, b, product, out)
    return out
