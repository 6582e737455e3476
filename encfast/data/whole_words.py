"""Masks of whole words: of what an encoder reads, and of what each row of a decoder sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from encfast.data.masking import MaskedTokens, check_masking, replace_rows
from encfast.packed import PackedBatch


def mask_words(
    tokens: PackedBatch,
    word_ids: Tensor,
    *,
    vocab_size: int,
    mask_id: int,
    prob: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Chooses words, and replaces most of their tokens, each by a draw of its own.

    Words are taken in random order as long as they fit into ``prob`` of the sequence's tokens, at
    least one token, as in transformers' ``DataCollatorForWholeWordMask``. For the border.

    Args:
        tokens: integer ids ``[N]``, on the CPU.
        word_ids: int64 ``[N]``, the number of each token's word within its sequence, ascending; -1
            where a token is special and never chosen. Fast tokenizers know them (``word_ids()``).
        vocab_size: V.
        mask_id: id of [MASK].
        prob: share of the tokens of words that is chosen, in [0, 1].
        mask_share, random_share: of the chosen; see :func:`encfast.data.masking.mask_tokens`.
        generator: of all random numbers.

    Returns:
        The tokens with their chosen rows replaced, those rows, and the ids that stood there.

    Raises:
        ValueError: as :func:`encfast.data.masking.mask_tokens`, or for word ids that do not fit.
    """
    check_masking(vocab_size, mask_id, prob, mask_share, random_share)
    chosen = [draw_words(ids, prob, 1, generator)[0] for ids in _split(tokens, word_ids)]
    rows = torch.cat(chosen).nonzero().flatten() if chosen else torch.empty(0, dtype=torch.int64)
    shares = mask_share, random_share
    return replace_rows(tokens, rows, vocab_size, mask_id, *shares, generator=generator)


def visible_pairs(
    tokens: PackedBatch,
    word_ids: Tensor,
    *,
    prob: float = 0.5,
    num_masks: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What each row of a RetroMAE decoder sees (Xiao et al. 2022, arXiv 2205.12035, section 3.2).

    Of up to ``num_masks`` masks of whole words drawn for a sequence, each row takes one at random,
    and is hidden from itself. The first column, [CLS], is visible to all; so are special tokens.

    Args:
        tokens: B sequences, on the CPU.
        word_ids: int64 ``[N]``, see :func:`mask_words`.
        prob: share of the tokens of words that a row does not see.
        num_masks: most masks of a sequence.
        generator: of all random numbers.

    Returns:
        bool, the ``[L, L]`` of all sequences one after the other: a ``bias`` of
        :func:`encfast.ops.varlen_attn`.

    Raises:
        ValueError: for a share outside of [0, 1], less than one mask, or word ids that do not fit.
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    if num_masks < 1:
        raise ValueError(f"num_masks must be >= 1, got {num_masks}")
    grids = [torch.empty(0, dtype=torch.bool)]
    for ids in _split(tokens, word_ids):
        length = len(ids)
        if length:
            hidden = draw_words(ids, prob, min(length, num_masks), generator)
            hidden = hidden[torch.randint(len(hidden), (length,), generator=generator)]
            hidden.fill_diagonal_(True)
            hidden[:, 0] = False
            grids.append(~hidden.flatten())
    return torch.cat(grids)


def draw_words(
    word_ids: Tensor, prob: float, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """bool ``[count, L]``: independent choices of whole words of one sequence.

    Args:
        word_ids: int64 ``[L]``, as in :func:`mask_words`.
        prob: share of the tokens that is chosen, in [0, 1].
        count: number of choices.
        generator: of the order in which words are taken.

    Returns:
        True where a token is chosen.
    """
    words, place, sizes = word_ids[word_ids >= 0].unique(return_inverse=True, return_counts=True)
    budget = max(1, round(prob * len(place))) if prob > 0 else 0
    order = torch.rand((count, len(words)), generator=generator).argsort(1)
    taken = torch.zeros(count, len(words), dtype=torch.bool)
    used = torch.zeros(count, dtype=torch.int64)
    # All masks in step, word by word: after a word that does not fit comes one that may.
    for word in order.T:
        fits = used + sizes[word] <= budget
        taken.scatter_(1, word[:, None], fits[:, None])
        used += sizes[word] * fits
    chosen = torch.zeros(count, len(word_ids), dtype=torch.bool)
    chosen[:, word_ids >= 0] = taken[:, place]
    return chosen


def _split(tokens: PackedBatch, word_ids: Tensor) -> Iterator[Tensor]:
    if word_ids.shape != tokens.data.shape or word_ids.dtype != torch.int64:
        raise ValueError(
            f"word_ids is {word_ids.dtype} of shape {tuple(word_ids.shape)}, expected int64 "
            f"{tuple(tokens.data.shape)}, one for each token"
        )
    yield from word_ids.split(tokens.lengths().tolist())
