"""Multi-head self-attention over a packed batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from encfast import ops
from encfast.config import BlockConfig
from encfast.layers.cache import KVCache
from encfast.layers.dropout import StaticFloat
from encfast.layers.linear import Linear, linear
from encfast.layers.norm import Norm
from encfast.packed import PackedBatch


def alibi_slopes(num_heads: int) -> Tensor:
    """fp32 ``[H]``: ALiBi's slope for each of ``num_heads`` (Press et al. 2022, arXiv 2108.12409).

    Section 3: a power of two H takes the geometric sequence 2^(-8(k+1)/H); any other H takes that
    of the largest power of two c below it, then every second slope of the sequence for 2c.
    """
    c = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (k + 1) / c) for k in range(c)]
    between = [2.0 ** (-8.0 * (k + 1) / (2 * c)) for k in range(0, 2 * c, 2)]
    return torch.tensor((slopes + between)[:num_heads], dtype=torch.float32)


class QVBiasLinear(Linear):
    """The fused projection of q, k and v whose k part has no bias (BEiT, arXiv 2106.08254).

    Args:
        in_features: C.
        sizes: rows of q, of k and of v.
    """

    def __init__(self, in_features: int, sizes: tuple[int, int, int], **factory: Any) -> None:
        super().__init__(in_features, sum(sizes), bias=False, **factory)
        self.q_bias = nn.Parameter(torch.zeros(sizes[0], **factory))
        self.k_size = sizes[1]
        self.v_bias = nn.Parameter(torch.zeros(sizes[2], **factory))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, C]`` -> ``[N, sum(sizes)]``."""
        bias = torch.cat((self.q_bias, self.q_bias.new_zeros(self.k_size), self.v_bias))
        return linear(x, self.weight, bias)


class Attention(nn.Module):
    """Projections around :func:`encfast.ops.varlen_attn`; biases and window as the config says.

    ``qkv`` is one matmul; its rows are [q heads, k heads, v heads], D each.

    Args:
        config: uses dim, num_heads, num_kv_heads, head_dim, causal, window, position, softcap,
            attn_dropout, qk_norm with what it says of norms, and the biases.
    """

    slopes: Tensor | None
    softcap = StaticFloat()
    attn_dropout = StaticFloat()

    def __init__(
        self,
        config: BlockConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_size
        self.causal, self.window, self.softcap = config.causal, config.window, config.softcap
        self.attn_dropout = config.attn_dropout
        heads = (self.num_heads, self.kv_heads, self.kv_heads)
        q, k, v = (n * self.head_dim for n in heads)
        self.qkv: Linear
        if config.qkv_bias == "qv":
            self.qkv = QVBiasLinear(config.dim, (q, k, v), **factory)
        else:
            self.qkv = Linear(config.dim, q + k + v, bias=bool(config.qkv_bias), **factory)
        self.out = Linear(
            self.num_heads * self.head_dim, config.dim, bias=config.out_bias, **factory
        )
        self.q_norm = _head_norm(config, **factory) if config.qk_norm else None
        self.k_norm = _head_norm(config, **factory) if config.qk_norm else None
        slopes = None
        if config.position == "alibi":
            slopes = torch.empty(self.num_heads, dtype=torch.float32, device=device)
        self.register_buffer("slopes", slopes, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Refills the slopes (the projections reset themselves)."""
        if self.slopes is not None and not self.slopes.is_meta:
            with torch.no_grad():
                self.slopes.copy_(alibi_slopes(self.num_heads))

    def rotated(self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q ``[N, H, D]`` and k ``[N, Hk, D]`` turned by ``rope``, cos and sin ``[N, D / 2]``."""
        return ops.rotary_qk(q, k, *rope)

    def heads(
        self,
        batch: PackedBatch,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        rel_bias: Tensor | None = None,
    ) -> Tensor:
        """``[N, H * D]``: what the heads read, before the output projection.

        Args:
            batch: rows ``[N, C]``.
            rope: cos and sin ``[N, D / 2]`` to rotate q and k with: what :meth:`rotated` takes.
            cache: keys and values of earlier tokens; the new ones are added to it.
            rel_bias: ``[H, R]`` or ``[N, H, R]``, added to the scores by relative position.

        Returns:
            ``[N, H * D]``.
        """
        qkv = self.qkv(batch.data).unflatten(-1, (-1, self.head_dim))  # [N, H + 2 Hk, D]
        q, k, v = qkv.split((self.num_heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotated(q, k, rope)
        cu_seqlens_k, max_seqlen_k = batch.cu_seqlens, batch.max_seqlen
        if cache is not None:
            keys, values = cache.append(k, v, batch)
            k, v = keys.data, values.data
            cu_seqlens_k, max_seqlen_k = keys.cu_seqlens, keys.max_seqlen
        out = ops.varlen_attn(
            q,
            k,
            v,
            batch.cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_k=max_seqlen_k,
            causal=self.causal,
            window=self.window,
            alibi_slopes=None if self.slopes is None else self.slopes.float(),
            rel_bias=rel_bias,
            softcap=self.softcap,
            dropout_p=(self.attn_dropout or None) if self.training else None,
        )  # [N, H, D]
        return out.flatten(1)

    def forward(
        self,
        batch: PackedBatch,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        rel_bias: Tensor | None = None,
    ) -> Tensor:
        """Rows ``[N, C]`` of ``batch`` -> ``[N, C]``.

        Args:
            batch: rows and geometry.
            rope: cos and sin of each row's angles, ``[N, D / 2]``, from :class:`Rotary`.
            cache: keys and values of earlier rows, to which these are appended.
            rel_bias: ``[H, R]`` or ``[N, H, R]``, see :func:`encfast.ops.varlen_attn`.

        Returns:
            ``[N, C]``: what the residual stream gets.
        """
        return self.out(self.heads(batch, rope, cache, rel_bias))


def _head_norm(config: BlockConfig, **factory: Any) -> Norm:
    return Norm(
        config.head_size,
        kind=config.norm,
        eps=config.norm_eps,
        bias=config.norm_bias,
        unit_offset=config.norm_unit_offset,
        precision=config.norm_precision,
        **factory,
    )
