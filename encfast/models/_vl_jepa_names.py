"""VL-JEPA's towers under transformers' names: VJEPA2Model, LlamaModel, Gemma3TextModel."""

from __future__ import annotations

from encfast.config import BlockConfig
from encfast.layers.patch import flat_kernel
from encfast.models._vl_jepa_config import LlamaConfig, TextConfig, VisionConfig
from encfast.weights import Tied, both


def vision_names(config: VisionConfig) -> list[Tied]:
    """Of :class:`VisionEncoder` of ``config``, in a ``VJEPA2Model`` without its predictor."""
    kernel = flat_kernel(config.dim, config.channels, config.patch_size)
    patches = "encoder.embeddings.patch_embeddings.proj"
    names = [
        Tied("embed.proj.weight", (f"{patches}.weight",), **kernel),
        Tied("embed.proj.bias", (f"{patches}.bias",)),
        *both("norm", "encoder.layernorm"),
    ]
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        names += [
            *both(f"{ours}.norm1", f"{theirs}.norm1"),
            *both(
                f"{ours}.attn.qkv", *(f"{theirs}.attention.{x}" for x in ("query", "key", "value"))
            ),
            *both(f"{ours}.attn.out", f"{theirs}.attention.proj"),
            *both(f"{ours}.norm2", f"{theirs}.norm2"),
            *both(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
            *both(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
        ]
    return names


def llama_names(config: LlamaConfig, *, first: int = 0) -> list[Tied]:
    """Of :class:`Llama` of ``config``, in a ``LlamaModel`` from its layer ``first`` on.

    Llama 3.2 1B has 16, of which 8 to 15 are the predictor's.
    """
    pairs = [("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")]
    layers = _layers(config.block(causal=False), config.depth, first, pairs)
    return [Tied("norm.weight", ("norm.weight",)), *layers]


def gemma_names(config: TextConfig) -> list[Tied]:
    """Of :class:`TextEncoder` of ``config`` but its projection, in a ``Gemma3TextModel``."""
    pairs = [
        ("norm1", "input_layernorm"),
        ("branch_norm1", "post_attention_layernorm"),
        ("norm2", "pre_feedforward_layernorm"),
        ("branch_norm2", "post_feedforward_layernorm"),
        ("attn.q_norm", "self_attn.q_norm"),
        ("attn.k_norm", "self_attn.k_norm"),
    ]
    return [
        Tied("tokens.weight", ("embed_tokens.weight",)),
        Tied("norm.weight", ("norm.weight",)),
        *_layers(config.block(0), config.depth, 0, pairs),
    ]


def _layers(block: BlockConfig, depth: int, first: int, pairs: list[tuple[str, str]]) -> list[Tied]:
    """What Llama and Gemma have in common, and ``pairs`` of further names."""
    rows = tuple(n * block.head_size for n in (block.num_heads, block.kv_heads, block.kv_heads))
    names = []
    for i in range(depth):
        ours, theirs = f"stack.blocks.{i}", f"layers.{first + i}"
        qkv = tuple(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv")
        names.append(Tied(f"{ours}.attn.qkv.weight", qkv, sizes=rows))
        parts = {
            "attn.out": ("self_attn.o_proj",),
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down": ("mlp.down_proj",),
        } | {a: (b,) for a, b in pairs}
        names += [
            Tied(f"{ours}.{a}.weight", tuple(f"{theirs}.{name}.weight" for name in whole))
            for a, whole in parts.items()
        ]
    return names
