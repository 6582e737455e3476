"""What the tensors of Frozen in Time are called in its published code, timm and transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encfast.layers.patch import flat_kernel
from encfast.weights import Tied, both, tied_table, tied_token

if TYPE_CHECKING:
    from encfast.models.frozen_in_time import FrozenInTimeConfig


def image_names(config: FrozenInTimeConfig, prefix: str = "") -> list[Tied]:
    """The part of the clip tower that sees images, as timm's VisionTransformer names it."""
    c, clips = config, "clips."
    entries = [
        tied_token(f"{clips}class_token", f"{prefix}cls_token", c.dim),
        tied_table(f"{clips}positions.table", f"{prefix}pos_embed", 1 + c.num_patches, c.dim),
        Tied(
            f"{clips}embed.proj.weight",
            (f"{prefix}patch_embed.proj.weight",),
            **flat_kernel(c.dim, c.channels, c.patch_size),
        ),
        Tied(f"{clips}embed.proj.bias", (f"{prefix}patch_embed.proj.bias",)),
        *both(f"{clips}norm", f"{prefix}norm"),
    ]
    for i in range(c.depth):
        entries += _pairs(
            f"{clips}blocks.{i}",
            f"{prefix}blocks.{i}",
            {
                "norm1": "norm1",
                "space.qkv": "attn.qkv",
                "space.out": "attn.proj",
                "norm2": "norm2",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
            },
        )
    return entries


def time_names(config: FrozenInTimeConfig, prefix: str) -> list[Tied]:
    """The rest of the clip tower, as published."""
    c = config
    entries = [tied_table("clips.times", f"{prefix}temporal_embed", c.frames, c.dim)]
    pairs = {"norm3": "norm3", "time.qkv": "timeattn.qkv", "time.out": "timeattn.proj"}
    for i in range(c.depth):
        entries += _pairs(f"clips.blocks.{i}", f"{prefix}blocks.{i}", pairs)
    return entries


def text_names(config: FrozenInTimeConfig, prefix: str = "") -> list[Tied]:
    """The text tower, as transformers' DistilBertModel or BertModel names it."""
    bert = config.text == "bert"
    embed, table = "text.embed", f"{prefix}embeddings."
    entries = [
        Tied(f"{embed}.word.weight", (f"{table}word_embeddings.weight",)),
        Tied(f"{embed}.position.weight", (f"{table}position_embeddings.weight",)),
        *both(f"{embed}.norm", f"{table}LayerNorm"),
    ]
    if bert:
        entries.append(Tied(f"{embed}.segment.weight", (f"{table}token_type_embeddings.weight",)))
        entries += both("text.pooler", f"{prefix}pooler.dense")
    for i in range(config.text_depth):
        ours, theirs = f"text.stack.blocks.{i}", f"{prefix}{_LAYERS[config.text]}.{i}"
        qkv, pairs = _TEXT_BLOCK[config.text]
        entries += both(f"{ours}.attn.qkv", *(f"{theirs}.{name}" for name in qkv))
        entries += _pairs(ours, theirs, pairs)
    return entries


def published_names(config: FrozenInTimeConfig) -> list[Tied]:
    """Everything, as m-bain/frozen-in-time names it."""
    video = "video_model."
    return [
        *image_names(config, video),
        *time_names(config, video),
        *text_names(config, "text_model."),
        *both("clip_proj", "vid_proj.0"),
        *both("text_proj", "txt_proj.1"),
    ]


_LAYERS = {"distilbert": "transformer.layer", "bert": "encoder.layer"}
_TEXT_BLOCK: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "distilbert": (
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        {
            "attn.out": "attention.out_lin",
            "norm1": "sa_layer_norm",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
            "norm2": "output_layer_norm",
        },
    ),
    "bert": (
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        {
            "attn.out": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "norm2": "output.LayerNorm",
        },
    ),
}


def _pairs(ours: str, theirs: str, layers: dict[str, str]) -> list[Tied]:
    return [
        tied for own, name in layers.items() for tied in both(f"{ours}.{own}", f"{theirs}.{name}")
    ]
