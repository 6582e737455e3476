"""What dupmae is fed: texts with two kinds of masks to pre-train, queries and passages to tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast.data.whole_words import mask_words, visible_pairs
from encfast.packed import PackedBatch

if TYPE_CHECKING:
    from encfast.models.dupmae import DupMaeConfig


@dataclass(frozen=True, eq=False)
class PretrainBatch:
    """Texts ``[CLS] words [SEP]`` of N tokens, T the sum of their squared lengths."""

    tokens: PackedBatch  # ids [N], masked for the encoder
    rows: Tensor  # int64 [M]: masked rows
    targets: Tensor  # int64 [M]: what stood there
    originals: Tensor  # int64 [N]: ids before they were masked
    visible: Tensor  # bool [T]: what each row of the decoder sees, [L, L] of each text
    words: PackedBatch  # int64: rows of the tokens of words, text by text
    ordinary: PackedBatch  # int64: all rows but the first of each text

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PretrainBatch:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {n: v.to(device, non_blocking=non_blocking) for n, v in values.items()}
        return PretrainBatch(**moved)


@dataclass(frozen=True, eq=False)
class RetrievalBatch:
    """Q queries, then their passages: G of the first query, the right one first, G of the next."""

    tokens: PackedBatch  # ids [N] of Q + Q * G texts
    queries: int  # Q
    teacher: Tensor | None = None  # [Q, G]: another model's scores of a query's own passages


class Representation(NamedTuple):
    """Both parts of what retrieval compares."""

    cls: Tensor  # [B, K]: c
    lexical: Tensor  # float32 [B, V]: mu; [B, 0] without


class SparseRepresentation(NamedTuple):
    """What an index keeps of passages: c, and the largest entries of mu with their places."""

    cls: Tensor  # [B, K]
    values: Tensor  # float32 [B, k]
    ids: Tensor  # int64 [B, k]


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and the task's terms of it before they are weighted."""

    total: Tensor
    masked_lm: Tensor | None = None
    decoder: Tensor | None = None
    bag_of_words: Tensor | None = None
    contrastive: Tensor | None = None
    distillation: Tensor | None = None


for _dataclass in (PretrainBatch, RetrievalBatch, Losses):
    torch.export.register_dataclass(
        _dataclass, serialized_type_name=f"{__name__}.{_dataclass.__name__}"
    )


def similarity(queries: Representation, passages: SparseRepresentation) -> Tensor:
    """c_q c_d + sum over the kept entries v of mu_d of mu_q[v] mu_d[v].

    Args:
        queries: Q of them, mu whole.
        passages: P of them, mu with its largest entries alone.

    Returns:
        float32 ``[Q, P]``.
    """
    scores = queries.cls.float() @ passages.cls.float().mT
    if queries.lexical.shape[1]:
        # A passage is a weighted bag of rows of mu_q^T [V, Q].
        bags = F.embedding_bag(
            passages.ids,
            queries.lexical.mT.contiguous(),
            per_sample_weights=passages.values,
            mode="sum",
        )
        scores = scores + bags.mT
    return scores


class PretrainCollator:
    """Masks a list of examples for `DataLoader(collate_fn=...)`.

    An example is a pair: ids ``[L]`` of ``[CLS] words [SEP]``, and the number of each token's word,
    -1 for special tokens; see :func:`encfast.data.whole_words.mask_words`.

    Args:
        config: of the model.
        generator: of all random numbers.
    """

    def __init__(self, config: DupMaeConfig, generator: torch.Generator | None = None) -> None:
        self.config, self.generator = config, generator

    def __call__(self, examples: Sequence[tuple[Any, Any]]) -> PretrainBatch:
        """Raises ValueError for word ids that do not fit the ids."""
        longest = self.config.max_positions
        tokens, words = (
            PackedBatch.from_list([e[i][:longest] for e in examples], dtype=torch.int64)
            for i in (0, 1)
        )
        return pretrain_batch(self.config, tokens, words.data, self.generator)


def pretrain_batch(
    config: DupMaeConfig,
    tokens: PackedBatch,
    word_ids: Tensor,
    generator: torch.Generator | None = None,
) -> PretrainBatch:
    """Both masks of ids ``[N]`` and what follows from them; for the border."""
    draw = {"generator": generator}
    masked = mask_words(
        tokens,
        word_ids,
        vocab_size=config.vocab_size,
        mask_id=config.mask_id,
        prob=config.mask_prob,
        **draw,
    )
    visible = visible_pairs(
        tokens, word_ids, prob=config.decoder_mask_prob, num_masks=config.num_masks, **draw
    )
    return PretrainBatch(
        *masked, tokens.data, visible, rows_where(tokens, word_ids >= 0), ordinary_rows(tokens)
    )


def ordinary_rows(tokens: PackedBatch) -> PackedBatch:
    """int64 rows of all tokens but the first of each sequence; for the border."""
    return rows_where(tokens, tokens.positions() > 0)


def rows_where(tokens: PackedBatch, kept: Tensor) -> PackedBatch:
    """int64 rows where bool ``[N]`` is True, sequence by sequence; for the border."""
    rows = kept.nonzero().flatten()
    counts = torch.bincount(tokens.owners(rows), minlength=tokens.batch_size)
    return PackedBatch.from_lengths(rows, counts)


def example_batch(
    config: DupMaeConfig, generator: torch.Generator | None, lengths: Sequence[int] | None
) -> PretrainBatch | RetrievalBatch:
    """Random texts in the form the task expects; see ``DupMae.example_batch``."""
    draw = {"generator": generator}
    if lengths is None:
        longest = min(64, config.max_positions)
        lengths = [*torch.randint(min(8, longest), longest + 1, (4,), **draw).tolist(), 0]
    ids = torch.randint(config.vocab_size, (sum(lengths),), **draw)
    tokens = PackedBatch.from_lengths(ids, lengths)
    place, size = tokens.positions(), tokens.lengths().long()[tokens.segment_ids()]
    ids.masked_fill_(place == size - 1, config.sep_id).masked_fill_(place == 0, config.cls_id)
    if config.task == "retrieval":
        return RetrievalBatch(tokens, tokens.batch_size // 2)
    # Words of one or two tokens.
    word_ids = place // 2
    word_ids.masked_fill_((place == 0) | (place == size - 1), -1)
    return pretrain_batch(config, tokens, word_ids, generator)
