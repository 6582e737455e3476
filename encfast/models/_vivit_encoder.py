"""The body that ViViT's spatial and temporal transformer share: a ViT from rows to class rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encfast.config import BlockConfig
from encfast.layers import LearnedPositions, Norm, Stack
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask


class Encoder(nn.Module):
    """Class token, learned positions, pre-norm blocks, final norm.

    Args:
        blocks: one config per block.
        grid: rows along each axis that the position table is for.
    """

    def __init__(self, blocks: Sequence[BlockConfig], grid: Sequence[int], **factory: Any) -> None:
        super().__init__()
        dim = blocks[0].dim
        self.class_token = nn.Parameter(torch.empty(dim, **factory))
        self.positions = LearnedPositions(grid, dim, class_token=True, **factory)
        self.stack = Stack(blocks, **factory)
        self.norm = Norm(dim, eps=blocks[0].norm_eps, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class token 0, as published (the modules reset themselves)."""
        nn.init.zeros_(self.class_token)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Rows ``[N, C]`` of B sequences -> their class rows ``[B, C]``.

        The last block is finished at the class rows alone. A sequence takes the first positions of
        the table.
        """
        x = self._with_class_rows(batch)  # [B + N, C]
        return self.norm(self.stack(x, rows=x.first_rows()))  # [B, C]

    def all_rows(self, batch: PackedBatch) -> Tensor:
        """Rows ``[N, C]`` of B sequences -> ``[B + N, C]``, each class row before its sequence."""
        return self.norm(self.stack(self._with_class_rows(batch)).data)

    def _with_class_rows(self, batch: PackedBatch) -> PackedBatch:
        plan = _everything(batch).visible_plan()
        return plan.build(batch.data, self.class_token, self.positions())


def _everything(batch: PackedBatch) -> PatchMask:
    """A mask that hides nothing, of sequences as long as those of ``batch``."""
    ids = torch.arange(batch.total, device=batch.device)
    ends, longest = batch.cu_seqlens, batch.max_seqlen
    return PatchMask(ids, ids[:0], ids, ends, ends, longest, longest, 0)
