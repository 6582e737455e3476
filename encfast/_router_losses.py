"""Losses that keep a router's choices even and its logits small. Public in `encfast.losses`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from encfast._precision import wide
from encfast.routing import Routing


def load_balance_loss(
    routing: Routing, *, choices: Literal["first", "all"] = "first", normalise: bool = False
) -> Tensor:
    """``E * sum_e mean_t(p_te) * f_e``: least where tokens are spread evenly over the experts.

    f_e is the share of tokens that choose expert e, whether or not it has room for them: 1 at
    perfect balance and E where all tokens go to one with probability 1. Rows that are no tokens
    count for nothing.

    Source: Switch Transformers (Fedus et al. 2022, arXiv 2101.03961), equation 4, which GShard and
    DeepSpeed-MoE take from first choices alone.

    Args:
        routing: as :func:`encfast.ops.route_tokens` returns it.
        choices: count first choices, or all K of a token, as Mixtral does (K at perfect balance).
        normalise: divide a token's scores by their sum, where they are sigmoids (DeepSeek-V3,
            arXiv 2412.19437, equations 17 to 20).

    Returns:
        0-dim, fp32.

    Raises:
        ValueError: for another ``choices``, or a routing without probabilities.

    Examples:
        >>> from encfast.losses import load_balance_loss
        >>> routing = ops.route_tokens(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), 1)
        >>> load_balance_loss(routing).round(decimals=2)
        tensor(1.)
    """
    if choices not in ("first", "all"):
        raise ValueError(f"choices must be 'first' or 'all', got {choices!r}")
    if routing.probabilities is None:
        raise ValueError("routing has no probabilities, expected one of encfast.ops.route_tokens")
    scores, experts = routing.probabilities, routing.num_experts
    if normalise:
        least = torch.finfo(scores.dtype).tiny
        scores = scores / scores.sum(1, keepdim=True).clamp(min=least)
    tokens = (routing.expert_ids[:, 0] >= 0).sum().clamp(min=1)
    ids = routing.expert_ids[:, :1] if choices == "first" else routing.expert_ids
    ids = torch.where(ids < 0, experts, ids).flatten().long()
    counts = ids.new_zeros(experts + 1).index_add(0, ids, torch.ones_like(ids))[:experts]
    return experts * (scores.sum(0) / tokens * (counts / tokens)).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, which keeps a router's logits small.

    Source: ST-MoE (Zoph et al. 2022, arXiv 2202.08906), equation 5.

    Args:
        logits: ``[N, E]``.
        mask: bool ``[N]``, False where a row is no token.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import router_z_loss
        >>> router_z_loss(torch.tensor([[0.0, 0.0]])).sqrt().exp().round()
        tensor(2.)
    """
    logits = wide(logits)
    if mask is None:
        return logits.logsumexp(1).square().sum() / max(logits.shape[0], 1)
    # Filled before, not after: what stands in padding may be NaN, and 0 * NaN a gradient.
    squares = logits.masked_fill(~mask[:, None], 0).logsumexp(1).square()
    return squares.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
