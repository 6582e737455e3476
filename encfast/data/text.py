"""TextBatch: packed tokens and what a task wants to know about them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from encfast.data.masking import MaskedTokens
from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Tokens and what is to be predicted of them; a task reads the fields it needs."""

    tokens: PackedBatch  # ids [N]
    segments: Tensor | None = None  # int64 [N]: 0 in the first text, 1 in the second; all 0 if None
    rows: Tensor | None = None  # int64 [M]: masked rows
    targets: Tensor | None = None  # int64 [M]: what stood in the masked rows
    labels: Tensor | None = None  # [B], tokens [N]: int64, -100 for none; floating: regression
    starts: Tensor | None = None  # int64 [B]: the answer's first position in its sequence
    ends: Tensor | None = None  # int64 [B]: its last; outside of the sequence: no answer here

    @classmethod
    def from_masked(cls, masked: MaskedTokens, segments: Tensor | None = None) -> TextBatch:
        """A batch to be predicted, of what :func:`encfast.data.masking.mask_tokens` made.

        Args:
            masked: its tokens, rows and targets.
            segments: int64 ``[N]``, of the tokens.
        """
        return cls(masked.tokens, segments, masked.rows, masked.targets)

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TextBatch:
        """Removes the padding of a grid; for the border, like :meth:`PackedBatch.pack`.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 0 at padding.
            token_type_ids: ``[B, S]``.
            labels: ``[B, S]`` to predict tokens, where only labels > 0 count (0 is [PAD]); or
                ``[B]`` to classify.
        """
        tokens = PackedBatch.pack(input_ids, attention_mask)

        def packed(grid: Tensor) -> Tensor:
            return PackedBatch.pack(grid, attention_mask).data

        segments = None if token_type_ids is None else packed(token_type_ids)
        if labels is None or labels.dim() == 1:
            return cls(tokens, segments, labels=labels)
        targets = packed(labels)
        rows = (targets > 0).nonzero().flatten()
        return cls(tokens, segments, rows, targets[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TextBatch:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
        }
        return TextBatch(**moved)


torch.export.register_dataclass(
    TextBatch, serialized_type_name=f"{TextBatch.__module__}.{TextBatch.__name__}"
)
