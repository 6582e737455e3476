"""What Hi-End-MAE's tensors are called in its published code (FengheTan9/Hi-End-MAE)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from encfast.layers.patch import flat_kernel
from encfast.models._hi_end_mae_config import HiEndMaeConfig
from encfast.weights import Tied, both, tied_token

_KV = ".cross_attn.kv."


def published_names(config: HiEndMaeConfig) -> list[Tied]:
    """The name map of a model that pre-trains, for tensors that went through :func:`split_kv`."""
    c = config
    entries = [
        tied_token("encoder.class_token", "encoder.cls_token", c.dim),
        Tied(
            "encoder.embed.proj.weight",
            ("encoder.patch_embed.proj.weight",),
            **flat_kernel(c.dim, c.channels, c.patch_size),
        ),
        Tied("encoder.embed.proj.bias", ("encoder.patch_embed.proj.bias",)),
        *both("encoder.norm", "encoder.norm"),
        tied_token("decoder.mask_token", "mask_token", c.decoder_dim),
        *both("decoder.norm", "decoder.norm"),
        *both("decoder.predict", "decoder.head"),
    ]
    for i in range(c.depth):
        entries += _block(f"encoder.stack.blocks.{i}", f"encoder.blocks.{i}")
    for i in range(c.decoder_depth):
        entries += _block(f"decoder.stack.blocks.{i}", f"decoder.blocks.{i}")
    for i in range(len(c.levels)):
        entries += _cross_block(f"decoder.blocks.{i}", f"decoder.cross_attention_blocks.{i}")
    for i in range(len(c.levels) + 1):
        entries += both(f"decoder.bridges.{i}", f"encoder_to_decoder.{i}")
    return entries


def split_kv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict, its projections of keys and values apart, without ``module.``."""
    parted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if _KV not in name:
            parted[name] = tensor
            continue
        for kind, part in zip("kv", tensor.chunk(2), strict=True):
            parted[name.replace(_KV, f".cross_attn.{kind}.")] = part
    return parted


def _block(ours: str, theirs: str) -> list[Tied]:
    return [
        *both(f"{ours}.norm1", f"{theirs}.norm1"),
        *both(f"{ours}.attn.qkv", f"{theirs}.attn.qkv"),
        *both(f"{ours}.attn.out", f"{theirs}.attn.proj"),
        *_second_half(ours, theirs),
    ]


def _cross_block(ours: str, theirs: str) -> list[Tied]:
    return [
        *both(f"{ours}.norm0", f"{theirs}.norm0"),
        *both(f"{ours}.attn.qkv", f"{theirs}.self_attn.qkv"),
        *both(f"{ours}.attn.out", f"{theirs}.self_attn.proj"),
        *both(f"{ours}.norm1", f"{theirs}.norm1"),
        *(e for x in "qkv" for e in both(f"{ours}.cross.{x}", f"{theirs}.cross_attn.{x}")),
        *both(f"{ours}.cross.out", f"{theirs}.cross_attn.proj"),
        *_second_half(ours, theirs),
    ]


def _second_half(ours: str, theirs: str) -> list[Tied]:
    return [
        *both(f"{ours}.norm2", f"{theirs}.norm2"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
    ]
