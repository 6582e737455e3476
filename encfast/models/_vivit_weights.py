"""Where ViViT's weights come from: a ViT for images, and stage 1 of its own training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from encfast import weights
from encfast.config import nearest
from encfast.layers import resize_positions
from encfast.layers.patch import flat_kernel
from encfast.models._vivit_encoder import Encoder
from encfast.weights import Tied, both, tied_table, tied_token, vit_block

if TYPE_CHECKING:
    from encfast.models.vivit import Vivit, VivitConfig

Inflation = Literal["central", "average"]
TemporalInit = Literal["stage1", "image", "random"]
_KERNEL = "embeddings.patch_embeddings.projection.weight"


def inflate(kernel: Tensor, frames: int, how: Inflation) -> Tensor:
    """A kernel over images as one over tubelets (arXiv 2103.15691, equations 8 and 9).

    Both give on a still clip what the kernel gives on its image.

    Args:
        kernel: ``[D, C, p, q]``.
        frames: t, depth of the tubelets.
        how: "central": the kernel at frame t // 2 and zeros elsewhere; "average": a t-th of the
            kernel at every frame.

    Returns:
        ``[D, C, t, p, q]``.

    Raises:
        ValueError: for another ``how``.
    """
    if how not in get_args(Inflation):
        raise ValueError(f"inflation {how!r} is unknown; {nearest(how, get_args(Inflation))}")
    if how == "average":
        return kernel.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames
    inflated = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    inflated[:, :, frames // 2] = kernel
    return inflated


def image_names(config: VivitConfig) -> list[Tied]:
    """Name map of tubelets and spatial transformer to transformers' ViTModel."""
    c, rows = config, 1 + config.num_patches
    entries = [
        tied_token("spatial.class_token", "embeddings.cls_token", c.dim),
        tied_table("spatial.positions.table", "embeddings.position_embeddings", rows, c.dim),
        Tied("embed.proj.weight", (_KERNEL,), **flat_kernel(c.dim, c.channels, c.patch_size)),
        Tied("embed.proj.bias", (_KERNEL.replace("weight", "bias"),)),
        *both("spatial.norm", "layernorm"),
    ]
    for i in range(c.spatial_depth):
        entries += vit_block(f"spatial.stack.blocks.{i}", f"layers.{i}")
    return entries


def load_image_model(model: Vivit, tensors: Mapping[str, Tensor], inflation: Inflation) -> None:
    """See :meth:`encfast.models.vivit.Vivit.load_image_model`."""
    given = dict(tensors)
    if _KERNEL in given:
        given[_KERNEL] = inflate(given[_KERNEL], model.config.patch_size[0], inflation)
    entries = image_names(model.config)
    filled = {entry.ours for entry in entries}
    weights.load(
        model,
        given,
        entries,
        ignore=[name for name in given if name.startswith("pooler.")],
        keep=[name for name in model.state_dict() if name not in filled],
    )


@torch.no_grad()
def copy_first_stage(first: Vivit, second: Vivit, temporal_init: TemporalInit) -> None:
    """Fills a model of stage 2; see :meth:`encfast.models.vivit.Vivit.second_stage`."""
    if temporal_init not in get_args(TemporalInit):
        raise ValueError(
            f"temporal_init {temporal_init!r} is unknown; "
            f"{nearest(temporal_init, get_args(TemporalInit))}"
        )
    second.embed.load_state_dict(first.embed.state_dict())
    second.spatial.load_state_dict(first.spatial.state_dict())
    if temporal_init == "stage1":
        state = first.temporal.state_dict()
        state["positions.table"] = resize_positions(
            state["positions.table"], (first.config.time,), (second.config.time,), class_token=True
        )
        second.temporal.load_state_dict(state)
        if first.config.num_labels == second.config.num_labels:
            second.head.load_state_dict(first.head.state_dict())
    elif temporal_init == "image":
        _copy_first_blocks(first.spatial, second.temporal)


def _copy_first_blocks(source: Encoder, target: Encoder) -> None:
    if target.stack.depth > source.stack.depth:
        raise ValueError(
            f"temporal_init 'image' needs {target.stack.depth} spatial blocks, there are "
            f"{source.stack.depth}"
        )
    for own, given in zip(target.stack.blocks, source.stack.blocks, strict=False):
        own.load_state_dict(given.state_dict())
    target.norm.load_state_dict(source.norm.state_dict())
    target.class_token.copy_(source.class_token)
