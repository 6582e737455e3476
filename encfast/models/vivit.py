"""ViViT's factorised encoder (Arnab et al., ICCV 2021, arXiv 2103.15691, model 2), trained as in
Optimizing Factorized Encoder Models: Time and Memory Reduction for Scalable and Efficient Action
Recognition (Gowda, Arnab and Huang, ECCV 2024, arXiv 2306.04822).

A clip is cut into tubelets, two frames deep. A spatial transformer sees the tubelets of one time
index, a temporal one the class rows of a clip's time indices, and a linear head, zero at first, its
class row. All time indices of all clips are one packed batch of the spatial transformer, all clips
one of the temporal transformer, and clips may differ in length. Only class rows are read, so the
last block of each transformer is finished there alone.

Training has two stages. Stage 1 trains everything on few frames, from a pre-trained image model
whose patch kernel becomes the central or the average frame of the tubelet's. Stage 2
(:meth:`Vivit.second_stage`) freezes tubelets and spatial transformer, keeps the temporal one,
stretches its positions over more frames, and puts an adapter between the two. The frozen part runs
in evaluation mode, without gradients or saved tensors, in chunks if wanted, and its features can be
kept between epochs.

What the papers leave open is read as in the published code of ViViT (google-research/scenic): GELU
by its tanh approximation, norms with eps 1e-6, linear layers drawn after Glorot and Bengio, class
tokens and head that start at 0, the central frame of two being the second. The adapter's form is
not specified; see :mod:`encfast.models._vivit_adapters`. A clip shorter than the position table
takes its first positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from encfast import losses
from encfast.config import BlockConfig, nearest, replace_fields, with_drop_path
from encfast.data.clips import ClipBatch
from encfast.layers import PatchEmbed
from encfast.layers.base import Model, init_xavier
from encfast.layers.dropout import StaticFloat
from encfast.layers.patch import tubelets
from encfast.models._vivit_adapters import Adapter, make_adapter, zero_branch
from encfast.models._vivit_encoder import Encoder
from encfast.models._vivit_training import TRAINING, Recipe
from encfast.models._vivit_weights import (
    Inflation,
    TemporalInit,
    copy_first_stage,
    image_names,
    load_image_model,
)
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register
from encfast.weights import Tied

__all__ = ["TRAINING", "Losses", "Recipe", "Vivit", "VivitConfig"]


@dataclass(frozen=True)
class VivitConfig:
    """ViViT-B/16x2, factorised encoder, on 32 frames; stage 1."""

    image_size: tuple[int, int] = (224, 224)  # pixels, height and width
    patch_size: tuple[int, int, int] = (2, 16, 16)  # frames, and pixels along height and width
    frames: int = 32  # of the longest clip
    channels: int = 3
    dim: int = 768  # C
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    spatial_depth: int = 12  # blocks
    temporal_depth: int = 4  # blocks
    activation: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    norm_eps: float = 1e-6

    num_labels: int = 400  # K
    label_smoothing: float = 0.0  # in [0, 1)
    drop_path: float = 0.0  # of the last block of each transformer; linear from 0 in the first

    freeze_spatial: bool = False  # tubelets and spatial transformer are not trained: stage 2
    adapter: Adapter = "none"  # before the temporal transformer
    spatial_chunk: int | None = None  # time indices per pass of a frozen spatial transformer

    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of uint8 frames, pixels in 0..1
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.adapter not in get_args(Adapter):
            raise ValueError(
                f"adapter {self.adapter!r} is unknown; {nearest(self.adapter, get_args(Adapter))}"
            )
        size = (self.frames, *self.image_size)
        if len(self.patch_size) != 3 or any(
            n < p or n % p for n, p in zip(size, self.patch_size, strict=True)
        ):
            raise ValueError(
                f"frames and image_size are {size}, expected multiples of {self.patch_size}"
            )
        for name in ("spatial_depth", "temporal_depth", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.spatial_chunk is not None and self.spatial_chunk < 1:
            raise ValueError(f"spatial_chunk must be >= 1 or None, got {self.spatial_chunk}")
        self.block()

    @property
    def grid(self) -> tuple[int, int]:
        """Tubelets along height and width."""
        (height, width), (_, p, q) = self.image_size, self.patch_size
        return height // p, width // q

    @property
    def num_patches(self) -> int:
        """P, tubelets of one time index."""
        return math.prod(self.grid)

    @property
    def time(self) -> int:
        """Time indices of the longest clip."""
        return self.frames // self.patch_size[0]

    def block(self) -> BlockConfig:
        """Of every block, but for its drop path."""
        return BlockConfig(
            self.dim,
            self.num_heads,
            self.ffn_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
        )

    def blocks(self, depth: int) -> list[BlockConfig]:
        """The configs of the ``depth`` blocks of a transformer."""
        return with_drop_path(self.block(), self.drop_path, depth)


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and its one term."""

    total: Tensor
    classification: Tensor


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class Vivit(Model):
    """Tubelets, spatial transformer, adapter or none, temporal transformer, head."""

    label_smoothing = StaticFloat()

    def __init__(
        self,
        config: VivitConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.label_smoothing = config, config.label_smoothing
        self.embed = PatchEmbed(
            config.patch_size,
            config.dim,
            channels=config.channels,
            mean=config.pixel_mean,
            std=config.pixel_std,
            **factory,
        )
        self.spatial = Encoder(config.blocks(config.spatial_depth), config.grid, **factory)
        self.adapter = make_adapter(config.adapter, config.block(), **factory)
        self.temporal = Encoder(config.blocks(config.temporal_depth), (config.time,), **factory)
        self.head = nn.Linear(config.dim, config.num_labels, **factory)
        self.reset_parameters()
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def _frozen(self) -> list[nn.Module]:
        return [self.embed, self.spatial] if self.config.freeze_spatial else []

    def reset_parameters(self) -> None:
        """Draws all parameters anew; head and adapter start at zero."""
        init_xavier(self)
        nn.init.zeros_(self.head.weight)
        if self.adapter is not None:
            zero_branch(self.adapter)

    def train(self, mode: bool = True) -> Vivit:
        """Training or evaluation mode; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def features(self, clips: PackedBatch) -> PackedBatch:
        """What the spatial transformer knows of each time index.

        Without gradients where it is frozen, and ``spatial_chunk`` time indices at a time (outside
        of compiled graphs, whose number of time indices varies).

        Args:
            clips: frames ``[N, C, H, W]``, floating or uint8; lengths that the tubelets' depth
                divides.

        Returns:
            One row per time index: ``[T, C]``, or with adapter "attn" its class and patch rows
            ``[T, 1 + P, C]``.

        Raises:
            ValueError: for frames of another size, or (on the CPU) a clip whose length is no
                multiple.
        """
        tubelets = self._tubelets(clips)  # [T, C, t, H, W]
        if not self.config.freeze_spatial:
            return tubelets.with_data(self._spatial(tubelets.data))
        with torch.no_grad():
            if self.config.spatial_chunk is None:
                return tubelets.with_data(self._spatial(tubelets.data))
            chunks = tubelets.data.split(self.config.spatial_chunk)
            return tubelets.with_data(torch.cat([self._spatial(chunk) for chunk in chunks]))

    def _tubelets(self, clips: PackedBatch) -> PackedBatch:
        """Frames ``[N, C, H, W]`` -> ``[T, C, t, H, W]``, one row per time index."""
        size = tuple(clips.data.shape[2:])
        if size != self.config.image_size:
            raise ValueError(f"clips has frames of {size}, expected {self.config.image_size}")
        return tubelets(clips, self.config.patch_size[0])

    def _spatial(self, tubelets: Tensor) -> Tensor:
        """``[T, C, t, H, W]`` -> ``[T, C]`` or ``[T, 1 + P, C]``."""
        count, patches = tubelets.shape[0], self.config.num_patches
        ends = torch.arange(count + 1, dtype=torch.int32, device=tubelets.device) * patches
        batch = PackedBatch(self.embed(tubelets), ends, patches)  # [T * P, C]
        if self.config.adapter == "attn":
            return self.spatial.all_rows(batch).unflatten(0, (count, 1 + patches))
        return self.spatial(batch)

    def classify(self, features: PackedBatch) -> Tensor:
        """Features of time indices -> scores ``[B, K]`` of the clips.

        Args:
            features: as :meth:`features` returns them.

        Returns:
            ``[B, K]``.

        Raises:
            ValueError: for a clip that is longer than the position table.
        """
        if features.max_seqlen > self.config.time:
            raise ValueError(
                f"clips have up to {features.max_seqlen} time indices, the position table has "
                f"{self.config.time}; stretch it with second_stage(frames=...)"
            )
        rows = features.data if self.adapter is None else self.adapter(features.data)  # [T, C]
        return self.head(self.temporal(features.with_data(rows)))  # [B, K]

    def forward(self, clips: PackedBatch) -> Tensor:
        """Frames ``[N, C, H, W]`` of B clips -> scores ``[B, K]``.

        Raises:
            ValueError: as :meth:`features` and :meth:`classify`.
        """
        return self.classify(self.features(clips))

    def loss(self, batch: ClipBatch) -> Losses:
        """Mean cross entropy of the labels of clips that are not empty.

        Raises:
            ValueError: if the batch has no labels, or neither clips nor features.
        """
        if batch.labels is None:
            raise ValueError("the loss needs batch.labels, which is None")
        features = batch.features
        if features is None:
            if batch.clips is None:
                raise ValueError("the loss needs batch.clips or batch.features, both are None")
            features = self.features(batch.clips)
        loss = losses.classification_loss(
            self.classify(features),
            batch.labels,
            features.lengths() > 0,
            label_smoothing=self.label_smoothing,
        )
        return Losses(loss, loss)

    @torch.no_grad()
    def cache(self, batch: ClipBatch) -> ClipBatch:
        """The batch with features in place of frames, for as many epochs as one likes.

        Valid as long as frames are augmented no further: what is frozen computes the same again.

        Raises:
            ValueError: if the spatial transformer is trained, or there are no clips.
        """
        if not self.config.freeze_spatial:
            raise ValueError("cache needs freeze_spatial=True: features change with every step")
        if batch.clips is None:
            raise ValueError("cache needs batch.clips, which is None")
        return ClipBatch(None, batch.labels, self.features(batch.clips))

    def second_stage(
        self,
        *,
        frames: int | None = None,
        adapter: Adapter = "mlp",
        temporal_init: TemporalInit = "stage1",
        **overrides: Any,
    ) -> Vivit:
        """A model for stage 2: this one's spatial transformer, frozen, and an adapter behind it.

        Args:
            frames: of the longest clip; None: as here. Temporal positions are interpolated.
            adapter: "mlp" by default.
            temporal_init: where the temporal transformer comes from: "stage1", this model's;
                "image", the first blocks, final norm and class token of the spatial one; "random".
                The head is kept by "stage1" alone, and where num_labels does not change.
            **overrides: further fields of the config.

        Raises:
            ValueError: for an unknown ``temporal_init``; for "image", if the temporal transformer
                is the deeper one.
        """
        fields = {"frames": frames or self.config.frames, "adapter": adapter, **overrides}
        config = replace_fields(self.config, {"freeze_spatial": True, **fields})
        weight = self.head.weight
        model = Vivit(config, device=weight.device, dtype=weight.dtype)
        copy_first_stage(self, model, temporal_init)
        return model

    def load_image_model(
        self, tensors: Mapping[str, Tensor], *, inflation: Inflation = "central"
    ) -> None:
        """Fills tubelets and spatial transformer from a ViT for images; the rest stays as it is.

        Args:
            tensors: the state dict of a transformers ViTModel of this image size; its pooler, if
                any, is not used.
            inflation: what the patch kernel becomes: "central", the middle frame of the tubelet's
                with zeros around it, or "average", every frame's, divided by their number.

        Raises:
            ValueError: for tensors that do not fit, or an unknown ``inflation``.
        """
        load_image_model(self, tensors, inflation)

    def image_names(self) -> list[Tied]:
        """What tubelets and spatial transformer are called in transformers' ViTModel.

        There the kernel of the patches has no time; see :meth:`load_image_model`.
        """
        return image_names(self.config)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> ClipBatch:
        """Random clips whose frames resemble their neighbours, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: time indices of each clip; three clips, one of them empty, if None.

        Returns:
            What ``loss`` takes.
        """
        c, draw = self.config, {"generator": generator}
        lengths = [c.time, 0, 1 + c.time // 2] if lengths is None else lengths
        frames = [n * c.patch_size[0] for n in lengths]
        shape = (c.channels, *c.image_size)
        clips = PackedBatch.from_lengths(0.5 * torch.randn(sum(frames), *shape, **draw), frames)
        still = torch.randn(len(frames), *shape, **draw)
        labels = torch.randint(c.num_labels, (len(frames),), **draw)
        return ClipBatch(clips.with_data(clips.data + still[clips.segment_ids()]), labels)


VARIANTS = {
    "base": VivitConfig(),
    "large": VivitConfig(dim=1024, num_heads=16, ffn_dim=4096, spatial_depth=24, temporal_depth=24),
    "tiny": VivitConfig(
        image_size=(16, 24),
        patch_size=(2, 8, 8),
        frames=256,
        dim=32,
        num_heads=2,
        ffn_dim=64,
        spatial_depth=2,
        temporal_depth=1,
        num_labels=6,
    ),
}

register(
    "vivit",
    Vivit,
    VARIANTS,
    ModelInfo(
        title=(
            "Optimizing Factorized Encoder Models: Time and Memory Reduction for Scalable and "
            "Efficient Action Recognition"
        ),
        year=2024,
        paper="arXiv 2306.04822",
        tasks=("video-classification",),
        inputs="clips: PackedBatch of frames [N, C, H, W], floating or uint8",
        ops=("varlen_attn", "patch_gather"),
        fidelity=(
            "fp32 outputs and every gradient within 1e-5 of transformers' ViTModel on each time "
            "index followed by nn.TransformerEncoder on the class rows"
        ),
        deviations=(
            "the adapter's form is not published: three readings, all zero at first",
            "the last block of each transformer is finished at class rows alone, which changes no "
            "number",
            "drop path rescales the branches it keeps, which the published code does not",
        ),
    ),
)
