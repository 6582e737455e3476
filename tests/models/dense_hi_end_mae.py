"""Hi-End-MAE as formulas over dense tensors in the order of the raster, under published names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.models.hi_end_mae import HiEndMaeConfig


def table(grid, dim: int) -> Tensor:
    """[P, dim]: [sin, cos] of the row, of the column and of the slice of each patch."""
    rows = []
    for h in range(grid[0]):
        for w in range(grid[1]):
            for d in range(grid[2]):
                row = []
                for place in (h, w, d):
                    angles = [place / 10_000 ** (i / (dim // 6)) for i in range(dim // 6)]
                    row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                rows.append(row)
    return torch.tensor(rows)


def patches(volumes: Tensor, patch) -> Tensor:
    """[B, C, H, W, D] -> [B, P, ph * pw * pd * C]."""
    (b, c), (h, w, d), (p, q, r) = volumes.shape[:2], volumes.shape[2:], patch
    cells = volumes.reshape(b, c, h // p, p, w // q, q, d // r, r)
    return torch.einsum("bchpwqdr->bhwdpqrc", cells).reshape(b, -1, p * q * r * c)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, N, C] and twice [B, M, C] -> [B, N, C]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.qkv(x).chunk(3, -1), self.heads))


class CrossAttention(nn.Module):
    """Keys and values apart, which the published code projects as one."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.proj(attention(self.q(x), self.k(y), self.v(y), self.heads))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn, self.mlp = SelfAttention(dim, heads), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6) for _ in range(3))
        self.self_attn, self.cross_attn = SelfAttention(dim, heads), CrossAttention(dim, heads)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), y)
        return x + self.mlp(self.norm2(x))


class DenseHiEndMae(nn.Module):
    def __init__(self, c: HiEndMaeConfig) -> None:
        super().__init__()
        self.config = c
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.encoder.patch_embed = nn.Module()
        self.encoder.patch_embed.proj = nn.Conv3d(c.channels, c.dim, c.patch_size, c.patch_size)
        sizes = (c.dim, c.num_heads, c.ffn_dim)
        self.encoder.blocks = nn.ModuleList(Block(*sizes) for _ in range(c.depth))
        self.encoder.norm = nn.LayerNorm(c.dim, 1e-6)
        dim = c.decoder_dim
        sizes = (dim, c.decoder_heads, c.decoder_ffn_dim)
        self.decoder.blocks = nn.ModuleList(Block(*sizes) for _ in range(c.decoder_depth))
        self.decoder.cross_attention_blocks = nn.ModuleList(CrossBlock(*sizes) for _ in c.levels)
        self.decoder.norm = nn.LayerNorm(dim, 1e-6)
        self.decoder.head = nn.Linear(dim, c.patch_voxels)
        self.encoder_to_decoder = nn.ModuleList(
            nn.Linear(c.dim, dim) for _ in range(len(c.levels) + 1)
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))

    def encode(self, volumes: Tensor, shown: Tensor) -> list[Tensor]:
        """[B, 1 + K, C] of the patches that `shown` [B, P] shows: after each block, and normed."""
        x = self.encoder.patch_embed.proj(volumes).flatten(2).transpose(1, 2)
        x = x + table(self.config.grid, self.config.dim)
        x = x[shown].unflatten(0, (len(volumes), -1))
        x = torch.cat((self.encoder.cls_token.expand(len(x), -1, -1), x), 1)
        outputs = []
        for block in self.encoder.blocks:
            x = block(x)
            outputs.append(x)
        return [*outputs, self.encoder.norm(x)]

    def forward(self, volumes: Tensor, shown: Tensor) -> Tensor:
        """[B, P, Q]: voxels of all patches, in the order of the raster."""
        outputs = self.encode(volumes, shown)
        rows = self.encoder_to_decoder[-1](outputs[-1])
        x = self.mask_token.expand(*shown.shape, -1).clone()
        x[shown] = rows[:, 1:].flatten(0, 1)
        x = torch.cat((rows[:, :1], x + table(self.config.grid, self.config.decoder_dim)), 1)
        for block in self.decoder.blocks:
            x = block(x)
        levels = self.config.levels
        for i, block in enumerate(self.decoder.cross_attention_blocks):
            which = len(levels) - 1 - i
            x = block(x, self.encoder_to_decoder[which](outputs[levels[which]]))
        return self.decoder.head(self.decoder.norm(x))[:, 1:]

    def loss(self, volumes: Tensor, shown: Tensor) -> Tensor:
        rows = patches(volumes, self.config.patch_size)
        target = F.layer_norm(rows, rows.shape[-1:], eps=1e-6)
        return F.mse_loss(self(volumes, shown)[~shown], target[~shown])
