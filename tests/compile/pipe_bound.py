"""How much of the time a main loop could keep the tensor cores busy, at most, from its opcodes.

Each instruction occupies one pipe for some cycles; the fullest pipe bounds the loop from below. The
rates are public figures entered by hand. Latency, bank conflicts and memory stalls are not in it:
the bound says what instruction mix forbids, never how fast a kernel is.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Rates(NamedTuple):
    """Of one of the four parts of an SM, which each issue one warp instruction per cycle."""

    float_cycles: int  # per warp instruction: 32 threads over the lanes of the pipe
    integer_cycles: int
    tensor_flops: int  # per cycle, half precision with float32 sums


# CUDA programming guide, "throughput of native arithmetic instructions"; tensor cores as in the
# architectures' whitepapers, dense, of server boards (GeForce boards of sm_86 and 89 do half).
RATES = {
    "sm_80": Rates(2, 2, 512),
    "sm_86": Rates(1, 2, 256),
    "sm_89": Rates(1, 2, 256),
    "sm_90": Rates(1, 2, 1024),
    "sm_120": Rates(1, 1, 256),
}
SPECIAL_CYCLES = 8  # 4 lanes
MEMORY_CYCLES = 4  # 128 bytes per cycle, shared by the four parts


def tensor_use_bound(opcodes: Iterable[str], arch: str) -> float | None:
    """Share of cycles in 0..1; None without half precision tensor instructions, or where their
    opcode does not tell their size (tcgen05)."""
    if arch not in RATES:
        return None
    busy: Counter[str] = Counter()
    for opcode in opcodes:
        pipe, cycles = _occupied(opcode, RATES[arch])
        busy[pipe] += cycles
        busy["issue"] += 1
    return round(busy["tensor"] / max(busy.values()), 3) if busy["tensor"] else None


def _occupied(opcode: str, rates: Rates) -> tuple[str, float]:
    if flops := _tensor_flops(opcode):
        return "tensor", flops / rates.tensor_flops
    if re.match(r"FFMA|FMUL|FADD|IMAD", opcode):
        return "float", rates.float_cycles
    if opcode.startswith("MUFU"):
        return "special", SPECIAL_CYCLES
    if re.match(r"LDS|STS|LDGSTS|LDG|STG|SHFL", opcode):  # LDSM, STSM too
        return "memory", MEMORY_CYCLES * _lines(opcode)
    if re.match(r"IADD|LEA|LOP3|SHF|ISETP|FSETP|F?SEL|FMNMX|F2F|PRMT|MOV|PLOP", opcode):
        return "integer", rates.integer_cycles
    return "issue", 0


def _tensor_flops(opcode: str) -> int:
    """Of one warp; a warpgroup's four warps share a wgmma."""
    if opcode.startswith("HMMA.16816."):
        return 2 * 16 * 8 * 16
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k // 4
    return 0


def _lines(opcode: str) -> int:
    """Lines of 128 bytes that a warp moves."""
    if "SM." in opcode:  # LDSM.16.M88.4: four 8 x 8 matrices of half precision
        return int(opcode.rsplit(".", 1)[1]) if opcode[-1] in "24" else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1
