"""What CPRD's tensors are called in transformers' ViTModel and BertModel."""

from __future__ import annotations

from encfast.layers.patch import flat_kernel
from encfast.models._cprd_config import CprdConfig
from encfast.weights import Tied, both, tied_table, tied_token, vit_block

_PATCH = "embeddings.patch_embeddings.projection"


def student_names(config: CprdConfig, *, image: str = "vit.", text: str = "bert.") -> list[Tied]:
    """Of both encoders of :class:`~encfast.models.cprd.Cprd`.

    Args:
        config: of the model.
        image, text: what stands in front of the names of a ViTModel and of a BertModel.
    """
    entries = _image_names(config, image) + _embedding_names(text)
    for i in range(config.text_depth):
        entries += _bert_block(f"text.blocks.{i}", f"{text}encoder.layer.{i}", ("norm1", "norm2"))
    return entries


def teacher_names(config: CprdConfig, *, image: str = "vit.", text: str = "bert.") -> list[Tied]:
    """Of both encoders of :class:`~encfast.models.cprd.CrossEncoder`, as :func:`student_names`."""
    entries = _image_names(config, image) + _embedding_names(text)
    for i in range(config.teacher_depth):
        ours, theirs = f"blocks.{i}", f"{text}encoder.layer.{i}"
        entries += _bert_block(ours, theirs, ("norm0", "norm2"))
        if i >= config.teacher_text_layers:
            kinds = {"q": "query", "k": "key", "v": "value"}
            for name, kind in kinds.items():
                entries += both(f"{ours}.cross.{name}", f"{theirs}.crossattention.self.{kind}")
            entries += both(f"{ours}.cross.out", f"{theirs}.crossattention.output.dense")
            entries += both(f"{ours}.norm1", f"{theirs}.crossattention.output.LayerNorm")
    return entries


def _image_names(config: CprdConfig, prefix: str) -> list[Tied]:
    dim, rows = config.dim, 1
    for size, patch in zip(config.image_size, config.patch_size, strict=True):
        rows *= size // patch
    entries = [
        tied_token("image.class_token", f"{prefix}embeddings.cls_token", dim),
        tied_table(
            "image.positions.table", f"{prefix}embeddings.position_embeddings", 1 + rows, dim
        ),
        Tied(
            "image.embed.proj.weight",
            (f"{prefix}{_PATCH}.weight",),
            **flat_kernel(dim, config.channels, config.patch_size),
        ),
        Tied("image.embed.proj.bias", (f"{prefix}{_PATCH}.bias",)),
        *both("image.norm", f"{prefix}layernorm"),
    ]
    for i in range(config.depth):
        entries += vit_block(f"image.stack.blocks.{i}", f"{prefix}layers.{i}")
    return entries


def _embedding_names(prefix: str) -> list[Tied]:
    tables = {"word": "word", "position": "position", "segment": "token_type"}
    return [
        *(
            Tied(f"embed.{ours}.weight", (f"{prefix}embeddings.{theirs}_embeddings.weight",))
            for ours, theirs in tables.items()
        ),
        *both("embed.norm", f"{prefix}embeddings.LayerNorm"),
    ]


def _bert_block(ours: str, theirs: str, norms: tuple[str, str]) -> list[Tied]:
    attention = f"{theirs}.attention"
    return [
        *both(f"{ours}.attn.qkv", *(f"{attention}.self.{x}" for x in ("query", "key", "value"))),
        *both(f"{ours}.attn.out", f"{attention}.output.dense"),
        *both(f"{ours}.{norms[0]}", f"{attention}.output.LayerNorm"),
        *both(f"{ours}.mlp.up", f"{theirs}.intermediate.dense"),
        *both(f"{ours}.mlp.down", f"{theirs}.output.dense"),
        *both(f"{ours}.{norms[1]}", f"{theirs}.output.LayerNorm"),
    ]
