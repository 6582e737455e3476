"""VL-JEPA's X: the encoder of V-JEPA 2 (Assran et al., arXiv 2506.09985) over clips of any length.

Its 3-D rotary positions are kept as published, down to an oddity that the released weights were
trained with: the two elements of a pair are turned by different angles. Of a part of 2h channels
with frequencies w_0 .. w_(h-1), element e takes the angle of w_(e mod h), yet pairs are neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from encfast.layers import Attention, Block, Norm, PatchEmbed
from encfast.layers.exact import ExactBuffers
from encfast.layers.patch import tubelets
from encfast.models._vl_jepa_config import VisionConfig
from encfast.packed import PackedBatch


class TubeletRotary(ExactBuffers):
    """Tables of a head's angles: equal parts turn with time, row and column, the rest stays.

    Args:
        head_dim: D, 6 at least.
        theta: base of the frequencies.
        grid: tubelets along height and width.
    """

    frequency: Tensor

    def __init__(
        self,
        head_dim: int,
        theta: float,
        grid: tuple[int, int],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.grid = head_dim, theta, grid
        empty = torch.empty(3, head_dim, dtype=torch.float32, device=device)
        self.register_buffer("frequency", empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the frequency ``[3, D]`` of each channel along each axis."""
        if self.frequency.is_meta:
            return
        half = self.head_dim // 3 // 2
        part = (self.theta ** -(torch.arange(half).float() / half)).repeat(2)  # [2h]
        with torch.no_grad():
            self.frequency.zero_()
            for axis in range(3):
                self.frequency[axis, axis * 2 * half : (axis + 1) * 2 * half] = part

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 ``[N, D]``, of the places ``[N]`` of tubelets in their clips."""
        height, width = self.grid
        time, cell = positions // (height * width), positions % (height * width)
        where = torch.stack((time, cell // width, cell % width), 1).float()  # [N, 3]
        angles = (where[:, :, None] * self.frequency).sum(1)  # one term of three is not 0
        return angles.cos(), angles.sin()


class TubeletAttention(Attention):
    """Attention whose heads turn by :class:`TubeletRotary`."""

    def rotated(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q and k at their positions; ``rope`` are tables ``[N, D]``."""
        cos, sin = (table[:, None].to(q.dtype) for table in rope)
        return q * cos + _quarter_turn(q) * sin, k * cos + _quarter_turn(k) * sin


def _quarter_turn(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


class VisionEncoder(nn.Module):
    """Tubelets, pre-norm blocks, final norm; no class token, no table of positions.

    Args:
        config: sizes of frames, tubelets and blocks.
    """

    def __init__(self, config: VisionConfig, **factory: Any) -> None:
        super().__init__()
        self.image_size, self.depth = config.image_size, config.patch_size[0]
        self.num_patches = config.num_patches
        self.embed = PatchEmbed(
            config.patch_size,
            config.dim,
            channels=config.channels,
            mean=config.pixel_mean,
            std=config.pixel_std,
            **factory,
        )
        block = config.block()
        self.blocks = nn.ModuleList(
            Block(block, attn=TubeletAttention(block, **factory), **factory)
            for _ in range(config.depth)
        )
        self.rotary = TubeletRotary(
            block.head_size, config.rope_theta, config.grid, device=factory.get("device")
        )
        self.norm = Norm(config.dim, eps=config.norm_eps, **factory)

    def forward(self, clips: PackedBatch) -> PackedBatch:
        """Frames ``[N, C, H, W]`` of B clips -> rows ``[T * P, dim]``, time index by time index.

        Raises:
            ValueError: for frames of another size, or (on the CPU) a clip whose length is no
                multiple of a tubelet's.
        """
        size = tuple(clips.data.shape[2:])
        if size != self.image_size:
            raise ValueError(f"clips has frames of {size}, expected {self.image_size}")
        times, patches = tubelets(clips, self.depth), self.num_patches
        x = PackedBatch(
            self.embed(times.data), times.cu_seqlens * patches, times.max_seqlen * patches
        )
        rope = self.rotary(x.positions())
        for block in self.blocks:
            x = block(x, rope)  # [T * P, dim]
        return x.with_data(self.norm(x.data))
