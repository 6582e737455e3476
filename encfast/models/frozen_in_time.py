"""Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval (Bain et al., ICCV 2021,
arXiv 2104.00650).

Two towers with one space: clips of 1 to F frames through a ViT with divided space-time attention
around one class row per clip, captions through DistilBERT. An image is a clip of one frame, and
clips of different lengths share a batch. The attention in time starts at zero and so does the table
of times, so that a model of clips begins as the image model its weights come from; training on one
frame first and on more frames last (:class:`Curriculum`, :meth:`FrozenInTime.with_frames`) is far
cheaper than training on many throughout.

Faithful to the published code (m-bain/frozen-in-time): the class row's query sees all rows of the
clip, its key and value are shared by every group of patches; the residual of both attentions is the
block's input; no temporal term for the class row; NormSoftmax is the sum of both directions at a
fixed temperature of 0.05; captions are read at DistilBERT's first row, or at BERT's pooled one.

Both towers finish their last block at first rows alone, which changes no number. Frames beyond a
clip's are left out, where the published code appends frames of zeros. A pair whose clip or caption
is empty has no loss of its own; what it embeds as remains one of the wrong candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops, weights
from encfast.config import BlockConfig, nearest, replace_fields
from encfast.layers.base import Model, init_normal
from encfast.layers.dropout import StaticFloat
from encfast.models._frozen_in_time_data import CaptionedClips, example_batch
from encfast.models._frozen_in_time_names import image_names, published_names, text_names
from encfast.models._frozen_in_time_text import TextTower
from encfast.models._frozen_in_time_training import (
    TRAINING,
    Curriculum,
    Recipe,
    TimeGrowth,
    grow_times,
    max_margin_loss,
    sample_frames,
)
from encfast.models._frozen_in_time_video import ClipTower
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register
from encfast.weights import Tied

__all__ = [
    "TRAINING",
    "CaptionedClips",
    "Curriculum",
    "Embeddings",
    "FrozenInTime",
    "FrozenInTimeConfig",
    "Losses",
    "Recipe",
    "sample_frames",
]

Objective = Literal["norm-softmax", "max-margin"]
TextKind = Literal["distilbert", "bert"]
_INIT_STD = 0.02


@dataclass(frozen=True)
class FrozenInTimeConfig:
    """ViT-B/16 on up to 4 frames, and DistilBERT."""

    image_size: tuple[int, int] = (224, 224)  # pixels, height and width
    patch_size: tuple[int, int] = (16, 16)  # pixels
    frames: int = 4  # of the longest clip
    channels: int = 3
    dim: int = 768  # C
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    norm_eps: float = 1e-6
    time_init: Literal["zeros", "random"] = "zeros"  # of the attention in time

    text: TextKind = "distilbert"  # what is read: the first row; of BERT behind its pooler
    vocab_size: int = 30_522  # V
    max_positions: int = 512  # longest caption
    text_dim: int = 768
    text_depth: int = 6  # blocks
    text_heads: int = 12
    text_ffn_dim: int = 3072
    text_norm_eps: float = 1e-12
    text_dropout: float = 0.1  # on embeddings and branches
    text_attn_dropout: float = 0.1  # on the attention weights

    embed_dim: int = 256  # E, of both towers' embeddings
    objective: Objective = "norm-softmax"
    temperature: float = 0.05  # of NormSoftmax, fixed
    margin: float = 1.0  # of max-margin

    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of uint8 frames, pixels in 0..1
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, known in (("objective", Objective), ("text", TextKind)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ValueError(f"{name} {value!r} is unknown; {nearest(value, get_args(known))}")
        if self.time_init not in ("zeros", "random"):
            raise ValueError(f"time_init must be 'zeros' or 'random', got {self.time_init!r}")
        if any(n % p for n, p in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                f"image_size is {self.image_size}, expected multiples of {self.patch_size}"
            )
        for name in ("frames", "depth", "text_depth", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("temperature", "margin"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        self.block()
        self.text_block()

    @property
    def num_patches(self) -> int:
        """P, patches of a frame."""
        (height, width), (p, q) = self.image_size, self.patch_size
        return height // p * (width // q)

    def block(self) -> BlockConfig:
        """Of every block of the clip tower."""
        return BlockConfig(self.dim, self.num_heads, self.ffn_dim, norm_eps=self.norm_eps)

    def text_block(self) -> BlockConfig:
        """Of every block of the text tower; DistilBERT drops nothing behind its attention."""
        return BlockConfig(
            self.text_dim,
            self.text_heads,
            self.text_ffn_dim,
            norm_position="post",
            norm_eps=self.text_norm_eps,
            attn_dropout=self.text_attn_dropout,
            attn_out_dropout=self.text_dropout if self.text == "bert" else 0.0,
            mlp_dropout=self.text_dropout,
        )

    def attention_scores(self, frames: int, *, joint: bool = False) -> int:
        """Scores that a head of one block computes for a clip; ``joint``: were all rows to see all.

        In space frames * P * (P + 1), in time P * frames * (frames + 1), and every row for either
        class query. The last block computes fewer: its attention in space has the class query only.
        """
        patches = self.num_patches
        rows = 1 + frames * patches
        if joint:
            return rows**2
        return frames * patches * (patches + 1 + frames + 1) + 2 * rows


@dataclass(frozen=True, eq=False)
class Embeddings:
    """``[B, E]`` of clips and of captions, of length 1; None where none were given."""

    clips: Tensor | None
    text: Tensor | None


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and its one term."""

    total: Tensor
    matching: Tensor


