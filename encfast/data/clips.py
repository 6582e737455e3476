"""ClipBatch: clips of different lengths, and what a task wants to know about them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """Frames of B clips and their labels; or features of the clips, computed before."""

    clips: PackedBatch | None  # frames [N, C, H, W], floating or uint8
    labels: Tensor | None = None  # int64 [B], -100 for none
    features: PackedBatch | None = None  # in place of clips: see the model that made them

    @classmethod
    def from_dense(cls, videos: Tensor, labels: Tensor | None = None) -> ClipBatch:
        """Clips of one length; for the border.

        Args:
            videos: ``[B, C, T, H, W]``, as a 3-D convolution takes them.
            labels: int64 ``[B]`` or None.

        Raises:
            ValueError: for a tensor of other than five dimensions.
        """
        if videos.dim() != 5:
            raise ValueError(f"videos has shape {tuple(videos.shape)}, expected [B, C, T, H, W]")
        frames = videos.transpose(1, 2).flatten(0, 1)  # [B * T, C, H, W]
        lengths = [videos.shape[2]] * videos.shape[0]
        return cls(PackedBatch.from_lengths(frames, lengths), labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ClipBatch:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
        }
        return ClipBatch(**moved)


torch.export.register_dataclass(
    ClipBatch, serialized_type_name=f"{ClipBatch.__module__}.{ClipBatch.__name__}"
)
