"""Embeddings of packed tokens: word, learned position and segment tables, norm, dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.config import NormPrecision
from encfast.layers.dropout import Dropout
from encfast.layers.norm import Norm
from encfast.packed import PackedBatch


class Embeddings(nn.Module):
    """``dropout(norm(word[id] + position[pos] + segment[type]))`` on packed rows.

    Args:
        vocab_size: V.
        dim: channels of the tables.
        max_positions: longest sequence the learned position table serves; 0: no table.
        position_offset: rows of the table before position 0's (RoBERTa: 2, never used).
        num_segments: size of the token-type table; 0: none.
        norm: whether a norm follows.
        norm_eps, norm_bias, norm_precision: of that norm.
        dropout: probability in [0, 1).
        padding_idx: id whose embedding stays zero and takes no gradient, or None.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        max_positions: int = 0,
        position_offset: int = 0,
        num_segments: int = 0,
        norm: bool = True,
        norm_eps: float = 1e-5,
        norm_bias: bool = True,
        norm_precision: NormPrecision = "default",
        dropout: float = 0.0,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.max_positions, self.position_offset = max_positions, position_offset
        self.word = nn.Embedding(vocab_size, dim, padding_idx=padding_idx, **factory)
        rows = position_offset + max_positions
        self.position = nn.Embedding(rows, dim, **factory) if max_positions else None
        self.segment = nn.Embedding(num_segments, dim, **factory) if num_segments else None
        for table in (self.word, self.segment):
            if table is not None:
                # Unused, but a float attribute costs torch.compile a second pass.
                table.norm_type = 2  # type: ignore[assignment]
        self.norm = (
            Norm(dim, eps=norm_eps, bias=norm_bias, precision=norm_precision, **factory)
            if norm
            else nn.Identity()
        )
        self.drop = Dropout(dropout)

    def forward(
        self,
        tokens: PackedBatch,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> PackedBatch:
        """Token ids ``[N]`` -> rows ``[N, C]``.

        Args:
            tokens: integer ids in [0, V).
            segments: token types ``[N]``; all 0 if None.
            positions: int64 ``[N]``; the place in the sequence if None.

        Returns:
            The batch of the embeddings, normed where the config says so.

        Raises:
            ValueError: if a sequence is longer than the position table.
        """
        return self.around(tokens.with_data(self.word(tokens.data)), segments, positions)

    def around(
        self,
        rows: PackedBatch,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> PackedBatch:
        """The same around rows ``[N, C]`` in the words' place; transformers' inputs_embeds.

        Args:
            rows: what the words' table would give, and the geometry.
            segments: int64 ``[N]``, as in ``forward``.
            positions: int64 ``[N]``, as in ``forward``.

        Returns:
            The batch of the embeddings, normed where the config says so.

        Raises:
            ValueError: if a sequence is longer than the position table.
        """
        x = rows.data
        if self.segment is not None:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        if self.position is not None:
            if rows.max_seqlen > self.max_positions:
                raise ValueError(
                    f"a sequence has {rows.max_seqlen} tokens, the position table "
                    f"{self.max_positions}; truncate, or build the model with more positions"
                )
            places = rows.positions() if positions is None else positions
            x = x + F.embedding(places + self.position_offset, self.position.weight)
        return rows.with_data(self.drop(self.norm(x)))
