"""What goes into Ettin's loss and what comes out of it, and a batch to try it with."""

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
    from encfast.models.ettin import EttinConfig


@dataclass
class EttinLoss:
    """Terms of the loss; a mode has one of them."""

    masked: Tensor | None = None
    next_token: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The term this mode trains."""
        term = self.next_token if self.masked is None else self.masked
        assert term is not None
        return term


torch.export.register_dataclass(EttinLoss, serialized_type_name="encfast.models.ettin.EttinLoss")


def example_batch(
    config: EttinConfig, generator: torch.Generator | None, lengths: Sequence[int] | None
) -> TextBatch:
    """Body of :meth:`encfast.models.ettin.Ettin.example_batch`."""
    special = tuple(config.special_ids().values())
    words = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    lengths = [37, 5, 0, 130, 12] if lengths is None else lengths
    ids = words[torch.randint(len(words), (sum(lengths),), generator=generator)]
    tokens = PackedBatch.from_lengths(ids, lengths)
    full = tokens.lengths() > 0
    ids[tokens.last_rows()[full]] = config.eos_id
    ids[tokens.first_rows()[full]] = config.bos_id
    if config.causal:
        return TextBatch(tokens)
    if config.mask_id is None:
        raise ValueError("masking needs the config's mask_id, which is None")
    masked = mask_tokens(
        tokens,
        vocab_size=config.vocab_size,
        mask_id=config.mask_id,
        prob=config.mask_rate,
        special_ids=special,
        generator=generator,
    )
    return TextBatch.from_masked(masked)
