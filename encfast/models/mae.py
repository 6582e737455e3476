"""Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377).

A plain pre-norm ViT encodes the quarter of an image's patches that stays visible, behind a class
token; a narrower decoder sees those rows and one shared mask token at each hidden place, in the
order of the image, and predicts the pixels of the hidden patches, normalised patch by patch. Hidden
pixels are never read by the encoder: they are gathered once, as targets. Positions are fixed sines
and cosines, the column's part first, as the published code has them.

The decoder finishes its last block at the hidden patches alone, the class token's row of the
encoder takes part in the decoder, and the loss is the mean over hidden patches. For classification
the decoder is left out and all patches are visible; the head reads the class row, or by default,
as in the paper's fine-tuning code, the mean of the patch rows, normed after pooling. Published
recipes: pre-training with AdamW 1.5e-4 per 256 images, betas 0.9 and 0.95, weight decay 0.05;
fine-tuning with drop path 0.1 (base), 0.2 (large) or 0.3 (huge).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from encfast import losses, ops
from encfast.config import BlockConfig, nearest, with_drop_path
from encfast.data.images import ImageBatch, smooth_images
from encfast.data.mask_grids import keep_count
from encfast.data.patches import random_mask
from encfast.layers import FixedPositions, Linear, Norm, PatchEncoder, Stack
from encfast.layers.base import Model, init_xavier
from encfast.layers.patch import IMAGENET_MEAN, IMAGENET_STD, flat_kernel
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask
from encfast.registry import ModelInfo, register
from encfast.weights import Tied, both, tied_table, tied_token, vit_block

__all__ = ["Losses", "Mae", "MaeConfig"]

Task = Literal["masked-image", "classification"]
_TOKEN_STD = 0.02  # of the mask token
_HEAD_STD = 2e-5  # of the classifier, in the published fine-tuning


@dataclass(frozen=True)
class MaeConfig:
    """ViT-B/16 and the published decoder."""

    image_size: tuple[int, int] = (224, 224)  # pixels, height and width
    patch_size: tuple[int, int] = (16, 16)  # pixels
    channels: int = 3
    dim: int = 768  # C
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    norm_eps: float = 1e-6

    task: Task = "masked-image"
    mask_ratio: float = 0.75  # share of hidden patches, in (0, 1)
    norm_pix_loss: bool = True  # targets are normalised patch by patch
    decoder_dim: int = 512
    decoder_depth: int = 8  # blocks
    decoder_heads: int = 16
    decoder_ffn_dim: int = 2048

    num_labels: int = 1000  # K of classification
    pooling: Literal["mean", "class"] = "mean"  # what the classifier reads
    drop_path: float = 0.0  # of the last encoder block; linear from 0 in the first

    pixel_mean: tuple[float, ...] = IMAGENET_MEAN  # of uint8 images, pixels in 0..1
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task {self.task!r} is unknown; {nearest(self.task, get_args(Task))}")
        if self.pooling not in ("mean", "class"):
            raise ValueError(f"pooling must be 'mean' or 'class', got {self.pooling!r}")
        if any(n % p for n, p in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                f"image_size is {self.image_size}, expected multiples of {self.patch_size}"
            )
        for name in ("depth", "decoder_depth", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        keep_count(self.num_patches, self.mask_ratio)
        self.encoder_blocks()
        self.decoder_block()

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        (height, width), (p, q) = self.image_size, self.patch_size
        return height // p, width // q

    @property
    def num_patches(self) -> int:
        """P, patches of an image."""
        return math.prod(self.grid)

    @property
    def patch_pixels(self) -> int:
        """Q, numbers in a patch: what is predicted of it."""
        return math.prod(self.patch_size) * self.channels

    def encoder_blocks(self) -> list[BlockConfig]:
        """Of each encoder block."""
        block = BlockConfig(self.dim, self.num_heads, self.ffn_dim, norm_eps=self.norm_eps)
        return with_drop_path(block, self.drop_path, self.depth)

    def decoder_block(self) -> BlockConfig:
        """Of every decoder block."""
        return BlockConfig(
            self.decoder_dim, self.decoder_heads, self.decoder_ffn_dim, norm_eps=self.norm_eps
        )


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and the task's term of it."""

    total: Tensor
    pixels: Tensor | None = None
    classification: Tensor | None = None


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class Decoder(nn.Module):
    """From the encoder's rows to pixels of patches."""

    def __init__(self, config: MaeConfig, **factory: Any) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.embed = Linear(config.dim, dim, **factory)
        self.mask_token = nn.Parameter(torch.empty(dim, **factory))
        self.positions = FixedPositions(
            config.grid, dim, axes=(1, 0), class_token=True, device=factory["device"]
        )
        self.stack = Stack([config.decoder_block()] * config.decoder_depth, **factory)
        self.norm = Norm(dim, eps=config.norm_eps, **factory)
        self.predict = Linear(dim, config.patch_pixels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the mask token anew (the modules reset themselves)."""
        nn.init.normal_(self.mask_token, std=_TOKEN_STD)

    def forward(self, encoded: PackedBatch, mask: PatchMask, ids: Tensor) -> Tensor:
        """Encoder rows ``[B * (1 + K), C]`` -> pixels ``[M, Q]`` of the patches ``ids`` ``[M]``."""
        rows = self.embed(encoded.data)  # [B * (1 + K), Cd]
        x = mask.full_plan().build(rows, self.mask_token, self.positions())  # [B * (1 + P), Cd]
        read = self.stack(x, rows=mask.full_rows(ids))  # [M, Cd]
        return self.predict(self.norm(read))  # [M, Q]


class Mae(Model):
    """Patches, a ViT over the visible ones, and the decoder or the classifier of one task."""

    def __init__(
        self,
        config: MaeConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.task = config, config.task
        self.encoder = PatchEncoder(
            config.image_size,
            config.patch_size,
            config.encoder_blocks(),
            axes=(1, 0),
            channels=config.channels,
            mean=config.pixel_mean,
            std=config.pixel_std,
            **factory,
        )
        self.decoder = Decoder(config, **factory) if config.task == "masked-image" else None
        self.head: nn.Linear | None = None
        if config.task == "classification":
            self.head = nn.Linear(config.dim, config.num_labels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_xavier(self)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=_HEAD_STD)

    def draw_mask(self, batch: int, *, generator: torch.Generator | None = None) -> PatchMask:
        """Hides ``mask_ratio`` of the patches of each of ``batch`` images, on the model's device.

        Args:
            batch: B.
            generator: of the noise, on that device.

        Returns:
            What is visible of ``batch`` images.
        """
        keep = keep_count(self.config.num_patches, self.config.mask_ratio)
        device = self.encoder.embed.proj.weight.device
        return random_mask(batch, self.config.grid, keep, generator=generator, device=device)

    def encode(self, images: Tensor, mask: PatchMask | None = None) -> PackedBatch:
        """Rows behind the final norm, ``[B * (1 + K), C]``: class row, then the visible patches.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: everything.

        Returns:
            A batch with one sequence per image.

        Raises:
            ValueError: for images of another size, or a mask of another number of patches.
        """
        return self.encoder(images, mask)

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """What the task predicts.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: a random choice to predict pixels, everything to classify.

        Returns:
            Pixels ``[B * (P - K), Q]`` of the hidden patches in the order [*patch, C], normalised
            if ``norm_pix_loss``; or scores ``[B, K]``.

        Raises:
            ValueError: as :meth:`encode`.
        """
        if self.task == "classification":
            return self._classify(images, mask)
        mask = self.draw_mask(images.shape[0]) if mask is None else mask
        return self.predict(images, mask, mask.hidden)

    def predict(self, images: Tensor, mask: PatchMask, ids: Tensor | None = None) -> Tensor:
        """Pixels ``[M, Q]`` of the patches ``ids`` int64 ``[M]``; None: of all, visible ones too.

        Raises:
            ValueError: as :meth:`encode`; for a model without a decoder.
        """
        if self.decoder is None:
            raise ValueError(f"task {self.task!r} has no decoder, expected 'masked-image'")
        if ids is None:
            ids = torch.arange(mask.total, device=images.device)
        return self.decoder(self.encode(images, mask), mask, ids)

    def _classify(self, images: Tensor, mask: PatchMask | None) -> Tensor:
        assert self.head is not None
        encoder = self.encoder
        mask = encoder.all_visible(images) if mask is None else mask
        x = encoder.embedded(images, mask)
        if self.config.pooling == "class":
            pooled = encoder.stack(x, rows=x.first_rows())  # [B, C]
        else:
            rows = ops.gather_rows(encoder.stack(x).data, mask.visible_rows())  # [B * K, C]
            pooled = rows.unflatten(0, (images.shape[0], mask.max_visible)).mean(1)  # [B, C]
        return self.head(encoder.norm(pooled))  # [B, K]

    def loss(self, batch: ImageBatch) -> Losses:
        """Mean squared error of hidden pixels, or cross entropy of labels.

        Raises:
            ValueError: if the batch has no labels to classify.
        """
        if self.task == "classification":
            if batch.labels is None:
                raise ValueError("the loss of task 'classification' needs batch.labels")
            loss = losses.cross_entropy(self(batch.images, batch.mask), batch.labels)
            return Losses(loss, classification=loss)
        mask = self.draw_mask(batch.images.shape[0]) if batch.mask is None else batch.mask
        predicted = self(batch.images, mask)  # [B * (P - K), Q]
        pixels = self.encoder.embed.pixels(
            batch.images, mask.hidden, channels_last=True, dtype=torch.float32
        )
        loss = losses.pixel_loss(predicted, pixels, normalise=self.config.norm_pix_loss)
        return Losses(loss, pixels=loss)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: PatchMask) -> Tensor:
        """The images with their hidden patches as predicted.

        Normalised predictions are put back to the mean and the deviation of the patches they stand
        for, as the paper's pictures are made.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible, and kept as it is.

        Returns:
            fp32 ``[B, C, *image_size]``.
        """
        pixels = self.encoder.embed.pixels(
            images, channels_last=True, dtype=torch.float32
        )  # [B * P, Q]
        predicted = self(images, mask).float()
        if self.config.norm_pix_loss:
            mean, deviation = losses.patch_moments(pixels[mask.hidden])
            predicted = predicted * deviation + mean
        rows = pixels.index_copy(0, mask.hidden, predicted)
        return ops.fold_patches(rows, images.shape, self.encoder.embed.patch, channels_last=True)

    def example_batch(
        self, generator: torch.Generator | None = None, *, batch_size: int = 4
    ) -> ImageBatch:
        """``batch_size`` smooth random images with a mask or labels, on the CPU.

        All numbers are drawn from ``generator``.
        """
        c = self.config
        images = smooth_images(batch_size, c.channels, c.image_size, generator=generator)
        if c.task == "classification":
            labels = torch.randint(c.num_labels, (batch_size,), generator=generator)
            return ImageBatch(images, labels=labels)
        keep = keep_count(c.num_patches, c.mask_ratio)
        mask = random_mask(batch_size, c.grid, keep, generator=generator, device="cpu")
        return ImageBatch(images, mask)

    def reference_names(self) -> list[Tied]:
        """What our tensors are called in transformers' ViTMAEForPreTraining.

        A model that classifies has its encoder's alone, to load which ``ignore`` those of the
        decoder and ``keep`` the head.
        """
        c = self.config
        rows = 1 + c.num_patches
        entries = [
            tied_token("encoder.class_token", "vit.embeddings.cls_token", c.dim),
            tied_table(
                "encoder.positions.table", "vit.embeddings.position_embeddings", rows, c.dim
            ),
            Tied(
                "encoder.embed.proj.weight",
                ("vit.embeddings.patch_embeddings.projection.weight",),
                **flat_kernel(c.dim, c.channels, c.patch_size),
            ),
            Tied("encoder.embed.proj.bias", ("vit.embeddings.patch_embeddings.projection.bias",)),
            *both("encoder.norm", "vit.layernorm"),
        ]
        for i in range(c.depth):
            entries += vit_block(f"encoder.stack.blocks.{i}", f"vit.layers.{i}")
        if self.decoder is None:
            return entries
        entries += [
            tied_token("decoder.mask_token", "decoder.mask_token", c.decoder_dim),
            tied_table("decoder.positions.table", "decoder.decoder_pos_embed", rows, c.decoder_dim),
            *both("decoder.embed", "decoder.decoder_embed"),
            *both("decoder.norm", "decoder.decoder_norm"),
            *both("decoder.predict", "decoder.decoder_pred"),
        ]
        for i in range(c.decoder_depth):
            entries += vit_block(f"decoder.stack.blocks.{i}", f"decoder.decoder_layers.{i}")
        return entries


VARIANTS = {
    "base": MaeConfig(),
    "large": MaeConfig(dim=1024, depth=24, num_heads=16, ffn_dim=4096),
    "huge": MaeConfig(patch_size=(14, 14), dim=1280, depth=32, num_heads=16, ffn_dim=5120),
    "tiny": MaeConfig(
        image_size=(24, 16),
        patch_size=(4, 4),
        dim=48,
        depth=2,
        num_heads=4,
        ffn_dim=96,
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=2,
        decoder_ffn_dim=64,
        num_labels=10,
    ),
}

register(
    "mae",
    Mae,
    VARIANTS,
    ModelInfo(
        title="Masked Autoencoders Are Scalable Vision Learners",
        year=2022,
        paper="arXiv 2111.06377",
        tasks=("masked-image", "classification"),
        inputs="images [B, C, H, W], floating or uint8; mask: PatchMask of the visible patches",
        ops=("patch_gather", "varlen_attn", "add_norm"),
        fidelity=(
            "fp32 loss, predictions and every gradient within 1e-5 of transformers' "
            "ViTMAEForPreTraining with its noise"
        ),
        deviations=(
            "the decoder finishes its last block at the hidden patches alone, which changes no "
            "number of the loss",
        ),
    ),
)
