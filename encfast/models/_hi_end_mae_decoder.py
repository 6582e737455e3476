"""Hi-End-MAE's decoder: hidden patches from what the encoder says at several depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encfast.layers import CrossBlock, FixedPositions, Linear, Norm, Stack
from encfast.models._hi_end_mae_config import HiEndMaeConfig
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask

_TOKEN_STD = 0.02  # of the mask token


class Decoder(nn.Module):
    """Self-attention over all patches, then one block of cross-attention per level, deepest first.

    The encoder's last output starts the visible rows; each level's output, projected by a bridge of
    its own, is what one block reads keys and values from: neither normed nor with positions.
    """

    def __init__(self, config: HiEndMaeConfig, **factory: Any) -> None:
        super().__init__()
        dim, count = config.decoder_dim, len(config.levels)
        self.gradient_checkpointing = False
        # One per level, shallow to deep, and that of the last output.
        self.bridges = nn.ModuleList(Linear(config.dim, dim, **factory) for _ in range(count + 1))
        self.mask_token = nn.Parameter(torch.empty(dim, **factory))
        self.positions = FixedPositions(
            config.grid, dim, class_token=True, device=factory["device"]
        )
        self.stack = Stack([config.decoder_block()] * config.decoder_depth, **factory)
        self.blocks = nn.ModuleList(
            CrossBlock(config.decoder_block(), **factory) for _ in range(count)
        )
        self.norm = Norm(dim, eps=config.norm_eps, **factory)
        self.predict = Linear(dim, config.patch_voxels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the mask token anew (the modules reset themselves)."""
        nn.init.normal_(self.mask_token, std=_TOKEN_STD)

    def forward(
        self, encoded: PackedBatch, levels: Sequence[PackedBatch], mask: PatchMask
    ) -> Tensor:
        """Voxels ``[N - K, Q]`` of the hidden patches, in the mask's order.

        Args:
            encoded: ``[B + K, C]``, the encoder's normed rows: class row, then visible patches.
            levels: ``[B + K, C]`` each, what its blocks said, shallow to deep.
            mask: which patches they are.
        """
        rows = self.bridges[-1](encoded.data)  # [B + K, Cd]
        # Never put back in the raster's order: hidden rows are each sequence's suffix.
        x = mask.suffix_plan().build(rows, self.mask_token, self.positions())  # [B + N, Cd]
        x = self.stack(x)
        hidden = mask.hidden_batch(mask.suffix_rows())
        deepest_first = list(zip(self.bridges[:-1], levels, strict=True))[::-1]
        for i, (block, (bridge, level)) in enumerate(zip(self.blocks, deepest_first, strict=True)):
            context = level.with_data(bridge(level.data))  # [B + K, Cd]
            # Nobody reads what the last block would say of visible patches.
            x = self._run(block, x, context, hidden if i == len(self.blocks) - 1 else None)
        return self.predict(self.norm(x.data))  # [N - K, Q]

    def _run(
        self, block: nn.Module, x: PackedBatch, context: PackedBatch, rows: PackedBatch | None
    ) -> PackedBatch:
        if not (self.gradient_checkpointing and self.training):
            return block(x, context, rows)

        # Plain tensors in and out: the compiled form of checkpoint takes nothing else.
        def run(x_rows: Tensor, context_rows: Tensor) -> Tensor:
            return block(x.with_data(x_rows), context.with_data(context_rows), rows).data

        out = checkpoint(run, x.data, context.data, use_reentrant=False)
        return (x if rows is None else rows).with_data(out)
