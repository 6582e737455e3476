"""Small Frozen in Time models away from their start, and batches for them."""

import torch

import encfast
from encfast.models.frozen_in_time import CaptionedClips, FrozenInTime

QUIET = {"text_dropout": 0.0, "text_attn_dropout": 0.0}
SQUARE = {"image_size": (32, 32), "dim": 48, "num_heads": 4, "ffn_dim": 80}  # 16 patches


def tiny(*, noise: float = 0.1, **overrides) -> FrozenInTime:
    """A model whose parameters are all moved off their start, the attention in time's too."""
    model = encfast.create("frozen_in_time/tiny", **QUIET | overrides)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def batch_of(model: FrozenInTime, lengths=(3, 1, 4, 2), seed: int = 0) -> CaptionedClips:
    return model.example_batch(torch.Generator().manual_seed(seed), lengths=lengths)
