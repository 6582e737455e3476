"""What the models of the BERT family are fed, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from encfast.data.masking import mask_tokens
from encfast.data.text import TextBatch
from encfast.packed import PackedBatch

if TYPE_CHECKING:
    from encfast.models.bert_family import BertFamilyConfig


@dataclass(frozen=True, eq=False)
class Scores:
    """What forward returns: the last hidden rows, and what the task's heads say."""

    hidden: PackedBatch  # [N, C]
    pooled: Tensor | None = None  # [B, C]
    vocab: Tensor | None = None  # [M, V] at the rows asked for, or [N, V]
    labels: Tensor | None = None  # [B, K], or [N, K] for tokens, or [B, 2] for pre-training
    start: Tensor | None = None  # [N]
    end: Tensor | None = None  # [N]


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and its terms as far as the task has them."""

    total: Tensor
    masked_lm: Tensor | None = None
    sentence_pair: Tensor | None = None
    next_token: Tensor | None = None
    classification: Tensor | None = None
    span: Tensor | None = None


for _dataclass in (Scores, Losses):
    torch.export.register_dataclass(
        _dataclass, serialized_type_name=f"{__name__}.{_dataclass.__name__}"
    )


def example_batch(
    config: BertFamilyConfig,
    generator: torch.Generator | None,
    lengths: Sequence[int] | None,
) -> TextBatch:
    """Random text in the form ``config.task`` expects; see ``BertFamily.example_batch``."""
    draw = {"generator": generator}
    if lengths is None:
        longest = min(64, config.max_positions)
        lengths = [*torch.randint(min(8, longest), longest + 1, (4,), **draw).tolist(), 0]
    ids = torch.randint(config.vocab_size, (sum(lengths),), **draw)
    tokens = PackedBatch.from_lengths(ids, lengths)
    segments = _mark_pairs(config, tokens) if config.num_segments else None
    size = tokens.lengths().long()
    if config.task in ("masked-lm", "pretrain"):
        special = [i for i in (config.pad_id, config.cls_id, config.sep_id) if i is not None]
        masked = mask_tokens(
            tokens,
            vocab_size=config.vocab_size,
            mask_id=config.mask_id,
            special_ids=special,
            **draw,
        )
        pairs = torch.randint(2, size.shape, **draw)
        return TextBatch(masked.tokens, segments, masked.rows, masked.targets, pairs)
    if config.task == "span":
        starts = (torch.rand(size.shape, **draw) * size).long()
        ends = torch.minimum(starts + torch.randint(5, size.shape, **draw), size - 1)
        return TextBatch(tokens, segments, starts=starts, ends=ends)
    if config.task in ("encode", "causal-lm"):
        return TextBatch(tokens, segments)
    count = ids.shape if config.task == "token-classification" else size.shape
    if config.num_labels == 1:
        return TextBatch(tokens, segments, labels=torch.rand(count, **draw))
    return TextBatch(tokens, segments, labels=torch.randint(config.num_labels, count, **draw))


def _mark_pairs(config: BertFamilyConfig, tokens: PackedBatch) -> Tensor:
    """Makes ``[CLS] A [SEP] B [SEP]`` of each sequence, in place; returns token types ``[N]``."""
    place = tokens.positions()
    size = tokens.lengths().long()[tokens.segment_ids()]
    middle = size // 2
    tokens.data.masked_fill_((place == middle) | (place == size - 1), config.sep_id)
    tokens.data.masked_fill_(place == 0, config.cls_id)
    return (place > middle).long().clamp(max=config.num_segments - 1)
