"""encfast inside of timm, before and after: a ViT-S/16 of random weights, images of one size.

No image has padding, so unpadding wins nothing: what is left is the attention kernel against
PyTorch's own. With patch dropout both drop the same patches, timm by sort and gather, encfast by
selection and one gather of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from before_after import BF16, FP32, against_the_first, alike, variants
from harness import BenchSpec, Call, Gate, Setting, Variant, absent
from steps import adamw_step, verify_step
from timing import short_name
from torch import Tensor, nn

import vision

_CLASSES = 10
_TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@dataclass(frozen=True)
class Inputs:
    """One batch, how the model differs from ViT-S/16, and what every row must make of it."""

    options: dict[str, Any]
    images: Tensor  # fp32 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    logits: Tensor  # fp32 [B, 10], in eval mode
    expected: tuple[float, float]  # loss and gradient norm of a step, for training


def _inputs(options: dict[str, Any], batch: int, step: bool, device: str) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    size = options.get("img_size", 224)
    images = torch.randn(batch, 3, size, size, generator=draw).to(device)
    labels = torch.randint(_CLASSES, (batch,), generator=draw).to(device)
    given = Inputs(options, images, labels, torch.empty(0), (0.0, 0.0))
    with torch.inference_mode():
        logits = _model(given, False, FP32).eval()(images)
    expected = _step(given, False, FP32)() if step else (0.0, 0.0)
    return Inputs(options, images, labels, logits, expected)


def _model(inputs: Inputs, ours: bool, dtype: torch.dtype) -> nn.Module:
    timm = vision.load("timm")
    from encfast.integrations import timm as hook

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=_CLASSES, **inputs.options)
    model = model.to(inputs.images.device, dtype)
    return hook.accelerate(model) if ours else model


def _inference(inputs: Inputs, ours: bool, dtype: torch.dtype) -> Call:
    model, images = _model(inputs, ours, dtype).eval(), inputs.images.to(dtype)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return Call(run, note=_note(inputs))


def _step(inputs: Inputs, ours: bool, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    model = _model(inputs, ours, FP32).train()

    def loss() -> Tensor:
        torch.manual_seed(1)  # all rows drop the same patches
        return F.cross_entropy(model(inputs.images), inputs.labels)

    return adamw_step(model, loss, inputs.images.device, dtype)


def _training(inputs: Inputs, ours: bool, dtype: torch.dtype) -> Call:
    return Call(_step(inputs, ours, dtype), note=_note(inputs))


def _note(inputs: Inputs) -> str:
    rate = inputs.options.get("patch_drop_rate", 0)
    return f"{rate:.0%} of the patches dropped" if rate else "no padding"


def _tokens(inputs: Inputs) -> float:
    """With the class token, before any is dropped."""
    patch = inputs.options.get("patch_size", 16)
    return float(len(inputs.images) * (1 + (inputs.images.shape[-1] // patch) ** 2))


def _verify(inputs: Inputs, variant: Variant, found: Tensor) -> Gate:
    return alike(found, inputs.logits, variant)


def _spec(
    name: str,
    title: str,
    options: dict[str, Any],
    batch: int,
    dtype: torch.dtype,
    setting: Setting,
    step: bool,
) -> BenchSpec:
    short, phase = short_name(dtype), "step" if step else "inference"
    ways = (("timm", False), ("encfast accelerate", True))
    rows = variants(ways, _training if step else _inference, dtype)
    return BenchSpec(
        name=f"integrations/timm-{name}-{phase}-{short}",
        title=f"inside timm, {phase}, {title}, {short}",
        inputs=lambda: _inputs(options, batch, step, setting.device),
        variants=rows,
        verify=verify_step if step else _verify,
        tokens=_tokens,
        pairs=against_the_first(rows),
        needs=("timm",),
        budget_s=0.2 if setting.suite == "tiny" else 10.0,
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The benches of timm: of the full suite, and tiny ones where there is a timm."""
    if setting.suite == "tiny":
        if absent(("timm",)):
            return []
        tiny = ("three images", _TINY, 3, FP32, setting)
        return [_spec("tiny", *tiny, step=step) for step in (False, True)]
    if setting.suite != "full":
        return []
    whole: dict[str, Any] = {}
    dropped = {"patch_drop_rate": 0.5}
    cases = (
        ("uniform", "ViT-S/16, 8 images of 224 pixels", whole, False),
        ("uniform", "ViT-S/16, 8 images of 224 pixels", whole, True),
        ("patch-dropout", "ViT-S/16, 8 images, half of the patches", dropped, True),
    )
    return [
        _spec(name, title, options, 8, dtype, setting, step)
        for name, title, options, step in cases
        for dtype in (FP32, BF16)
    ]
