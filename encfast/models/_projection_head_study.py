"""What the projection-head study measures: linear probes, blended data, and its linear theory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from encfast._precision import wide


def probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, ridge: float = 1e-3
) -> float:
    """Accuracy of a linear classifier on frozen features: ridge regression on one-hot labels.

    All channels are divided by one number: dividing each by its own deviation would undo what a
    head that only weighs channels has done.

    Args:
        train, test: ``[N, p]``; centred by the means of ``train``, whose mean variance becomes 1.
        train_labels, test_labels: int64 ``[N]``.
        ridge: weight of the penalty, relative to N.

    Returns:
        In 0..1.
    """
    mean = train.double().mean(0)
    deviation = (train.double() - mean).square().mean().sqrt().clamp(min=1e-12)
    x, y = ((v.double() - mean) / deviation for v in (train, test))
    target = F.one_hot(train_labels).double()
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (target - target.mean(0)))
    predicted = (y @ weight + target.mean(0)).argmax(1)
    return (predicted == test_labels).double().mean().item()


def blend_digits(
    images: Tensor,
    digits: Tensor,
    *,
    strength: float = 0.7,
    drop: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """MNIST on CIFAR-10: each digit in the middle half of its image, ``(1 - s) x + s d`` inside it.

    Args:
        images: ``[B, C, H, W]``, floating, in [0, 1]; H and W even.
        digits: ``[B, h, w]`` in [0, 1], resized to ``[H / 2, W / 2]``.
        strength: s.
        drop: probability that an image keeps no digit, the augmentation that destroys it.
        generator: of what is dropped, on the images' device.

    Returns:
        ``[B, C, H, W]`` in the dtype of the images.

    Raises:
        ValueError: for different numbers of images and digits, or odd sizes.
    """
    b, _, h, w = images.shape
    if len(digits) != b or h % 2 or w % 2:
        raise ValueError(
            f"images has shape {tuple(images.shape)}, digits {tuple(digits.shape)}; expected a "
            "digit an image, and even height and width"
        )
    small = F.interpolate(
        digits[:, None].to(images.dtype), (h // 2, w // 2), mode="bilinear", antialias=True
    )
    digit = F.pad(small, (w // 4, w // 2 - w // 4, h // 4, h // 2 - h // 4))  # [B, 1, H, W]
    kept = torch.rand(b, generator=generator, device=images.device) >= drop
    inside = (digit > 0) & kept[:, None, None, None]
    return torch.where(inside, (1 - strength) * images + strength * digit, images)


def spectral_contrastive_loss(a: Tensor, b: Tensor) -> Tensor:
    """``-2 mean a_i . b_i + mean over i != j of (a_i . b_j)^2``, from ``D x D`` products alone.

    Source: HaoChen et al. 2021, arXiv 2106.04156, equation 6.

    Args:
        a, b: two views ``[B, D]`` of the same B things; B < 2 leaves the second term out.

    Returns:
        0-dim.
    """
    a, b = wide(a), wide(b)
    n, pairs = len(a), (a * b).sum(1)
    others = ((a.T @ a) * (b.T @ b)).sum() - pairs.square().sum()
    return -2 * pairs.sum() / max(n, 1) + others / max(n * (n - 1), 1)


def feature_moments(strengths: Tensor, destroyed: Tensor) -> tuple[Tensor, Tensor]:
    """E[x x^T] and E[x x+^T] of independent orthonormal features.

    Feature i has deviation ``strengths[i]``; an augmentation draws it anew with probability
    ``destroyed[i]``, in each of two views.
    """
    variance = strengths.square()
    return torch.diag(variance), torch.diag(variance * (1 - destroyed).square())


def balanced_net(
    dim: int, *, scale: float = 0.3, aligned: bool = True, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """float64 W1, W2 ``[dim, dim]`` with ``W1 W1^T = W2^T W2``.

    Gradient flow keeps this balance from every such start; steps of a finite rate keep it exactly
    where W1's right singular vectors are the features.

    Args:
        dim: features, the axes of the input.
        scale: of the singular values of both.
        aligned: right singular vectors of W1 are the axes, not random.
        generator: of all random numbers.

    Returns:
        W1 and W2.
    """

    def orthogonal() -> Tensor:
        noise = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise).Q

    inner, left, right = orthogonal(), orthogonal(), orthogonal()
    sizes = scale * (0.5 + torch.rand(dim, generator=generator, dtype=torch.float64))
    w1 = inner * sizes
    return w1 if aligned else w1 @ right, left @ (inner * sizes).T


def descend(
    w1: Tensor,
    w2: Tensor,
    second: Tensor,
    pairs: Tensor,
    *,
    rate: float,
    steps: int,
    decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gradient descent of W2 W1 on the spectral contrastive loss of a whole distribution.

    Args:
        w1, w2: of the encoder and of the linear head.
        second, pairs: E[x x^T] and E[x x+^T].
        rate, steps: of the descent.
        decay: weight decay of both.

    Returns:
        W1 and W2 after the last step.
    """
    for _ in range(steps):
        w = w2 @ w1
        # Of -2 tr(W P W^T) + |C^1/2 W^T W C^1/2|^2.
        g = 4 * (w @ second @ w.T @ w @ second - w @ pairs)
        w1, w2 = (
            w1 - rate * (w2.T @ g + decay * w1),
            w2 - rate * (g @ w1.T + decay * w2),
        )
    return w1, w2
