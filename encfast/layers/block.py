"""Block: attention and MLP around a residual stream. Stack: blocks in order, with checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encfast import ops
from encfast.config import BlockConfig
from encfast.layers.attention import Attention
from encfast.layers.cache import KVCache
from encfast.layers.dropout import Dropout, DropPath, StaticFloat
from encfast.layers.mlp import MLP
from encfast.layers.norm import Norm
from encfast.layers.relative import RelativeBias
from encfast.layers.rotary import Rotary
from encfast.packed import PackedBatch


class Block(nn.Module):
    """One transformer block.

    - post: ``x = norm1(x + attn(x)); x = norm2(x + mlp(x))`` (BERT, GPT-1);
    - pre: ``x = x + attn(norm1(x)); x = x + mlp(norm2(x))`` (GPT-2, ModernBERT);
    - sandwich: pre, and each branch through a norm of its own, ``branch_norm1`` and
      ``branch_norm2``, before it is added (Gemma 2).

    With ``layer_scale`` each branch has a learned factor per channel, ``scale1`` and ``scale2``
    (Touvron et al. 2021, arXiv 2103.17239); with ``drop_path`` a sequence may skip it in training.

    Args:
        config: of the block.
        attn: attention in the place of the one that ``config`` describes.
        mlp: rows ``[N, C]`` -> rows ``[N, C]`` in the place of an MLP that ``config`` describes.
    """

    scale1: nn.Parameter | None
    scale2: nn.Parameter | None
    layer_scale = StaticFloat()

    def __init__(
        self,
        config: BlockConfig,
        *,
        attn: Attention | None = None,
        mlp: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.post = config.norm_position == "post"
        self.attn = Attention(config, **factory) if attn is None else attn
        self.mlp = MLP(config, **factory) if mlp is None else mlp
        self.norm1 = _norm(config, **factory) if config.first_norm else nn.Identity()
        self.norm2 = _norm(config, **factory)
        sandwich = config.norm_position == "sandwich"
        self.branch_norm1 = _norm(config, **factory) if sandwich else nn.Identity()
        self.branch_norm2 = _norm(config, **factory) if sandwich else nn.Identity()
        self.attn_drop = Dropout(config.attn_out_dropout)
        self.mlp_drop = Dropout(config.mlp_dropout)
        self.drop_path1, self.drop_path2 = DropPath(config.drop_path), DropPath(config.drop_path)
        self.layer_scale = config.layer_scale
        for name in ("scale1", "scale2"):
            scale = None
            if config.layer_scale is not None:
                scale = nn.Parameter(torch.empty(config.dim, **factory))
            self.register_parameter(name, scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the factors of LayerScale (the modules reset themselves)."""
        for scale in (self.scale1, self.scale2):
            if scale is not None:
                nn.init.constant_(scale, self.layer_scale)

    def forward(
        self,
        batch: PackedBatch,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> PackedBatch:
        """Rows ``[N, C]`` -> rows ``[N, C]``.

        Args:
            batch: rows and geometry.
            rope: cos and sin ``[N, D / 2]``, if the config's position is "rope".
            cache: keys and values of earlier rows.

        Returns:
            The batch with the block's rows.
        """
        return batch.with_data(self.forward_rows(batch, None, rope, cache))

    def forward_rows(
        self,
        batch: PackedBatch,
        rows: Tensor | None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        rel_bias: Tensor | None = None,
    ) -> Tensor:
        """Only the rows asked for: every row is a key, but Wo, norms and MLP run on ``rows`` alone.

        Args:
            batch: rows ``[N, C]``.
            rows: int64 ``[M]`` in [-1, N), -1 being a row of zeros; None: all.
            rope, cache, rel_bias: see :meth:`Attention.heads`.

        Returns:
            ``[M, C]``.
        """
        seen, x = self.attended(batch, rows, rope, cache, rel_bias)
        return self.joined(self.mlp(seen), x, batch, rows)

    def attended(
        self,
        batch: PackedBatch,
        rows: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        rel_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The half with attention: what the MLP reads, and the residual stream beside it.

        Args:
            batch: rows ``[N, C]`` and geometry.
            rows: int64 ``[M]``, the rows that go on; None: all.
            rope: cos and sin ``[N, D / 2]``, or None.
            cache: keys and values of earlier rows, or None.
            rel_bias: ``[H, R]`` or ``[N, H, R]``, or None.

        Returns:
            ``[M, C]`` each.
        """
        x = batch.data
        seen = batch if self.post else batch.with_data(self.norm1(x))
        heads = self.attn.heads(seen, rope, cache, rel_bias)  # [N, H * D]
        if rows is not None:
            x, heads = ops.gather_rows(x, rows), ops.gather_rows(heads, rows)
        branch = self.attn_drop(self.branch_norm1(self.attn.out(heads)))
        branch = self.drop_path1(branch, batch, rows)
        if self.post:
            x = _norm_of_sum(self.norm1, branch, x, self.scale1)
            return x, x
        if isinstance(self.norm2, Norm):
            normed, x = self.norm2(branch, x, branch_scale=self.scale1, return_sum=True)
        else:
            x = _sum(branch, x, self.scale1)
            normed = self.norm2(x)
        return normed, x

    def joined(self, branch: Tensor, x: Tensor, batch: PackedBatch, rows: Tensor | None) -> Tensor:
        """The residual stream with what the MLP made of it.

        Args:
            branch: ``[M, C]``, the MLP's output.
            x: ``[M, C]``, the residual stream.
            batch: the geometry, by which sequences skip the branch (``drop_path``).
            rows: int64 ``[M]``, where in the batch these rows are; None: all of them.

        Returns:
            ``[M, C]``.
        """
        branch = self.drop_path2(self.mlp_drop(self.branch_norm2(branch)), batch, rows)
        if self.post:
            return _norm_of_sum(self.norm2, branch, x, self.scale2)
        return _sum(branch, x, self.scale2)


def _sum(branch: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else scale.to(branch.dtype) * branch)


def _norm_of_sum(norm: nn.Module, branch: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    """Also for an identity, or a norm that was put in Norm's place."""
    if isinstance(norm, Norm):
        return norm(branch, x, branch_scale=scale)
    return norm(_sum(branch, x, scale))


def _norm(config: BlockConfig, **factory: Any) -> Norm:
    return Norm(
        config.dim,
        kind=config.norm,
        eps=config.norm_eps,
        bias=config.norm_bias,
        unit_offset=config.norm_unit_offset,
        precision=config.norm_precision,
        **factory,
    )


class Stack(nn.Module):
    """Blocks in order; computes each rotary table once and checkpoints activations on request.

    Args:
        configs: one per block; they may differ in window, rope_theta, first_norm.
        share: use one set of weights for all blocks (ALBERT); the configs must then be equal.
        blocks: the blocks themselves, where ``configs`` do not say all of them.
        relative: the bias of relative positions that all blocks share (MPNet).

    Raises:
        ValueError: for ``share`` with configs that differ.
    """

    def __init__(
        self,
        configs: Sequence[BlockConfig],
        *,
        share: bool = False,
        blocks: Sequence[Block] | None = None,
        relative: RelativeBias | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if share and any(c != configs[0] for c in configs):
            raise ValueError("share=True needs equal block configs")
        self.depth = len(configs)
        self.gradient_checkpointing = False
        if blocks is None:
            unique = configs[:1] if share else configs
            blocks = [Block(c, device=device, dtype=dtype) for c in unique]
        self.blocks = nn.ModuleList(blocks)
        self.relative = relative
        # One table per distinct base; blocks refer to theirs by position in this list.
        bases = [(c.rope_theta, c.rope_scaling) if c.position == "rope" else None for c in configs]
        distinct = list(dict.fromkeys(b for b in bases if b is not None))
        self.rotaries = nn.ModuleList(
            Rotary(configs[0].head_size, theta, scaling=scaling, device=device)
            for theta, scaling in distinct
        )
        self.rotary_of = [None if b is None else distinct.index(b) for b in bases]

    def forward(
        self,
        batch: PackedBatch,
        *,
        rows: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> PackedBatch | Tensor:
        """Runs all blocks.

        Args:
            batch: rows ``[N, C]``.
            rows: int64 ``[M]`` in [-1, N): compute only these rows of the last block; -1 (say, the
                first row of an empty sequence) stands for a row of zeros.
            caches: one per block, for decoding.

        Returns:
            The batch with new rows, or with ``rows`` given a plain ``[M, C]``.
        """
        tables, bias = self._rope_tables(batch, caches), self._rel_bias()
        for i in range(self.depth):
            cache = None if caches is None else caches[i]
            last = rows if i == self.depth - 1 else None
            x = self._run(i, batch, last, tables, cache, bias)
            if last is not None:
                return x
            batch = batch.with_data(x)
        return batch if rows is None else ops.gather_rows(batch.data, rows)

    def levels(
        self, batch: PackedBatch, which: Sequence[int]
    ) -> tuple[PackedBatch, list[PackedBatch]]:
        """Runs all blocks, and keeps what some of them return.

        Args:
            batch: rows ``[N, C]``.
            which: indices of blocks, from 0.

        Returns:
            What the last block returns, and what the blocks ``which`` do, in that order.

        Raises:
            ValueError: for an index outside of 0..depth - 1.
        """
        for i in which:
            if not 0 <= i < self.depth:
                raise ValueError(f"which holds {i}, expected blocks 0..{self.depth - 1}")
        tables, bias = self._rope_tables(batch, None), self._rel_bias()
        kept: dict[int, PackedBatch] = {}
        for i in range(self.depth):
            batch = batch.with_data(self._run(i, batch, None, tables, None, bias))
            if i in which:
                kept[i] = batch
        return batch, [kept[i] for i in which]

    def _run(
        self,
        i: int,
        batch: PackedBatch,
        rows: Tensor | None,
        tables: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache | None,
        rel_bias: Tensor | None = None,
    ) -> Tensor:
        block, rope = self.blocks[i % len(self.blocks)], self._rope(i, tables)
        if self.gradient_checkpointing and self.training and cache is None:
            return _checkpointed(block, batch, rows, rope, rel_bias)
        return block.forward_rows(batch, rows, rope, cache, rel_bias)

    def _rel_bias(self) -> Tensor | None:
        return None if self.relative is None else self.relative()

    def _rope(self, i: int, tables: Sequence[tuple[Tensor, Tensor]]) -> Any:
        which = self.rotary_of[i]
        return None if which is None else tables[which]

    def _rope_tables(
        self, batch: PackedBatch, caches: Sequence[KVCache] | None
    ) -> list[tuple[Tensor, Tensor]]:
        if not len(self.rotaries):
            return []
        positions = batch.positions() if caches is None else caches[0].positions(batch)
        return [rotary(positions) for rotary in self.rotaries]

    def new_caches(self) -> list[KVCache]:
        """One empty cache per block, bounded where the block's left window is."""
        caches = []
        for i in range(self.depth):
            left = self.blocks[i % len(self.blocks)].attn.window[0]
            caches.append(KVCache(None if left < 0 else left))
        return caches


def _checkpointed(
    block: Block,
    batch: PackedBatch,
    rows: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    rel_bias: Tensor | None,
) -> Tensor:
    # Plain tensors in and out: the compiled form of checkpoint takes nothing else.
    def run(data: Tensor) -> Tensor:
        return block.forward_rows(batch.with_data(data), rows, rope, None, rel_bias)

    return checkpoint(run, batch.data, use_reentrant=False)
