"""Small regularized auto-encoders with known weights, and points to try them at."""

import torch

import encfast
from encfast.models.regularized_autoencoder import RegularizedAutoencoder


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str = "tiny", seed: int = 0, **overrides) -> RegularizedAutoencoder:
    torch.manual_seed(seed)
    overrides = {"dtype": torch.float64} | overrides
    return encfast.create(f"regularized_autoencoder/{name}", **overrides)


def points(n: int, d: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn((n, d), dtype=torch.float64, generator=rng(seed))
