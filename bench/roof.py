"""What the machine can do: GEMM, copies, and multiply-adds alone, in this run and on one thread.

The GEMM is the roof a library can be expected to reach; the multiply-adds, loops of peak.c without
any loads, are the roof nobody can go beyond.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import cpu_flags, multiplies
from timing import cpu_seconds, cuda_seconds, interleave, threads

GEMM_SIZE = 2048
COPY_BYTES = 2**28
BUDGET_S = 4.0
SECONDS_A_LOOP = 0.05  # of peak.c; long enough for the clock, short enough to interleave
# By dtype, fastest first: a loop of peak.c and the flag of /proc/cpuinfo that allows it.
LOOPS = {
    "fp32": (("fma_avx512", "avx512f"), ("fma_avx2", "fma")),
    "bf16": (("tile_bf16", "amx_bf16"), ("dot_bf16", "avx512_bf16")),
    "int8": (("tile_int8", "amx_int8"), ("dot_int8", "avx512_vnni")),
}


def measure(device: str) -> dict[str, float]:
    """GF/s (int8: Gop/s) of a GEMM by dtype, GB/s of a copy, GF/s of multiply-adds as "DTYPE peak".

    What cannot be measured is left out: a GEMM that PyTorch has only a plain loop for, of many
    seconds (int8, bfloat16), peaks without a compiler.
    """
    calls, work = {}, {}
    for name, (call, amount) in {**_gemms(device), **_copy(device), **_peaks(device)}.items():
        calls[name], work[name] = call, amount
    with threads(1):
        for call in calls.values():
            call()
        stats = interleave(calls, cpu_seconds if device == "cpu" else cuda_seconds, BUDGET_S)
    return {name: work[name] / stats[name].median / 1e9 for name in calls}


Measured = dict[str, tuple[Callable[[], Any], float]]


def _gemms(device: str) -> Measured:
    work = 2.0 * GEMM_SIZE**3
    found: Measured = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if multiplies(dtype, device):
            x = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype)
            found[name] = functools.partial(torch.mm, x, x), work
    if multiplies(torch.int8, device) and hasattr(torch, "_int_mm"):
        x = torch.randint(-8, 8, (GEMM_SIZE, GEMM_SIZE), dtype=torch.int8, device=device)
        found["int8"] = functools.partial(torch._int_mm, x, x), work
    return found


def _copy(device: str) -> Measured:
    source = torch.ones(COPY_BYTES // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return {"copy": (lambda: target.copy_(source), float(COPY_BYTES))}


def _peaks(device: str) -> Measured:
    library = _library() if device == "cpu" else None
    if library is None:
        return {}
    found: Measured = {}
    for dtype, loops in LOOPS.items():
        loop = next((name for name, flag in loops if flag in cpu_flags()), None)
        if loop:
            found[f"{dtype} peak"] = _bound_loop(library, loop)
    return found


def _bound_loop(library: ctypes.CDLL, name: str) -> tuple[Callable[[], Any], float]:
    """A call of the loop that lasts about SECONDS_A_LOOP, and its number of operations."""
    run, rounds = getattr(library, name), 1000
    run.argtypes = [ctypes.c_long]
    while (seconds := cpu_seconds(functools.partial(run, rounds))) < SECONDS_A_LOOP / 4:
        rounds *= 4
    rounds = int(rounds * SECONDS_A_LOOP / seconds)
    operations = ctypes.c_long.in_dll(library, f"{name}_ops").value
    return functools.partial(run, rounds), float(operations * rounds)


def _library() -> ctypes.CDLL | None:
    """peak.c, compiled into a file that is gone again; None without a compiler that can."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc" if shutil.which("gcc") else "cc"]
    source = Path(__file__).with_name("peak.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        command = [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None
