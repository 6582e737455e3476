"""CT volumes as Hi-End-MAE takes them: the window, augmentation, and phantoms for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ORGANS = 6  # ellipsoids in the body of a phantom
_SHARPNESS = 6.0  # of their borders: 1 / width, in radii


def window_ct(hounsfield: Tensor, low: float = -175.0, high: float = 250.0) -> Tensor:
    """``hounsfield`` units of any shape, clipped to [low, high] -> fp32 in 0..1.

    Raises:
        ValueError: unless low < high.
    """
    if not low < high:
        raise ValueError(f"low must be < high, got {low} and {high}")
    return (hounsfield.float().clamp(low, high) - low) / (high - low)


@dataclass(frozen=True)
class Augmentation:
    """Flips, quarter turns and shifts of intensity, for the workers of a data loader."""

    flip: float = 0.5  # probability, for each axis
    turn: float = 0.3  # probability of one to three quarter turns of height into width
    scale: float = 0.1  # probability of a factor in 1 +- strength
    shift: float = 0.1  # probability of an offset in +- strength
    strength: float = 0.1

    def __call__(
        self,
        volume: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One volume and what is said of its voxels.

        Args:
            volume: ``[C, H, W, D]``, floating.
            labels: ``[H, W, D]`` or None; moved like the voxels.
            generator: of all numbers, on the CPU.

        Raises:
            ValueError: for a volume that a quarter turn would give another size.
        """
        if volume.dim() != 4 or volume.shape[1] != volume.shape[2]:
            raise ValueError(
                f"volume has shape {tuple(volume.shape)}, expected [C, H, W, D] with H = W"
            )
        draws = torch.rand(8, generator=generator).tolist()
        axes = [axis - 3 for axis in range(3) if draws[axis] < self.flip]
        quarters = int(torch.randint(1, 4, (), generator=generator)) if draws[3] < self.turn else 0
        moved, said = (
            t if t is None else t.flip(axes).rot90(quarters, (-3, -2)) for t in (volume, labels)
        )
        assert moved is not None
        if draws[4] < self.scale:
            moved = moved * (1 + self.strength * (2 * draws[5] - 1))
        if draws[6] < self.shift:
            moved = moved + self.strength * (2 * draws[7] - 1)
        return moved, said


PRETRAINING_AUGMENTATION = Augmentation()
FINE_TUNING_AUGMENTATION = Augmentation(flip=0.2, turn=0.2)


def phantoms(
    batch: int,
    size: Sequence[int],
    num_labels: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Bodies with organs in them, all of them ellipsoids with soft borders.

    An organ's class is how dense it is: 1 is the least. Body and air are class 0.

    Args:
        batch: B.
        size: voxels along height, width and depth.
        num_labels: K, the classes; with 1 there are no organs.
        generator: of all numbers, on the CPU.

    Returns:
        fp32 ``[B, 1, *size]``, about 0..1, and int64 ``[B, *size]`` in 0..K - 1.
    """
    steps = [torch.linspace(-1, 1, n) for n in size]
    places = torch.stack(torch.meshgrid(*steps, indexing="ij"))  # [3, *size]

    def draw(low: float, high: float, *shape: int) -> Tensor:
        uniform = torch.rand(batch, *shape, generator=generator)
        return (low + (high - low) * uniform).view(batch, *shape, 1, 1, 1)

    def ellipsoid(centre: Tensor, radii: Tensor) -> Tensor:
        """``[B, *size]``: 1 within, 0 outside, 0.5 at the border."""
        radius = ((places - centre) / radii).square().sum(1).sqrt()
        return torch.sigmoid(_SHARPNESS * (1 - radius))

    body = ellipsoid(draw(-0.1, 0.1, 3), draw(0.7, 0.95, 3))
    shading = 1 + (draw(-0.3, 0.3, 3) * places).sum(1)  # [B, *size]
    volumes, labels = 0.35 * body * shading, torch.zeros_like(body, dtype=torch.int64)
    for _ in range(_ORGANS if num_labels > 1 else 0):
        kind = torch.randint(1, num_labels, (batch, 1, 1, 1), generator=generator)
        within = ellipsoid(draw(-0.5, 0.5, 3), draw(0.2, 0.45, 3))
        density = 0.35 + 0.6 * kind / (num_labels - 1)
        volumes = volumes + within * (density - volumes)
        labels = torch.where(within > 0.5, kind, labels)
    return volumes.unsqueeze(1), labels
