"""The feed-forward half of a block: plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import BlockConfig, nearest
from encfast.layers.dropout import Dropout


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
}


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
        self.up = nn.Linear(config.dim, halves * config.ffn_dim, bias=config.up_bias, **factory)
        self.drop = Dropout(config.mlp_hidden_dropout)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.down_bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` -> ``[N, C]``."""
        hidden = self.up(x)  # [N, F] or [N, 2F]
        if self.glu:
            a, b = hidden.chunk(2, dim=-1)
            hidden = self.act(a) * b
        else:
            hidden = self.act(hidden)
        return self.down(self.drop(hidden))
