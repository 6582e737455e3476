"""Investigating the Benefits of Projection Head for Representation Learning (Xue et al., ICLR
2024, arXiv 2403.11391).

An encoder turns an image into z, a head z into u; the loss sees u, and what comes after training
uses z. The paper asks why z transfers better: layers weigh features more and more unequally, so
that z still holds what u has lost. Its own head has no parameter: ``u_i = z_i kappa^-i``. Here are
the heads {none, linear, MLP of 2 and 3 layers, identity with a symmetric ReLU, fixed reweighting},
the objectives {SimCLR, SupCon, supervised, spectral contrastive}, probes on both representations,
and the linear theory as functions (:func:`balanced_net`, :func:`descend`, :func:`feature_moments`).

Heads, SupCon and kappa follow a co-author's code (github.com/jiayini1119/projection-head-
experiments); sizes on CIFAR a third party's reproduction. Published recipes: SimCLR with Adam 1e-3,
weight decay 1e-6, 512 images, 400 epochs; SupCon with SGD 0.1; supervised with SGD 0.1, weight
decay 5e-4, 128 images, 200 epochs. "Destroyed" in the theory is read as drawn anew, which gives the
published gain ``(1 - alpha) / phi`` of a feature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast import contrastive, losses
from encfast.config import nearest
from encfast.data.images import ImageBatch, smooth_images
from encfast.layers.base import Model
from encfast.layers.dropout import StaticFloat
from encfast.models._projection_head_nets import FlatMLP, Head, ResNet, SymmetricReLU, make_head
from encfast.models._projection_head_study import (
    balanced_net,
    blend_digits,
    descend,
    feature_moments,
    probe_accuracy,
    spectral_contrastive_loss,
)
from encfast.registry import ModelInfo, register

__all__ = [
    "Losses",
    "ProjectionHead",
    "ProjectionHeadConfig",
    "Representations",
    "SymmetricReLU",
    "balanced_net",
    "blend_digits",
    "descend",
    "feature_moments",
    "probe_accuracy",
    "spectral_contrastive_loss",
]

Objective = Literal["simclr", "supcon", "supervised", "spectral"]


@dataclass(frozen=True)
class ProjectionHeadConfig:
    """SimCLR on CIFAR with a residual network of p = 512 and the MLP head."""

    encoder: Literal["resnet", "mlp"] = "resnet"
    image_size: tuple[int, ...] = (3, 32, 32)  # channels, height, width; any for "mlp"
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the stages, or of the MLP's layers; last: p
    blocks: tuple[int, ...] = (2, 2, 2, 2)  # of each stage; resnet
    bottleneck: bool = False  # p is 4 times the last width
    small_images: bool = True  # a 3x3 stem without pooling

    head: Head = "mlp"
    head_hidden: int = 512
    head_out: int = 128  # of "linear" and MLPs; the other heads keep p
    kappa: float = 1.05  # of "reweight"; 1.5 for SupCon, 1.2 supervised

    objective: Objective = "simclr"
    temperature: float = 0.5
    num_labels: int = 10  # K, supervised

    def __post_init__(self) -> None:
        for name, kinds in (
            ("encoder", ("resnet", "mlp")),
            ("head", get_args(Head)),
            ("objective", get_args(Objective)),
        ):
            if getattr(self, name) not in kinds:
                value = getattr(self, name)
                raise ValueError(f"{name} {value!r} is unknown; {nearest(value, kinds)}")
        if self.encoder == "resnet" and len(self.widths) != len(self.blocks):
            raise ValueError(f"widths has {len(self.widths)} stages, blocks {len(self.blocks)}")
        if not self.kappa > 1:
            raise ValueError(f"kappa must be > 1, got {self.kappa}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @property
    def dim(self) -> int:
        """p, channels of z."""
        return self.widths[-1] * (4 if self.bottleneck and self.encoder == "resnet" else 1)

    @property
    def out_dim(self) -> int:
        """Channels of u."""
        return self.head_out if self.head in ("linear", "mlp", "mlp3") else self.dim


@dataclass(frozen=True, eq=False)
class Representations:
    """Of the same images, before and behind the head."""

    before: Tensor  # z [B, p]
    after: Tensor  # u [B, q]


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, which is the objective's only term."""

    total: Tensor
    contrastive: Tensor | None = None
    classification: Tensor | None = None


for _dataclass in (Representations, Losses):
    torch.export.register_dataclass(
        _dataclass, serialized_type_name=f"{__name__}.{_dataclass.__name__}"
    )


