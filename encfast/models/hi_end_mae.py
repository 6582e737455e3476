"""Hi-End-MAE: Hierarchical Encoder-Driven Masked Autoencoders Are Stronger Vision Learners for
Medical Image Segmentation (Tang et al., Medical Image Analysis 2025, arXiv 2502.08347).

A plain 3-D ViT encodes the quarter of a CT volume's patches that stays visible, behind a class
token. The decoder asks it how the others look: two blocks of self-attention over all patches, then
one block of cross-attention for each of three levels of the encoder, deepest first, whose keys and
values are that level's rows through a bridge of their own, without norm or positions. Patches stay
in the random order in which the mask lists them, visible ones first, up to the loss: the error of
the voxels of hidden patches, normalised patch by patch. Nothing of the encoder is concatenated.

For segmentation the decoder, the class token and the bridges are left out. The encoder sees all
patches, its positions are learned from the sines and cosines on, and UNETR's convolutions read the
same levels; patches of 12 voxels, no power of 2, are reached by a trilinear resize.

What the paper leaves open is read as in the published code (FengheTan9/Hi-End-MAE): the levels are
the outputs of blocks 3, 6 and 9, counted from 0; the variance of a patch is the biased one;
segmentation is trained with the sum of Dice loss, over the background too, and cross entropy. The
biases of the bridges start at 0 as all others do. Volumes come in 0..1, see :func:`window_ct`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from encfast import losses, ops, weights
from encfast.data.images import ImageBatch
from encfast.data.mask_grids import keep_count
from encfast.data.patches import random_mask
from encfast.layers import PatchEncoder
from encfast.layers.base import Model, init_xavier
from encfast.models._hi_end_mae_config import HiEndMaeConfig
from encfast.models._hi_end_mae_data import (
    FINE_TUNING_AUGMENTATION,
    PRETRAINING_AUGMENTATION,
    Augmentation,
    phantoms,
    window_ct,
)
from encfast.models._hi_end_mae_decoder import Decoder
from encfast.models._hi_end_mae_names import published_names, split_kv
from encfast.models._hi_end_mae_training import FINE_TUNING, PRETRAINING, Recipe
from encfast.models._hi_end_mae_unetr import Segmenter
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask
from encfast.registry import ModelInfo, register
from encfast.weights import Tied

__all__ = [
    "FINE_TUNING",
    "FINE_TUNING_AUGMENTATION",
    "PRETRAINING",
    "PRETRAINING_AUGMENTATION",
    "Augmentation",
    "HiEndMae",
    "HiEndMaeConfig",
    "Losses",
    "Recipe",
    "phantoms",
    "window_ct",
]


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and the task's terms of it."""

    total: Tensor
    voxels: Tensor | None = None
    dice: Tensor | None = None
    classification: Tensor | None = None


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class HiEndMae(Model):
    """The encoder, and the decoder or UNETR's convolutions behind it, as the task has it."""

    # CrossBlock holds two attentions as Block holds one.
    _no_split_modules: ClassVar[list[str]] = ["Block", "CrossBlock"]

    def __init__(
        self,
        config: HiEndMaeConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.task = config, config.task
        pretrains = config.task == "masked-image"
        self.encoder = PatchEncoder(
            config.image_size,
            config.patch_size,
            [config.encoder_block()] * config.depth,
            class_token=pretrains,
            learned_positions=not pretrains,
            channels=config.channels,
            **factory,
        )
        self.decoder = Decoder(config, **factory) if pretrains else None
        self.segmenter = None if pretrains else Segmenter(config, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_xavier(self)

    def load_encoder(self, pretrained: Mapping[str, Tensor]) -> None:
        """Takes over the encoder of a pre-trained model; the rest of that is ignored.

        To segment, the class token is left out, and positions go on from the fixed ones.

        Args:
            pretrained: its ``state_dict()``.

        Raises:
            RuntimeError: if it holds no encoder, or another one.
        """
        prefix = "encoder."
        own = {n.removeprefix(prefix): t for n, t in pretrained.items() if n.startswith(prefix)}
        if self.encoder.class_token is None and own.pop("class_token", None) is not None:
            own["positions.table"] = own["positions.table"][1:]
        self.encoder.load_state_dict(own)

    def draw_mask(self, batch: int, *, generator: torch.Generator | None = None) -> PatchMask:
        """Hides ``mask_ratio`` of the patches of each of ``batch`` volumes, on the model's device.

        Visible and hidden ones are listed in a random order.

        Args:
            batch: B.
            generator: of the noise, on that device.

        Returns:
            What is visible of ``batch`` volumes.
        """
        c, device = self.config, self.encoder.embed.proj.weight.device
        keep = keep_count(c.num_patches, c.mask_ratio)
        return random_mask(batch, c.grid, keep, ordered=False, generator=generator, device=device)

    def encode(
        self, images: Tensor, mask: PatchMask | None = None
    ) -> tuple[PackedBatch, list[PackedBatch]]:
        """The encoder's normed rows, and what the blocks of ``config.levels`` say.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: everything.

        Returns:
            ``[B + K, C]`` each: class row, then the visible patches; to segment, without a class
            row.

        Raises:
            ValueError: for volumes of another size, or a mask of another number of patches.
        """
        return self.encoder.levels(images, self.config.levels, mask)

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """What the task predicts.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: a random choice. None to segment.

        Returns:
            Voxels ``[B * (P - K), Q]`` of the hidden patches, normalised, in the mask's order, each
            in the order [*patch, C]; or scores ``[B, K, *image_size]``.

        Raises:
            ValueError: as :meth:`encode`; for a mask where the task is to segment.
        """
        if self.segmenter is not None:
            if mask is not None:
                raise ValueError("mask is given, expected None: task 'segmentation' sees it all")
            return self.segmenter(self._floating(images), *self.encode(images))
        assert self.decoder is not None
        mask = self.draw_mask(images.shape[0]) if mask is None else mask
        return self.decoder(*self.encode(images, mask), mask)

    def _floating(self, images: Tensor) -> Tensor:
        """As the encoder's patches are normalised."""
        return images if images.is_floating_point() else images.float() / 255

    def loss(self, batch: ImageBatch) -> Losses:
        """Mean squared error of hidden voxels, or Dice loss and cross entropy of labels.

        Raises:
            ValueError: if the batch has no labels to segment.
        """
        if self.task == "segmentation":
            if batch.labels is None:
                raise ValueError("the loss of task 'segmentation' needs batch.labels")
            scores = self(batch.images, batch.mask)  # [B, K, *size]
            dice = losses.dice_loss(scores, batch.labels)
            classification = losses.cross_entropy(scores, batch.labels)
            return Losses(dice + classification, dice=dice, classification=classification)
        mask = self.draw_mask(batch.images.shape[0]) if batch.mask is None else batch.mask
        predicted = self(batch.images, mask)  # [B * (P - K), Q]
        target = self.encoder.embed.pixels(
            batch.images, mask.hidden, channels_last=True, dtype=torch.float32
        )
        loss = losses.pixel_loss(predicted, target, normalise=True, unbiased=False)
        return Losses(loss, voxels=loss)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: PatchMask) -> Tensor:
        """fp32 ``[B, C, *image_size]``: visible patches as they are, hidden ones as predicted.

        Predictions are put back to the mean and the deviation of the patches they stand for.

        Raises:
            ValueError: as :meth:`encode`; for a model that segments.
        """
        if self.decoder is None:
            raise ValueError(f"task {self.task!r} has no decoder, expected 'masked-image'")
        embed = self.encoder.embed
        voxels = embed.pixels(images, channels_last=True, dtype=torch.float32)  # [B * P, Q]
        mean, deviation = losses.patch_moments(voxels[mask.hidden], unbiased=False)
        rows = voxels.index_copy(0, mask.hidden, self(images, mask).float() * deviation + mean)
        return ops.fold_patches(rows, images.shape, embed.patch, channels_last=True)

    def example_batch(
        self, generator: torch.Generator | None = None, *, batch_size: int = 4
    ) -> ImageBatch:
        """``batch_size`` phantoms of ellipsoids with a mask or labels, on the CPU.

        All numbers are drawn from ``generator``.
        """
        c = self.config
        images, labels = phantoms(batch_size, c.image_size, c.num_labels, generator=generator)
        images = images.repeat(1, c.channels, 1, 1, 1)
        if c.task == "segmentation":
            return ImageBatch(images, labels=labels)
        keep = keep_count(c.num_patches, c.mask_ratio)
        mask = random_mask(
            batch_size, c.grid, keep, ordered=False, generator=generator, device="cpu"
        )
        return ImageBatch(images, mask)

    def load_published(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills a model that pre-trains from the published code's state dict.

        Its tables of positions, which are ours, and its prefix ``module.`` are not used.

        Raises:
            ValueError: listing tensors that do not fit; for a model that segments, which takes its
                encoder from another's by :meth:`load_encoder`.
        """
        tables = ("encoder_pos_embed", "decoder_pos_embed")
        keep = ("encoder.positions.table", "decoder.positions.table")
        parted = split_kv(tensors)
        weights.load(self, parted, self.reference_names(), ignore=tables, keep=keep)

    def reference_names(self) -> list[Tied]:
        """What our tensors are called in FengheTan9/Hi-End-MAE, where keys and values are parted.

        Raises:
            ValueError: for a model that segments.
        """
        if self.task != "masked-image":
            raise ValueError(f"published names are those of task 'masked-image', not {self.task!r}")
        return published_names(self.config)


_P16 = {"patch_size": (16, 16, 16)}

VARIANTS = {
    "large-p12": HiEndMaeConfig(),
    "large-p16": HiEndMaeConfig(**_P16),
    "base-p16": HiEndMaeConfig(
        **_P16,
        dim=768,
        num_heads=12,
        ffn_dim=3072,
        decoder_dim=384,
        decoder_heads=12,
        decoder_ffn_dim=1536,
    ),
    "tiny": HiEndMaeConfig(
        image_size=(24, 24, 12),
        patch_size=(6, 6, 6),
        dim=48,
        depth=3,
        num_heads=4,
        ffn_dim=96,
        levels=(0, 1),
        decoder_dim=66,
        decoder_depth=1,
        decoder_heads=2,
        decoder_ffn_dim=96,
        num_labels=3,
        feature_size=4,
    ),
}

register(
    "hi_end_mae",
    HiEndMae,
    VARIANTS,
    ModelInfo(
        title=(
            "Hi-End-MAE: Hierarchical Encoder-driven Masked Autoencoders Are Stronger Vision "
            "Learners for Medical Image Segmentation"
        ),
        year=2025,
        paper="arXiv 2502.08347",
        tasks=("masked-image", "segmentation"),
        inputs="images [B, C, H, W, D] in 0..1 or uint8; mask: PatchMask of the visible patches",
        ops=("patch_gather", "varlen_attn", "pad", "add_norm"),
        fidelity=(
            "fp32 loss, predictions and every gradient within 1e-5 of a dense eager "
            "re-implementation of the published code in the order of the raster, the encoder "
            "within 1e-5 of transformers' ViTMAE layers, segmentation within 1e-5 of MONAI's UNETR"
        ),
        deviations=(
            "the decoder finishes its last block at the hidden patches alone, which changes no "
            "number of the loss",
            "fine-tuning keeps the encoder's norm eps of 1e-6, where the published network has "
            "monai's 1e-5",
        ),
    ),
)
