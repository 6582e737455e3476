"""Cross-attention: queries of one packed batch, keys and values of another; a block around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.config import BlockConfig
from encfast.layers.attention import Attention
from encfast.layers.dropout import Dropout, DropPath, StaticFloat
from encfast.layers.linear import Linear
from encfast.layers.mlp import MLP
from encfast.layers.norm import Norm
from encfast.packed import PackedBatch


class CrossAttention(nn.Module):
    """Sequence b of the queries attends to sequence b of the context.

    Args:
        config: uses dim, num_heads, num_kv_heads, head_dim, softcap, attn_dropout and the biases;
            ``qkv_bias="qv"`` leaves out that of the keys.
        context_dim: channels of the context; None: dim.

    Raises:
        ValueError: for a causal config, windows or positions, which say nothing between two
            sequences.
    """

    softcap = StaticFloat()
    attn_dropout = StaticFloat()

    def __init__(
        self,
        config: BlockConfig,
        *,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.causal or config.window != (-1, -1) or config.position != "none":
            raise ValueError(
                "cross-attention has no order of rows, got "
                f"causal={config.causal}, window={config.window}, position={config.position!r}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim, self.softcap = config.head_size, config.softcap
        self.attn_dropout = config.attn_dropout
        rows, kv_rows = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        context_dim = config.dim if context_dim is None else context_dim
        biased = config.qkv_bias is not False
        self.q = Linear(config.dim, rows, bias=biased, **factory)
        self.k = Linear(context_dim, kv_rows, bias=config.qkv_bias is True, **factory)
        self.v = Linear(context_dim, kv_rows, bias=biased, **factory)
        self.out = Linear(rows, config.dim, bias=config.out_bias, **factory)

    def forward(
        self,
        queries: PackedBatch,
        context: PackedBatch,
        *,
        values: Tensor | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Rows ``[N, C]`` of the queries -> ``[N, C]``.

        Args:
            queries: ``[N, C]``, B sequences.
            context: ``[Nk, Ck]``, as many sequences; an empty one yields the output's bias.
            values: ``[Nk, Ck]``: what values are projected from, where that is not what keys are
                (CAE norms the two apart); None: the context.
            query_positions, key_positions: ``[N, C]`` and ``[Nk, Ck]``, added to the input of q
                and of k, not of v.
            bias: one matrix ``[Lq, Lk]`` per sequence, packed: what hides keys, or is added to
                scores; as :func:`encfast.ops.varlen_attn` takes it.

        Returns:
            ``[N, C]``.

        Raises:
            ValueError: if the batches have different numbers of sequences.
        """
        if context.batch_size != queries.batch_size:
            raise ValueError(
                f"context has {context.batch_size} sequences, the queries {queries.batch_size}"
            )
        q_rows = queries.data if query_positions is None else queries.data + query_positions
        k_rows = context.data if key_positions is None else context.data + key_positions
        v_rows = context.data if values is None else values
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim))
            for layer, x in ((self.q, q_rows), (self.k, k_rows), (self.v, v_rows))
        )  # [N, H, D], [Nk, Hk, D] twice
        out = ops.varlen_attn(
            q,
            k,
            v,
            queries.cu_seqlens,
            cu_seqlens_k=context.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            max_seqlen_k=context.max_seqlen,
            bias=bias,
            softcap=self.softcap,
            dropout_p=(self.attn_dropout or None) if self.training else None,
        )  # [N, H, D]
        return self.out(out.flatten(1))


class CrossBlock(nn.Module):
    """A decoder's block: attention among the rows, attention to a context, MLP; pre-norm.

    ``x = x + attn(norm0(x)); x = x + cross(norm1(x), context); x = x + mlp(norm2(x))``. The context
    is read as it is.

    Args:
        config: of all three branches.
        context_dim: channels of the context; None: dim.

    Raises:
        ValueError: for a config with post-norm, without the first norm or with LayerScale, and as
            :class:`CrossAttention`.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = config.norm_position == "pre" and config.first_norm and config.layer_scale is None
        if not plain:
            raise ValueError(
                "a CrossBlock is pre-norm without LayerScale, got "
                f"norm_position={config.norm_position!r}, first_norm={config.first_norm}, "
                f"layer_scale={config.layer_scale}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = Attention(config, **factory)
        self.cross = CrossAttention(config, context_dim=context_dim, **factory)
        self.mlp = MLP(config, **factory)
        self.norm0, self.norm1, self.norm2 = (
            Norm(
                config.dim,
                kind=config.norm,
                eps=config.norm_eps,
                bias=config.norm_bias,
                precision=config.norm_precision,
                **factory,
            )
            for _ in range(3)
        )
        self.attn_drop, self.cross_drop = (Dropout(config.attn_out_dropout) for _ in range(2))
        self.mlp_drop = Dropout(config.mlp_dropout)
        self.drop_path = DropPath(config.drop_path)  # holds a rate only: one for three branches

    def forward(
        self, batch: PackedBatch, context: PackedBatch, rows: PackedBatch | None = None
    ) -> PackedBatch:
        """Rows ``[N, C]`` -> ``[N, C]``; with ``rows``, of M rows -> ``[M, C]``.

        Args:
            batch: ``[N, C]``, B sequences.
            context: ``[Nk, Ck]``, as many.
            rows: int64 ``[M]`` in 0..N - 1, the rows of each sequence that go on: every row is a
                key of the self-attention, all that follows runs on these alone.

        Returns:
            The batch of queries with the block's rows; with ``rows`` of those alone.

        Raises:
            ValueError: as :meth:`CrossAttention.forward`.
        """
        x, queries, ids = batch.data, batch, None
        heads = self.attn.heads(batch.with_data(self.norm0(x)))  # [N, H * D]
        if rows is not None:
            queries, ids = rows, rows.data
            x, heads = ops.gather_rows(x, ids), ops.gather_rows(heads, ids)
        branch = self.drop_path(self.attn_drop(self.attn.out(heads)), batch, ids)
        normed, x = self.norm1(branch, x, return_sum=True)
        branch = self.cross_drop(self.cross(queries.with_data(normed), context))
        normed, x = self.norm2(self.drop_path(branch, queries), x, return_sum=True)
        branch = self.mlp_drop(self.mlp(normed))
        return queries.with_data(x + self.drop_path(branch, queries))
