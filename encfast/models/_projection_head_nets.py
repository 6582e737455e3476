"""Encoders and heads of the projection-head study."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.layers.dropout import StaticFloat

Head = Literal["none", "linear", "mlp", "mlp3", "symmetric", "reweight"]


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, whose floats are no symbols to the compiler, which would trace a second time."""

    eps = StaticFloat()
    momentum = StaticFloat()  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Shown by ``print(module)``; torch's looks for the floats where they are not."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class ResidualBlock(nn.Module):
    """He et al. 2016, arXiv 1512.03385: two 3x3 convolutions, or 1x1, 3x3, 1x1 with 4 times the
    channels; names as in torchvision.

    Args:
        inputs: channels of the input.
        width: of the 3x3 convolutions.
        stride: of the first of them.
        bottleneck: the second kind.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.outputs = 4 * width if bottleneck else width
        sizes = [(width, 1), (width, 3), (self.outputs, 1)] if bottleneck else [(width, 3)] * 2
        at, before = (1 if bottleneck else 0), inputs
        self.count = len(sizes)
        for i, (channels, kernel) in enumerate(sizes):
            step = stride if i == at else 1
            conv = nn.Conv2d(before, channels, kernel, step, kernel // 2, bias=False, **factory)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", BatchNorm2d(channels, **factory))
            before = channels
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != self.outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, self.outputs, 1, stride, bias=False, **factory),
                BatchNorm2d(self.outputs, **factory),
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, outputs, H / stride, W / stride]``."""
        kept = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.count + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = F.relu(x if i < self.count else x + kept)
        return x


class ResNet(nn.Module):
    """A residual network up to the mean over pixels.

    Args:
        channels: of the images.
        widths: of the stages; each but the first halves height and width.
        blocks: of each stage.
        bottleneck: see :class:`ResidualBlock`.
        small_images: a 3x3 convolution at full size in the place of ImageNet's 7x7 and pooling.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        *,
        bottleneck: bool,
        small_images: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        kernel, stride, padding = (3, 1, 1) if small_images else (7, 2, 3)
        first = widths[0]
        self.conv1 = nn.Conv2d(channels, first, kernel, stride, padding, bias=False, **factory)
        self.bn1 = BatchNorm2d(first, **factory)
        self.small_images = small_images
        stages, width_in = [], first
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = []
            for j in range(count):
                step = 2 if i > 0 and j == 0 else 1
                stage.append(ResidualBlock(width_in, width, step, bottleneck, **factory))
                width_in = stage[-1].outputs
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, p]``."""
        x = F.relu(self.bn1(self.conv1(images)))
        if not self.small_images:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
        return x.mean((2, 3))


class FlatMLP(nn.Module):
    """Linear layers over flattened images, ReLU between them."""

    def __init__(self, sizes: Sequence[int], **factory: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, **factory) for n, m in pairwise(sizes))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, *size]`` -> ``[B, p]``."""
        x = images.flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.relu(x))
        return x


class SymmetricReLU(nn.Module):
    """``relu(x - b) - relu(-x - b)`` with one learned threshold b, 0 at first: the identity."""

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros((), **factory))

    def reset_parameters(self) -> None:
        """The identity again."""
        nn.init.zeros_(self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.relu(x - self.threshold) - F.relu(-x - self.threshold)


class Reweight(nn.Module):
    """``u_i = z_i kappa^-i``, fixed: later coordinates feel the loss less and less.

    In float32 the factors of kappa = 1.5 vanish from i = 255 on, and with them gradients: how many
    coordinates a loss sees is a property of kappa.

    Args:
        dim: p.
        kappa: above 1.
    """

    scales: Tensor

    def __init__(self, dim: int, kappa: float, **factory: Any) -> None:
        super().__init__()
        self.kappa = kappa
        self.register_buffer("scales", torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the factors, powers in float64."""
        if self.scales.is_meta:
            return
        exponent = -torch.arange(self.scales.numel(), dtype=torch.float64)
        with torch.no_grad():
            self.scales.copy_(self.kappa**exponent)

    def forward(self, z: Tensor) -> Tensor:
        """``[B, p]`` -> ``[B, p]``."""
        return z * self.scales


def make_head(kind: Head, dim: int, hidden: int, out: int, kappa: float, **factory: Any) -> Any:
    """A head of ``dim`` channels; "none", "symmetric" and "reweight" keep their number."""
    if kind == "none":
        return nn.Identity()
    if kind == "reweight":
        return Reweight(dim, kappa, **factory)
    if kind == "linear":
        return nn.Linear(dim, out, **factory)
    if kind == "symmetric":
        square = (nn.Linear(dim, dim, **factory) for _ in range(2))
        return nn.Sequential(next(square), SymmetricReLU(**factory), next(square))
    return FlatMLP([dim, *[hidden] * (2 if kind == "mlp3" else 1), out], **factory)
