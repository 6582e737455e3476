"""Context Autoencoder for Self-Supervised Representation Learning (Chen et al., IJCV 2023, arXiv
2202.03026), with CAE v2 (Zhang et al. 2022, arXiv 2211.09799).

The encoder, a pre-norm ViT with LayerScale, sees a class token and the visible half of an image's
patches, and nothing else. A latent regressor predicts the latents of hidden patches: one shared
mask token at each hidden place cross-attends to the visible latents, without the class token, and
to all queries. A decoder of self-attention blocks turns these predictions, with positions, into
scores over visual tokens. An alignment term draws them to what the encoder itself, without
gradient, says of the hidden patches and a class token. The loss is the cross entropy of the hidden
patches' tokens plus twice the mean squared error of the alignment.

Where the paper is silent its published code decides (Atten4Vis/CAE): queries and keys have no bias
on the keys' side, positions are added before the norms of q and k, not of v, and the residual of a
regressor block goes through its second norm. That code keeps a second encoder whose weights are
overwritten by the first one's after every step: here there is one. Where the decoder's width is not
the encoder's, a linear layer with a norm stands between them, for latents and alignment targets.
The target passes the same DropPath while training. Base and smaller models start from Glorot's
weights, large from BEiT's, which fall with depth (``scaled_init``).

``objective="features"`` is CAE v2: no alignment and no decoder blocks; class token, visible and
hidden patches all predict the features of another encoder (CLIP) up to length, by cosine.

To classify, the encoder reads all patches; the head reads their mean, normed after pooling, or the
class token. Probing freezes the encoder and puts a batch norm without parameters before the head;
an attentive probe pools the patches by one cross-attention with a learned query, without residual.
Published recipes: pre-training with AdamW 1.5e-3 per 2048 images, weight decay 0.05, drop path 0.1,
gradients clipped at 3; fine-tuning with 8e-3 per 1024 and layer-wise decay 0.65 (base).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encfast import losses, ops
from encfast.data.images import ImageBatch, smooth_images
from encfast.data.mask_grids import block_hidden, keep_count
from encfast.layers import BatchNorm, FixedPositions, Norm, PatchEncoder, Stack, pool
from encfast.layers.base import Model, init_xavier
from encfast.layers.dropout import StaticFloat
from encfast.models._cae_config import CaeConfig
from encfast.models._cae_init import init_scaled, init_tokens
from encfast.models._cae_names import published_names
from encfast.models._cae_probe import AttentivePool
from encfast.models._cae_regressor import Regressor
from encfast.models._cae_tokenizer import PatchCodebook
from encfast.packed import PackedBatch
from encfast.patch_mask import PatchMask
from encfast.registry import ModelInfo, register
from encfast.weights import Tied

__all__ = ["Cae", "CaeConfig", "Losses", "PatchCodebook"]

_HEAD_STD = 2e-5  # of the classifier, in the published fine-tuning


@dataclass(frozen=True, eq=False)
class Losses:
    """The total, and the task's terms of it before they are weighted."""

    total: Tensor
    tokens: Tensor | None = None
    alignment: Tensor | None = None
    features: Tensor | None = None
    classification: Tensor | None = None


torch.export.register_dataclass(Losses, serialized_type_name=f"{__name__}.Losses")


class Decoder(nn.Module):
    """From predicted latents to what is predicted of a patch: blocks (none in v2), norm, head."""

    def __init__(self, config: CaeConfig, **factory: Any) -> None:
        super().__init__()
        tokens = config.objective == "tokens"
        self.stack = Stack(config.decoder_blocks(config.decoder_depth), **factory)
        self.norm = Norm(config.decoder_dim, eps=config.norm_eps, **factory)
        self.head = nn.Linear(
            config.decoder_dim, config.vocab_size if tokens else config.feature_dim, **factory
        )

    def forward(self, latents: PackedBatch) -> Tensor:
        """``[M, Cd]`` -> ``[M, V]``."""
        return self.predict(self.stack(latents).data)

    def predict(self, rows: Tensor) -> Tensor:
        """``[M, Cd]`` behind the blocks -> ``[M, V]``."""
        return self.head(self.norm(rows))


