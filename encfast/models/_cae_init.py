"""What CAE's weights start from, where neither BERT's nor Glorot's habit is meant."""

from __future__ import annotations

import math

from torch import nn

from encfast.layers import Block, PatchEmbed, PatchEncoder
from encfast.layers.base import init_normal
from encfast.models._cae_regressor import Regressor, RegressorBlock

_STD = 0.02


def init_scaled(model: nn.Module) -> None:
    """BEiT's start: normal weights, cut at one deviation, both outputs of block i / sqrt(2i).

    Source: Bao et al., arXiv 2106.08254, section 2.5.
    """
    init_normal(model, _STD)
    for child in model.modules():
        if isinstance(child, nn.Linear):
            _normal(child.weight)
    for child in model.modules():
        if isinstance(child, nn.ModuleList):
            _scale_outputs(child)


def init_tokens(model: nn.Module) -> None:
    """Class token, mask token and the projection of patches: normal, cut at one deviation."""
    for child in model.modules():
        if isinstance(child, PatchEmbed):
            _normal(child.proj.weight)
        elif isinstance(child, PatchEncoder):
            _normal(child.class_token)
        elif isinstance(child, Regressor):
            _normal(child.mask_token)


def _normal(weight: nn.Parameter) -> None:
    nn.init.trunc_normal_(weight, std=_STD, a=-_STD, b=_STD)


def _scale_outputs(blocks: nn.ModuleList) -> None:
    for i, block in enumerate(blocks):
        if isinstance(block, (Block, RegressorBlock)):
            for layer in (block.attn.out, block.mlp.down):
                layer.weight.data.div_(math.sqrt(2.0 * (i + 1)))
