"""How ViViT's factorised encoder is trained on Kinetics-400, in either stage.

Numbers come from google-research/scenic, projects/vivit/configs/kinetics400.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """One run: SGD with momentum 0.9, no weight decay, a warm-up under a cosine."""

    lr: float  # at its peak, were there no cosine
    batch_size: int = 64  # clips
    epochs: float = 30
    warmup: float = 2.5  # epochs
    max_norm: float = 1.0  # of all gradients, clipped before each step

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over what of ``model`` is trained; frozen parameters stay out of it."""
        learned = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(learned, lr=self.lr, momentum=0.9)

    def factor(self, step: int, steps: int) -> float:
        """Factor of the rate, for ``torch.optim.lr_scheduler.LambdaLR``.

        The cosine runs over the whole run, warm-up included, and multiplies the linear rise.

        Args:
            step: from 0.
            steps: of the whole run; past them the factor is 0.

        Returns:
            In 0..1.
        """
        rise = self.warmup / self.epochs * steps
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
        return cosine * (min(step / rise, 1.0) if rise else 1.0)


TRAINING = {"base": Recipe(5e-2), "large": Recipe(1e-1)}
