"""Random masks over patches, drawn on any device; `encfast.data.mask_grids` is for data loaders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from encfast import ops
from encfast.data.mask_grids import check_grid, check_groups, check_hide, check_keep
from encfast.patch_mask import PatchMask


def random_mask(
    batch: int,
    grid: Sequence[int],
    keep: int,
    *,
    ordered: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> PatchMask:
    """Keeps ``keep`` patches of each sequence, each choice alike (MAE, arXiv 2111.06377).

    Args:
        batch: B, sequences.
        grid: patches along each axis of an image, a clip or a volume.
        keep: visible patches of each, in 1..P.
        ordered: list them, and the hidden ones, in ascending order, otherwise in a random one.
        generator: of the noise, on ``device``.
        device: of the mask; by default the generator's.

    Returns:
        What is visible of ``batch`` sequences of P patches, P the product of ``grid``.

    Raises:
        TypeError, ValueError: if a number is no integer, or out of its range.

    Examples:
        >>> from encfast.data import random_mask
        >>> mask = random_mask(2, (4, 4), keep=3)
        >>> mask.visible.shape, mask.hidden.shape
        (torch.Size([6]), torch.Size([26]))
    """
    patches = math.prod(check_grid(grid, len(grid)))
    noise = _noise(batch, patches, generator, device)
    return PatchMask.from_noise(noise, check_keep(keep, patches), ordered=ordered)


def tube_mask(
    batch: int,
    grid: Sequence[int],
    keep: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> PatchMask:
    """Keeps the same ``keep`` places in every frame of a clip (VideoMAE, arXiv 2203.12602).

    Args:
        batch: B, clips.
        grid: (T, H, W) patches; time is the slowest axis.
        keep: visible patches of each frame, in 1..H * W.
        generator, device: as in :func:`random_mask`.

    Returns:
        What is visible of ``batch`` clips; all frames of a clip show the same places.

    Raises:
        TypeError, ValueError: as :func:`random_mask`; for a grid of other than three axes.
    """
    frames, height, width = check_grid(grid, 3)
    places = height * width
    keep = check_keep(keep, places)
    chosen = ops.select_patches(_noise(batch, places, generator, device), keep)
    hidden = (chosen.restore < 0).view(batch, 1, places)
    return PatchMask.from_hidden(hidden.expand(-1, frames, -1).flatten(1), frames * keep)


def group_mask(
    batch: int,
    groups: Sequence[int] | Tensor,
    hide: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> PatchMask:
    """Hides ``hide`` whole groups of patches, such as parts of a body; for the border.

    Args:
        batch: B, sequences.
        groups: integers ``[P]`` in 0..G - 1, none of which is missing: the group of each patch.
        hide: groups to hide, in 1..G.
        generator, device: as in :func:`random_mask`.

    Returns:
        A mask whose counts differ between sequences where the groups differ in size.

    Raises:
        TypeError, ValueError: as :func:`random_mask`; for groups that are not as described.
    """
    of_patch, count = check_groups(groups.cpu().numpy() if isinstance(groups, Tensor) else groups)
    keep = count - check_hide(hide, count)
    chosen = ops.select_patches(_noise(batch, count, generator, device), keep)
    hidden = (chosen.restore < 0).view(batch, count)
    return PatchMask.from_hidden(hidden[:, torch.from_numpy(of_patch).to(hidden.device)])


def _noise(
    batch: int,
    patches: int,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    if device is None and generator is not None:
        device = generator.device
    return torch.rand(batch, patches, generator=generator, device=device)