for _class in (Embeddings, Losses):
    torch.export.register_dataclass(_class, serialized_type_name=f"{__name__}.{_class.__name__}")


class FrozenInTime(Model):
    """A tower of clips, a tower of captions, a projection behind each."""

    _no_split_modules = ["Block", "SpaceTimeBlock"]  # noqa: RUF012
    temperature = StaticFloat()
    margin = StaticFloat()

    def __init__(
        self,
        config: FrozenInTimeConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        c = self.config = config
        self.objective, self.temperature, self.margin = c.objective, c.temperature, c.margin
        self.clips = ClipTower(
            c.image_size,
            c.patch_size,
            c.frames,
            [c.block()] * c.depth,
            channels=c.channels,
            mean=c.pixel_mean,
            std=c.pixel_std,
            **factory,
        )
        self.text = TextTower(
            c.vocab_size,
            c.max_positions,
            c.text_block(),
            c.text_depth,
            dropout=c.text_dropout,
            bert=c.text == "bert",
            **factory,
        )
        self.clip_proj = nn.Linear(c.dim, c.embed_dim, **factory)
        self.text_proj = nn.Linear(c.text_dim, c.embed_dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew; the attention in time starts as ``time_init`` says."""
        init_normal(self, _INIT_STD)
        for proj in (self.clip_proj, self.text_proj):
            proj.reset_parameters()
        if self.config.time_init == "zeros":
            for block in self.clips.blocks:
                block.time.zero()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table ``[V, C]`` of the captions."""
        return self.text.embed.word

    def embed_clips(self, clips: PackedBatch) -> Tensor:
        """Frames ``[T, C, H, W]``, floating or uint8, of B clips -> ``[B, E]``, of length 1.

        Raises:
            ValueError: for frames of another size, or a clip longer than the table of times.
        """
        return F.normalize(self.clip_proj(self.clips(clips)), dim=-1)

    def embed_text(self, text: PackedBatch) -> Tensor:
        """``text``, ids ``[N]`` of B captions, [CLS] first -> ``[B, E]``, of length 1.

        Raises:
            ValueError: for a caption longer than the position table.
        """
        return F.normalize(self.text_proj(F.relu(self.text(text))), dim=-1)

    def forward(
        self, clips: PackedBatch | None = None, text: PackedBatch | None = None
    ) -> Embeddings:
        """Embeddings of clips, of captions or of both; the cosine of two is their dot product.

        Args:
            clips: frames, as :meth:`embed_clips` takes them.
            text: ids, as :meth:`embed_text` takes them.

        Returns:
            ``[B, E]`` of each, None of what was not given.

        Raises:
            ValueError: as :meth:`embed_clips` and :meth:`embed_text`.
        """
        return Embeddings(
            None if clips is None else self.embed_clips(clips),
            None if text is None else self.embed_text(text),
        )

    def loss(self, batch: CaptionedClips) -> Losses:
        """The objective over all pairs of clips and captions of ``batch``; 0 without any.

        Raises:
            ValueError: if there are not as many captions as clips.
        """
        clips, text = batch.clips, batch.text
        if clips.batch_size != text.batch_size:
            raise ValueError(f"text has {text.batch_size} captions, expected {clips.batch_size}")
        a, b = self.embed_clips(clips), self.embed_text(text)  # [B, E]
        loss = self._matching(a, b, (clips.lengths() > 0) & (text.lengths() > 0))
        return Losses(loss, loss)

    def _matching(self, a: Tensor, b: Tensor, kept: Tensor) -> Tensor:
        if a.shape[0] == 0:
            return (a.sum() + b.sum()).float()
        if self.objective == "max-margin":
            return max_margin_loss(a @ b.t(), self.margin, kept=kept)
        positives = torch.where(kept, torch.arange(a.shape[0], device=a.device), -1)
        scale = 1.0 / self.temperature
        return ops.info_nce(a, b, logit_scale=scale, positives=positives, directions="sum")

    def with_frames(self, frames: int, *, growth: TimeGrowth = "zeros") -> FrozenInTime:
        """The next stage of a curriculum: this model for clips of another number of frames.

        Args:
            frames: of the longest clip.
            growth: what the table of times has for frames it did not know, see ``grow_times``.

        Returns:
            A model of its own.

        Raises:
            ValueError: for ``frames`` below 1, or another ``growth``.
        """
        weight = self.clip_proj.weight
        config = replace_fields(self.config, {"frames": frames})
        state = self.state_dict()
        state["clips.times"] = grow_times(state["clips.times"], frames, growth)
        model = FrozenInTime(config, device=weight.device, dtype=weight.dtype)
        model.load_state_dict(state)
        return model.train(self.training)

    def load_image_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills what sees images from the state dict of timm's ViT; the rest stays as it is.

        Raises:
            ValueError: for tensors that do not fit; nothing is loaded then.
        """
        self._load_part(tensors, image_names(self.config), ignore=("head.", "pre_logits."))

    def load_text_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills the text tower from the state dict of transformers' DistilBertModel or BertModel.

        Raises:
            ValueError: for tensors that do not fit; nothing is loaded then.
        """
        self._load_part(tensors, text_names(self.config), ignore=("embeddings.position_ids",))

    def _load_part(
        self, tensors: Mapping[str, Tensor], entries: Sequence[Tied], ignore: tuple[str, ...]
    ) -> None:
        filled = {entry.ours for entry in entries}
        weights.load(
            self,
            tensors,
            entries,
            ignore=[name for name in tensors if name.startswith(ignore)],
            keep=[name for name in self.state_dict() if name not in filled],
        )

    def reference_names(self) -> list[Tied]:
        """What our tensors are called in m-bain/frozen-in-time's checkpoints."""
        return published_names(self.config)

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> CaptionedClips:
        """Random clips whose frames resemble their neighbours, random captions, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: frames of each clip; four clips, one of them empty, if None.

        Returns:
            What ``loss`` takes.
        """
        return example_batch(self.config, generator, lengths)


VARIANTS = {
    "base": FrozenInTimeConfig(),
    "base-1f": FrozenInTimeConfig(frames=1),
    "base-8f": FrozenInTimeConfig(frames=8),
    "base-bert": FrozenInTimeConfig(text="bert", text_depth=12),
    "tiny": FrozenInTimeConfig(
        image_size=(16, 24),
        patch_size=(8, 8),
        frames=128,
        dim=32,
        depth=2,
        num_heads=2,
        ffn_dim=64,
        vocab_size=128,
        max_positions=32,
        text_dim=32,
        text_depth=1,
        text_heads=2,
        text_ffn_dim=64,
        embed_dim=16,
    ),
}

register(
    "frozen_in_time",
    FrozenInTime,
    VARIANTS,
    ModelInfo(
        title="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval",
        year=2021,
        paper="arXiv 2104.00650",
        tasks=("video-text-retrieval", "image-text-retrieval"),
        inputs=(
            "clips: PackedBatch of frames [T, C, H, W], floating or uint8; text: PackedBatch of "
            "ids [N]"
        ),
        ops=("varlen_attn", "pad", "patch_gather", "rank_loss"),
        fidelity=(
            "fp32 outputs and every gradient within 1e-5 of timm's VisionTransformer (one frame) "
            "and of transformers' DistilBertModel and BertModel; blocks within 1e-5 of attention "
            "under the full boolean masks"
        ),
        deviations=(
            "frames beyond a clip's are left out, where the published code appends zeros",
            "the last blocks are finished at first rows alone, which changes no number",
        ),
    ),
)
