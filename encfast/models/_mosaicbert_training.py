"""How MosaicBERT is trained: the runs of the paper, their optimizer and learning rate.

Numbers come from mosaicml/examples, examples/benchmarks/bert (``yamls`` and ``src/glue``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from encfast.schedules import linear_schedule


@dataclass(frozen=True)
class Recipe:
    """One training run: AdamW with betas 0.9 and 0.98, eps 1e-6, rate linear up and linear down."""

    lr: float  # at its peak
    weight_decay: float  # share of every weight that one step at the peak rate takes away
    batch_size: int  # sequences
    max_length: int = 256  # tokens
    steps: int | None = None
    epochs: int | None = None  # where steps is None
    warmup: float = 0.06  # share of the steps
    final: float = 0.0  # factor of the peak rate at the end
    num_labels: int | None = None
    start: str = "pretraining"  # whose weights the run starts from

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over all parameters of ``model``; no norm or bias is exempt from decay.

        At the peak rate a step of the paper's DecoupledAdamW takes ``weight_decay`` of a weight,
        one of ``torch.optim.AdamW`` takes ``lr * weight_decay`` of it, hence the division.
        """
        return torch.optim.AdamW(
            model.parameters(),
            lr=self.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=self.weight_decay / self.lr,
        )

    def factor(self, step: int, steps: int | None = None) -> float:
        """Factor of the peak rate, for ``torch.optim.lr_scheduler.LambdaLR``.

        Args:
            step: from 0.
            steps: of the whole run, where the recipe counts epochs.

        Returns:
            In 0..1.

        Raises:
            ValueError: if nobody says how many steps there are.
        """
        total = steps or self.steps
        if total is None:
            raise ValueError(f"this recipe runs for {self.epochs} epochs; pass steps=")
        return linear_schedule(step, round(self.warmup * total), total, final=self.final)


PRETRAINING = {
    "base": Recipe(5e-4, 1e-5, 4096, max_length=128, steps=70_000, final=0.02),
    "large": Recipe(2e-4, 1e-5, 4096, max_length=128, steps=70_000, final=0.02),
}
GLUE = {
    "mnli": Recipe(5e-5, 5e-6, 48, epochs=3, num_labels=3),
    "qqp": Recipe(3e-5, 3e-6, 16, epochs=5, num_labels=2),
    "qnli": Recipe(1e-5, 1e-6, 16, epochs=10, num_labels=2),
    "sst2": Recipe(3e-5, 3e-6, 16, epochs=3, num_labels=2),
    "cola": Recipe(5e-5, 5e-6, 32, epochs=10, num_labels=2),
    "rte": Recipe(1e-5, 1e-5, 16, epochs=3, num_labels=2, start="mnli"),
    "mrpc": Recipe(8e-5, 8e-6, 32, epochs=10, num_labels=2, start="mnli"),
    "stsb": Recipe(3e-5, 3e-6, 32, epochs=10, num_labels=1, start="mnli"),
}
