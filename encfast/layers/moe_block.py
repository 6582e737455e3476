"""Transformer blocks with a mixture of experts in the place of their MLP, and stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encfast.config import BlockConfig
from encfast.layers.block import Block, Stack
from encfast.layers.cache import KVCache
from encfast.layers.moe import MoEConfig, RouterLosses, moe_layer, sum_losses
from encfast.packed import PackedBatch

Rope = tuple[Tensor, Tensor] | None


class MoEBlock(Block):
    """A :class:`~encfast.layers.Block` whose MLP is a MoE layer; only the rows it runs on route.

    Args:
        config: of the block.
        moe: of the mixture.
    """

    def __init__(
        self,
        config: BlockConfig,
        moe: MoEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(config, mlp=moe_layer(config, moe, **factory), **factory)

    def forward_rows(
        self,
        batch: PackedBatch,
        rows: Tensor | None,
        rope: Rope = None,
        cache: KVCache | None = None,
        rel_bias: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Block.forward_rows`; the router's losses are not computed."""
        seen, x = self.attended(batch, rows, rope, cache, rel_bias)
        return self.joined(self.mlp(seen).data, x, batch, rows)

    def forward_with_losses(
        self,
        batch: PackedBatch,
        rows: Tensor | None = None,
        rope: Rope = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, RouterLosses]:
        """The rows ``[M, C]`` of :meth:`forward_rows`, and what the router's losses are.

        Args:
            batch: rows ``[N, C]`` and geometry.
            rows: int64 ``[M]``, those that go on and route; None: all.
            rope: cos and sin ``[N, D / 2]``, or None.
            cache: keys and values of earlier rows.

        Returns:
            ``[M, C]``, and the losses of this layer.
        """
        seen, x = self.attended(batch, rows, rope, cache)
        out = self.mlp(seen)
        return self.joined(out.data, x, batch, rows), out.losses()


class MoEStack(Stack):
    """A :class:`~encfast.layers.Stack` in which some blocks are mixtures.

    Args:
        configs: one per block.
        moes: one per block, None where the block keeps its MLP.

    Raises:
        ValueError: if there are not as many ``moes`` as ``configs``.
    """

    def __init__(
        self,
        configs: Sequence[BlockConfig],
        moes: Sequence[MoEConfig | None],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(configs) != len(moes):
            raise ValueError(
                f"moes has {len(moes)} entries, expected {len(configs)}, one per block"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            configs,
            blocks=[
                Block(c, **factory) if m is None else MoEBlock(c, m, **factory)
                for c, m in zip(configs, moes, strict=True)
            ],
            **factory,
        )

    def forward_with_losses(
        self, batch: PackedBatch, *, rows: Tensor | None = None
    ) -> tuple[PackedBatch | Tensor, RouterLosses]:
        """As :meth:`Stack.forward`, with the routers' losses summed over the blocks.

        Args:
            batch: rows ``[N, C]`` and geometry.
            rows: int64 ``[M]``: only these rows of the last block are wanted.

        Returns:
            The batch, or the rows ``[M, C]``, and the losses.

        Raises:
            ValueError: if no block is a mixture.
        """
        tables = self._rope_tables(batch, None)
        found: list[RouterLosses] = []
        for i, block in enumerate(self.blocks):
            last = rows if i == self.depth - 1 else None
            if isinstance(block, MoEBlock):
                x, losses = self._run_mixture(block, batch, last, self._rope(i, tables))
                found.append(losses)
            else:
                x = self._run(i, batch, last, tables, None)
            if last is not None:
                return x, sum_losses(found)
            batch = batch.with_data(x)
        return batch, sum_losses(found)

    def _run_mixture(
        self, block: MoEBlock, batch: PackedBatch, rows: Tensor | None, rope: Rope
    ) -> tuple[Tensor, RouterLosses]:
        if not (self.gradient_checkpointing and self.training):
            return block.forward_with_losses(batch, rows, rope)

        # Plain tensors in and out, as in Stack.
        def run(data: Tensor) -> tuple[Tensor, ...]:
            x, losses = block.forward_with_losses(batch.with_data(data), rows, rope)
            return x, *losses

        x, *losses = checkpoint(run, batch.data, use_reentrant=False)
        return x, RouterLosses(*losses)
