"""uCLIP: Parameter-Efficient Multilingual Extension of Vision-Language Models with Unpaired Data
(AAAI 2026, arXiv 2511.13036).

Two small heads put the features of a frozen CLIP and of a frozen multilingual sentence encoder in
one space. They see English sentences alone: each is encoded by both, and retrieves by a soft search
a pseudo image among features of unpaired images and a pseudo sentence among those of unpaired
sentences of other languages (:class:`MemoryBanks`). Noise, heads and losses as in the published
code (dinyudin203/uCLIP); banks and retrieval need no head, so that what a sentence retrieves is
computed once and kept.

At test time an image goes through the head of CLIP, a sentence of any language through the other;
banks, noise and CLIP's text encoder are not needed.

The published code gathers the distances of the intra loss, not the contrastive ones, over
processes; here both are of the rows at hand. A batch of one row, which has no variance, is
normalised by the running averages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import ops
from encfast.layers import BatchNorm
from encfast.layers.base import Model
from encfast.layers.dropout import StaticFloat
from encfast.models._uclip_retrieval import Anchors, MemoryBanks, soft_retrieve
from encfast.registry import ModelInfo, register

__all__ = ["Anchors", "Losses", "MemoryBanks", "Uclip", "UclipConfig", "soft_retrieve"]


@dataclass(frozen=True)
class UclipConfig:
    """mpnet and OpenCLIP's ViT-B-32, the published default."""

    clip_dim: int = 512  # D, of CLIP's features
    multilingual_dim: int = 768  # E, of the sentence encoder's
    embed_dim: int = 512  # of the common space

    temperature: float = 0.01  # of the contrastive losses, fixed
    noise: float = 0.004  # variance of each coordinate of what the heads read in training
    pivot_weight: float = 1.0  # of English by either encoder (L_et); 0 leaves the loss out
    retrieved_weight: float = 1.0  # of pseudo sentences and images (L_uv)
    intra_weight: float = 0.1  # of the distances within a modality

    def __post_init__(self) -> None:
        for name in ("clip_dim", "multilingual_dim", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        for name in ("noise", "pivot_weight", "retrieved_weight", "intra_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and its terms before their weights."""

    total: Tensor
    pivot: Tensor  # L_et
    retrieved: Tensor  # L_uv
    intra: Tensor


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class ProjectionHead(nn.Module):
    """Linear, batch norm, ReLU, Linear; through twice the channels."""

    def __init__(self, dim: int, embed_dim: int, **factory: Any) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim, **factory)
        self.norm = BatchNorm(2 * dim, **factory)
        self.down = nn.Linear(2 * dim, embed_dim, **factory)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for layer in (self.up, self.norm, self.down):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` -> ``[B, embed_dim]`` of length 1."""
        return F.normalize(self.down(F.relu(self._norm(self.up(x)))), dim=-1)

    def _norm(self, x: Tensor) -> Tensor:
        n = self.norm
        if self.training and x.shape[0] == 1:
            averages = n.running_mean, n.running_var
            return F.batch_norm(x, *averages, n.weight, n.bias, eps=n.eps)
        return n(x)


class Uclip(Model):
    """A head behind the multilingual encoder, another behind both of CLIP's."""

    _no_split_modules = ["ProjectionHead"]  # noqa: RUF012
    temperature = StaticFloat()
    noise_std = StaticFloat()

    def __init__(
        self,
        config: UclipConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.temperature = config, config.temperature
        self.noise_std = math.sqrt(config.noise)
        self.weights = tuple(
            repr(float(w))  # text: see layers.dropout.StaticFloat
            for w in (config.pivot_weight, config.retrieved_weight, config.intra_weight)
        )
        self.multilingual = ProjectionHead(config.multilingual_dim, config.embed_dim, **factory)
        self.clip = ProjectionHead(config.clip_dim, config.embed_dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for head in (self.multilingual, self.clip):
            head.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of images by CLIP -> ``[B, embed_dim]``, as :meth:`embed_images`."""
        return self.embed_images(images)

    def embed_images(self, features: Tensor) -> Tensor:
        """CLIP's features ``[B, D]`` -> ``[B, embed_dim]`` of length 1, without noise."""
        return self.clip(F.normalize(features, dim=-1))

    def embed_sentences(self, features: Tensor) -> Tensor:
        """Sentences' ``features`` ``[B, E]`` -> ``[B, embed_dim]`` of length 1, without noise."""
        return self.multilingual(F.normalize(features, dim=-1))

    def perturbed(self, features: Tensor) -> Tensor:
        """``features`` ``[B, D]`` with fresh noise while training, of length 1."""
        if self.training and self.noise_std:
            features = features + self.noise_std * torch.randn_like(features)
        return F.normalize(features, dim=-1)

    def loss(self, batch: Anchors) -> Losses:
        """Both contrastive losses and the distances; 0 for a batch without rows.

        Each head is called for its two kinds of features in turn, each normalised over its own
        rows; the running averages mix both.

        Raises:
            ValueError: if the features do not have the same number of rows.
        """
        # One by one: a set of sizes would compile a graph for each of them.
        rows = [getattr(batch, name).shape[0] for name in _FEATURES]
        if any(n != rows[0] for n in rows):
            raise ValueError(f"the features have {rows} rows, expected one number")
        e, u = (self.multilingual(self.perturbed(x)) for x in (batch.multilingual, batch.sentences))
        t, v = (self.clip(self.perturbed(x)) for x in (batch.clip, batch.images))
        if e.shape[0] == 0:
            nothing = (e + u + t + v).sum().float()
            return Losses(nothing, nothing, nothing, nothing)
        scale = 1.0 / self.temperature
        pivot = ops.info_nce(e, t, logit_scale=scale)
        retrieved = ops.info_nce(u, v, logit_scale=scale)
        apart = F.pairwise_distance(u.float(), e.float())
        apart = apart + F.pairwise_distance(t.float(), v.float())
        intra = apart.mean() / 2
        terms = pivot, retrieved, intra
        parts = [float(w) * term for w, term in zip(self.weights, terms, strict=True) if float(w)]
        return Losses(torch.stack(parts).sum() if parts else 0.0 * pivot, *terms)

    def example_batch(
        self, generator: torch.Generator | None = None, *, batch_size: int = 4
    ) -> Anchors:
        """Features of ``batch_size`` random sentences that retrieve from random banks, on the CPU.

        All numbers are drawn from ``generator``.
        """
        c = self.config

        def drawn(count: int, dim: int) -> Tensor:
            return F.normalize(torch.randn(count, dim, generator=generator), dim=-1)

        dtype = self.clip.up.weight.dtype
        banks = MemoryBanks(drawn(64, c.clip_dim), drawn(64, c.multilingual_dim))
        made = banks.anchors(drawn(batch_size, c.clip_dim), drawn(batch_size, c.multilingual_dim))
        return Anchors(*(getattr(made, name).to(dtype) for name in _FEATURES))


_FEATURES = ("clip", "multilingual", "images", "sentences")
_BASE = UclipConfig()
VARIANTS = {
    "mpnet-clip": _BASE,
    "minilm-clip": replace(_BASE, multilingual_dim=384),
    "mpnet-siglip2": replace(_BASE, clip_dim=768),
    "minilm-siglip2": replace(_BASE, multilingual_dim=384, clip_dim=768),
    "tiny": UclipConfig(clip_dim=24, multilingual_dim=16, embed_dim=20),
}

register(
    "uclip",
    Uclip,
    VARIANTS,
    ModelInfo(
        title=(
            "uCLIP: Parameter-Efficient Multilingual Extension of Vision-Language Models with "
            "Unpaired Data"
        ),
        year=2026,
        paper="arXiv 2511.13036",
        tasks=("image-text-retrieval",),
        inputs="features [B, D] of images by CLIP, [B, E] of sentences by a multilingual encoder",
        ops=("rank_loss",),
        fidelity=(
            "losses within 1e-5 of open_clip's ClipLoss at logit_scale 100 and of "
            "torch.nn.functional.pairwise_distance; retrieval within 1e-5 of the dense softmax; "
            "the published numbers of parameters"
        ),
        deviations=(
            "over several processes every loss is of the own rows",
            "a batch of one row is normalised by the running averages",
        ),
    ),
)
