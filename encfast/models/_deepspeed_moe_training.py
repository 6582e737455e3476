"""How DeepSpeed-MoE is trained: the runs of the paper, and the staged distillation of its students.

Numbers come from ``examples_deepspeed/MoE`` in github.com/microsoft/Megatron-DeepSpeed and, for the
dense models, from table 2.1 of GPT-3 (Brown et al. 2020, arXiv 2005.14165), which they follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.schedules import cosine_schedule

if TYPE_CHECKING:
    from encfast.data.text import TextBatch
    from encfast.models.deepspeed_moe import DeepSpeedMoE, MoELosses

ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # of matrices


@dataclass(frozen=True)
class Recipe:
    """One pre-training run: AdamW, and a cosine that counts tokens."""

    lr: float  # at its peak
    min_lr: float  # at the end of the cosine and after it
    batch_size: int  # sequences
    decay: float = 300e9  # tokens until min_lr; mixtures want a longer decay than dense models
    max_length: int = 2048  # tokens of a sequence
    warmup: float = 375e6  # tokens
    tokens: float = 300e9  # of the whole run
    clip_norm: float = 1.0  # largest norm of the gradient of all parameters together

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over all parameters of ``model``; norms and biases do not decay."""
        return torch.optim.AdamW(param_groups(model), lr=self.lr, betas=ADAM_BETAS)

    def factor(self, tokens: float) -> float:
        """Factor of the peak rate after ``tokens`` tokens."""
        return cosine_schedule(tokens, self.warmup, self.decay, final=self.min_lr / self.lr)


_GPT3_DECAY = 260e9

RECIPES = {
    "125m": Recipe(6e-4, 6e-5, 256, _GPT3_DECAY),
    "350m": Recipe(3e-4, 3e-5, 256, _GPT3_DECAY),
    "1.3b": Recipe(2e-4, 2e-5, 512, _GPT3_DECAY),
    "6.7b": Recipe(1.2e-4, 1.2e-5, 1024, _GPT3_DECAY),
    "350m-moe-128": Recipe(2e-4, 2e-6, 256),
    "1.3b-moe-128": Recipe(1.2e-4, 1e-6, 512),
    "350m-pr-moe-32-64": Recipe(3e-4, 1e-6, 256),
    "1.3b-pr-moe-64-128": Recipe(1.2e-4, 1e-6, 512),
    "350m-mos": Recipe(3e-4, 1e-6, 256),
    "1.3b-mos": Recipe(1.2e-4, 1e-6, 512),
}


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the parameters of ``model``: matrices decay; norms and biases do not.

    The biases of experts are stacks ``[E, F]``: their name tells them from a matrix.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not name.endswith("bias")
        (decayed if is_matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": kept, "weight_decay": 0.0},
    ]


def distillation_loss(student: Tensor, teacher: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, a mean over the kept rows.

    Args:
        student, teacher: logits ``[N, V]``; the teacher's take no gradient.
        kept: bool ``[N]``; 0 if it keeps none.
        temperature: T, > 0.

    Returns:
        0-dim, fp32 or wider.

    Raises:
        ValueError: for a teacher of another shape.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher has logits {tuple(teacher.shape)}, expected {tuple(student.shape)} like the "
            "student"
        )
    ours, theirs = (
        F.log_softmax(logits.float() / temperature, dim=-1)
        for logits in (student, teacher.detach())
    )
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # [N]
    total = divergence.masked_fill(~kept, 0).sum()
    return temperature**2 * total / kept.sum().clamp(min=1)


@dataclass(frozen=True)
class StagedDistillation:
    """Mixture-of-Students: a teacher's help until a cut-off, then the text alone.

    A student is too small to follow its teacher to the end: distilled all the way it falls behind
    one that was trained without (section 4.2 of the paper).
    """

    cutoff: int = 400_000  # first step without the teacher

    def __post_init__(self) -> None:
        if self.cutoff < 0:
            raise ValueError(f"cutoff must be >= 0 steps, got {self.cutoff}")

    def loss(
        self, student: DeepSpeedMoE, batch: TextBatch, teacher: DeepSpeedMoE, step: int
    ) -> MoELosses:
        """:meth:`DeepSpeedMoE.distill` before the cut-off, :meth:`DeepSpeedMoE.loss` from it on.

        Args:
            student: to be trained.
            batch: as for ``loss``.
            teacher: in evaluation mode; not run from the cut-off on.
            step: from 0.

        Returns:
            The total and its terms, 0-dim each.
        """
        return student.distill(batch, teacher) if step < self.cutoff else student.loss(batch)
