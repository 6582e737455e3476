"""SkeletonBatch: packed frames and what a task predicts of them; poses made comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encfast.packed import PackedBatch


@dataclass(frozen=True, eq=False)
class SkeletonBatch:
    """Clips as a packed batch whose rows are frames; a task reads the fields it needs."""

    tokens: PackedBatch  # poses [N, V, 2] to pre-train, [N, P, V, 2] to classify
    rows: Tensor | None = None  # int64 [M]: masked joints, n * V + v for joint v of frame n
    labels: Tensor | None = None  # int64 [B], -100 for none

    @classmethod
    def from_mask(cls, tokens: PackedBatch, mask: Tensor) -> SkeletonBatch:
        """Poses and the joints to hide and predict; for the border: M is data.

        Args:
            tokens: poses ``[N, V, 2]``.
            mask: bool ``[N, V]``, True where hidden.

        Raises:
            ValueError: if the mask has another shape or, though there are frames, hides nothing.
        """
        if mask.shape != tokens.data.shape[:2]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(tokens.data.shape[:2])}"
            )
        rows = mask.flatten().nonzero().flatten()
        check_rows(rows, tokens)
        return cls(tokens, rows.to(tokens.device))

    def to(self, *args: Any, **kwargs: Any) -> SkeletonBatch:
        """Poses by ``tensor.to(*args, **kwargs)``; rows and labels follow to their device."""
        tokens = self.tokens.to(*args, **kwargs)
        rows = None if self.rows is None else self.rows.to(tokens.device)
        labels = None if self.labels is None else self.labels.to(tokens.device)
        return SkeletonBatch(tokens, rows, labels)


torch.export.register_dataclass(SkeletonBatch, serialized_type_name=f"{__name__}.SkeletonBatch")


def check_rows(rows: Tensor, tokens: PackedBatch) -> None:
    """Raises ValueError if frames are there and no joint of them is hidden."""
    if rows.shape[0] == 0 and tokens.total > 0:
        raise ValueError(f"the mask hides nothing in {tokens.total} frames: there is no loss")


def normalise(poses: Tensor, root: Sequence[int] = (11, 12)) -> Tensor:
    """Poses around their root, scaled to a mean distance of 1 from it.

    Without this the direction of a joint's vector is that of the body's place in the image, and a
    mean pose predicts it well.

    Args:
        poses: ``[..., V, 2]``.
        root: joints whose mean is the root; COCO's hips.

    Returns:
        ``[..., V, 2]``; an absent body, all joints in one place, becomes zeros.
    """
    centred = poses - poses[..., list(root), :].mean(-2, keepdim=True)
    size = centred.norm(dim=-1).mean(-1)[..., None, None]
    return centred / size.clamp(min=torch.finfo(poses.dtype).tiny)


def jitter(poses: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Poses with noise of a detector's kind: each coordinate off by N(0, std).

    Args:
        poses: floating ``[..., V, 2]``, on the generator's device.
        std: in units of the poses, >= 0.
        generator: of the noise.

    Returns:
        Of the poses' shape and dtype.

    Raises:
        ValueError: for a negative ``std``.
    """
    if not std >= 0:
        raise ValueError(f"std must be >= 0, got {std}")
    noise = torch.randn(poses.shape, generator=generator, dtype=poses.dtype, device=poses.device)
    return poses + std * noise
