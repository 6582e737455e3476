"""What the kernels' tables of tile sizes are looked up by: the architecture at hand.

Tables are small and chosen by rule, not by measuring at run time: the first call on a new shape is
as fast as the second, and the same numbers come out of every process. (Who wants attention measured
all the same finds it in _tune.py.)
"""

import torch
import triton

INTERPRETER = "interpreter"


def target() -> str:
    """Architecture the next launch compiles for: "sm_90", "gfx942"; under TRITON_INTERPRET=1
    "interpreter"."""
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    active = triton.runtime.driver.active.get_current_target()
    return f"sm_{active.arch}" if active.backend == "cuda" else active.arch


def nearest(table: dict, arch: str):
    """The entry of `arch`, else that of the newest older architecture of its vendor.

    Keys are like "sm_80", "gfx90a" and "interpreter"; each vendor's oldest key must be among them.
    """
    if arch in table:
        return table[arch]
    vendor = arch[:3]  # "sm_" or "gfx"
    older = [key for key in table if key.startswith(vendor) and _version(key) <= _version(arch)]
    if not older:
        raise ValueError(f"no configuration for {arch}, oldest of {sorted(table)}")
    return table[max(older, key=_version)]


def for_head(table: dict, dtype: torch.dtype, head_size: int, weight: int) -> tuple[int, tuple]:
    """BLOCK_D and the tile sizes of an attention kernel.

    Below each architecture a table has (bytes of an element, weight of the rule), and below that
    BLOCK_D; an entry also serves what is lighter or narrower, down to the next one.
    """
    block_d = max(
        16, triton.next_power_of_2(head_size)
    )  # 16: what a tensor core multiplies at once
    rules = nearest(table, target())
    entries = rules[min(key for key in rules if key >= (dtype.itemsize, weight))]
    return block_d, entries[min(width for width in entries if width >= block_d)]


def _version(arch: str) -> int:
    """sm_120 -> 120, gfx90a -> 0x90a: later architectures are greater within a vendor."""
    digits = arch.removeprefix("sm_").removeprefix("gfx")
    return int(digits, 16 if arch.startswith("gfx") else 10)
