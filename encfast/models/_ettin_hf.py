"""Ettin's weights and config under the names of transformers' ModernBert and ModernBertDecoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from encfast.weights import Tied

if TYPE_CHECKING:
    from encfast.models.ettin import EttinConfig

_MODEL_TYPES = {"modernbert": False, "modernbert-decoder": True}
# What Ettin fixes; a checkpoint that says otherwise is another architecture.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}
# The second name of the tied embedding, which some files also hold.
TIED_COPY = "decoder.weight"


def entries(config: EttinConfig) -> list[Tied]:
    """The name map: with a head that of ForMaskedLM or ForCausalLM, else that of the bare model."""
    body = "model." if config.lm_head else ""
    head = "lm_head." if config.causal else "head."
    names = [
        Tied("embed.word.weight", (f"{body}embeddings.tok_embeddings.weight",)),
        Tied("embed.norm.weight", (f"{body}embeddings.norm.weight",)),
        Tied("norm.weight", (f"{body}final_norm.weight",)),
    ]
    if config.lm_head:
        names += [Tied(f"head.{n}.weight", (f"{head}{n}.weight",)) for n in ("dense", "norm")]
        names.append(Tied("head.decoder.bias", ("decoder.bias",)))
    qkv = ("q_proj", "k_proj", "v_proj") if config.causal else ("Wqkv",)
    for i in range(config.num_layers):
        ours, theirs = f"stack.blocks.{i}.", f"{body}layers.{i}."
        if i > 0:  # layer 0 has no norm before attention
            names.append(Tied(f"{ours}norm1.weight", (f"{theirs}attn_norm.weight",)))
        names += [
            Tied(f"{ours}attn.qkv.weight", tuple(f"{theirs}attn.{n}.weight" for n in qkv)),
            Tied(f"{ours}attn.out.weight", (f"{theirs}attn.Wo.weight",)),
            Tied(f"{ours}norm2.weight", (f"{theirs}mlp_norm.weight",)),
            Tied(f"{ours}mlp.up.weight", (f"{theirs}mlp.Wi.weight",)),
            Tied(f"{ours}mlp.down.weight", (f"{theirs}mlp.Wo.weight",)),
        ]
    return names


def fields_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EttinConfig from a ``config.json``.

    Raises:
        ValueError: naming the entry that Ettin cannot represent.
    """
    kind = theirs.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}, expected one of {sorted(_MODEL_TYPES)}")
    for name, value in _FIXED.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"config.json has {name} = {theirs[name]!r}, Ettin has {value!r}")
    bases = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
    if "global_rope_theta" in theirs:  # configs written before transformers 5
        bases["full_attention"] = theirs["global_rope_theta"]
        bases["sliding_attention"] = theirs.get("local_rope_theta") or bases["full_attention"]
    for layer_type, rope in (theirs.get("rope_parameters") or {}).items():
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"config.json has rope_parameters of rope_type {rope['rope_type']!r}, "
                "Ettin has 'default'"
            )
        bases[layer_type] = rope.get("rope_theta", bases[layer_type])
    depth, every = theirs["num_hidden_layers"], theirs.get("global_attn_every_n_layers", 3)
    if theirs.get("layer_types"):
        every = _global_every(theirs["layer_types"])
    head = (theirs.get("architectures") or ["ForMaskedLM"])[0]
    vocab_size = theirs.get("vocab_size", 50368)
    return {
        "dim": theirs["hidden_size"],
        "num_layers": depth,
        "num_heads": theirs["num_attention_heads"],
        "ffn_dim": theirs["intermediate_size"],
        "causal": _MODEL_TYPES[kind],
        "vocab_size": vocab_size,
        "max_positions": theirs.get("max_position_embeddings", 8192),
        "half_window": theirs.get("local_attention", 128) // 2,
        "window_mode": "hf",
        "global_every": every,
        "rope_theta_global": bases["full_attention"],
        "rope_theta_local": bases["sliding_attention"],
        "norm_eps": theirs.get("norm_eps", 1e-5),
        # transformers also drops attention probabilities at this rate; Ettin does not.
        "attn_out_dropout": theirs.get("attention_dropout", 0.0),
        "lm_head": not head.endswith("Model"),
        "bos_id": theirs.get("bos_token_id", 50281),
        "eos_id": theirs.get("eos_token_id", 50282),
        "pad_id": theirs.get("pad_token_id", 50283),
        # Their configs do not name it; with the published vocabulary it is known.
        "mask_id": 50284 if vocab_size == 50368 else None,
    }


def _global_every(layer_types: list[str]) -> int:
    wide = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    every = wide[1] if len(wide) > 1 else len(layer_types)
    if wide != list(range(0, len(layer_types), every)):
        raise ValueError(
            f"config.json has layer_types with full attention in layers {wide}, "
            "Ettin has it in one of every n from layer 0"
        )
    return every


def config_from(config: EttinConfig) -> dict[str, Any]:
    """``config.json`` for transformers."""
    kind = "ModernBertDecoder" if config.causal else "ModernBert"
    task = ("ForCausalLM" if config.causal else "ForMaskedLM") if config.lm_head else "Model"
    layers = [
        "sliding_attention" if i % config.global_every else "full_attention"
        for i in range(config.num_layers)
    ]
    rope = {
        "full_attention": config.rope_theta_global,
        "sliding_attention": config.rope_theta_local,
    }
    return _FIXED | {
        "model_type": "modernbert-decoder" if config.causal else "modernbert",
        "architectures": [kind + task],
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "local_attention": 2 * config.half_window,
        "layer_types": layers,
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": v} for k, v in rope.items()},
        "norm_eps": config.norm_eps,
        # Their attention_dropout would also drop probabilities.
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "cls_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "sep_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
