"""The plain vision transformer over the patches of an image that are visible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encfast.config import BlockConfig
from encfast.layers.block import Stack
from encfast.layers.norm import Norm
from encfast.layers.patch import PatchEmbed
from encfast.layers.positions import FixedPositions, LearnedPositions
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask

_TOKEN_STD = 0.02  # of the class token


class PatchEncoder(nn.Module):
    """Class token, visible patches and positions through pre-norm blocks.

    Hidden patches are never read.

    Args:
        image_size: pixels along each axis.
        patch_size: pixels of a patch along each axis.
        blocks: one config per block, of one ``dim``.
        axes: order of the axes' parts of the positions, as in
            :func:`encfast.layers.sincos_positions`.
        class_token: whether there is one.
        learned_positions: a learned table of positions instead of fixed sines and cosines.
        channels, mean, std: as in :class:`encfast.layers.PatchEmbed`.
    """

    class_token: nn.Parameter | None
    positions: FixedPositions | LearnedPositions

    def __init__(
        self,
        image_size: Sequence[int],
        patch_size: Sequence[int],
        blocks: Sequence[BlockConfig],
        *,
        axes: Sequence[int] | None = None,
        class_token: bool = True,
        learned_positions: bool = False,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = blocks[0].dim
        self.image_size = tuple(image_size)
        self.embed = PatchEmbed(patch_size, dim, channels=channels, mean=mean, std=std, **factory)
        self.grid = self.embed.grid(image_size)
        self.num_patches = math.prod(self.grid)
        token = nn.Parameter(torch.empty(dim, **factory)) if class_token else None
        self.register_parameter("class_token", token)
        if learned_positions:
            self.positions = LearnedPositions(self.grid, dim, class_token=class_token, **factory)
        else:
            self.positions = FixedPositions(
                self.grid, dim, axes=axes, class_token=class_token, device=device
            )
        self.stack = Stack(blocks, **factory)
        self.norm = Norm(dim, eps=blocks[0].norm_eps, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the class token anew (the modules reset themselves)."""
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=_TOKEN_STD)

    def all_visible(self, images: Tensor) -> PatchMask:
        """The mask that hides nothing of ``images`` ``[B, C, *image_size]``."""
        return PatchMask.all_visible(images.shape[0], self.num_patches, device=images.device)

    def embedded(self, images: Tensor, mask: PatchMask) -> PackedBatch:
        """What the first block reads: ``[B + K, C]``, class row, then the K visible patches.

        Without a class token ``[K, C]``, here and below.

        Raises:
            ValueError: for images of another size, or a mask of another number of patches.
        """
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"images has size {tuple(images.shape[2:])}, expected {self.image_size}"
            )
        if mask.total != images.shape[0] * self.num_patches:
            raise ValueError(
                f"mask has {mask.total} patches, expected {self.num_patches} for each of "
                f"{images.shape[0]} images"
            )
        rows = self.embed(images, mask.visible)  # [K, C]
        plan = mask.visible_plan(class_token=self.class_token is not None)
        return plan.build(rows, self.class_token, self.positions())

    def levels(
        self, images: Tensor, which: Sequence[int], mask: PatchMask | None = None
    ) -> tuple[PackedBatch, list[PackedBatch]]:
        """What :meth:`forward` returns, and what the blocks ``which`` do, not normed.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            which: indices of blocks, from 0.
            mask: what is visible; None: everything.

        Returns:
            The batch of normed rows, and one batch for each of ``which``.

        Raises:
            ValueError: as :meth:`embedded`; for an index that is no block's.
        """
        mask = self.all_visible(images) if mask is None else mask
        x, kept = self.stack.levels(self.embedded(images, mask), which)  # [B + K, C] each
        return x.with_data(self.norm(x.data)), kept

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> PackedBatch:
        """Rows behind the final norm, ``[B + K, C]``: class row, then the visible patches.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: everything.

        Returns:
            A batch with one sequence per image.

        Raises:
            ValueError: as :meth:`embedded`.
        """
        mask = self.all_visible(images) if mask is None else mask
        x = self.stack(self.embedded(images, mask))  # [B + K, C]
        return x.with_data(self.norm(x.data))
