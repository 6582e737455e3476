"""Philox4x32-10 in plain PyTorch integers, and the dropout masks drawn from it.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a number
depends on its counter and the key alone, so every backend, the backward pass and a recomputed
forward draw the same mask without storing it.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds over four counter words: four random words of their broadcast shape.

    Words are int64 tensors that hold 0..2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_keep(
    dropout_p: float, rng: Tensor, sequence: int, shape: tuple[int, ...]
) -> tuple[Tensor, float]:
    """Which probabilities of a sequence are kept, bool of shape [H, Lq, Lk], and their multiplier.

    Sixteen bits decide: kept iff they are >= round(65536 p), so p is quantised, and 1 / (1 - p) for
    the quantised p is the multiplier. The words of counter (j >> 3, i, head, sequence) serve the
    keys j .. j | 7, the low half of a word before the high one. The key is the low words of rng,
    int64 [2].
    """
    heads, lq, lk = shape
    threshold = min(int(dropout_p * 65536 + 0.5), 65535)
    counter = (
        torch.arange((lk + 7) // 8, device=rng.device),
        torch.arange(lq, device=rng.device)[:, None],
        torch.arange(heads, device=rng.device)[:, None, None],
        torch.tensor(sequence, device=rng.device),
    )
    key = rng & _WORD
    words = philox4x32(counter, (key[0], key[1]))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    draws = torch.stack(torch.broadcast_tensors(*halves), dim=-1)  # [H, Lq, ceil(Lk / 8), 8]
    draws = draws.reshape(heads, lq, (lk + 7) // 8 * 8)[..., :lk]
    return draws >= threshold, 65536 / (65536 - threshold)


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of a * m, by halves of m: the product itself would overflow int64."""
    low = a * (m & 0xFFFF)
    middle = (low >> 16) + a * (m >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
