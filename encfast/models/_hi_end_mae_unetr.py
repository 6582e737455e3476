"""UNETR's convolutions (Hatamizadeh et al. 2022, arXiv 2103.10504) around a ViT's levels.

Sizes, norms and activations are those of the published fine-tuning: instance norm without weights,
leaky ReLU of slope 0.01, no bias but in the last layer and behind the trilinear resize.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.models._hi_end_mae_config import HiEndMaeConfig
from encfast.packed import PackedBatch


def _doubled(inner: int, outer: int, **factory: Any) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(inner, outer, 2, stride=2, bias=False, **factory)


class ResBlock(nn.Module):
    """Two normed convolutions of 3^3 around a shortcut, which is a convolution where widths differ.

    Args:
        inner, outer: channels of input and output.
    """

    def __init__(self, inner: int, outer: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inner, outer, 3, padding=1, bias=False, **factory)
        self.conv2 = nn.Conv3d(outer, outer, 3, padding=1, bias=False, **factory)
        self.shortcut: nn.Module | None = None
        if inner != outer:
            self.shortcut = nn.Conv3d(inner, outer, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inner, *size]`` -> ``[B, outer, *size]``."""
        y = F.leaky_relu(_instance_norm(self.conv1(x)))
        y = _instance_norm(self.conv2(y))
        if self.shortcut is not None:
            x = _instance_norm(self.shortcut(x))
        return F.leaky_relu(y + x)


class Lift(nn.Module):
    """A level of the ViT at a higher resolution: doubled, and doubled again with a ResBlock behind.

    Args:
        inner, outer: channels of input and output.
        doublings: at least 1.
    """

    def __init__(self, inner: int, outer: int, doublings: int, **factory: Any) -> None:
        super().__init__()
        self.first = _doubled(inner, outer, **factory)
        self.further = nn.Sequential()
        for _ in range(doublings - 1):
            self.further.append(_doubled(outer, outer, **factory))
            self.further.append(ResBlock(outer, outer, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inner, *size]`` -> ``[B, outer, *(size * 2^doublings)]``."""
        return self.further(self.first(x))


class Up(nn.Module):
    """From a lower resolution to that of a skip connection, and a ResBlock over both.

    Args:
        inner, outer: channels of the lower resolution, and of the skip connection and the output.
        doubles: by a transposed convolution; otherwise resized trilinearly, then convolved.
    """

    def __init__(self, inner: int, outer: int, *, doubles: bool = True, **factory: Any) -> None:
        super().__init__()
        self.doubles = doubles
        self.up: nn.Module
        if doubles:
            self.up = _doubled(inner, outer, **factory)
        else:
            self.up = nn.Conv3d(inner, outer, 3, padding=1, **factory)
        self.block = ResBlock(2 * outer, outer, **factory)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``[B, inner, *size]`` and ``[B, outer, *larger]`` -> ``[B, outer, *larger]``."""
        if not self.doubles:
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.block(torch.cat((self.up(x), skip), 1))


class Segmenter(nn.Module):
    """A class for each voxel, from the volume, the levels and the last output of a ViT.

    The deeper of n levels a skip connection is, the lower is its resolution: the grid of patches,
    doubled once for the deepest and n times for the shallowest. The step from there to voxels is
    one more doubling if patches have 2^(n + 1) voxels along each axis, otherwise a resize.
    """

    def __init__(self, config: HiEndMaeConfig, **factory: Any) -> None:
        super().__init__()
        features, count = config.feature_size, len(config.levels)
        widths = [features * 2 ** (k + 1) for k in range(count)]  # of the levels, shallow to deep
        self.grid = config.grid
        self.stem = ResBlock(config.channels, features, **factory)
        self.skips = nn.ModuleList(
            Lift(config.dim, width, count - k, **factory) for k, width in enumerate(widths)
        )
        inner = [config.dim, *widths[:0:-1]]
        self.ups = nn.ModuleList(
            Up(i, o, **factory) for i, o in zip(inner, widths[::-1], strict=True)
        )
        doubles = all(p == 2 ** (count + 1) for p in config.patch_size)
        self.last = Up(widths[0], features, doubles=doubles, **factory)
        self.head = nn.Conv3d(features, config.num_labels, 1, **factory)

    def forward(
        self, images: Tensor, encoded: PackedBatch, levels: Sequence[PackedBatch]
    ) -> Tensor:
        """Scores ``[B, K, *size]``.

        Args:
            images: ``[B, channels, *size]``, floating.
            encoded: ``[B * P, C]``, the last output.
            levels: ``[B * P, C]`` each, shallow to deep.
        """
        x = self._volume(encoded.data)  # [B, C, *grid]
        skips = [
            lift(self._volume(level.data)) for lift, level in zip(self.skips, levels, strict=True)
        ]  # [B, 2^(k + 1) F, *(grid * 2^(n - k))]
        for up, skip in zip(self.ups, skips[::-1], strict=True):
            x = up(x, skip)
        x = self.last(x, self.stem(images.to(self.head.weight.dtype)))  # [B, F, *size]
        return self.head(x)

    def _volume(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, *self.grid)).movedim(-1, 1).contiguous()


def _instance_norm(x: Tensor) -> Tensor:
    # Not nn.InstanceNorm3d, whose eps would be a symbol to the compiler.
    return F.instance_norm(x)
