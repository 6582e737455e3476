"""The attentive probe: one learned query that asks all patches of a frozen encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast.config import BlockConfig
from encfast.layers import CrossAttention, Norm
from encfast.packed import PackedBatch


class AttentivePool(nn.Module):
    """``attn(norm_q(query), norm_k(x), norm_v(x))``, without MLP or residual (CAE, section 4.1).

    Args:
        dim: C.
        num_heads: H.
        norm_eps: of the norms.
    """

    def __init__(self, dim: int, num_heads: int, *, norm_eps: float, **factory: Any) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim, **factory))
        self.norm_q, self.norm_k, self.norm_v = (
            Norm(dim, eps=norm_eps, **factory) for _ in range(3)
        )
        config = BlockConfig(dim, num_heads, dim, qkv_bias="qv")
        self.attn = CrossAttention(config, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The query starts from zero, as published (the modules reset themselves)."""
        nn.init.zeros_(self.query)

    def forward(self, patches: PackedBatch) -> Tensor:
        """``[K, C]``, B sequences -> ``[B, C]``."""
        batch = patches.batch_size
        query = self.norm_q(self.query).to(patches.data.dtype).expand(batch, -1)  # [B, C]
        steps = torch.arange(batch + 1, dtype=torch.int32, device=patches.device)
        keys = patches.with_data(self.norm_k(patches.data))
        return self.attn(PackedBatch(query, steps, 1), keys, values=self.norm_v(patches.data))
