"""Clocks and the order of calls: how time and memory of a call are measured.

Knows nothing of benches. A call is any function without arguments.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIN_ROUNDS = 3
MAX_ROUNDS = 100
OVERTIME = 3  # budgets a measurement may exceed its own by to reach MIN_ROUNDS
# Larger than the L2 cache of any GPU sold so far.
L2_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Stats:
    """Seconds of one call."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stats:
        """From the samples."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), tenths[0], tenths[-1], len(seconds))


def interleave(
    calls: dict[str, Callable[[], Any]],
    seconds_of: Callable[[Callable[[], Any]], float],
    budget_s: float,
) -> dict[str, Stats]:
    """Calls every variant once per round until the budget is used or MAX_ROUNDS are done.

    The order turns by one each round, so that nobody always runs behind the same neighbour.
    """
    if not calls:
        return {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + budget_s
    gc.collect()
    gc.disable()
    try:
        for done in range(MAX_ROUNDS):
            late = time.perf_counter() - end
            if late > (0 if done >= MIN_ROUNDS else OVERTIME * budget_s) and done:
                break
            for name in order:
                samples[name].append(seconds_of(calls[name]))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return {name: Stats.of(seconds) for name, seconds in samples.items()}


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU time of the whole process: what the call costs, whoever else uses the machine."""
    start = time.process_time()
    call()
    return time.process_time() - start


def wall_seconds(call: Callable[[], Any]) -> float:
    """Time on the clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], Any]) -> float:
    """Time between two events on the current stream, with a cold L2 cache."""
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def best_of(candidates: dict[str, Callable[[], Any]], device: str = "cpu") -> str:
    """The name of the fastest call: how a bench picks a batch size in favour of each variant."""
    seconds_of = cpu_seconds if device == "cpu" else cuda_seconds

    def second_call(name: str) -> float:
        candidates[name]()  # libraries compile kernels for shapes they have not seen
        return seconds_of(candidates[name])

    return min(candidates, key=second_call)


@contextmanager
def threads(count: int):
    """PyTorch's threads inside an operator, for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Memory a call needs at its worst moment beyond what was in use before; None if unknown.

    On a CPU this is the resident set as Linux counts it, with allocations outside of PyTorch.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        # Memory the C library keeps for reuse would hide what the call asks for.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (AttributeError, OSError):
        return None


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


class OtherLoad:
    """How many cores other programs keep busy, from construction to :meth:`cores`; Linux only."""

    def __init__(self) -> None:
        self._start = self._busy_ticks(), time.process_time(), time.perf_counter()

    def cores(self) -> float | None:
        """The mean so far; None where it is not known."""
        busy, own, wall = self._start
        now = self._busy_ticks()
        if busy is None or now is None:
            return None
        everyone = (now - busy) / os.sysconf("SC_CLK_TCK")
        others = everyone - (time.process_time() - own)
        return max(0.0, others / (time.perf_counter() - wall))

    @staticmethod
    def _busy_ticks() -> int | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
        return user + nice + system + irq + softirq + steal


def short_name(dtype: torch.dtype) -> str:
    """As it stands in names and tables."""
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
    return names[str(dtype).removeprefix("torch.")]
