"""What VL-JEPA's four towers are made of: one frozen config each, published sizes as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from encfast.config import BlockConfig, RopeScaling, nearest
from encfast.layers.patch import IMAGENET_MEAN, IMAGENET_STD

Objective = Literal["infonce", "cosine", "l1", "l2"]


@dataclass(frozen=True)
class VisionConfig:
    """X: V-JEPA 2 ViT-L/16 (arXiv 2506.09985), without class token."""

    image_size: tuple[int, int] = (256, 256)  # pixels, height and width
    patch_size: tuple[int, int, int] = (2, 16, 16)  # frames, and pixels along height and width
    channels: int = 3
    dim: int = 1024
    depth: int = 24  # blocks
    num_heads: int = 16
    ffn_dim: int = 4096
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN  # of uint8 frames, pixels in 0..1
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.patch_size) != 3 or any(
            n < p or n % p for n, p in zip(self.image_size, self.patch_size[1:], strict=True)
        ):
            raise ValueError(
                f"image_size is {self.image_size}, expected multiples of {self.patch_size[1:]}"
            )
        if self.block().head_size < 6:
            raise ValueError(
                f"heads have {self.block().head_size} channels, expected 6 at least: 2 for each of "
                "time, height and width"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Tubelets along height and width."""
        (height, width), (_, p, q) = self.image_size, self.patch_size
        return height // p, width // q

    @property
    def num_patches(self) -> int:
        """P, tubelets of one time index."""
        return math.prod(self.grid)

    def block(self) -> BlockConfig:
        """Of every block; positions are its attention's affair."""
        return BlockConfig(self.dim, self.num_heads, self.ffn_dim, norm_eps=self.norm_eps)


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 3.2 1B's layers and token table: the last 8 of its 16 are the predictor."""

    depth: int = 8  # layers
    dim: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    ffn_dim: int = 8192  # of each half of the GLU
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    vocab_size: int = 128_256

    def block(self, *, causal: bool) -> BlockConfig:
        """The config of every layer, ``causal`` or not."""
        return BlockConfig(
            self.dim,
            self.num_heads,
            self.ffn_dim,
            num_kv_heads=self.num_kv_heads,
            norm="rmsnorm",
            norm_eps=self.norm_eps,
            causal=causal,
            position="rope",
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            qkv_bias=False,
            out_bias=False,
            glu=True,
            activation="silu",
            up_bias=False,
            down_bias=False,
        )


@dataclass(frozen=True)
class TextConfig:
    """Y: EmbeddingGemma 300M (arXiv 2509.20354), Gemma 3's layers with attention both ways."""

    vocab_size: int = 262_144
    dim: int = 768
    depth: int = 24  # layers
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 256
    ffn_dim: int = 1152  # of each half of the GLU
    half_window: int = 256  # tokens on each side that a sliding layer sees
    full_every: int = 6  # layer l sees everything if l + 1 is a multiple
    rope_theta_full: float = 1_000_000.0
    rope_theta_sliding: float = 10_000.0
    norm_eps: float = 1e-6

    def block(self, layer: int) -> BlockConfig:
        """The layer at depth ``layer``."""
        full = (layer + 1) % self.full_every == 0
        return BlockConfig(
            self.dim,
            self.num_heads,
            self.ffn_dim,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_position="sandwich",
            norm="rmsnorm",
            norm_eps=self.norm_eps,
            norm_unit_offset=True,
            norm_precision="fp32",
            qk_norm=True,
            window=(-1, -1) if full else (self.half_window, self.half_window),
            position="rope",
            rope_theta=self.rope_theta_full if full else self.rope_theta_sliding,
            qkv_bias=False,
            out_bias=False,
            glu=True,
            activation="gelu_tanh",
            up_bias=False,
            down_bias=False,
        )


@dataclass(frozen=True)
class VlJepaConfig:
    """VL-JEPA as published; frames per clip are the batch's affair."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    predictor: LlamaConfig = field(default_factory=LlamaConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 1536  # E, of the space in which the loss lives
    causal: bool = False  # the predictor's mask; True is the paper's ablation

    objective: Objective = "infonce"
    temperature: float = 0.07  # at the start, learned; infonce only
    text_lr_ratio: float = 0.05  # rate of Y's parameters over that of the others

    decoder_depth: int = 4  # causal Llama layers over the predictor's token table; 0: no decoder
    prefix: int = 4  # rows that an embedding becomes in front of the decoder's tokens
    bos_id: int = 128_000
    eos_id: int = 128_001

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"objective {self.objective!r} is unknown; "
                f"{nearest(self.objective, get_args(Objective))}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.text_lr_ratio < math.inf:
            raise ValueError(f"text_lr_ratio must be >= 0 and finite, got {self.text_lr_ratio}")
        if self.decoder_depth < 0 or self.prefix < 1:
            raise ValueError(
                "decoder_depth must be >= 0 and prefix >= 1, "
                f"got {self.decoder_depth} and {self.prefix}"
            )
        for name in ("bos_id", "eos_id"):
            token, size = getattr(self, name), self.predictor.vocab_size
            if not 0 <= token < size:
                raise ValueError(f"{name} = {token} is no id of a vocabulary of {size}")
