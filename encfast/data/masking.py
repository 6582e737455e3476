"""Corruption of packed tokens for masked language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from encfast.packed import PackedBatch


class MaskedTokens(NamedTuple):
    """What :func:`mask_tokens` returns."""

    tokens: PackedBatch  # ids [N], corrupted
    rows: Tensor  # int64 [M]: the rows to predict, ascending
    targets: Tensor  # int64 [M]: what stood there


def mask_tokens(
    tokens: PackedBatch,
    *,
    vocab_size: int,
    mask_id: int,
    prob: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    special_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Chooses rows to predict, and replaces most of them.

    Every row that is not special is chosen independently, as in transformers'
    ``DataCollatorForLanguageModeling``. Of the chosen, ``mask_share`` become ``mask_id``,
    ``random_share`` any id, and the rest stay (Devlin et al. 2019, section 3.1). For the border:
    the number of chosen rows depends on the draw, and may be 0.

    Args:
        tokens: integer ids ``[N]``, on the CPU or where ``generator`` lives.
        vocab_size: V.
        mask_id: id of [MASK].
        prob: probability of being chosen, in [0, 1].
        mask_share, random_share: shares of the chosen; their sum is at most 1.
        special_ids: ids never chosen ([CLS], [SEP], ...).
        generator: of all random numbers.

    Returns:
        The tokens with their chosen rows replaced, those rows, and the ids that stood there.

    Raises:
        ValueError: for a probability or share outside of its range, or an id outside of [0, V).

    Examples:
        >>> from encfast.data import mask_tokens
        >>> tokens = PackedBatch.from_list([torch.arange(10, 20), torch.arange(30, 35)])
        >>> always = {"mask_share": 1.0, "random_share": 0.0}
        >>> masked = mask_tokens(tokens, vocab_size=50, mask_id=4, prob=0.3, **always)
        >>> bool((masked.tokens.data[masked.rows] == 4).all())
        True
        >>> torch.equal(masked.targets, tokens.data[masked.rows])
        True
    """
    check_masking(vocab_size, mask_id, prob, mask_share, random_share, special_ids)
    ids = tokens.data
    special = torch.isin(ids, ids.new_tensor(list(special_ids)))
    drawn = torch.rand(ids.shape, generator=generator, device=ids.device)
    rows = ((drawn < prob) & ~special).nonzero().flatten()
    shares = mask_share, random_share
    return replace_rows(tokens, rows, vocab_size, mask_id, *shares, generator=generator)


def replace_rows(
    tokens: PackedBatch,
    rows: Tensor,
    vocab_size: int,
    mask_id: int,
    mask_share: float,
    random_share: float,
    *,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """The second half of :func:`mask_tokens`: ``rows``, int64 ``[M]`` ascending, are chosen."""
    ids = tokens.data
    draw = {"generator": generator, "device": ids.device}
    targets = ids[rows]
    fate = torch.rand(rows.shape, **draw)
    random_ids = torch.randint(vocab_size, rows.shape, **draw).to(ids.dtype)
    shown = torch.where(fate < mask_share, torch.full_like(targets, mask_id), targets)
    randomised = (fate >= mask_share) & (fate < mask_share + random_share)
    shown = torch.where(randomised, random_ids, shown)
    return MaskedTokens(tokens.with_data(ids.index_copy(0, rows, shown)), rows, targets.long())


def check_masking(
    vocab_size: int,
    mask_id: int,
    prob: float,
    mask_share: float,
    random_share: float,
    special_ids: Sequence[int] = (),
) -> None:
    """Raises the ValueErrors of :func:`mask_tokens`."""
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    if min(mask_share, random_share) < 0 or mask_share + random_share > 1 + 1e-9:
        raise ValueError(
            "mask_share and random_share must be >= 0 and add up to at most 1, "
            f"got {mask_share} and {random_share}"
        )
    for name, token in [("mask_id", mask_id), *(("special_ids", s) for s in special_ids)]:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} holds {token}, expected an id in [0, {vocab_size})")
