"""How transformers calls the tensors of dupmae."""

from __future__ import annotations

from encfast.weights import Tied, both


def bert_names(depth: int) -> list[Tied]:
    """Those of ``BertForMaskedLM`` with so many layers: encoder and head."""
    table, head = "bert.embeddings.", "cls.predictions."
    entries = [
        Tied(f"embed.{ours}.weight", (f"{table}{theirs}_embeddings.weight",))
        for ours, theirs in (
            ("word", "word"),
            ("position", "position"),
            ("segment", "token_type"),
        )
    ]
    entries += both("embed.norm", f"{table}LayerNorm")
    for i in range(depth):
        ours, theirs = f"stack.blocks.{i}.", f"bert.encoder.layer.{i}."
        qkv = (f"{theirs}attention.self.{n}" for n in ("query", "key", "value"))
        entries += both(f"{ours}attn.qkv", *qkv)
        entries += both(f"{ours}attn.out", f"{theirs}attention.output.dense")
        entries += both(f"{ours}norm1", f"{theirs}attention.output.LayerNorm")
        entries += both(f"{ours}mlp.up", f"{theirs}intermediate.dense")
        entries += both(f"{ours}mlp.down", f"{theirs}output.dense")
        entries += both(f"{ours}norm2", f"{theirs}output.LayerNorm")
    entries += both("lm_head.dense", f"{head}transform.dense")
    entries += both("lm_head.norm", f"{head}transform.LayerNorm")
    return [*entries, Tied("lm_head.decoder.bias", (f"{head}bias",))]
