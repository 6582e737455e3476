"""What CAE's tensors are called in its published code (Atten4Vis/CAE)."""

from __future__ import annotations

from encfast.layers.patch import flat_kernel
from encfast.models._cae_config import CaeConfig
from encfast.weights import Tied, both, tied_table, tied_token


def published_names(config: CaeConfig) -> list[Tied]:
    """The name map of a model that pre-trains."""
    c = config
    entries = [
        tied_token("encoder.class_token", "encoder.cls_token", c.dim),
        tied_table("encoder.positions.table", "encoder.pos_embed", 1 + c.num_patches, c.dim),
        Tied(
            "encoder.embed.proj.weight",
            ("encoder.patch_embed.proj.weight",),
            **flat_kernel(c.dim, c.channels, c.patch_size),
        ),
        Tied("encoder.embed.proj.bias", ("encoder.patch_embed.proj.bias",)),
        *both("encoder.norm", "encoder.norm"),
        tied_token("regressor.mask_token", "mask_token", c.decoder_dim),
        tied_table("positions.table", "rd_pos_embed", 1 + c.num_patches, c.decoder_dim),
        *both("decoder.norm", "decoder.norm"),
        *both("decoder.head", "decoder.head"),
    ]
    if c.decoder_dim != c.dim:
        entries += both("project.0", "encoder_to_regresser")
        entries += both("project.1", "encoder_to_regresser_norm")
    # Published code has this norm in v2 as well, and does not use it.
    if c.objective == "tokens":
        entries += both("regressor.norm", "regresser.norm")
    for i in range(c.depth):
        entries += _block(f"encoder.stack.blocks.{i}", f"encoder.blocks.{i}")
    for i in range(c.regressor_depth):
        entries += _cross_block(f"regressor.blocks.{i}", f"regresser.regressor_blocks.{i}")
    for i in range(c.decoder_depth):
        entries += _block(f"decoder.stack.blocks.{i}", f"decoder.decoder_blocks.{i}")
    return entries


def _block(ours: str, theirs: str) -> list[Tied]:
    return [
        *both(f"{ours}.norm1", f"{theirs}.norm1"),
        Tied(f"{ours}.attn.qkv.weight", (f"{theirs}.attn.qkv.weight",)),
        Tied(f"{ours}.attn.qkv.q_bias", (f"{theirs}.attn.q_bias",)),
        Tied(f"{ours}.attn.qkv.v_bias", (f"{theirs}.attn.v_bias",)),
        *both(f"{ours}.attn.out", f"{theirs}.attn.proj"),
        *both(f"{ours}.norm2", f"{theirs}.norm2"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
        Tied(f"{ours}.scale1", (f"{theirs}.gamma_1",)),
        Tied(f"{ours}.scale2", (f"{theirs}.gamma_2",)),
    ]


def _cross_block(ours: str, theirs: str) -> list[Tied]:
    attn = f"{theirs}.cross_attn"
    return [
        *(
            entry
            for name in "qkv"
            for entry in both(f"{ours}.norm_{name}", f"{theirs}.norm1_{name}")
        ),
        *(Tied(f"{ours}.attn.{name}.weight", (f"{attn}.{name}.weight",)) for name in "qkv"),
        Tied(f"{ours}.attn.q.bias", (f"{attn}.q_bias",)),
        Tied(f"{ours}.attn.v.bias", (f"{attn}.v_bias",)),
        *both(f"{ours}.attn.out", f"{attn}.proj"),
        *both(f"{ours}.norm2", f"{theirs}.norm2_cross"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp_cross.fc1"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp_cross.fc2"),
        Tied(f"{ours}.scale1", (f"{theirs}.gamma_1_cross",)),
        Tied(f"{ours}.scale2", (f"{theirs}.gamma_2_cross",)),
    ]
