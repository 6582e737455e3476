"""The text tower of Frozen in Time: DistilBERT's first row, or BERT's pooled one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast.config import BlockConfig
from encfast.layers import Embeddings, Stack
from encfast.packed import PackedBatch


class TextTower(nn.Module):
    """Embeddings and post-norm blocks, the last of which is finished at first rows alone.

    Args:
        vocab_size: V.
        max_positions: the longest text.
        block: of every block.
        depth: blocks.
        dropout: of the embeddings.
        bert: BERT with its token types and its pooler, tanh of a linear layer.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        block: BlockConfig,
        depth: int,
        *,
        dropout: float,
        bert: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.embed = Embeddings(
            vocab_size,
            block.dim,
            max_positions=max_positions,
            num_segments=2 if bert else 0,
            norm_eps=block.norm_eps,
            dropout=dropout,
            padding_idx=0,
            **factory,
        )
        self.stack = Stack([block] * depth, **factory)
        self.pooler = nn.Linear(block.dim, block.dim, **factory) if bert else None

    def forward(self, text: PackedBatch) -> Tensor:
        """Ids ``[N]`` of B texts -> ``[B, C]``; an empty text has a row of zeros for its first."""
        first = torch.where(text.lengths() > 0, text.first_rows(), -1)  # [B]
        rows = self.stack(self.embed(text), rows=first)  # [B, C]
        return rows if self.pooler is None else torch.tanh(self.pooler(rows))
