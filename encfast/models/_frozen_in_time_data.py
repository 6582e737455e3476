"""Batches of clips and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from encfast.packed import PackedBatch

if TYPE_CHECKING:
    from encfast.models.frozen_in_time import FrozenInTimeConfig

_CLS, _SEP = 101, 102  # of BERT's vocabulary
_WORDS = (3, 12)  # of an example's caption


@dataclass(frozen=True, eq=False)
class CaptionedClips:
    """B clips and their B captions; an image is a clip of one frame."""

    clips: PackedBatch  # frames [T, C, H, W], floating or uint8
    text: PackedBatch  # ids [N]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CaptionedClips:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        moved = (x.to(device, non_blocking=non_blocking) for x in (self.clips, self.text))
        return CaptionedClips(*moved)


torch.export.register_dataclass(
    CaptionedClips, serialized_type_name=f"{__name__}.{CaptionedClips.__name__}"
)


def example_batch(
    config: FrozenInTimeConfig, generator: torch.Generator | None, lengths: Sequence[int] | None
) -> CaptionedClips:
    """See :meth:`encfast.models.frozen_in_time.FrozenInTime.example_batch`."""
    c = config
    lengths = [c.frames, 1, 0, (c.frames + 1) // 2] if lengths is None else lengths
    shape = (c.channels, *c.image_size)
    noise = 0.5 * torch.randn(sum(lengths), *shape, generator=generator)
    clips = PackedBatch.from_lengths(noise, lengths)
    still = torch.randn(len(lengths), *shape, generator=generator)
    clips = clips.with_data(noise + still[clips.segment_ids()])
    words = torch.randint(*_WORDS, (len(lengths),), generator=generator) + 2
    special = min(_CLS, c.vocab_size - 2), min(_SEP, c.vocab_size - 1)
    ids = torch.randint(1, c.vocab_size, (int(words.sum()),), generator=generator)
    text = PackedBatch.from_lengths(ids, words)
    ids[text.first_rows()], ids[text.last_rows()] = special
    return CaptionedClips(clips, text)
