"""What goes into VL-JEPA's loss and what comes out of it, and a batch to try it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from encfast.models._vl_jepa_config import VlJepaConfig
from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class VlJepaBatch:
    """B clips, what is asked about them, and what the answer is.

    Queries and answers are ids of the predictor's vocabulary, targets of Y's: one text in two
    tokenizers.
    """

    clips: PackedBatch  # frames [N, C, H, W], floating or uint8
    target: PackedBatch  # ids for Y
    query: PackedBatch | None = None  # ids; None: captioning, stage 1
    answer: PackedBatch | None = None  # ids from bos to eos, for the decoder

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> VlJepaBatch:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
        }
        return VlJepaBatch(**moved)


@dataclass(frozen=True, eq=False)
class VlJepaLoss:
    """The total and its terms; ``text`` is the decoder's, of embeddings it does not change."""

    total: Tensor
    embedding: Tensor
    text: Tensor | None


for _cls in (VlJepaBatch, VlJepaLoss):
    torch.export.register_dataclass(_cls, serialized_type_name=f"{__name__}.{_cls.__name__}")


def still_clips(images: Tensor, depth: int) -> PackedBatch:
    """``images`` ``[B, C, H, W]`` as clips of one time index: each repeated ``depth`` times."""
    return PackedBatch.from_lengths(images.repeat_interleave(depth, 0), [depth] * images.shape[0])


def example_batch(
    config: VlJepaConfig, generator: torch.Generator | None, lengths: Sequence[int] | None
) -> VlJepaBatch:
    """Clips whose frames resemble their neighbours, with queries and answers of random ids.

    Args:
        config: of the model.
        generator: of all random numbers.
        lengths: time indices of each clip; three clips, one of them empty, if None. An empty clip
            has no texts.
    """
    draw: Any = {"generator": generator}
    vision, llama = config.vision, config.predictor
    lengths = [4, 0, 2] if lengths is None else list(lengths)
    frames = [n * vision.patch_size[0] for n in lengths]
    shape = (vision.channels, *vision.image_size)
    clips = PackedBatch.from_lengths(0.5 * torch.randn(sum(frames), *shape, **draw), frames)
    scene = torch.randn(len(frames), *shape, **draw)
    clips = clips.with_data(clips.data + scene[clips.segment_ids()])

    def texts(vocab_size: int, longest: int) -> list[Tensor]:
        sizes = [1 + int(torch.randint(longest, (), **draw)) if n else 0 for n in lengths]
        return [torch.randint(vocab_size, (size,), **draw) for size in sizes]

    bos, eos = torch.tensor([config.bos_id]), torch.tensor([config.eos_id])
    answers = [torch.cat((bos, t, eos)) if len(t) else t for t in texts(llama.vocab_size, 6)]
    packed = (
        PackedBatch.from_list(t, dtype=torch.int64)
        for t in (texts(config.text.vocab_size, 6), texts(llama.vocab_size, 9), answers)
    )
    return VlJepaBatch(clips, *packed)
