"""One optimiser step of MAE's pre-training: a quarter of the patches visible, loss on the others.

Both variants have the same weights, images and noise. Before anything is timed, the loss of the
first step and the norm of all its gradients must equal those of transformers' ViTMAE in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import BenchSpec, Call, Setting, Variant
from steps import Step, adamw_step, verify_step
from torch import Tensor, nn

from encfast import create
from encfast.data import ImageBatch, keep_count
from encfast.data.images import smooth_images
from encfast.patch_mask import PatchMask
from encfast.weights import load

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """What is trained, on how many images at once."""

    title: str
    batch: int
    variant: str = "base"
    overrides: tuple[tuple[str, Any], ...] = ()  # fields of the variant's config

    def model(self) -> Any:
        """Ours, with random weights."""
        return create(f"mae/{self.variant}", **dict(self.overrides))


@dataclass(frozen=True)
class Inputs:
    """Images and noise, the weights under transformers' names, and what the first step gives."""

    case: Case
    images: Tensor  # [B, C, H, W]
    noise: Tensor  # [B, P]
    weights: dict[str, Tensor]
    expected: tuple[float, float]  # loss, norm of all gradients


def _transformers(case: Case) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    c = case.model().config
    config = ViTMAEConfig(
        image_size=c.image_size[0],
        patch_size=c.patch_size[0],
        num_channels=c.channels,
        hidden_size=c.dim,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        intermediate_size=c.ffn_dim,
        layer_norm_eps=c.norm_eps,
        decoder_hidden_size=c.decoder_dim,
        decoder_num_hidden_layers=c.decoder_depth,
        decoder_num_attention_heads=c.decoder_heads,
        decoder_intermediate_size=c.decoder_ffn_dim,
        mask_ratio=c.mask_ratio,
        norm_pix_loss=c.norm_pix_loss,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return ViTMAEForPreTraining(config)


def _inputs(case: Case, device: str) -> Inputs:
    model = _transformers(case)
    c, generator = case.model().config, torch.Generator().manual_seed(0)
    images = smooth_images(case.batch, c.channels, c.image_size, generator=generator).to(device)
    noise = torch.rand(case.batch, c.num_patches, generator=generator).to(device)
    inputs = Inputs(case, images, noise, model.state_dict(), (0.0, 0.0))
    return Inputs(case, images, noise, model.state_dict(), _peer_step(inputs, FP32)())


def _peer_step(inputs: Inputs, dtype: torch.dtype) -> Step:
    model = _transformers(inputs.case).train().to(inputs.images.device)
    model.load_state_dict(inputs.weights)
    return adamw_step(
        model, lambda: model(inputs.images, noise=inputs.noise).loss, inputs.images.device, dtype
    )


def _our_step(inputs: Inputs, dtype: torch.dtype) -> Step:
    model = inputs.case.model().train().to(inputs.images.device)
    load(model, inputs.weights, model.reference_names())
    c = model.config
    keep = keep_count(c.num_patches, c.mask_ratio)

    def loss() -> Tensor:
        mask = PatchMask.from_noise(inputs.noise, keep)
        return model.loss(ImageBatch(inputs.images, mask)).total

    return adamw_step(model, loss, inputs.images.device, dtype)


def _spec(name: str, case: Case, dtype: torch.dtype, setting: Setting) -> BenchSpec:
    short, long = ("fp32", "fp32") if dtype == FP32 else ("bf16", "bf16 autocast")
    makers = {f"transformers {short}": _peer_step, f"encfast {short}": _our_step}

    def call(make: Callable[..., Any], inputs: Inputs) -> Call:
        return Call(make(inputs, dtype))

    variants = tuple(
        Variant(n, dtype, functools.partial(call, m), ours=m is _our_step)
        for n, m in makers.items()
    )
    return BenchSpec(
        name=f"mae/{name}-{short}",
        title=f"MAE pre-training step, {case.title}, AdamW, {long}",
        inputs=lambda: _inputs(case, setting.device),
        variants=variants,
        verify=verify_step,
        tokens=lambda inputs: float(inputs.noise.numel()),  # patches
        pairs=((variants[1].name, variants[0].name),),
        needs=("transformers",),
        budget_s={"tiny": 0.2, "quick": 2.0, "full": 20.0}[setting.suite],
    )


def specs(setting: Setting) -> list[BenchSpec]:
    """The MAE benches of a suite."""
    if setting.suite == "tiny":
        square = (("image_size", (24, 24)),)
        return [_spec("tiny", Case("3 images", 3, "tiny", square), FP32, setting)]
    if setting.suite == "quick":
        shallow = (("depth", 4), ("decoder_depth", 2))
        case = Case("ViT-B/16 of 4 + 2 blocks, 4 images", 4, overrides=shallow)
        return [_spec("4+2-blocks", case, BF16, setting)]
    case = Case("ViT-B/16, 16 images", 16)
    return [_spec("B16", case, dtype, setting) for dtype in (FP32, BF16)]
