"""How to Make Cross Encoder a Good Teacher for Efficient Image-Text Retrieval? (Chen et al., CVPR
2024, arXiv 2407.07479): contrastive partial ranking distillation, CPRD.

A dual encoder (a ViT and BERT, each read at its class row) mines, for every image, the K texts of
the batch that are most similar to it but for its own, and likewise for every text. A frozen
cross-encoder scores these pairs alone. Only the order of its scores is used: each negative that is
still hard to the teacher has to be nearer than all ranked behind it. That ranking loss shares the
temperature of the ordinary contrastive loss it is added to: ``L = L_con + lambda / 2 (L_i2t +
L_t2i)``. To retrieve, the teacher is not needed.

Faithful to the paper: mining by the student, order without scores, the truncated likelihood over
valid negatives with the invalid ones behind them. Left open by the source, and a field of the
config each: K, lambda, which negatives are valid (here: a matching logit of at least `threshold`),
the temperatures, the reduction, the size of the shared space. The teacher's logit, match minus no
match, is sorted in fp32: probabilities would tie near 0 and 1. Momentum keys and a queue, if
wanted, follow ALBEF (`MomentumQueue`) and serve the contrastive loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.data.images import smooth_images
from encfast.layers import Stack
from encfast.layers.base import Model, init_normal
from encfast.models._cprd_config import CprdConfig
from encfast.models._cprd_queue import MomentumQueue
from encfast.models._cprd_teacher import CrossEncoder, image_encoder, word_embeddings
from encfast.packed import PackedBatch
from encfast.registry import ModelInfo, register

__all__ = ["Cprd", "CprdConfig", "CrossEncoder", "Features", "Losses", "MomentumQueue", "PairBatch"]

Scorer = Callable[[Tensor, Tensor], Tensor]  # ids of images and of texts -> the teacher's logits


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Images and their texts, pair by pair."""

    tokens: PackedBatch  # ids [N] of B texts
    images: Tensor  # [B, C, *image_size], floating or uint8
    scores: Tensor | None = None  # [B, B]: the teacher's logit of image i with text j, if known


@dataclass(frozen=True, eq=False)
class Features:
    """Rows ``[B, E]`` of length 1; None for what was not given."""

    texts: Tensor | None = None
    images: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Losses:
    """The total and its terms."""

    total: Tensor
    contrastive: Tensor
    image_to_text: Tensor  # ranking losses, not weighted
    text_to_image: Tensor


for _class in (PairBatch, Features, Losses):
    torch.export.register_dataclass(_class, serialized_type_name=f"{__name__}.{_class.__name__}")


