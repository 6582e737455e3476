"""What this machine has instructions for, and what PyTorch makes of them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch


@functools.cache
def cpu_flags() -> frozenset[str]:
    """As Linux names them; none where it does not say."""
    try:
        found = re.search(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether PyTorch's matrix products of this dtype are more than loops over single elements.

    On CPUs without AVX-512 those of bfloat16 are such loops, a hundred times slower than float32;
    without VNNI so is its int8 product.
    """
    if device != "cpu":
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.int8:
        return bool(cpu_flags() & {"avx512_vnni", "amx_int8"})
    return True
