"""Random numbers of a router, the same bits on every device.

Words come from Philox (`philox4x32`), whose counter names a token and a purpose. What follows them
is integer arithmetic and single roundings of float32, never a fused product and sum and never a
library's logarithm, so that choices made by these numbers are equal everywhere.
"""

import torch
from torch import Tensor

from .philox import philox4x32

GUMBEL, PRIORITY, JITTER = 1, 2, 3  # the last word of the counter
# The single-precision logarithm of the Cephes library (S. Moshier).
_SQRT_HALF = 0x3F3504F3
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def words(rng: Tensor, rows: int, columns: int, purpose: int) -> Tensor:
    """int64 [rows, columns] of 0..2^32 - 1: word c % 4 of counter (c // 4, row, 0, purpose)."""
    device = rng.device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    counter = (
        torch.arange((columns + 3) // 4, device=device),
        torch.arange(rows, device=device)[:, None],
        zero,
        zero + purpose,
    )
    key = rng & 0xFFFFFFFF
    drawn = torch.broadcast_tensors(*philox4x32(counter, (key[0], key[1])))
    return torch.stack(drawn, -1).reshape(rows, (columns + 3) // 4 * 4)[:, :columns]


def uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1): odd multiples of 2^-24."""
    return (2 * (words >> 9) + 1).float() * 2.0**-24


def gumbel(rng: Tensor, rows: int, columns: int) -> Tensor:
    """float32 [rows, columns] of the standard Gumbel distribution, -log(-log(u))."""
    return -_log(-_log(uniform(words(rng, rows, columns, GUMBEL))))


def priority_keys(rng: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [rows, columns], uniform in 0..2^31 - 1."""
    return words(rng, rows, columns, PRIORITY) >> 1


def jitter(rng: Tensor, rows: int, columns: int, amount: float) -> Tensor:
    """float32 [rows, columns], uniform in (1 - amount, 1 + amount)."""
    centred = 2 * uniform(words(rng, rows, columns, JITTER)) - 1  # exact
    return centred * torch.tensor(amount, dtype=torch.float32, device=rng.device) + 1


def _log(x: Tensor) -> Tensor:
    """Of positive normal numbers."""
    bits = x.view(torch.int32) - _SQRT_HALF
    exponent = (bits >> 23).float()
    m = ((bits & 0x7FFFFF) + _SQRT_HALF).view(torch.float32) - 1
    p = torch.full_like(m, _LOG[0])
    for c in _LOG[1:]:
        p = p * m + torch.tensor(c, dtype=torch.float32, device=x.device)
    square = m * m
    low = (m * square) * p
    low = low + exponent * torch.tensor(_LN2_LOW, dtype=torch.float32, device=x.device)
    low = low + square * -0.5
    return (m + low) + exponent * _LN2_HIGH