class ProjectionHead(Model):
    """An encoder, a head, and for the supervised objective a classifier behind it."""

    _no_split_modules: ClassVar[list[str]] = ["ResidualBlock"]
    logit_scale = StaticFloat()  # one over the temperature

    def __init__(
        self,
        config: ProjectionHeadConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.logit_scale = config, 1 / config.temperature
        self.encoder: nn.Module
        if config.encoder == "mlp":
            self.encoder = FlatMLP([math.prod(config.image_size), *config.widths], **factory)
        else:
            self.encoder = ResNet(
                config.image_size[0],
                config.widths,
                config.blocks,
                bottleneck=config.bottleneck,
                small_images=config.small_images,
                **factory,
            )
        self.head = make_head(
            config.head,
            config.dim,
            config.head_hidden,
            config.head_out,
            config.kappa,
            **factory,
        )
        self.classifier: nn.Linear | None = None
        if config.objective == "supervised":
            self.classifier = nn.Linear(config.out_dim, config.num_labels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as PyTorch's layers do; "symmetric" starts as the identity."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if self.config.head == "symmetric":
            for linear in (self.head[0], self.head[2]):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor, use_head: bool | None = None) -> Representations | Tensor:
        """Both representations, or with ``use_head`` given one of them.

        Args:
            images: ``[B, *image_size]``, floating.
            use_head: True for u ``[B, q]``, False for z ``[B, p]``, what is kept after training.

        Returns:
            Both, or the one that ``use_head`` names.

        Raises:
            ValueError: for images of another size.
        """
        if tuple(images.shape[1:]) != self.config.image_size:
            raise ValueError(
                f"images has shape {tuple(images.shape)}, expected [B, *{self.config.image_size}]"
            )
        weight = next(self.encoder.parameters())
        z = self.encoder(images.to(weight.dtype))  # [B, p]
        if use_head is None:
            return Representations(z, self.head(z))
        return self.head(z) if use_head else z

    def loss(self, batch: ImageBatch) -> Losses:
        """The objective's loss; 0 of an empty batch.

        Args:
            batch: ``images``, one view of each; ``targets``, another view of the same shape
                (SimCLR and spectral need it, SupCon takes it); ``labels`` (SupCon, supervised).

        Returns:
            The total and its term, 0-dim each.

        Raises:
            ValueError: if the batch lacks what the objective needs.
        """
        objective = self.config.objective
        views = [batch.images] + ([] if batch.targets is None else [batch.targets])
        if objective in ("simclr", "spectral") and len(views) < 2:
            raise ValueError(f"objective {objective!r} needs batch.targets, another view")
        if objective in ("supcon", "supervised") and batch.labels is None:
            raise ValueError(f"objective {objective!r} needs batch.labels")
        if objective == "supervised":
            assert self.classifier is not None
            logits = self.classifier(self(batch.images, True))  # [B, K]
            loss = losses.cross_entropy(logits, batch.labels)
            return Losses(loss, classification=loss)
        u = self(torch.cat(views), True)  # [views * B, q]
        loss = self._contrast(u, len(views), batch.labels) if len(u) else u.sum()
        return Losses(loss, contrastive=loss)

    def _contrast(self, u: Tensor, views: int, labels: Tensor | None) -> Tensor:
        if self.config.objective == "spectral":
            return spectral_contrastive_loss(*u.chunk(2))
        scale, u = self.logit_scale, F.normalize(u, dim=1)
        if self.config.objective == "simclr":
            return contrastive.nt_xent(*u.chunk(2), logit_scale=scale)
        assert labels is not None
        return contrastive.sup_con(u, labels.repeat(views), logit_scale=scale)

    def example_batch(
        self, generator: torch.Generator | None = None, *, batch_size: int = 4
    ) -> ImageBatch:
        """``batch_size`` smooth random images, a noisy second view of each, and labels, on the CPU.

        All numbers are drawn from ``generator``.
        """
        c, *size = self.config.image_size
        images = smooth_images(batch_size, c, tuple(size) or (1,), generator=generator)
        images = images.view(batch_size, *self.config.image_size)
        noise = torch.randn(images.shape, generator=generator)
        labels = torch.randint(self.config.num_labels, (batch_size,), generator=generator)
        return ImageBatch(images, targets=images + 0.1 * noise, labels=labels)


_RESNET50: dict[str, Any] = {
    "image_size": (3, 224, 224),
    "blocks": (3, 4, 6, 3),
    "bottleneck": True,
    "small_images": False,
    "head_hidden": 2048,
}

VARIANTS = {
    "simclr-cifar": ProjectionHeadConfig(),
    "supcon-cifar": ProjectionHeadConfig(objective="supcon", kappa=1.5),
    "supervised-cifar": ProjectionHeadConfig(objective="supervised", kappa=1.2),
    "supcon-resnet50": ProjectionHeadConfig(objective="supcon", **_RESNET50),
    "tiny": ProjectionHeadConfig(
        image_size=(3, 8, 8), widths=(8, 16), blocks=(1, 1), head_hidden=16, head_out=8
    ),
}

register(
    "projection_head",
    ProjectionHead,
    VARIANTS,
    ModelInfo(
        title="Investigating the Benefits of Projection Head for Representation Learning",
        year=2024,
        paper="arXiv 2403.11391",
        tasks=("contrastive", "classification"),
        inputs="images [B, C, H, W], floating",
        ops=("rank_loss",),
        fidelity=(
            "losses equal to float64 formulas over all pairs; the identities of the linear theory "
            "to 1e-6; fixed head equal to kappa^-i"
        ),
        deviations=("no spurious-correlation data sets and no re-weighted last layer (DFR)",),
    ),
)
