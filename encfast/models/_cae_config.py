"""CaeConfig: sizes, task and objective of a context autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from encfast.config import BlockConfig, nearest, with_drop_path
from encfast.data.mask_grids import keep_count
from encfast.layers.patch import IMAGENET_MEAN, IMAGENET_STD

Task = Literal["masked-image", "classification", "probing"]
Objective = Literal["tokens", "features"]
Pooling = Literal["mean", "class", "attentive"]


@dataclass(frozen=True)
class CaeConfig:
    """CAE-B/16."""

    image_size: tuple[int, int] = (224, 224)  # pixels, height and width
    patch_size: tuple[int, int] = (16, 16)  # pixels
    channels: int = 3
    dim: int = 768  # C
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    norm_eps: float = 1e-6
    layer_scale: float = 0.1  # start of the factors on all branches

    task: Task = "masked-image"
    mask_ratio: float = 0.5  # share of hidden patches, in (0, 1)
    min_block: int = 16  # patches of the smallest rectangle to hide
    objective: Objective = "tokens"  # what is predicted; "features": CAE v2
    vocab_size: int = 8192  # V, visual tokens
    feature_dim: int = 512  # channels of the features of CAE v2
    alignment_weight: float = 2.0
    decoder_dim: int = 768  # Cd: of regressor and decoder
    decoder_heads: int = 12
    decoder_ffn_dim: int = 3072
    regressor_depth: int = 4  # blocks
    decoder_depth: int = 4  # blocks
    scaled_init: bool = False  # BEiT's weights, smaller with depth, instead of Glorot's

    num_labels: int = 1000  # K of classification
    pooling: Pooling = "mean"  # what the classifier reads
    drop_path: float = 0.1  # of each stack's last block; linear from 0 in the first

    pixel_mean: tuple[float, ...] = IMAGENET_MEAN  # of uint8 images, pixels in 0..1
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, kinds in (("task", Task), ("objective", Objective), ("pooling", Pooling)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(f"{name} {value!r} is unknown; {nearest(value, get_args(kinds))}")
        if self.pooling == "attentive" and self.task != "probing":
            raise ValueError(f"pooling 'attentive' is for task 'probing', not {self.task!r}")
        if any(n % p for n, p in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                f"image_size is {self.image_size}, expected multiples of {self.patch_size}"
            )
        sizes = ("depth", "regressor_depth", "min_block", "vocab_size", "feature_dim", "num_labels")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if (self.decoder_depth == 0) != (self.objective == "features"):
            raise ValueError(
                f"decoder_depth={self.decoder_depth} does not go with objective "
                f"{self.objective!r}: tokens are decoded, features are not"
            )
        keep_count(self.num_patches, self.mask_ratio)
        self.encoder_blocks(), self.decoder_blocks(self.decoder_depth)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        (height, width), (p, q) = self.image_size, self.patch_size
        return height // p, width // q

    @property
    def num_patches(self) -> int:
        """P, patches of an image."""
        return math.prod(self.grid)

    def encoder_blocks(self) -> list[BlockConfig]:
        """Of each encoder block; a frozen encoder drops nothing."""
        block = self._block(self.dim, self.num_heads, self.ffn_dim)
        return with_drop_path(block, 0.0 if self.task == "probing" else self.drop_path, self.depth)

    def decoder_blocks(self, depth: int) -> list[BlockConfig]:
        """The configs of the blocks of a regressor or decoder of this ``depth``."""
        block = self._block(self.decoder_dim, self.decoder_heads, self.decoder_ffn_dim)
        return with_drop_path(block, self.drop_path, depth)

    def _block(self, dim: int, num_heads: int, ffn_dim: int) -> BlockConfig:
        return BlockConfig(
            dim,
            num_heads,
            ffn_dim,
            norm_eps=self.norm_eps,
            qkv_bias="qv",
            layer_scale=self.layer_scale,
        )