class Cprd(Model):
    """The student: two encoders, a linear layer behind each, a temperature."""

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
        self.text = Stack([config.text_block()] * config.text_depth, **factory)
        self.image_proj = nn.Linear(config.dim, config.embed_dim, **factory)
        self.text_proj = nn.Linear(config.text_dim, config.embed_dim, **factory)
        self.log_scale = nn.Parameter(torch.empty((), **factory))  # log(1 / tau)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        init_normal(self, self.config.init_std)
        nn.init.constant_(self.log_scale, -math.log(self.config.temperature))

    def get_input_embeddings(self) -> nn.Embedding:
        """The word table ``[V, C]``."""
        return self.embed.word

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, E]`` of length 1 from images ``[B, C, *image_size]``, floating or uint8."""
        x = self.image.embedded(images, self.image.all_visible(images))
        first = self.image.norm(self.image.stack(x, rows=x.first_rows()))  # [B, C]
        return F.normalize(self.image_proj(first), dim=-1)

    def encode_texts(self, tokens: PackedBatch) -> Tensor:
        """``[B, E]`` of length 1; ``tokens`` are ids ``[N]`` of B texts, each from ``[CLS]`` on.

        Empty texts all have one feature.
        """
        rows = tokens.first_rows().masked_fill(tokens.lengths() == 0, -1)
        first = self.text(self.embed(tokens), rows=rows)  # [B, C]
        return F.normalize(self.text_proj(first), dim=-1)

    def forward(self, tokens: PackedBatch | None = None, images: Tensor | None = None) -> Features:
        """Features of what is given, texts or images or both.

        Args:
            tokens: ids ``[N]``, as in :meth:`encode_texts`.
            images: ``[B, C, *image_size]``, floating or uint8.

        Returns:
            ``[B, E]`` of length 1 of each, None of what was not given.
        """
        return Features(
            None if tokens is None else self.encode_texts(tokens),
            None if images is None else self.encode_images(images),
        )

    def loss(
        self,
        batch: PairBatch,
        *,
        teacher: CrossEncoder | None = None,
        queue: MomentumQueue | None = None,
    ) -> Losses:
        """Contrastive loss and both ranking losses; 0 for a batch without pairs.

        Args:
            batch: B pairs.
            teacher: scores the mined pairs, 2 B K of them; None: ``batch.scores`` has them.
            queue: momentum keys in place of the batch's own, and more negatives for the
                contrastive loss. The batch's keys are put into it.

        Returns:
            The total and its terms, 0-dim each.

        Raises:
            ValueError: if the batch has not as many images as texts, nobody scores, or the teacher
                is in training mode, where dropout would shuffle its order.
        """
        tokens, images = batch.tokens, batch.images
        if images.shape[0] != tokens.batch_size:
            raise ValueError(
                f"the batch has {images.shape[0]} images and {tokens.batch_size} texts"
            )
        v, t, scale = self.encode_images(images), self.encode_texts(tokens), self.log_scale.exp()
        if images.shape[0] == 0:
            zero = v.sum() + t.sum() + 0 * scale
            return Losses(zero, zero, zero, zero)
        contrastive = self._contrastive(v, t, scale, batch, queue)
        i2t, t2i = self.ranking(v, t, self._scorer(batch, teacher))
        total = contrastive + self.config.rank_weight / 2 * (i2t + t2i)
        return Losses(total, contrastive, i2t, t2i)

    def ranking(self, images: Tensor, texts: Tensor, score: Scorer) -> tuple[Tensor, Tensor]:
        """The ranking losses of images among texts and of texts among images.

        Args:
            images, texts: features ``[B, E]``.
            score: the teacher: int64 ids ``[B, K]`` of images and of texts -> ``[B, K]``.

        Returns:
            Two losses, 0-dim.
        """
        rows = torch.arange(images.shape[0], device=images.device)[:, None]
        return (
            self._ranked(images, texts, lambda c: score(rows.expand_as(c), c)),
            self._ranked(texts, images, lambda c: score(c, rows.expand_as(c))),
        )

    def _ranked(self, queries: Tensor, keys: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        c = self.config
        k = min(c.num_negatives, keys.shape[0] - 1)
        if k < 1:
            return queries.float().sum() * 0
        mined = ops.hard_negatives(queries, keys, k)  # [B, K]
        candidates, valid = ops.teacher_order(mined, score(mined), **c.rule())
        scale = self.log_scale.exp() if c.rank_temperature is None else 1 / c.rank_temperature
        return ops.partial_ranking(
            queries,
            keys,
            logit_scale=scale,
            candidates=candidates,
            valid=valid,
            reduction=c.rank_reduction,
        )

    @staticmethod
    def _scorer(batch: PairBatch, teacher: CrossEncoder | None) -> Scorer:
        if teacher is not None:
            if teacher.training:
                raise ValueError("teacher is in training mode, expected teacher.eval()")
            with torch.no_grad():
                images, texts = teacher.images(batch.images), teacher.texts(batch.tokens)
            return lambda i, t: teacher.score(images, texts, i, t)
        scores = batch.scores
        if scores is None:
            raise ValueError("the loss needs a teacher, or batch.scores of one; both are None")
        return lambda i, t: scores[i, t].float()

    @staticmethod
    def _contrastive(
        v: Tensor, t: Tensor, scale: Tensor, batch: PairBatch, queue: MomentumQueue | None
    ) -> Tensor:
        if queue is None:
            return ops.info_nce(v, t, logit_scale=scale)
        old_images, old_texts = queue.images.clone(), queue.texts.clone()
        v_keys, t_keys = queue.keys(batch.images, batch.tokens)
        queue.push(v_keys, t_keys)
        to_texts = ops.info_nce(
            v, t_keys, logit_scale=scale, negatives=old_texts, directions="rows"
        )
        to_images = ops.info_nce(
            t, v_keys, logit_scale=scale, negatives=old_images, directions="rows"
        )
        return (to_texts + to_images) / 2

    def example_batch(
        self, generator: torch.Generator | None = None, *, lengths: Sequence[int] | None = None
    ) -> PairBatch:
        """Random texts with smooth random images, and a teacher that knows the pairs, on the CPU.

        Args:
            generator: of all random numbers.
            lengths: of the texts; some, one of them 0, if None.

        Returns:
            What ``loss`` takes.
        """
        c, lengths = self.config, [7, 12, 0, 9, 3] if lengths is None else list(lengths)
        ids = torch.randint(1, c.vocab_size, (sum(lengths),), generator=generator)
        tokens = PackedBatch.from_lengths(ids, lengths)
        images = smooth_images(len(lengths), c.channels, c.image_size, generator=generator)
        scores = 2 * torch.randn(len(lengths), len(lengths), generator=generator)
        return PairBatch(tokens, images, scores + 6 * torch.eye(len(lengths)))


VARIANTS = {
    "base": CprdConfig(),
    "tiny": CprdConfig(
        image_size=(16, 24),
        patch_size=(8, 8),
        channels=1,
        pixel_mean=(0.5,),
        pixel_std=(0.5,),
        dim=48,
        depth=2,
        num_heads=4,
        ffn_dim=96,
        vocab_size=200,
        text_dim=32,
        text_depth=2,
        text_heads=2,
        text_ffn_dim=64,
        max_positions=128,
        embed_dim=24,
        num_negatives=2,
        threshold=-1.0,
        teacher_depth=2,
        teacher_text_layers=1,
        teacher_chunk=16,
    ),
}

register(
    "cprd",
    Cprd,
    VARIANTS,
    ModelInfo(
        title="How to Make Cross Encoder a Good Teacher for Efficient Image-Text Retrieval?",
        year=2024,
        paper="arXiv 2407.07479",
        tasks=("image-text-retrieval",),
        inputs="token ids [N] packed of B texts, images [B, C, H, W], the teacher's logits [B, B] "
        "or the teacher",
        ops=("varlen_attn", "add_norm", "patch_gather", "rank_loss", "partial_ranking"),
        fidelity="fp32 features and every gradient within 1e-5 of transformers' ViTModel and "
        "BertModel, the teacher's scores of a BertModel with cross-attention; the ranking loss "
        "equals the paper's double sum in float64",
        deviations=(
            "K, lambda, the rule of validity, temperatures and the reduction are not published: "
            "fields of the config",
        ),
    ),
)
