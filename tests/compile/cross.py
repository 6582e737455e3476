"""Compiles Triton kernels for any architecture, through their launchers and without a GPU.

    with compiling("sm_90") as launches:
        kernels.glu.glu(x, ...)          # CPU tensors: nothing runs, results are unwritten memory
    launches[0].kernel.asm["ptx"]

A launcher called this way looks up its tile sizes, specialises its arguments and sets its options
as it would on that GPU, so what compiles here is what users get.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS |= {arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")}


class FakeDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: str):
        self.target = TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """One launch that compiled instead of running."""

    name: str
    grid: tuple[int, ...]
    kernel: Any  # triton.compiler.CompiledKernel


@contextmanager
def fake_gpu(arch: str) -> Iterator[None]:
    """Triton takes `arch` for the GPU at hand; afterwards its driver is what it was.

    A kernel's cache in memory is by device number and does not know of this: see `compiling`.
    """
    # Reading `driver.active` would look for a real GPU and fail without one.
    before = driver._active
    driver.set_active(FakeDriver(arch))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def compiling(arch: str) -> Iterator[list[Launch]]:
    """Every launch inside compiles for `arch` and is appended to the list this yields."""
    launches: list[Launch] = []
    seen: set[JITFunction] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup=False, **kwargs):
        # Without this, sm_90 is handed the kernel that was compiled for sm_80 a moment ago.
        if self not in seen:
            self.device_caches.clear()
            seen.add(self)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.__name__, _sizes(grid, bound), kernel))
        return kernel

    with fake_gpu(arch), mock.patch.object(JITFunction, "run", compile_only):
        try:
            yield launches
        finally:
            for function in seen:
                function.device_caches.clear()


def _sizes(grid: tuple[int, ...] | Callable, bound: dict) -> tuple[int, ...]:
    return tuple(grid(bound) if callable(grid) else grid)
