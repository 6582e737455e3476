"""CAE as formulas over dense tensors, under the names of its published code."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.models.cae import CaeConfig


def table(grid, dim: int) -> Tensor:
    """[1, 1 + P, dim]: zeros, then [sin(row), cos(row), sin(column), cos(column)] of each patch."""
    rows = [[0.0] * dim]
    for y in range(grid[0]):
        for x in range(grid[1]):
            row = []
            for place in (y, x):
                angles = [place / 10_000 ** (i / (dim // 4)) for i in range(dim // 4)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    return torch.tensor(rows)[None]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, N, C] from [B, N, C] and twice [B, M, C]."""
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
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(softmax_attention(q + self.q_bias, k, v + self.v_bias, self.heads))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.q(q) + self.q_bias, self.k(k), self.v(v) + self.v_bias
        return self.proj(softmax_attention(q, k, v, self.heads))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn, self.mlp = SelfAttention(dim, heads), Mlp(dim, hidden)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class RegressorBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        for name in ("norm1_q", "norm1_k", "norm1_v", "norm2_cross"):
            setattr(self, name, nn.LayerNorm(dim, eps))
        self.cross_attn, self.mlp_cross = CrossAttention(dim, heads), Mlp(dim, hidden)
        self.gamma_1_cross = nn.Parameter(torch.ones(dim))
        self.gamma_2_cross = nn.Parameter(torch.ones(dim))

    def forward(self, q: Tensor, kv: Tensor, q_places: Tensor, k_places: Tensor) -> Tensor:
        asked = self.norm1_q(q + q_places)
        found = self.cross_attn(asked, self.norm1_k(kv + k_places), self.norm1_v(kv))
        x = self.norm2_cross(q + self.gamma_1_cross * found)
        return x + self.gamma_2_cross * self.mlp_cross(x)


class Encoder(nn.Module):
    def __init__(self, c: CaeConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(c.channels, c.dim, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(table(c.grid, c.dim), requires_grad=False)
        block = (c.dim, c.num_heads, c.ffn_dim, c.norm_eps)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, c.norm_eps)

    def forward(self, images: Tensor, shown: Tensor) -> Tensor:
        """[B, 1 + K, C] of the patches that `shown` [B, P] shows, as many of each image."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = x[shown].unflatten(0, (len(images), -1))
        x = torch.cat(((self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DenseCae(nn.Module):
    def __init__(self, c: CaeConfig) -> None:
        super().__init__()
        dim, eps, tokens = c.decoder_dim, c.norm_eps, c.objective == "tokens"
        block = (dim, c.decoder_heads, c.decoder_ffn_dim, eps)
        self.tokens = tokens
        self.encoder = Encoder(c)
        self.projects = dim != c.dim
        if self.projects:
            self.encoder_to_regresser = nn.Linear(c.dim, dim)
            self.encoder_to_regresser_norm = nn.LayerNorm(dim, eps)
        self.rd_pos_embed = nn.Parameter(table(c.grid, dim), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.regresser, self.decoder = nn.Module(), nn.Module()
        self.regresser.regressor_blocks = nn.ModuleList(
            RegressorBlock(*block) for _ in range(c.regressor_depth)
        )
        if tokens:
            self.regresser.norm = nn.LayerNorm(dim, eps)
        self.decoder.decoder_blocks = nn.ModuleList(Block(*block) for _ in range(c.decoder_depth))
        self.decoder.norm = nn.LayerNorm(dim, eps)
        self.decoder.head = nn.Linear(dim, c.vocab_size if tokens else c.feature_dim)
        with torch.no_grad():  # no branch may vanish, no norm be trivial
            for p in self.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))

    def projected(self, images: Tensor, shown: Tensor) -> Tensor:
        x = self.encoder(images, shown)
        return self.encoder_to_regresser_norm(self.encoder_to_regresser(x)) if self.projects else x

    def forward(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, M, V] and latents [B, M, C] of hidden patches; or, v2, features
        [B, 1 + P, D], class token first, then visible, then hidden ones."""
        count = len(images)
        encoded = self.projected(images, ~hidden)
        seen = encoded[:, 1:]
        places = self.rd_pos_embed[:, 1:].expand(count, -1, -1)
        seen_places = places[~hidden].unflatten(0, (count, -1))
        q_places = places[hidden].unflatten(0, (count, -1))
        k_places = torch.cat((seen_places, q_places), 1)
        x = self.mask_token.expand(count, q_places.shape[1], -1)
        for block in self.regresser.regressor_blocks:
            x = block(x, torch.cat((seen, x), 1), q_places, k_places)
        if not self.tokens:
            everything = torch.cat((encoded, x), 1)
            return self.decoder.head(self.decoder.norm(everything)), x
        latents = self.regresser.norm(x)
        x = latents + q_places
        for block in self.decoder.decoder_blocks:
            x = block(x)
        return self.decoder.head(self.decoder.norm(x)), latents

    def losses(self, images: Tensor, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy with `ids` [B, M], and the alignment before it is weighted."""
        scores, latents = self(images, hidden)
        with torch.no_grad():
            target = self.projected(images, hidden)[:, 1:]
        return F.cross_entropy(scores.flatten(0, 1), ids.flatten()), F.mse_loss(latents, target)

    def feature_loss(self, images: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        """Cosine error against `features` [B, 1 + P, D], class token first."""
        predicted = self(images, hidden)[0].flatten(0, 1)
        parts = [features[:, :1]]
        for chosen in (~hidden, hidden):
            parts.append(features[:, 1:][chosen].unflatten(0, (len(images), -1)))
        target = torch.cat(parts, 1).flatten(0, 1)
        return F.cosine_embedding_loss(
            predicted, target, torch.ones(len(target), dtype=target.dtype)
        )
