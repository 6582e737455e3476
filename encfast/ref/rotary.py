"""What rotary means, in plain PyTorch: pairs of elements turned by the angles of their row."""

import torch
from torch import Tensor


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [N, H, D] turned by the angles in rows `positions` [N] of cos and sin [S, R / 2].

    Args are those of `encfast.ops.rotary`. `compute_dtype` is the dtype of every intermediate; by
    default float32, or float64 when x is float64. The result has the dtype of x.
    """
    compute = compute_dtype or torch.promote_types(x.dtype, torch.float32)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos[:, None].to(compute), sin[:, None].to(compute)  # [N, 1, R / 2]
    if conjugate:
        sin = -sin
    rotated = 2 * cos.shape[-1]
    turning, rest = x[..., :rotated].to(compute), x[..., rotated:]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
