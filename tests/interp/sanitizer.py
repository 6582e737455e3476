"""A sanitizer for kernels under Triton's interpreter: what a GPU would do wrong without a word.

    with sanitized(seed=1) as launches:
        kernels.glu(x, ...)

Each launch inside is watched. A Violation is raised, inside of Triton's InterpreterError, for

- an access outside of the storage of every tensor argument, or not aligned to its element;
- a race between programs: an element that one program writes and another reads or writes, where
  not both are atomic; two elements of one store to the same address;
- a grid that no GPU takes.

The programs run in an order shuffled by the seed, so that a result which depends on the order
differs from seed to seed. `launches` lists the kernels that ran.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY, SEVERAL = -1, -2


class Violation(AssertionError):
    """What a kernel must not do."""


class _Memory:
    """One storage that a launch was given, and which program touched each byte of it."""

    def __init__(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.writer = np.full(self.size, NOBODY, np.int64)
        self.reader = np.full(self.size, NOBODY, np.int64)
        self.atomic = np.zeros(self.size, bool)

    def read(self, at: np.ndarray, program: int) -> None:
        self._nobody_else(self.writer[at], program, "reads", "wrote")
        self.reader[at] = np.where(np.isin(self.reader[at], (NOBODY, program)), program, SEVERAL)

    def write(self, at: np.ndarray, program: int) -> None:
        if np.unique(at).size != at.size:
            raise Violation(f"race: program {program} stores twice to one address at once")
        self._nobody_else(self.writer[at], program, "writes", "wrote")
        self._nobody_else(self.reader[at], program, "writes", "read")
        if self.atomic[at].any():
            raise Violation(f"race: program {program} stores where atomics are used")
        self.writer[at] = program

    def update(self, at: np.ndarray, program: int) -> None:
        self._nobody_else(self.writer[at], program, "updates", "wrote")
        self._nobody_else(self.reader[at], program, "updates", "read")
        self.atomic[at] = True

    def _nobody_else(self, who: np.ndarray, program: int, does: str, did: str) -> None:
        others = who[(who != NOBODY) & (who != program)]
        if others.size:
            other = "several programs" if others[0] == SEVERAL else f"program {others[0]}"
            raise Violation(f"race: program {program} {does} an element that {other} {did}")


class _Watch:
    """The memories of the launch at hand, and the order of its programs."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.memories: list[_Memory] = []
        self.order: Iterator[tuple[int, ...]] = iter(())
        self.program = 0

    def begin(self, args) -> None:
        storages = {t.untyped_storage().data_ptr(): t for t in _tensors(args)}
        self.memories = [_Memory(storages[start]) for start in sorted(storages)]

    def shuffle(self, sizes: tuple[int, ...]) -> None:
        most = (2**31 - 1, 65535, 65535)
        if not all(0 < size <= limit for size, limit in zip(sizes, most, strict=True)):
            raise Violation(f"a grid of {sizes}, expected 1 to {most}")
        order = list(itertools.product(*map(range, sizes)))
        self.random.shuffle(order)
        self.order = iter(order)

    def access(self, kind: str, pointers: TensorHandle, mask) -> None:
        mask = (mask.data if isinstance(mask, TensorHandle) else mask).astype(bool)
        shape = np.broadcast_shapes(pointers.data.shape, mask.shape)
        at = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask, shape)].astype(np.int64)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        starts = [memory.start for memory in self.memories]
        which = np.searchsorted(starts, at, side="right") - 1
        for i in np.unique(which):
            memory, inside = self.memories[i], at[which == i]
            outside = inside[(i < 0) | (inside + width > memory.start + memory.size)]
            if outside.size:
                raise Violation(
                    f"out of bounds: program {self.program} {kind}s {outside.size} elements beyond "
                    f"every tensor, the first {outside[0] - memory.start} bytes behind the start "
                    f"of one of {memory.size} bytes"
                )
            offset = inside - memory.start
            if (offset % width).any():
                raise Violation(f"program {self.program} {kind}s at an odd address")
            getattr(memory, kind)(offset, self.program)


def _tensors(args) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.untyped_storage().nbytes():
                yield arg
        elif isinstance(arg, tuple | list):
            yield from _tensors(arg)


@contextmanager
def sanitized(seed: int = 0) -> Iterator[list[str]]:
    """Watches every launch inside; see the module's docstring."""
    watch, launches = _Watch(seed), []
    builder = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas
    to_host = GridExecutor._init_args_hst
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def init_args(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        watch.begin((*args, *kwargs.values()))
        launches.append(self.fn.__name__)
        return args, kwargs

    def set_grid_dim(self, *sizes):
        watch.shuffle(sizes)
        set_dim(self, *sizes)

    def set_grid_idx(self, *_):
        index = next(watch.order)
        watch.program = int(np.ravel_multi_index(index, self.grid_dim))
        set_idx(self, *index)

    def masked_load(self, pointers, mask, *args):
        watch.access("read", pointers, mask)
        return load(self, pointers, mask, *args)

    def masked_store(self, pointers, value, mask, *args):
        watch.access("write", pointers, mask)
        return store(self, pointers, value, mask, *args)

    def atomic_rmw(self, op, pointers, value, mask, *args):
        watch.access("update", pointers, mask)
        return update(self, op, pointers, value, mask, *args)

    def atomic_cas(self, pointers, *args):
        watch.access("update", pointers, np.ones(np.shape(pointers.data), bool))
        return swap(self, pointers, *args)

    with (
        mock.patch.object(GridExecutor, "_init_args_hst", init_args),
        mock.patch.multiple(
            builder,
            set_grid_dim=set_grid_dim,
            set_grid_idx=set_grid_idx,
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=atomic_rmw,
            create_atomic_cas=atomic_cas,
        ),
    ):
        yield launches
