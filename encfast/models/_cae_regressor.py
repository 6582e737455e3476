"""CAE's latent regressor: what the encoder would say of hidden patches, from the visible ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encfast.config import BlockConfig
from encfast.layers import MLP, CrossAttention, DropPath, Norm
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask, RowPlan

_TOKEN_STD = 0.02  # of the mask token


def key_plan(mask: PatchMask) -> RowPlan:
    """All patches of each image in their order, from two sources.

    Builds from the encoder's rows ``[B + K, C]``, whose class rows it leaves out, with one row for
    each of the M hidden patches behind them. Attention does not see the order of its keys: this is
    the paper's concatenation of visible latents and queries, image by image.
    """
    first = mask.visible.shape[0] + mask.batch_size
    hidden = torch.arange(mask.hidden.shape[0], device=mask.hidden.device) + first
    index = torch.zeros_like(mask.restore)
    index = index.scatter(0, mask.visible, mask.visible_rows()).scatter(0, mask.hidden, hidden)
    ids = torch.arange(mask.total, device=mask.restore.device)
    # Row 0 of the position table is that of the class token.
    return RowPlan(index, mask.patches_of(ids) + 1, mask.cu_seqlens, mask.max_patches)


class RegressorBlock(nn.Module):
    """Queries attend to visible latents and to each other; only the queries go on.

    With q the queries, z the keys' rows and p positions::

        x = norm2(q + scale1 * attn(norm_q(q + p_q), norm_k(z + p_z), norm_v(z)))
        x = x + scale2 * mlp(x)

    The residual passes through norm2, unlike in a pre-norm block.
    """

    def __init__(self, config: BlockConfig, **factory: Any) -> None:
        super().__init__()
        norm = {"eps": config.norm_eps, **factory}
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (
            Norm(config.dim, **norm) for _ in range(4)
        )
        self.attn = CrossAttention(config, **factory)
        self.mlp = MLP(config, **factory)
        self.drop_path1, self.drop_path2 = DropPath(config.drop_path), DropPath(config.drop_path)
        self.start = repr(config.layer_scale)  # text: see layers.dropout.StaticFloat
        self.scale1 = nn.Parameter(torch.empty(config.dim, **factory))
        self.scale2 = nn.Parameter(torch.empty(config.dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the factors of LayerScale (the modules reset themselves)."""
        for scale in (self.scale1, self.scale2):
            nn.init.constant_(scale, float(self.start))

    def forward(
        self,
        queries: PackedBatch,
        encoded: Tensor,
        keys: RowPlan,
        positions: Tensor,
        table: Tensor,
    ) -> PackedBatch:
        """One row per hidden patch, ``[M, C]`` -> ``[M, C]``.

        Args:
            queries: ``[M, C]``.
            encoded: ``[B + K, C]``, the encoder's rows.
            keys: of :func:`key_plan`.
            positions: ``[M, C]``, of the queries.
            table: ``[1 + P, C]``, of all patches behind the class token's row.
        """
        q = queries.data
        rows = torch.cat((encoded, q))  # [B + K + M, C]
        placed = keys.build(rows, positions=table)  # [N, C]
        branch = self.attn(
            queries.with_data(self.norm_q(q + positions)),
            placed.with_data(self.norm_k(placed.data)),
            values=self.norm_v(keys.build(rows).data),
        )  # [M, C]
        x = self.norm2(self.drop_path1(branch, queries), q, branch_scale=self.scale1)
        branch = self.drop_path2(self.mlp(x), queries)
        return queries.with_data(x + self.scale2.to(branch.dtype) * branch)


class Regressor(nn.Module):
    """One shared mask token at each hidden place, through :class:`RegressorBlock` after block.

    Args:
        blocks: one config per block, of one ``dim``, with ``layer_scale``.
        final_norm: norm the result (CAE v2 leaves that to its head).
    """

    def __init__(
        self, blocks: Sequence[BlockConfig], *, final_norm: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        dim, eps = blocks[0].dim, blocks[0].norm_eps
        self.gradient_checkpointing = False
        self.mask_token = nn.Parameter(torch.empty(dim, **factory))
        self.blocks = nn.ModuleList(RegressorBlock(c, **factory) for c in blocks)
        self.norm = Norm(dim, eps=eps, **factory) if final_norm else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the mask token anew (the modules reset themselves)."""
        nn.init.normal_(self.mask_token, std=_TOKEN_STD)

    def forward(
        self, encoded: Tensor, mask: PatchMask, positions: Tensor, table: Tensor
    ) -> PackedBatch:
        """Encoder rows ``[B + K, C]`` -> a latent for each hidden patch, ``[M, C]``.

        Args:
            encoded: class row and visible patches of each image.
            mask: which they are.
            positions: ``[M, C]``, of the hidden patches.
            table: ``[1 + P, C]``, of all.
        """
        keys = key_plan(mask)
        token = self.mask_token.to(encoded.dtype).expand(mask.hidden.shape[0], -1)
        queries = mask.hidden_batch(token)  # [M, C]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                queries = _checkpointed(block, queries, encoded, keys, positions, table)
            else:
                queries = block(queries, encoded, keys, positions, table)
        return queries.with_data(self.norm(queries.data))


def _checkpointed(
    block: nn.Module,
    queries: PackedBatch,
    encoded: Tensor,
    keys: RowPlan,
    positions: Tensor,
    table: Tensor,
) -> PackedBatch:
    # Plain tensors in and out: the compiled form of checkpoint takes nothing else.
    def run(rows: Tensor, encoded: Tensor) -> Tensor:
        return block(queries.with_data(rows), encoded, keys, positions, table).data

    return queries.with_data(checkpoint(run, queries.data, encoded, use_reentrant=False))
