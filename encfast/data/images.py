"""ImageBatch: images, clips or volumes of one size, and what a task wants to know about them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast.patch_mask import PatchMask


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Pixels and what is to be predicted of them; a task reads the fields it needs."""

    images: Tensor  # [B, C, *size], floating or uint8
    mask: PatchMask | None = None  # which patches are visible
    targets: Tensor | None = None  # int64 ids of hidden patches, or floating features; see models
    labels: Tensor | None = None  # int64 [B], or [B, *size] of each pixel; -100 for none

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageBatch:
        """Every tensor on ``device``; ``non_blocking`` as in ``Tensor.to``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
        }
        return ImageBatch(**moved)


torch.export.register_dataclass(
    ImageBatch, serialized_type_name=f"{ImageBatch.__module__}.{ImageBatch.__name__}"
)


def smooth_images(
    batch: int,
    channels: int,
    size: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random images, clips or volumes whose neighbouring pixels are alike, as those of photos are.

    Noise on a grid of every fourth pixel, interpolated linearly, with mean 0 and deviation about 1.

    Args:
        batch: B.
        channels: C.
        size: pixels along each of 1 to 3 axes.
        generator, device: of the noise.

    Returns:
        fp32 ``[B, C, *size]``.
    """
    coarse = [max(2, -(-n // 4)) for n in size]
    noise = torch.randn(max(batch, 1), channels, *coarse, generator=generator, device=device)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    smooth = F.interpolate(noise, size=tuple(size), mode=mode, align_corners=True)
    return (1.5 * smooth)[:batch]
