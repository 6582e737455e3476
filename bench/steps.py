"""Steps of training as calls of a bench: what they return, and how they are verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from harness import Gate, Variant
from torch import Tensor, nn

LEARNING_RATE = 1e-5
# Relative; the loss of a step in bf16 is known to about three digits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Step = Callable[[], tuple[float, float]]  # its loss, and the norm of gradients


class Expecting(Protocol):
    """Inputs that know what the first step gives."""

    @property
    def expected(self) -> tuple[float, float]:
        """Its loss, and the norm of gradients."""


def adamw_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    watched: Sequence[nn.Parameter] | None = None,
) -> Step:
    """Forward, backward and AdamW; returns the loss and the norm of the watched gradients.

    Args:
        model: what is trained.
        loss: of it.
        device: of its input.
        dtype: bfloat16 runs the forward under autocast.
        watched: parameters; None: all that are trained.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=LEARNING_RATE, fused=True)
    seen = learned if watched is None else watched

    def step() -> tuple[float, float]:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        norm = nn.utils.get_total_norm([p.grad for p in seen if p.grad is not None])
        optimiser.step()
        return value.item(), norm.item()

    return step


def verify_step(inputs: Expecting, variant: Variant, found: Any) -> Gate:
    """Whether loss and gradient norm of the first step are those of the inputs."""
    bar = TOLERANCE[variant.dtype]
    worst = max(abs(x / e - 1) for x, e in zip(found, inputs.expected, strict=True))
    if worst <= bar:
        return Gate(True, f"gradients off by {worst:.0e}")
    return Gate(False, f"loss or gradient norm is off by {worst:.0e}, expected at most {bar:.0e}")
