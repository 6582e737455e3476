"""The feed-forward networks of a mixture as stacks of weights, for rows that stand by expert."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.config import BlockConfig
from encfast.layers.dropout import Dropout
from encfast.layers.mlp import activate, activation


class Experts(nn.Module):
    """E MLPs as :class:`~encfast.layers.MLP` has them, one per group of rows.

    Their parameters are plain stacks with the expert first, each in the layout of ``nn.Linear``:
    ``up`` ``[E, F, C]`` (``[E, 2F, C]`` with ``config.glu``, the activated half first), ``down``
    ``[E, C, F]``, ``up_bias`` ``[E, F]`` and ``down_bias`` ``[E, C]``. Checkpoints, FSDP and expert
    parallelism slice them along the first dimension.

    Args:
        config: ``dim``, ``ffn_dim``, ``glu``, ``activation``, ``up_bias``, ``down_bias`` and
            ``mlp_hidden_dropout`` are read.
        num_experts: E, at least 1.
    """

    up: nn.Parameter
    down: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        config: BlockConfig,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be >= 1, got {num_experts}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.glu = config.glu
        self.act = activation(config.activation)
        hidden = (2 if config.glu else 1) * config.ffn_dim
        shapes = {
            "up": (num_experts, hidden, config.dim),
            "up_bias": (num_experts, hidden) if config.up_bias else None,
            "down": (num_experts, config.dim, config.ffn_dim),
            "down_bias": (num_experts, config.dim) if config.down_bias else None,
        }
        for name, shape in shapes.items():
            stack = None if shape is None else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(name, stack)
        self.drop = Dropout(config.mlp_hidden_dropout)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    def reset_parameters(self) -> None:
        """Draws every expert as ``nn.Linear`` draws its weight and bias."""
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            bound = 1.0 / math.sqrt(weight.shape[2])
            for stack in (weight, bias):
                if stack is not None:
                    nn.init.uniform_(stack, -bound, bound)

    def forward(self, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Each row through the expert whose group it stands in.

        Args:
            rows: ``[M, C]``.
            cu_seqlens: int32 ``[E + 1]``, where the experts' groups begin; at most M.

        Returns:
            ``[M, C]``. Rows beyond the last group are of no expert; what they hold is unspecified.
        """
        rows, up, down = _autocast(rows, self.up, self.down)
        hidden = ops.grouped_mm(rows, up, cu_seqlens, bias=self.up_bias)  # [M, F] or [M, 2F]
        hidden = self.drop(activate(hidden, self.act, gated=self.glu))
        return ops.grouped_mm(hidden, down, cu_seqlens, bias=self.down_bias)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        experts, dim, ffn_dim = self.down.shape
        return f"{experts} x {dim} -> {ffn_dim} -> {dim}, gated={self.glu}"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that autocast gives to ``nn.Linear``, if it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
