"""The cross-encoder that teaches: ALBEF's layout (Li et al. 2021, arXiv 2107.07651)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.config import BlockConfig
from encfast.layers import Embeddings, Norm, PatchEncoder, pool
from encfast.layers.attention import Attention
from encfast.layers.base import Model, init_normal
from encfast.layers.cross import CrossAttention
from encfast.layers.dropout import Dropout
from encfast.layers.mlp import MLP
from encfast.models._cprd_config import CprdConfig
from encfast.packed import PackedBatch


def image_encoder(config: CprdConfig, **factory: Any) -> PatchEncoder:
    """The ViT of the student, and of the teacher."""
    return PatchEncoder(
        config.image_size,
        config.patch_size,
        config.image_blocks(),
        learned_positions=True,
        channels=config.channels,
        mean=config.pixel_mean,
        std=config.pixel_std,
        **factory,
    )


def word_embeddings(config: CprdConfig, **factory: Any) -> Embeddings:
    """BERT's, of the student and of the teacher."""
    return Embeddings(
        config.vocab_size,
        config.text_dim,
        max_positions=config.max_positions,
        num_segments=config.num_segments,
        norm_eps=config.text_norm_eps,
        dropout=config.dropout,
        padding_idx=config.pad_id,
        **factory,
    )


class FusionBlock(nn.Module):
    """A BERT block, with attention to an image between its attention and its MLP; post-norm.

    ``x = norm0(x + attn(x)); x = norm1(x + cross(x, image)); x = norm2(x + mlp(x))``, the middle
    one only with ``cross``.

    Args:
        config: of the block, post-norm.
        context_dim: channels of the image's rows; None: no attention to an image.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = Attention(config, **factory)
        self.cross: CrossAttention | None = None
        if context_dim is not None:
            self.cross = CrossAttention(config, context_dim=context_dim, **factory)
            self.norm1 = Norm(config.dim, eps=config.norm_eps, **factory)
        self.mlp = MLP(config, **factory)
        self.norm0, self.norm2 = (
            Norm(config.dim, eps=config.norm_eps, **factory) for _ in range(2)
        )
        self.drop = Dropout(config.attn_out_dropout)

    def forward(self, text: PackedBatch, image: PackedBatch | None = None) -> PackedBatch:
        """Rows ``[N, C]`` of B texts -> ``[N, C]``; ``image`` ``[Nk, Ck]`` of as many images."""
        x = text.data
        x = self.norm0(self.drop(self.attn(text)), x)
        if self.cross is not None:
            assert image is not None
            x = self.norm1(self.drop(self.cross(text.with_data(x), image)), x)
        return text.with_data(self.norm2(self.drop(self.mlp(x)), x))


class CrossEncoder(Model):
    """Image encoder, text layers of their own, fused ones, and the matching head on ``[CLS]``.

    Args:
        config: of the system, whose ``teacher_*`` fields and sizes it reads.
    """

    _no_split_modules = ["Block", "FusionBlock"]  # noqa: RUF012

    def __init__(
        self,
        config: CprdConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.image = image_encoder(config, **factory)
        self.embed = word_embeddings(config, **factory)
        block, first = config.text_block(), config.teacher_text_layers
        self.blocks = nn.ModuleList(
            FusionBlock(block, context_dim=config.dim if i >= first else None, **factory)
            for i in range(config.teacher_depth)
        )
        self.match = nn.Linear(config.text_dim, 2, **factory)  # no match, match
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_normal(self, self.config.init_std)

    def images(self, images: Tensor) -> PackedBatch:
        """Rows ``[B * (1 + P), C]`` of images ``[B, C, *image_size]``, for any texts."""
        return self.image(images)

    def texts(self, tokens: PackedBatch) -> PackedBatch:
        """Rows ``[N, C]`` of the ids ``tokens`` ``[N]`` behind the layers that see no image."""
        x = self.embed(tokens)
        for block in self.blocks[: self.config.teacher_text_layers]:
            x = block(x)
        return x

    def fuse(self, text: PackedBatch, image: PackedBatch) -> Tensor:
        """Logit of match minus no match, fp32 ``[B]``, of B rows each of `texts` and `images`."""
        for block in self.blocks[self.config.teacher_text_layers :]:
            text = block(text, image)
        scores = self.match(pool(text, "first")).float()  # [B, 2]
        return scores[:, 1] - scores[:, 0]

    def forward(self, images: Tensor, tokens: PackedBatch) -> Tensor:
        """Logit of match minus no match, pair by pair.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            tokens: ids ``[N]`` of B texts.

        Returns:
            fp32 ``[B]``.
        """
        return self.fuse(self.texts(tokens), self.images(images))

    @torch.no_grad()
    def score(
        self, images: PackedBatch, texts: PackedBatch, image_ids: Tensor, text_ids: Tensor
    ) -> Tensor:
        """`fuse` of chosen pairs, fp32 of the ids' shape, without a gradient.

        Args:
            images, texts: what `images` and `texts` return, each computed once.
            image_ids, text_ids: int64 of one shape: a pair each.

        Returns:
            fp32, of the ids' shape.
        """
        pairs = zip(
            image_ids.flatten().split(self.config.teacher_chunk),
            text_ids.flatten().split(self.config.teacher_chunk),
            strict=True,
        )
        scores = [self.fuse(_chosen(texts, t), _chosen(images, i)) for i, t in pairs]
        return torch.cat(scores).view(image_ids.shape)


def _chosen(batch: PackedBatch, which: Tensor) -> PackedBatch:
    """The sequences ``which`` int64 ``[M]`` of a batch, one after another."""
    lengths = batch.lengths()[which].long()
    ends = lengths.cumsum(0)
    starts = batch.cu_seqlens[which].long() - (ends - lengths)
    rows = torch.arange(int(ends[-1]), device=batch.device)
    rows = rows + starts.repeat_interleave(lengths)
    return PackedBatch.from_lengths(ops.gather_rows(batch.data, rows), lengths)
