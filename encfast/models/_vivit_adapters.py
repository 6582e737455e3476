"""What stands between a frozen spatial transformer and the temporal one (arXiv 2306.04822).

The paper calls it a compact module and leaves its form open. Each reading below adds a branch to
the class row of a time index, and the branch starts at zero: a model with a fresh adapter computes
what it computed without one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import BlockConfig
from encfast.layers import CrossAttention, Linear, Norm
from encfast.packed import PackedBatch

Adapter = Literal["none", "linear", "mlp", "attn"]
_QUERY_STD = 0.02


class LinearAdapter(nn.Module):
    """``x + out(norm(x))``."""

    def __init__(self, block: BlockConfig, **factory: Any) -> None:
        super().__init__()
        self.norm = Norm(block.dim, eps=block.norm_eps, **factory)
        self.out = Linear(block.dim, block.dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` -> ``[N, C]``."""
        return x + self.out(self.norm(x))


class MLPAdapter(nn.Module):
    """``x + out(gelu(down(x)))`` through a quarter of the channels."""

    def __init__(self, block: BlockConfig, **factory: Any) -> None:
        super().__init__()
        inner = max(block.dim // 4, 1)
        self.down = Linear(block.dim, inner, **factory)
        self.out = Linear(inner, block.dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C]`` -> ``[N, C]``."""
        return x + self.out(F.gelu(self.down(x)))


class AttentionAdapter(nn.Module):
    """A learned query pools the patch rows of its time index; the class row is the residual."""

    def __init__(self, block: BlockConfig, **factory: Any) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(block.dim, **factory))
        self.attn = CrossAttention(block, **factory)
        self.reset_parameters()

    @property
    def out(self) -> Linear:
        """The layer that starts at zero."""
        return self.attn.out

    def reset_parameters(self) -> None:
        """Draws the query anew (the projections reset themselves)."""
        nn.init.normal_(self.query, std=_QUERY_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Class and patch rows ``[N, 1 + P, C]`` -> ``[N, C]``."""
        n, rows = x.shape[0], x.shape[1] - 1
        ends = torch.arange(n + 1, dtype=torch.int32, device=x.device)
        queries = PackedBatch(self.query.expand(n, -1), ends, 1)
        patches = PackedBatch(x[:, 1:].flatten(0, 1), ends * rows, rows)  # [N * P, C]
        return x[:, 0] + self.attn(queries, patches)


def make_adapter(kind: Adapter, block: BlockConfig, **factory: Any) -> nn.Module | None:
    """The adapter called ``kind``; None for ``"none"``."""
    kinds = {"linear": LinearAdapter, "mlp": MLPAdapter, "attn": AttentionAdapter}
    return None if kind == "none" else kinds[kind](block, **factory)


def zero_branch(adapter: nn.Module) -> None:
    """Makes an adapter the identity of the class row."""
    nn.init.zeros_(adapter.out.weight)
    nn.init.zeros_(adapter.out.bias)
