"""The feed-forward half of a block: plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.config import BlockConfig, nearest
from encfast.layers.dropout import Dropout
from encfast.layers.linear import Linear

_FUSED_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
# Below, the costlier call of the op eats its gain (measured on Sapphire Rapids, bench/glu.py).
_FUSED_ELEMENTS = 2**17


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
}
_NAMES = {function: name for name, function in _ACTIVATIONS.items()}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called ``name``: gelu (exact), gelu_tanh, silu or relu.

    Raises:
        ValueError: for another name.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; {nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class MLP(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(a) * b)`` with ``[a, b] = up(x)``.

    The activated half a comes first. Source of the gated form: Shazeer 2020, arXiv 2002.05202.

    Args:
        config: dim, ffn_dim, glu, activation, biases, and dropout in front of ``down``.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.glu = config.glu
        self.act = activation(config.activation)
        halves = 2 if config.glu else 1
        self.up = Linear(config.dim, halves * config.ffn_dim, bias=config.up_bias, **factory)
        self.drop = Dropout(config.mlp_hidden_dropout)
        self.down = Linear(config.ffn_dim, config.dim, bias=config.down_bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` -> ``[N, C]``."""
        hidden = activate(self.up(x), self.act, gated=self.glu)  # [N, F]
        return self.down(self.drop(hidden))


def activate(hidden: Tensor, act: Callable[[Tensor], Tensor], *, gated: bool) -> Tensor:
    """The hidden rows of an MLP through its activation, by :func:`encfast.ops.glu` where that pays.

    Args:
        hidden: ``[N, F]``, or with ``gated`` ``[N, 2F]``: ``act(a) * b`` of ``[a, b]``.
        act: one of :func:`activation`, or any other function.

    Returns:
        ``[N, F]``.
    """
    if _fuses(hidden, act, gated):
        return ops.glu(hidden, activation=_NAMES[act], gated=gated)
    if not gated:
        return act(hidden)
    a, b = hidden.chunk(2, dim=-1)
    return act(a) * b


def _fuses(hidden: Tensor, act: Callable[[Tensor], Tensor], gated: bool) -> bool:
    # Elsewhere than on a CPU the op is its reference. A compiler fuses the plain form itself.
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if hidden.dtype not in _FUSED_DTYPES or hidden.numel() < _FUSED_ELEMENTS:
        return False
    # Alone, PyTorch's relu and its gelu in fp32 are as fast as the op.
    half = hidden.dtype != torch.float32
    name = _NAMES.get(act, "")
    return bool(name) and (gated or name in ("gelu_tanh", "silu") or (half and name == "gelu"))
