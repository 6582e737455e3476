"""Other kernels in the place of the CPU's, so that the tests of an op are theirs too."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def replaced(kernels: Mapping[str, Callable]) -> Iterator[None]:
    """Dispatcher ops, by name, are served by these on CPU tensors, behind their own checks and
    autograd."""
    library = torch.library.Library("encfast", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that a kernel is overridden
        for op, kernel in kernels.items():
            library.impl(op, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
