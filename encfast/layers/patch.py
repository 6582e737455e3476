"""Patches of images, clips and volumes as rows: pixels, normalisation and projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encfast import ops
from encfast.layers.exact import ExactBuffers
from encfast.layers.linear import Linear
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


class PatchEmbed(ExactBuffers):
    """A convolution whose stride is its kernel, as one linear layer over rows of pixels.

    ``proj.weight`` is the convolution's, flattened: its columns stand in the order [C, *patch].
    Only the pixels of the patches asked for are read.

    Args:
        patch: size of a patch along each axis: (16, 16) of an image, (2, 16, 16) of a clip
            ``[B, C, T, H, W]`` (tubelets), (12, 12, 12) of a volume.
        dim: channels of a row.
        channels: C of the pixels.
        bias: of the projection.
        mean, std: per channel, of pixels in 0..1: uint8 input becomes (x / 255 - mean) / std.
            Floating input is taken as it is.

    Raises:
        ValueError: for a patch without 1 to 3 sizes >= 1, or mean and std of another length.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        patch: Sequence[int],
        dim: int,
        *,
        channels: int = 3,
        bias: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch = tuple(patch)
        if not 1 <= len(self.patch) <= 3 or min(self.patch) < 1:
            raise ValueError(f"patch is {self.patch}, expected 1 to 3 sizes >= 1")
        self.channels = channels
        self.mean = tuple(mean) if mean is not None else (0.0,) * channels
        self.std = tuple(std) if std is not None else (1.0,) * channels
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} entries, expected {channels}, "
                "one per channel"
            )
        self.proj = Linear(
            channels * math.prod(self.patch), dim, bias=bias, device=device, dtype=dtype
        )
        for name in ("scale", "shift"):
            empty = torch.empty(channels, dtype=torch.float32, device=device)
            self.register_buffer(name, empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the normalisation (the projection resets itself)."""
        if self.scale.is_meta:
            return
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std))
        with torch.no_grad():
            self.scale.copy_(1 / (255 * std))
            self.shift.copy_(-mean / std)

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches along each axis of an image of this size.

        Raises:
            ValueError: if the patch does not divide the size.
        """
        if len(size) != len(self.patch) or any(
            n % p for n, p in zip(size, self.patch, strict=True)
        ):
            raise ValueError(f"size is {tuple(size)}, expected multiples of the patch {self.patch}")
        return tuple(n // p for n, p in zip(size, self.patch, strict=True))

    def pixels(
        self,
        images: Tensor,
        ids: Tensor | None = None,
        *,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Normalised pixels of patches, one patch a row, ``[M, C * prod(patch)]``.

        Args:
            images: ``[B, C, *size]``, floating or uint8; each size a multiple of the patch's.
            ids: int64 ``[M]``, b * P + p; None: all patches.
            channels_last: rows in the order [*patch, C], as MAE's targets.
            dtype: of the rows; by default the images', and fp32 for uint8.

        Returns:
            ``[M, C * prod(patch)]``.

        Raises:
            TypeError, ValueError: as :func:`encfast.ops.gather_patches`.
        """
        integer = images.dtype == torch.uint8
        return ops.gather_patches(
            images,
            ids,
            self.patch,
            channels_last=channels_last,
            scale=self.scale if integer else None,
            shift=self.shift if integer else None,
            dtype=dtype,
        )

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Images ``[B, C, *size]`` -> rows ``[M, dim]`` of the patches ``ids`` (None: of all).

        Raises:
            TypeError, ValueError: as :meth:`pixels`; for images of another number of channels.
        """
        self._check_channels("images", images, 1)
        return self.proj(self.pixels(images, ids, dtype=self._row_dtype(images)))

    def packed(
        self, images: Tensor | Sequence[Tensor], mask: PatchMask | None = None
    ) -> PackedBatch:
        """Rows of the visible patches as a batch, also of images of different sizes.

        Args:
            images: ``[B, C, *size]``; or B images ``[C, *size]``, for the border.
            mask: what is visible; None: everything.

        Returns:
            ``[K, dim]`` rows of all visible patches, one sequence per image.

        Raises:
            TypeError, ValueError: as :meth:`forward`; for a mask of other numbers of patches.
        """
        if not isinstance(images, Tensor):
            return self._packed_list(images, mask)
        if mask is None:
            count = math.prod(self.grid(images.shape[2:]))
            mask = PatchMask.all_visible(images.shape[0], count, device=images.device)
        return mask.visible_batch(self(images, mask.visible))

    def _packed_list(self, images: Sequence[Tensor], mask: PatchMask | None) -> PackedBatch:
        counts = [math.prod(self.grid(image.shape[1:])) for image in images]
        ids: Sequence[Tensor | None] = [None] * len(images)
        if mask is not None:
            if mask.cu_seqlens.diff().tolist() != counts:
                raise ValueError(
                    f"mask has {mask.cu_seqlens.diff().tolist()} patches, the images {counts}"
                )
            counts = mask.cu_visible.diff().tolist()
            ids = mask.patches_of(mask.visible).split(counts)
        rows = []
        for b, (image, own) in enumerate(zip(images, ids, strict=True)):
            self._check_channels(f"images[{b}]", image, 0)
            rows.append(self.pixels(image.unsqueeze(0), own, dtype=self._row_dtype(image)))
        nothing = self.proj.weight.new_empty((0, self.proj.in_features))
        return PackedBatch.from_lengths(self.proj(torch.cat(rows) if rows else nothing), counts)

    def _check_channels(self, name: str, images: Tensor, axis: int) -> None:
        if images.dim() != axis + 1 + len(self.patch) or images.shape[axis] != self.channels:
            shape = "[B, C, *size]" if axis else "[C, *size]"
            raise ValueError(
                f"{name} has shape {tuple(images.shape)}, expected {shape} with C={self.channels} "
                f"and {len(self.patch)} sizes"
            )

    def _row_dtype(self, images: Tensor) -> torch.dtype:
        """What the projection computes in: gathered in it, no pass over the rows converts them."""
        device = images.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.proj.weight.dtype

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"patch={self.patch}, channels={self.channels}"


def tubelets(clips: PackedBatch, depth: int) -> PackedBatch:
    """Frames ``[N, C, H, W]`` of clips -> ``[T, C, depth, H, W]``, one row per time index.

    Raises:
        ValueError: (on the CPU) for a clip whose length ``depth`` does not divide.
    """
    if clips.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_lengths(clips, depth)
    rows = clips.data.unflatten(0, (clips.total // depth, depth)).transpose(1, 2)
    return PackedBatch(rows, clips.cu_seqlens // depth, clips.max_seqlen // depth)


def _check_lengths(clips: PackedBatch, depth: int) -> None:
    odd = (clips.lengths() % depth).nonzero().flatten()
    if odd.numel():
        b = int(odd[0])
        raise ValueError(
            f"clip {b} has {int(clips.lengths()[b])} frames, expected a multiple of {depth}, the "
            "depth of a tubelet"
        )


def flat_kernel(dim: int, channels: int, patch: Sequence[int]) -> dict[str, Any]:
    """``shapes`` of the :class:`encfast.weights.Tied` of ``proj.weight`` and a convolution's.

    Args:
        dim: channels of the embedding.
        channels: of the image.
        patch: pixels along each axis.

    Returns:
        ``[dim, channels * prod(patch)]`` here, ``[dim, channels, *patch]`` there.
    """
    return {"shapes": ((dim, channels * math.prod(patch)), (dim, channels, *patch))}
