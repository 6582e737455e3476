"""Config of CPRD: student, teacher and the ranking loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from encfast.config import BlockConfig, nearest
from encfast.layers.patch import IMAGENET_MEAN, IMAGENET_STD

Validity = Literal["threshold", "top_m", "all"]
_REDUCTIONS = ("mean_query", "mean_term", "sum")


@dataclass(frozen=True)
class CprdConfig:
    """ViT-B/16 and BERT-base, teacher and student alike."""

    image_size: tuple[int, int] = (224, 224)  # pixels, height and width
    patch_size: tuple[int, int] = (16, 16)  # pixels
    channels: int = 3
    dim: int = 768  # C of the image encoder
    depth: int = 12  # blocks
    num_heads: int = 12  # H
    ffn_dim: int = 3072
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN  # of uint8 images, pixels in 0..1
    pixel_std: tuple[float, ...] = IMAGENET_STD

    vocab_size: int = 30_522  # V
    text_dim: int = 768  # C of the text encoder
    text_depth: int = 12  # blocks
    text_heads: int = 12
    text_ffn_dim: int = 3072
    text_norm_eps: float = 1e-12
    max_positions: int = 512  # longest text
    num_segments: int = 2  # token types
    dropout: float = 0.1  # on text embeddings and on both branches of a text block
    attn_dropout: float = 0.1  # on attention weights of texts
    pad_id: int | None = 0  # its embedding stays 0
    init_std: float = 0.02

    embed_dim: int = 256  # E, the shared space
    temperature: float = 0.07  # of the contrastive loss at the start; it is learned
    rank_temperature: float | None = None  # of the ranking loss; None: the same tensor
    num_negatives: int = 16  # K, mined for each query; fewer in a batch of fewer pairs
    rank_weight: float = 1.0  # lambda
    validity: Validity = "threshold"  # which negatives are still hard to the teacher
    threshold: float = 0.0  # least matching logit of a valid one: a probability of 1/2
    top_m: int = 8  # or how many of the teacher's first are valid
    rank_reduction: str = "mean_query"  # or "mean_term", "sum"; see ops.partial_ranking

    teacher_depth: int = 12  # text blocks of the teacher
    teacher_text_layers: int = 6  # the first of them, which see no image
    teacher_chunk: int = 64  # pairs scored at once

    def __post_init__(self) -> None:
        if self.validity not in get_args(Validity):
            choices = get_args(Validity)
            raise ValueError(
                f"validity {self.validity!r} is unknown; {nearest(self.validity, choices)}"
            )
        if self.rank_reduction not in _REDUCTIONS:
            raise ValueError(
                f"rank_reduction must be one of {', '.join(_REDUCTIONS)}, "
                f"got {self.rank_reduction!r}"
            )
        for name in ("depth", "text_depth", "embed_dim", "num_negatives", "teacher_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("temperature", "rank_temperature"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        if not 0 <= self.teacher_text_layers < self.teacher_depth:
            raise ValueError(
                f"teacher_text_layers must be in 0..{self.teacher_depth - 1}, "
                f"got {self.teacher_text_layers}"
            )
        self.image_blocks()
        self.text_block()

    def image_blocks(self) -> list[BlockConfig]:
        """Of the ViT's blocks."""
        block = BlockConfig(self.dim, self.num_heads, self.ffn_dim, norm_eps=self.norm_eps)
        return [block] * self.depth

    def text_block(self) -> BlockConfig:
        """Of every text block, the teacher's too."""
        return BlockConfig(
            self.text_dim,
            self.text_heads,
            self.text_ffn_dim,
            norm_position="post",
            norm_eps=self.text_norm_eps,
            attn_dropout=self.attn_dropout,
            attn_out_dropout=self.dropout,
            mlp_dropout=self.dropout,
        )

    def rule(self) -> dict[str, Any]:
        """What tells valid negatives from others, as `ops.teacher_order` takes it."""
        rules: dict[str, dict[str, Any]] = {
            "threshold": {"threshold": self.threshold},
            "top_m": {"top_m": self.top_m},
            "all": {},
        }
        return rules[self.validity]