class Cae(Model):
    """The encoder, and what one task puts behind it."""

    # RegressorBlock holds cross-attention as Block holds self-attention.
    _no_split_modules: ClassVar[list[str]] = ["Block", "RegressorBlock"]
    alignment_weight = StaticFloat()

    def __init__(
        self,
        config: CaeConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.task = config, config.task
        self.alignment_weight = config.alignment_weight
        self.encoder = PatchEncoder(
            config.image_size,
            config.patch_size,
            config.encoder_blocks(),
            channels=config.channels,
            mean=config.pixel_mean,
            std=config.pixel_std,
            **factory,
        )
        if config.task == "masked-image":
            self._build_pretraining(config, factory)
        else:
            self._build_classifier(config, factory)
        self.reset_parameters()

    def _build_pretraining(self, c: CaeConfig, factory: dict[str, Any]) -> None:
        self.project: nn.Module = nn.Identity()
        if c.decoder_dim != c.dim:
            self.project = nn.Sequential(
                nn.Linear(c.dim, c.decoder_dim, **factory),
                Norm(c.decoder_dim, eps=c.norm_eps, **factory),
            )
        self.positions = FixedPositions(
            c.grid, c.decoder_dim, class_token=True, device=factory["device"]
        )
        self.regressor = Regressor(
            c.decoder_blocks(c.regressor_depth), final_norm=c.objective == "tokens", **factory
        )
        self.decoder = Decoder(c, **factory)

    def _build_classifier(self, c: CaeConfig, factory: dict[str, Any]) -> None:
        self.pool: nn.Module | None = None
        if c.pooling == "attentive":
            self.pool = AttentivePool(c.dim, c.num_heads, norm_eps=c.norm_eps, **factory)
        self.head_norm: nn.Module = nn.Identity()
        if c.task == "probing":
            self.encoder.requires_grad_(False)
            self.head_norm = BatchNorm(c.dim, eps=1e-6, affine=False, **factory)
        self.head = nn.Linear(c.dim, c.num_labels, **factory)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        if self.config.scaled_init:
            init_scaled(self)
        else:
            init_xavier(self)
        init_tokens(self)
        if self.task != "masked-image":
            nn.init.normal_(self.head.weight, std=_HEAD_STD)

    def load_encoder(self, pretrained: Mapping[str, Tensor]) -> None:
        """Takes over the encoder of a pre-trained model; the rest of that is ignored.

        Args:
            pretrained: its ``state_dict()``.

        Raises:
            RuntimeError: if it holds no encoder, or another one.
        """
        prefix = "encoder."
        own = {n.removeprefix(prefix): t for n, t in pretrained.items() if n.startswith(prefix)}
        self.encoder.load_state_dict(own)

    def draw_mask(self, batch: int, *, generator: torch.Generator | None = None) -> PatchMask:
        """BEiT's rectangles until exactly ``mask_ratio`` of each image is hidden; for the border.

        Args:
            batch: B.
            generator: of the masks' seeds, on the CPU; see :func:`encfast.data.block_hidden`.

        Returns:
            What is visible of ``batch`` images.
        """
        c = self.config
        keep = keep_count(c.num_patches, c.mask_ratio)
        seeds = torch.randint(2**62, (batch,), generator=generator).tolist()
        hidden = block_hidden(c.grid, keep, seeds=seeds, min_patches=c.min_block)
        mask = PatchMask.from_hidden(torch.from_numpy(hidden), keep)
        return mask.to(self.encoder.embed.proj.weight.device)

    def encode(self, images: Tensor, mask: PatchMask | None = None) -> PackedBatch:
        """The encoder's rows, ``[B + K, C]``: class row, then the visible patches.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: everything.

        Returns:
            A batch with one sequence per image.

        Raises:
            ValueError: for images of another size, or a mask of another number of patches.
        """
        return self.encoder(images, mask)

    def regress(self, images: Tensor, mask: PatchMask) -> tuple[Tensor, PackedBatch]:
        """What is said of visible patches, and predicted of hidden ones.

        Returns:
            The encoder's rows at the decoder's width ``[B + K, Cd]``, and latents ``[M, Cd]``.

        Raises:
            ValueError: as :meth:`encode`.
        """
        encoded = self.project(self.encode(images, mask).data)  # [B + K, Cd]
        positions = self._hidden_positions(mask, encoded.dtype)
        return encoded, self.regressor(encoded, mask, positions, self.positions())

    def _hidden_positions(self, mask: PatchMask, dtype: torch.dtype) -> Tensor:
        """``[M, Cd]``; row 0 of the table is the class token's."""
        return ops.gather_rows(self.positions(), mask.patches_of(mask.hidden) + 1).to(dtype)

    @torch.no_grad()
    def latent_target(self, images: Tensor, mask: PatchMask) -> Tensor:
        """``[M, Cd]``: what the encoder says of hidden patches when it sees a class token and them.

        Raises:
            ValueError: as :meth:`encode`.
        """
        hidden = mask.complement()
        rows = self.project(self.encode(images, hidden).data)  # [B + M, Cd]
        return ops.gather_rows(rows, hidden.visible_rows())

    def decode(self, encoded: Tensor, latents: PackedBatch, mask: PatchMask) -> Tensor:
        """What :meth:`forward` returns, from ``encoded`` and ``latents`` of :meth:`regress`.

        ``mask`` is the one they were made with.
        """
        if self.config.objective == "tokens":
            positions = self._hidden_positions(mask, latents.data.dtype)
            return self.decoder(latents.with_data(latents.data + positions))  # [M, V]
        rows = self.decoder.predict(torch.cat((encoded, latents.data)))  # [B * (1 + P), D]
        hidden = torch.arange(mask.hidden.shape[0], device=rows.device) + encoded.shape[0]
        # Visible ones stand first; a plan of all rows has -1 where hidden ones belong.
        index = mask.full_plan().index.scatter(0, mask.full_rows(mask.hidden), hidden)
        return ops.gather_rows(rows, index)

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """What the task predicts.

        Args:
            images: ``[B, C, *image_size]``, floating or uint8.
            mask: what is visible; None: drawn to pre-train, everything to classify.

        Returns:
            Scores ``[M, V]`` of the tokens of hidden patches; features ``[B * (1 + P), D]`` of the
            class token and all patches in their order, visible ones too; or scores ``[B, K]``.

        Raises:
            ValueError: as :meth:`encode`.
        """
        if self.task != "masked-image":
            return self._classify(images, mask)
        mask = self.draw_mask(images.shape[0]) if mask is None else mask
        encoded, latents = self.regress(images, mask)
        return self.decode(encoded, latents, mask)

    def _classify(self, images: Tensor, mask: PatchMask | None) -> Tensor:
        c, encoder = self.config, self.encoder
        mask = encoder.all_visible(images) if mask is None else mask
        x = encoder.embedded(images, mask)
        if c.pooling == "class":
            pooled = encoder.norm(encoder.stack(x, rows=x.first_rows()))  # [B, C]
        else:
            rows = encoder.stack(x).data  # [B + K, C]
            patches = mask.visible_batch(ops.gather_rows(rows, mask.visible_rows()))  # [K, C]
            if self.pool is None:
                pooled = encoder.norm(pool(patches, "mean"))
            else:
                pooled = self.pool(patches.with_data(encoder.norm(patches.data)))
        return self.head(self.head_norm(pooled))  # [B, K]

    def loss(self, batch: ImageBatch) -> Losses:
        """Tokens and alignment, features, or labels, as the task has it.

        ``batch.targets`` are int64 ``[M]``, the ids of hidden patches; or floating
        ``[B * (1 + P), D]``, features of class token and patches as CLIP's ViT returns them.

        Raises:
            ValueError: if the batch lacks what the task needs.
        """
        needed = ("mask", "targets") if self.task == "masked-image" else ("labels",)
        for name in needed:
            if getattr(batch, name) is None:
                raise ValueError(
                    f"the loss of task {self.task!r} needs batch.{name}, which is None"
                )
        if self.task != "masked-image":
            loss = losses.cross_entropy(self(batch.images, batch.mask), batch.labels)
            return Losses(loss, classification=loss)
        encoded, latents = self.regress(batch.images, batch.mask)
        predicted = self.decode(encoded, latents, batch.mask)
        if self.config.objective == "features":
            loss = losses.scaled_cosine_error(predicted, batch.targets, beta=1.0)
            return Losses(loss, features=loss)
        tokens = losses.cross_entropy(predicted, batch.targets)
        target = self.latent_target(batch.images, batch.mask)
        alignment = losses.mean_squared_error(latents.data, target)
        total = tokens + self.alignment_weight * alignment
        return Losses(total, tokens=tokens, alignment=alignment)

    def example_batch(
        self, generator: torch.Generator | None = None, *, batch_size: int = 4
    ) -> ImageBatch:
        """``batch_size`` smooth random images with what the task predicts of them, on the CPU.

        Visual tokens are those of a random codebook; features are random. All numbers come from
        ``generator``.
        """
        c, draw = self.config, {"generator": generator}
        images = smooth_images(batch_size, c.channels, c.image_size, generator=generator)
        if c.task != "masked-image":
            labels = torch.randint(c.num_labels, (batch_size,), **draw)
            return ImageBatch(images, labels=labels)
        mask = self.draw_mask(batch_size, generator=generator).to("cpu")
        if c.objective == "features":
            features = torch.randn(batch_size * (1 + c.num_patches), c.feature_dim, **draw)
            return ImageBatch(images, mask, features)
        pixels = ops.gather_patches(images, mask.hidden, c.patch_size)
        codebook = PatchCodebook.random(c.vocab_size, pixels.shape[1], generator=generator)
        return ImageBatch(images, mask, codebook(pixels))

    def reference_names(self) -> list[Tied]:
        """What our tensors are called in Atten4Vis/CAE.

        Its pre-training checkpoints hold ``alignment_encoder.*`` as well, a copy of the encoder,
        which :func:`encfast.weights.load` is to ignore.

        Raises:
            ValueError: for a model that does not pre-train.
        """
        if self.task != "masked-image":
            raise ValueError(f"published names are those of task 'masked-image', not {self.task!r}")
        return published_names(self.config)


_SMALL = {"dim": 384, "ffn_dim": 1536}
_TI = {"dim": 192, "ffn_dim": 768}  # the paper's tiny, by DeiT's short name
_V2 = {"objective": "features", "decoder_depth": 0}

VARIANTS = {
    "ti": CaeConfig(**_TI),
    "small": CaeConfig(**_SMALL),
    "base": CaeConfig(),
    "large": CaeConfig(
        dim=1024,
        depth=24,
        num_heads=16,
        ffn_dim=4096,
        layer_scale=1e-5,
        decoder_dim=1024,
        decoder_heads=16,
        decoder_ffn_dim=4096,
        scaled_init=True,
    ),
    "ti-v2": CaeConfig(**_TI, **_V2),
    "small-v2": CaeConfig(**_SMALL, **_V2),
    "base-v2": CaeConfig(**_V2),
    "tiny": CaeConfig(
        image_size=(24, 16),
        patch_size=(4, 4),
        dim=48,
        depth=2,
        num_heads=4,
        ffn_dim=96,
        min_block=4,
        vocab_size=64,
        feature_dim=24,
        decoder_dim=32,
        decoder_heads=2,
        decoder_ffn_dim=64,
        regressor_depth=1,
        decoder_depth=1,
        num_labels=10,
        drop_path=0.0,
    ),
}

register(
    "cae",
    Cae,
    VARIANTS,
    ModelInfo(
        title="Context Autoencoder for Self-Supervised Representation Learning",
        year=2023,
        paper="arXiv 2202.03026",
        tasks=("masked-image", "classification", "probing"),
        inputs="images [B, C, H, W], floating or uint8; mask: PatchMask of the visible patches",
        ops=("patch_gather", "varlen_attn", "pad", "add_norm"),
        fidelity=(
            "fp32 losses and every gradient within 1e-5 of a dense eager re-implementation of the "
            "published code, the encoder within 1e-5 of transformers' BeitModel"
        ),
        deviations=(
            "one encoder serves as its own alignment target, which gives the published code's "
            "numbers: its copy shares the encoder's memory from the second step on",
            "the class token of CAE v2 predicts features too, as in the published code",
            "visual tokens come with the batch; a frozen codebook of patches stands in for "
            "DALL-E's dVAE in examples",
        ),
    ),
)
