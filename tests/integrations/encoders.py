"""Small encoders of transformers with random weights, and ragged batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCAB, LENGTHS, S = 64, (17, 11, 1, 5), 17
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
SPEECH = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "max_target_positions": 40,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
    "electra": {**SIZES, "embedding_size": 16},
    "albert": {**SIZES, "embedding_size": 16},
    "esm": {
        **SIZES,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": False,
    },
    "modernbert": {**SIZES, **NO_TOKENS, "local_attention": 6, "global_attn_every_n_layers": 2},
    "mpnet": {**SIZES, "pad_token_id": 1},
    "vit": VISION,
    "vit_mae": {
        **VISION,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 20,
    },
    "dinov2": VISION,
    "beit": {**VISION, "use_relative_position_bias": True},
    "clip": {"text_config": {**SIZES, "vocab_size": VOCAB}, "vision_config": VISION},
    "siglip": {"text_config": {**SIZES, "vocab_size": VOCAB}, "vision_config": VISION},
    "wav2vec2": {
        **SIZES,
        **SPEECH,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
    },
    "whisper": WHISPER,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
# In front of which module the padding is poisoned.
FIRST_BLOCK = {
    "bert": "encoder.layer.0",
    "roberta": "encoder.layer.0",
    "distilbert": "transformer.layer.0",
    "electra": "encoder.layer.0",
    "albert": "encoder.albert_layer_groups.0",
    "esm": "encoder.layer.0",
    "modernbert": "layers.0",
    "mpnet": "encoder.layer.0",
    "clip": "text_model.encoder.layers.0",
    "siglip": "text_model.encoder.layers.0",
    "wav2vec2": "encoder.layers.0",
    "t5": "encoder.block.0",
}


def config_of(system: str, **changes: Any) -> Any:
    """With this vocabulary, these special tokens and no dropout unless ``changes`` say so."""
    fields = {**CONFIGS[system], **changes}
    if system in ("t5", "whisper"):
        fields = {**SPECIAL, **fields}
    if system not in ("clip", "siglip"):
        fields = {"vocab_size": VOCAB, "pad_token_id": 0, **fields}
    return transformers.AutoConfig.for_model(system, **fields)


def model_of(system: str, **changes: Any) -> nn.Module:
    """In eval mode, weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(
        config_of(system, **changes), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(3)
    return model.eval()


def mask_of(lengths: tuple[int, ...] = LENGTHS, size: int = S, *, left: bool = False) -> Tensor:
    """int64 ``[B, S]``."""
    mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


def text(mask: Tensor | None = None) -> dict[str, Tensor]:
    """Ids without special ones, and their mask."""
    mask = mask_of() if mask is None else mask
    draw = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(5, VOCAB, mask.shape, generator=draw),
        "attention_mask": mask,
    }


def _images() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(len(LENGTHS), 3, 32, 32, generator=draw)}


def inputs_of(system: str) -> dict[str, Tensor]:
    """A ragged batch where the architecture has lengths."""
    draw = torch.Generator().manual_seed(3)
    if system in ("vit", "dinov2", "beit"):
        return _images()
    if system == "vit_mae":
        return _images() | {"noise": torch.rand(len(LENGTHS), 16, generator=draw)}
    if system in ("clip", "siglip"):
        return _images() | text()
    if system == "wav2vec2":
        mask = mask_of((800, 500, 90), 800)
        return {"input_values": torch.randn(mask.shape, generator=draw), "attention_mask": mask}
    decoder = {f"decoder_{k}": v for k, v in text(mask_of((6, 4, 2, 3), 6)).items()}
    if system == "whisper":
        return {"input_features": torch.randn(4, 16, 60, generator=draw)} | decoder
    return text() | decoder if system == "t5" else text()


def states(output: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hidden states of a model's output, without those of padding."""
    names: dict[str, Callable] = {
        "states": lambda o: o.get("last_hidden_state"),
        "encoder": lambda o: o.get("encoder_last_hidden_state"),
        "text": lambda o: o["text_model_output"].last_hidden_state if "text_embeds" in o else None,
        "vision": lambda o: (
            o["vision_model_output"].last_hidden_state if "image_embeds" in o else None
        ),
    }
    found = {name: read(output) for name, read in names.items()}
    masks = [m.bool() for name, m in inputs.items() if name.endswith("attention_mask")]
    valid = {}
    for name, x in found.items():
        if x is not None:
            fits = [m for m in masks if m.shape == x.shape[:2]]
            valid[name] = x[fits[0]] if fits else x
    return valid
