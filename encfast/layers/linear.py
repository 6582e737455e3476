"""``nn.Linear`` for training on CPUs that PyTorch's own product serves below their peak."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from encfast import _load, ops

# From here on the product takes long enough that what a call costs beside it does not count.
MIN_ROWS = 256


class Linear(nn.Linear):
    """An ``nn.Linear``: its parameters, names and initialisation, and its results up to rounding.

    On CPUs where :func:`encfast.ops.linear` is the faster product in float32, eager mode takes it.
    Other dtypes, autocast, few rows, compiled and exported graphs, function transforms and GPUs
    keep PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` -> ``[..., out_features]``."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by the faster of PyTorch's product and :func:`encfast.ops.linear`.

    Args:
        x: ``[..., C]``.
        weight: ``[F, C]``.
        bias: ``[F]`` or None.

    Returns:
        ``[..., F]``.
    """
    if torch.compiler.is_compiling() or not _is_ours(x, weight):
        return F.linear(x, weight, bias)
    return ops.linear(x, weight, bias)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and _torch_is_below_peak()
        and type(weight) in (Tensor, nn.Parameter)  # not a shard, nor quantised
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


@functools.cache
def _torch_is_below_peak() -> bool:
    """Whether PyTorch's products leave much of this CPU idle: on AMD's, from AVX2 on.

    MKL multiplies float32 there at 85 % of what Zen 4 could, the core of ``ops.linear`` at 92 %; on
    Intel's MKL reaches the peak.
    """
    if _load.error is not None or torch.ops.encfast.cpu_isa() == "base":
        return False
    return torch.ops.encfast.cpu_vendor() == "AuthenticAMD"
