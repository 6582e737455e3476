"""How Hi-End-MAE is trained: pre-training on crops of CT volumes, and fine-tuning for segmentation.

Numbers come from FengheTan9/Hi-End-MAE, ``main.py``, ``trainer.py`` and ``downstream/main.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from encfast.schedules import cosine_schedule

_PLACES = ("token", "positions")  # what names of tokens and tables of positions hold


@dataclass(frozen=True)
class Recipe:
    """One run: AdamW, a warm-up from 0, then a cosine down to 0."""

    epochs: int
    warmup: int  # epochs
    batch_size: int  # volumes per GPU
    crops: int  # of each volume
    betas: tuple[float, float]
    weight_decay: float
    lr: float = 1e-4  # at its peak
    exempt: bool = True  # vectors, tokens and positions do not decay

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over what of ``model`` is trained."""
        return torch.optim.AdamW(
            self.param_groups(model), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters of ``model`` that decay, and those that do not."""
        decay: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            free = self.exempt and (p.dim() < 2 or any(word in name for word in _PLACES))
            if p.requires_grad:
                (spared if free else decay).append(p)
        return [{"params": decay}, {"params": spared, "weight_decay": 0.0}]

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak rate, for ``torch.optim.lr_scheduler.LambdaLR``.

        Args:
            step: from 0.
            steps: of the whole run; past them the factor is 0.

        Returns:
            In 0..1.
        """
        return cosine_schedule(step, self.warmup / self.epochs * steps, steps)


PRETRAINING = Recipe(1000, 10, batch_size=24, crops=8, betas=(0.9, 0.95), weight_decay=0.05)
FINE_TUNING = Recipe(
    500, 50, batch_size=1, crops=4, betas=(0.9, 0.999), weight_decay=1e-5, exempt=False
)
