"""Losses of what was reconstructed: numbers, pixels, angles. Public in `encfast.losses`."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from encfast._precision import wide


def scaled_cosine_error(
    predicted: Tensor,
    targets: Tensor,
    *,
    beta: float = 2.0,
    reduction: Literal["mean", "rescaled"] = "mean",
) -> Tensor:
    """``mean_i (1 - cos(z_i, x_i))^beta``: easy rows, at small angles, weigh less as beta grows.

    Source: GraphMAE (Hou et al. 2022, arXiv 2205.10803), equation 2. SkeletonMAE (Yan et al. 2023,
    arXiv 2307.08476) prints a sum of ``((1 - cos) / M)^beta`` instead: ``"rescaled"``.

    Args:
        predicted: ``[M, C]``, rows z.
        targets: ``[M, C]``, rows x; a row of zeros has cosine 0.
        beta: at least 1.
        reduction: see above.

    Returns:
        0-dim, fp32 or wider.

    Raises:
        ValueError: for a beta below 1, another reduction, or shapes that differ.

    Examples:
        >>> from encfast.losses import scaled_cosine_error
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> scaled_cosine_error(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), x)
        tensor(0.5000)
    """
    if not beta >= 1:
        raise ValueError(f"beta must be >= 1, got {beta}")
    if reduction not in ("mean", "rescaled"):
        raise ValueError(f"reduction must be 'mean' or 'rescaled', got {reduction!r}")
    if predicted.shape != targets.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected {tuple(predicted.shape)} like "
            "the predictions"
        )
    cosine = F.cosine_similarity(wide(predicted), wide(targets), dim=-1)  # [M]
    # Rounding may bring 1 - cos below 0, where a broken power has no value.
    error, count = (1 - cosine).clamp(min=0), max(predicted.shape[0], 1)
    if reduction == "rescaled":
        return (error / count).pow(beta).sum()
    return error.pow(beta).sum() / count


def mean_squared_error(predicted: Tensor, targets: Tensor) -> Tensor:
    """Mean over all numbers of two ``[M, C]``, in fp32 or wider; 0 if there are none.

    Args:
        predicted: ``[M, C]``.
        targets: ``[M, C]``.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import mean_squared_error
        >>> mean_squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)
    """
    error = wide(predicted) - wide(targets)
    return error.square().sum() / max(error.numel(), 1)


def pixel_loss(
    predicted: Tensor,
    pixels: Tensor,
    *,
    normalise: bool = False,
    unbiased: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Mean squared error of patches, of their pixels or of those normalised patch by patch.

    Source: He et al., arXiv 2111.06377, section 4.1 (normalised targets).

    Args:
        predicted: ``[M, Q]``.
        pixels: ``[M, Q]``: what stood in these patches.
        normalise: compare with (pixels - mean) / sqrt(variance + eps) of each patch.
        unbiased: divide the variance by Q - 1, as MAE's published code does.
        eps: added to the variance.

    Returns:
        0-dim, fp32 or wider.

    Examples:
        >>> from encfast.losses import pixel_loss
        >>> pixel_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]))
        tensor(5.)
    """
    if normalise:
        pixels = normalised_patches(pixels, unbiased=unbiased, eps=eps)
    return mean_squared_error(predicted, pixels)


def normalised_patches(pixels: Tensor, *, unbiased: bool = True, eps: float = 1e-6) -> Tensor:
    """``[M, Q]``: (pixels - mean) / sqrt(variance + eps) of each patch, in fp32 or wider.

    Args:
        pixels: ``[M, Q]``.
        unbiased: divide the variance by Q - 1 instead of Q.
        eps: added to the variance.

    Returns:
        ``[M, Q]``.

    Examples:
        >>> from encfast.losses import normalised_patches
        >>> normalised_patches(torch.tensor([[1.0, 3.0]]), unbiased=False, eps=0.0)
        tensor([[-1.,  1.]])
    """
    mean, deviation = patch_moments(pixels, unbiased=unbiased, eps=eps)
    return (wide(pixels) - mean) / deviation


def patch_moments(
    pixels: Tensor, *, unbiased: bool = True, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + eps) of each patch.

    Args:
        pixels: ``[M, Q]``.
        unbiased: divide the variance by Q - 1 instead of Q.
        eps: added to the variance.

    Returns:
        ``[M, 1]`` each, fp32 or wider.

    Examples:
        >>> from encfast.losses import patch_moments
        >>> patch_moments(torch.tensor([[1.0, 3.0]]), unbiased=False, eps=0.0)
        (tensor([[2.]]), tensor([[1.]]))
    """
    pixels = wide(pixels)
    mean = pixels.mean(-1, keepdim=True)
    # Not torch.var_mean, which warns where there are no patches.
    squares = (pixels - mean).square().sum(-1, keepdim=True)
    return mean, (squares / max(pixels.shape[-1] - int(unbiased), 1) + eps).sqrt()
