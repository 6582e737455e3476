"""Sizes of Hi-End-MAE, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from encfast.config import BlockConfig, nearest
from encfast.data.mask_grids import keep_count

Task = Literal["masked-image", "segmentation"]


@dataclass(frozen=True)
class HiEndMaeConfig:
    """ViT-L/12 and the published decoder."""

    image_size: tuple[int, int, int] = (96, 96, 96)  # voxels: height, width, depth
    patch_size: tuple[int, int, int] = (12, 12, 12)  # voxels
    channels: int = 1
    dim: int = 1536  # C
    depth: int = 12  # blocks
    num_heads: int = 16  # H
    ffn_dim: int = 6144
    norm_eps: float = 1e-6
    levels: tuple[int, ...] = (3, 6, 9)  # blocks, from 0, whose outputs are read; shallow to deep

    task: Task = "masked-image"
    mask_ratio: float = 0.75  # share of hidden patches, in (0, 1)
    decoder_dim: int = 528
    decoder_depth: int = 2  # blocks of self-attention, before one of cross-attention per level
    decoder_heads: int = 16
    decoder_ffn_dim: int = 2112

    num_labels: int = 14  # K of segmentation, the background's among them
    feature_size: int = 32  # channels at full resolution; doubled with every halving

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task {self.task!r} is unknown; {nearest(self.task, get_args(Task))}")
        sizes = self.image_size, self.patch_size
        if any(len(s) != 3 or min(s) < 1 for s in sizes) or any(
            n % p for n, p in zip(*sizes, strict=True)
        ):
            raise ValueError(
                f"image_size is {self.image_size}, expected three multiples of {self.patch_size}"
            )
        for name in ("channels", "depth", "decoder_depth", "num_labels", "feature_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        ascending = list(self.levels) == sorted(set(self.levels))
        if (
            not self.levels
            or not ascending
            or not 0 <= self.levels[0] <= self.levels[-1] < self.depth
        ):
            raise ValueError(
                f"levels is {self.levels}, expected ascending blocks in 0..{self.depth - 1}"
            )
        for name in ("dim", "decoder_dim"):
            if getattr(self, name) % 6:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a multiple of 6: a sine and a "
                    "cosine for each of three axes"
                )
        if self.task == "segmentation" and min(self.patch_size) < 2 ** len(self.levels):
            raise ValueError(
                f"patch_size is {self.patch_size}, expected {2 ** len(self.levels)} or more: the "
                f"grid of patches is doubled for each of {len(self.levels)} levels"
            )
        keep_count(self.num_patches, self.mask_ratio)
        self.encoder_block()
        self.decoder_block()

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along height, width and depth."""
        (h, w, d), (p, q, r) = self.image_size, self.patch_size
        return h // p, w // q, d // r

    @property
    def num_patches(self) -> int:
        """P, patches of a volume."""
        return math.prod(self.grid)

    @property
    def patch_voxels(self) -> int:
        """Q, numbers in a patch: what is predicted of it."""
        return math.prod(self.patch_size) * self.channels

    def encoder_block(self) -> BlockConfig:
        """Of every encoder block."""
        return BlockConfig(self.dim, self.num_heads, self.ffn_dim, norm_eps=self.norm_eps)

    def decoder_block(self) -> BlockConfig:
        """Of every decoder block."""
        return BlockConfig(
            self.decoder_dim, self.decoder_heads, self.decoder_ffn_dim, norm_eps=self.norm_eps
        )
