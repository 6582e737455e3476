"""encfast's losses for open_clip against open_clip's own, on one process."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encfast.integrations import open_clip as hook
from vision import importorskip

open_clip = importorskip("open_clip")


def results(loss: nn.Module, output_dict: bool) -> list[Tensor]:
    """The loss, and the gradients of features, scale and bias."""
    draw = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(9, 24, generator=draw), dim=1) for _ in range(2))
    scale, bias = torch.tensor(12.0), torch.tensor(-3.0)
    leaves = [x.requires_grad_() for x in (image, text, scale, bias)]
    value = loss(*leaves, output_dict=output_dict)
    if output_dict:
        (value,) = value.values()
    used = leaves if "SigLip" in type(loss).__name__ else leaves[:3]  # a softmax has no bias
    return [value.detach(), *torch.autograd.grad(value, used)]


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_losses_and_gradients(name, output_dict):
    ours, theirs = (getattr(library, name)() for library in (hook, open_clip.loss))
    for found, expected in zip(*(results(x, output_dict) for x in (ours, theirs)), strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_signatures(name):
    """Constructors and calls take the same arguments, in the same order, with the same defaults."""
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(getattr(library, name), method)).parameters.values()
            for library in (hook, open_clip.loss)
        )
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
